"""Products by ``einsum`` against ``torch.einsum``, and attention written with it in the runtimes."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from networks import share_in_onnxruntime, share_in_openvino, with_statistics
from torch import Tensor, nn

import qzoo
from qzoo.placement.einsum import product_of
from qzoo.quantizers import quantizers

SIZES = dict(zip("abcdehijkmqtxy", (2, 3, 4, 5, 6, 2, 3, 4, 5, 2, 4, 3, 2, 3), strict=True))
PRODUCTS = """
bhid,bhjd->bhij  bhij,bhjd->bhid  b...ik,b...kj->...bij  abc,abd->acd  ij,jk  i,i->  ab,b->a  a,ab->b
abcd,aebd->ace  abc,bcd->da  ij,jk->ki  abij,abkj->kbia  bhqc,khc->bqhk  ijk,jkit->t  ...a,...a->...  ...ij,jk->...ik
"""
OTHERS = ["ij,jk,km->im", "ii,ij->ij", "ij,ij->ij", "ijk,jm->im", "ij->ji", "ab,ac->abc", "bi,bj->bij"]


def tensors(equation: str) -> list[Tensor]:
    terms = equation.split("->")[0].split(",")
    return [torch.randn([SIZES[letter] for letter in term.replace("...", "xy")]) for term in terms]


@pytest.mark.parametrize("equation", PRODUCTS.split())
def test_products_equal_torch(equation: str) -> None:
    torch.manual_seed(0)
    values = tensors(equation)
    product = product_of(equation, values)
    assert product is not None
    torch.testing.assert_close(product(*values), torch.einsum(equation, *values), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("equation", OTHERS)
def test_others_are_none(equation: str) -> None:
    assert product_of(equation, tensors(equation)) is None


def test_a_size_that_is_repeated_is_none() -> None:
    assert product_of("bij,bjk->bik", [torch.zeros(1, 2, 3), torch.zeros(4, 3, 2)]) is None


class Attention(nn.Module):
    def __init__(self, einsum: bool) -> None:
        super().__init__()
        self.einsum = einsum
        self.stem, self.qkv, self.fc = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 48), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).view(-1, 16, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        if self.einsum:
            weights = torch.einsum("bhid,bhjd->bhij", q, k * 0.35).softmax(-1)
            out = torch.einsum("b h i j, b h j d -> b i h d", weights, v)
        else:
            weights = (q @ (k * 0.35).transpose(-2, -1)).softmax(-1)
            out = (weights @ v).transpose(1, 2)
        return self.fc(out.reshape(-1, 16, 16).mean(1))


def test_attention_is_that_of_matmul(tmp_path: Path) -> None:
    images = torch.randn(4, 3, 16, 16)
    made = []
    for einsum in (False, True):
        torch.manual_seed(0)
        model = with_statistics(Attention(einsum), images)
        quantized = qzoo.quantize(model, images)
        assert quantized.qzoo_placement.left == ()
        qzoo.calibrate(quantized, [images], progress=False)
        made.append(quantized)
    ranges = [{name: q.amax for name, q in quantizers(model).items()} for model in made]
    assert ranges[0].keys() == ranges[1].keys()
    with torch.no_grad():
        assert torch.equal(made[0](images), made[1](images))
    for target, share in (("onnxruntime", share_in_onnxruntime), ("openvino", share_in_openvino)):
        if target == "openvino":
            pytest.importorskip("openvino")
        path = qzoo.export_onnx(made[1], tmp_path / f"{target}.onnx", target=target, example=images)
        assert "Einsum" not in {node.op_type for node in onnx.load(path).graph.node}
        assert share(path, images[:1]) == 1.0
