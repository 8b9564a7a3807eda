"""Transformers: to the bit what is integer, and within a step what LayerNorm, GELU and softmax feed.

Those three stay in float, and no runtime promises their last bit: a value between two levels may go either way. So the
exact test puts functions in their places that are exact in float32; the other one takes the network as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from exact import make_exact_
from torch import Tensor, nn

from qzoo.export import check, export_onnx
from qzoo.export.check import sqnr
from qzoo.models.vit import VisionTransformer
from qzoo.quantizers import set_target
from qzoo.registry import architecture, list_architectures
from qzoo.runtimes.ort import OnnxRuntimeRunner
from qzoo.scheme import Scheme

LEVELS = ("none", "basic", "extended", "all")
# Without LayerNorm the values of the wider ones vanish over 12 blocks; their blocks are the same code.
NAMES = [name for name in list_architectures() if name.startswith(("vit_tiny", "deit_tiny"))]


Make = Callable[[nn.Module], tuple[nn.Module, Tensor]]


@pytest.fixture
def make(calibrated) -> Make:
    """Calibrated on two images of noise; position embedding and class token of normal size."""

    def build(model: nn.Module) -> tuple[nn.Module, Tensor]:
        nn.init.normal_(model.pos_embed, 0, 0.5)
        nn.init.normal_(model.cls_token, 0, 0.5)
        images = torch.randn(2, 3, 224, 224)
        return calibrated(model, images), images

    return build


def make_float_operators_exact(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """LayerNorm, GELU and softmax become identity, ReLU and a halved ReLU."""
    for module in model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, nn.Identity())
            if isinstance(child, nn.GELU):
                setattr(module, name, nn.ReLU())
    monkeypatch.setattr(Tensor, "softmax", lambda x, dim: x.relu() * 0.5)


def assert_exact(model: nn.Module, images: Tensor, path: Path) -> None:
    make_exact_(model, "onnxruntime", images)
    with torch.no_grad():
        expected = model(images)
    assert len(expected.unique()) > 5, "a constant output would agree with anything"
    export_onnx(model, path, example=images[:2])
    for level in LEVELS:
        got = OnnxRuntimeRunner(path, level=level)(images)
        assert (got - expected).abs().max().item() == 0.0, level


@pytest.mark.parametrize(("dim", "heads"), [(192, 3)])
def test_exact_at_every_level(make: Make, tmp_path: Path, monkeypatch, dim: int, heads: int) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(dim, heads, depth=2, num_classes=20, quantize=Scheme.parse("w8a8"))
    make_float_operators_exact(model, monkeypatch)
    assert_exact(*make(model), tmp_path / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_whole_networks_are_exact(make: Make, tmp_path: Path, monkeypatch, name: str) -> None:
    torch.manual_seed(0)
    model = architecture(name).build(num_classes=20, in_channels=3, quantize=Scheme.parse("w8a8"))
    make_float_operators_exact(model, monkeypatch)
    assert_exact(*make(model), tmp_path / "model.onnx")


@pytest.mark.slow
def test_with_layernorm_gelu_and_softmax(make: Make, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(192, 3, depth=2, num_classes=20, quantize=Scheme.parse("w8a8"))
    model, images = make(model)
    path = export_onnx(model, tmp_path / "model.onnx", example=images[:2])
    found = check(path, model, images)
    assert found.agreement == 100
    assert found.layers[0].steps == 0, "the image itself"
    assert max(layer.steps for layer in found.layers) <= 2
    names = [layer.name.removesuffix("._input_quantizer") for layer in found.layers]
    first = names.index("blocks.0.attn.proj")
    products = [f"blocks.0.attn.{part}_quantizer" for part in ("query", "softmax")]
    assert names[:first] == ["patch_embed.proj", "blocks.0.attn.qkv", *products], (
        "keys and values are moved behind Q"
    )
    assert max(layer.differing for layer in found.layers[:first]) < 0.1, "in percent, up to the first softmax"
    # One value on another level changes a whole token, and that all the others through the softmax.
    assert max(layer.differing for layer in found.layers[:-1]) < 10
    assert min(layer.sqnr_db for layer in found.layers) > 40
    OnnxRuntimeRunner(path, optimized=tmp_path / "optimized.onnx")
    ops = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert ops["QGemm"] == 14, (
        "the patches, four linear layers a block, that of q, k, v parted, and the classifier"
    )
    assert ops["MatMulIntegerToFloat"] == ops["QLinearMatMul"] == 2, "the products in the attentions"
    assert not {"Conv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"} & set(ops)


@pytest.mark.parametrize("batch", ["dynamic", 1])
def test_every_layer_runs_in_int8(make: Make, tmp_path: Path, batch: str | int) -> None:
    torch.manual_seed(0)
    model, images = make(VisionTransformer(128, 2, depth=2, num_classes=20, quantize=Scheme.parse("w8a8")))
    path = export_onnx(model, tmp_path / "model.onnx", example=images, batch=batch)
    runner = OnnxRuntimeRunner(path, optimized=tmp_path / "optimized.onnx")
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    ops = Counter(node.op_type for node in graph.node)
    assert ops["QGemm"] == 14, (
        "the patches, four linear layers a block, that of q, k, v parted, and the classifier"
    )
    layers = {"Conv", "Gemm", "FusedGemm", "FusedConv", "MatMul", "FusedMatMul"}
    assert not {*layers, "Mul", "Erf", "Split", "Squeeze"} & set(ops)
    assert ops["QuantizeLinear"] == 14, "image, head; both norms, key, value, softmax and GELU of each block"
    assert ops["Gelu"] + ops["BiasGelu"] == ops["Softmax"] == 2
    assert ops["Transpose"] == 9, "the patches; query, key, value and result of each block"
    assert ops["MatMulIntegerToFloat"] == ops["QLinearMatMul"] == 2
    zeros = {tensor.name: onnx.numpy_helper.to_array(tensor).dtype for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type in ("MatMulIntegerToFloat", "QLinearMatMul")]
    assert {str(zeros[node.input[5]]) for node in products} == {"int8"}, "zero points of the right operands"
    with torch.no_grad():
        expected = set_target(model, "onnxruntime")(images[:1])
    assert sqnr(expected, runner(images[:1])) > 35
