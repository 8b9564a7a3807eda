"""SmoothQuant: the factors of the paper, an unchanged float function, and a gain where channels stick out."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from fidelity import sqnr
from torch import Tensor, nn

from qzoo.errors import CalibrationError, QuantizationError
from qzoo.models.vit import VisionTransformer
from qzoo.ptq import smooth
from qzoo.ptq.ranges import calibrate
from qzoo.quant.nn import QuantLinear, TensorQuantizer
from qzoo.scheme import Scheme


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def outliers() -> VisionTransformer:
    """One small block whose LayerNorms let three channels stick out, as those of trained transformers do."""
    torch.manual_seed(0)
    model = VisionTransformer(48, 3, depth=1, num_classes=10, quantize=Scheme()).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
    with torch.no_grad():
        for norm in (model.blocks[0].norm1, model.blocks[0].norm2):
            norm.weight[[3, 17, 30]] *= 60
    return model


def test_factors_are_the_papers(outliers: VisionTransformer, images: Tensor) -> None:
    block = outliers.blocks[0]
    seen: list[Tensor] = []
    handle = block.norm1.register_forward_hook(lambda m, args, out: seen.append(out.clone()))
    for quantizer in outliers.modules():
        if isinstance(quantizer, TensorQuantizer):
            quantizer.disable()
    with torch.no_grad():
        outliers(images)
    handle.remove()
    x, w = seen[0].numpy().reshape(-1, 48), block.attn.qkv.weight.detach().numpy().copy()
    weight, bias = block.norm1.weight.detach().clone(), block.norm1.bias.detach().clone()
    done = smooth(outliers, images.split(2), alpha=0.7, progress=False)
    assert [(d.norm, d.readers) for d in done] == [
        ("blocks.0.norm1", ("blocks.0.attn.qkv",)),
        ("blocks.0.norm2", ("blocks.0.mlp.fc1",)),
    ]
    expected = np.abs(x).max(0) ** 0.7 / np.abs(w).max(0) ** 0.3
    np.testing.assert_allclose(done[0].factors.numpy(), expected, rtol=1e-4)
    torch.testing.assert_close(block.norm1.weight * done[0].factors, weight)
    torch.testing.assert_close(block.norm1.bias * done[0].factors, bias)
    np.testing.assert_allclose(block.attn.qkv.weight.detach().numpy(), w * expected, rtol=1e-4)


def test_float_stays_and_int8_gains(outliers: VisionTransformer, images: Tensor) -> None:
    exact = VisionTransformer(48, 3, depth=1, num_classes=10)
    exact.load_state_dict(outliers.state_dict())
    exact.eval()
    plain = copy.deepcopy(outliers)
    calibrate(plain, [images], progress=False)
    smooth(outliers, [images], progress=False)
    smoothed = VisionTransformer(48, 3, depth=1, num_classes=10)
    smoothed.load_state_dict(outliers.state_dict())
    assert sqnr(exact, smoothed.eval(), images) > 80  # rounding of float32 only
    calibrate(outliers, [images], progress=False)
    assert sqnr(exact, outliers, images) > sqnr(exact, plain, images) + 3


class Shared(nn.Module):
    """Something else reads what the LayerNorm gives."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(6), QuantLinear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.fc(x) + x


def test_refusals(outliers: VisionTransformer) -> None:
    model, x = Shared().eval(), torch.randn(3, 6)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(QuantizationError, match="would change the model's output"):
        smooth(model, [x], progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(CalibrationError, match="no images"):
        smooth(outliers, [], progress=False)
    with pytest.raises(ValueError, match="alpha must be between 0 and 1"):
        smooth(outliers, [], alpha=2.0)
