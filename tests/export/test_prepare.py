"""The weights and ranges of the file are those of the simulation, however the model reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from qzoo.export import export_onnx
from qzoo.export.check import sqnr
from qzoo.quant import QuantDescriptor, quantize_
from qzoo.quant.nn import TensorQuantizer
from qzoo.runtimes.ort import OnnxRuntimeRunner

ROUNDING = 100.0  # dB


class Two(nn.Module):
    """Two linear layers, whose weights ``how`` reads."""

    def __init__(self, how: Callable[[Two, Tensor], Tensor]) -> None:
        super().__init__()
        self.how = how
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


def quantized(model: nn.Module, *, narrow: bool = True, share: float = 1.0) -> nn.Module:
    """Ranges that are ``share`` of the largest magnitude: 3 for activations."""
    quantize_(
        model,
        quant_desc_input=QuantDescriptor(8, narrow_range=narrow),
        quant_desc_weight=QuantDescriptor(8, axis=0, narrow_range=narrow),
    )
    for module in model.modules():
        if isinstance(getattr(module, "_weight_quantizer", None), TensorQuantizer):
            module._weight_quantizer.amax = share * module.weight.detach().abs().amax(1, keepdim=True).numpy()
            module._input_quantizer.amax = 3 * share
    return model.eval()


def difference(model: nn.Module, path: Path) -> float:
    x = torch.randn(64, 16)
    export_onnx(model, path, example=x[:2])
    with torch.no_grad():
        return sqnr(model(x), OnnxRuntimeRunner(path)(x))


@pytest.mark.parametrize(
    "how",
    [
        lambda m, x: m.b(F.linear(x, m.a.weight, m.a.bias)),
        lambda m, x: F.linear(m.a(x), m.a.weight),
        lambda m, x: m.a(m.a(x)),
    ],
    ids=["past its quantizer", "past its quantizer and through it", "twice"],
)
def test_a_weight_is_rounded_where_its_quantizer_reads_it(tmp_path: Path, how) -> None:
    """torchvision's Swin calls ``F.linear(x, self.qkv.weight)``: that weight is float in the simulation."""
    torch.manual_seed(0)
    assert difference(quantized(Two(how)), tmp_path / "m.onnx") > ROUNDING


def test_two_layers_with_one_weight_and_two_ranges(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Two(lambda m, x: m.b(m.a(x)))
    model.b.weight = model.a.weight
    quantized(model)
    model.b._weight_quantizer.amax = 0.7 * model.b._weight_quantizer.amax.numpy()
    assert difference(model, tmp_path / "m.onnx") > ROUNDING


@pytest.mark.parametrize("narrow", [True, False])
def test_the_lowest_level(tmp_path: Path, narrow: bool) -> None:
    """Of weights and activations that are clipped: -127 in a narrow range, else -128."""
    torch.manual_seed(0)
    model = quantized(Two(lambda m, x: m.b(m.a(x))), narrow=narrow, share=0.6)
    assert difference(model, tmp_path / "m.onnx") > ROUNDING
    stored = [numpy_helper.to_array(i) for i in onnx.load(tmp_path / "m.onnx").graph.initializer]
    weights = [array for array in stored if array.dtype == np.int8 and array.ndim == 2]
    assert {int(weight.min()) for weight in weights} == {-127 if narrow else -128}
