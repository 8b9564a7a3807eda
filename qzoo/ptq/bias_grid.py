"""Biases on the integer grid of the runtime, so that simulation and runtime add the same number.

An integer kernel adds the bias to its int32 sum, in units of input scale x weight scale (Jacob et al. 2018,
"Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", section 2.4), and the
runtime rounds the float bias to that unit when it loads the file. The simulation adds the float bias. The two sums
differ by up to half a unit, which flips a few roundings in a thousand, and these cascade. Here the bias, or the
BatchNorm's beta where one follows, moves by at most half a unit to where that rounding changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qzoo.errors import CalibrationError
from qzoo.ptq.layers import Layer, layers_of
from qzoo.quant.nn import TensorQuantizer
from qzoo.quantizers import switch_target
from qzoo.scheme import DEFAULT_TARGET

_INT32_ROOM = 2.0**30


@torch.no_grad()
def round_biases(model: nn.Module, example: Tensor, *, target: str = DEFAULT_TARGET) -> dict[str, Tensor]:
    """Round every bias to a multiple of its layer's input scale x weight scale, in place.

    Call it last: the ranges and the BatchNorm statistics must be final.

    Args:
        model: calibrated; it is left at ``target``.
        example: an input batch, for finding the BatchNorm that follows each layer.
        target: the runtime whose scales count. Only ONNX Runtime rounds biases; for others nothing is lost.

    Returns:
        Layer name -> how far its bias moved [out]. Channels whose weights are all zero, and biases that an int32
        can't hold in that unit, don't move. Layers whose weights have a range per group of inputs don't either: they
        have no single unit.

    Raises:
        CalibrationError: a layer has no range yet.

    Example:
        >>> moved = round_biases(model, images, target="onnxruntime")
        >>> moved["fc"].shape
        torch.Size([10])
    """
    switch_target(model, target)
    return {layer.name: _move(layer) for layer in layers_of(model, example) if _can_move(layer)}


def _can_move(layer: Layer) -> bool:
    inputs = layer.module.input_quantizer
    one_range = inputs.amax is not None and inputs.amax.numel() == 1 and isinstance(inputs.num_bits, int)
    return one_range and layer.one_range_a_row and _movable(layer) is not None


def _movable(layer: Layer) -> Tensor | None:
    return layer.module.bias if layer.norm is None else layer.norm.bias


def _scale(inputs: TensorQuantizer, amax: Tensor) -> Tensor:
    between = inputs.step_size if inputs.affine else None
    return amax.double() / inputs.maxbound if between is None else between.double()


def _move(layer: Layer) -> Tensor:
    inputs, weights, norm = layer.module.input_quantizer, layer.module.weight_quantizer, layer.norm
    movable, amax = _movable(layer), inputs.amax
    if movable is None or amax is None:
        raise CalibrationError(f"{layer.name!r} has no bias or no input range")
    unit = layer.amax.double().flatten().expand(len(movable)) / weights.maxbound * _scale(inputs, amax)
    bias = torch.zeros_like(unit) if layer.module.bias is None else layer.module.bias.double()
    if norm is not None and norm.running_mean is not None and norm.running_var is not None:
        gain = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
        bias = (bias - norm.running_mean.double()) * gain + movable.double()
        unit = unit * gain.abs()
    steps = (bias / unit).round()
    delta = torch.where(steps.isfinite() & (steps.abs() < _INT32_ROOM), steps * unit - bias, 0.0)
    movable.add_(delta.to(movable))
    return delta
