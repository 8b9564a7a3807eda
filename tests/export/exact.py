"""Exact comparison of the simulation with a runtime: the power-of-two construction.

A deep quantized network can't be compared with a tolerance: where two runtimes round a value differently by one unit
in the last place, an integer flips, and the flip grows from layer to layer. With every scale a power of two and every
bias a multiple of input scale x weight scale, all products, sums and rescalings are exact in float32 (as long as
sums stay below 2**24 units), so that simulation and runtime must agree to the bit. The construction changes the
weights' meaning, not the graph: what is exact for it is placed and translated correctly for any ranges.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qzoo.errors import ExportError
from qzoo.export.prepare import check_ranges
from qzoo.quant import ops
from qzoo.quant.fold import fold_batchnorm_
from qzoo.quant.nn import TensorQuantizer
from qzoo.quant.nn.modules._utils import weight_quantizer_of
from qzoo.quantizers import switch_target


@torch.no_grad()
def make_exact_(model: nn.Module, target: str, example: Tensor, *, even: bool = False) -> nn.Module:
    """Turn a calibrated model, in place, into one whose int8 run has no rounding differences. Returns the model.

    Folds BatchNorm, switches to ``target``, rounds every scale down to a power of two, puts the weights on their
    levels and rounds biases to multiples of input scale x weight scale. A BatchNorm that no layer takes up multiplies
    by a power of two.

    Args:
        example: an input batch, for finding the BatchNorms.
        even: zero points are even, as OpenVINO always needs them, and ONNX Runtime's integer Add and Mul do. They
            round quotient and zero point together, ONNX the quotient alone: what lies halfway between two codes goes
            the other way where the zero point is odd.

    Raises:
        ExportError: quantizers without a range; a weighted layer whose input is not quantized.
    """
    model.eval()
    switch_target(model, target)
    check_ranges(model)
    fold_batchnorm_(model, example)
    for module in model.modules():
        if isinstance(module, TensorQuantizer) and module.amax is not None:
            if module.affine:
                _round_limits(module, even=even or target == "openvino")
                continue
            module.amax = _power_of_two(module.amax, module.maxbound).cpu().numpy()
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            _round_norm(module)
        if weight_quantizer_of(module) is not None:
            _round_parameters(name, module)
    return model


def on_levels(model: nn.Module, images: Tensor) -> Tensor:
    """The images on the levels of the model's first quantizer: OpenVINO rounds them with one multiplication more."""
    first = next(
        m for m in model.modules() if isinstance(m, TensorQuantizer) and m.role == "input" and m.is_on
    )
    step = first.step_size
    assert step is not None
    return (images / step).round() * step


def _round_limits(quantizer: TensorQuantizer, even: bool) -> None:
    """Both ends where the scale is the power of two at or below the range's own, with the same zero point.

    Args:
        even: with the even zero point at or below.
    """
    step, zero = quantizer.step_size, quantizer.zero_point
    zero -= zero % 2 if even else 0
    assert step is not None
    step = step.double().log2().floor().exp2()
    quantizer.limits = [-zero * step.item(), (quantizer.maxbound - zero) * step.item()]


def _power_of_two(amax: Tensor, bound: float) -> Tensor:
    """The range whose scale is the power of two at or below the range's own; 2**-7 for a range of zero."""
    fallback = amax.max().clamp(min=bound * 2.0**-7)
    step = torch.where(amax > ops.TINY, amax, fallback).double() / bound
    return (step.log2().floor().exp2() * bound).float()


def _round_norm(norm: Any) -> None:
    """Factors of a power of two, terms of multiples of 2**-10, and a variance with which nothing is divided by."""
    if norm.weight is None or norm.running_var is None:
        return
    factor = (norm.running_var + norm.eps).rsqrt() * norm.weight
    term = norm.bias - norm.running_mean * factor
    norm.weight.copy_(factor.abs().log2().floor().exp2() * factor.sign())
    norm.bias.copy_((term * 2**10).round() / 2**10)
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)


def _round_parameters(name: str, layer: Any) -> None:
    source, weights = layer.input_quantizer, layer.weight_quantizer
    if not (source.is_on and weights.is_on):
        raise ExportError(f"{name}: input and weight must both be quantized for an exact comparison")
    amax, bits = weights.amax, weights.num_bits
    layer.weight.copy_(ops.fake_quantize(layer.weight, amax, bits, weights.unsigned, weights.narrow_range))
    if layer.bias is not None:
        unit = (source.step_size * weights.step_size).flatten().to(layer.bias.dtype)
        layer.bias.copy_((layer.bias / unit).round() * unit)
