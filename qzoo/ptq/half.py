"""Round BatchNorm and the ranges of weights to float16, which takes half the room in a packed checkpoint.

Beside its integer weights a small model keeps five numbers a channel: BatchNorm's four and the weight's range. In
EfficientNet-Lite0 they are 2.5 % of the float model. A packed file stores them in float16 where that changes
nothing (:mod:`qzoo.zoo.packing`); here they are moved to such values, before the model is measured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qzoo.ptq.layers import Layer, layers_of
from qzoo.quant import ops
from qzoo.quant.nn import TensorQuantizer


@torch.no_grad()
def compact(model: nn.Module, example: Tensor) -> int:
    """Round BatchNorm's gain, mean and variance and the ranges of weights to float16, in place.

    The integers of the weights stay what they are: a range that moves takes the weights along. BatchNorm makes up
    for that, and for the rounding of its own statistics, in its gain, which float16 holds to 1 part in 4096, and in
    its bias, which stays float32 and takes up the rest exactly. So each channel is what it was but for that part of
    its gain.

    Call it after the weights are final, and before :func:`qzoo.ptq.round_biases`.

    Args:
        model: calibrated; integer weights with one range per output channel.
        example: an input batch, for finding the BatchNorm that follows each layer.

    Returns:
        How many layers were rounded. Layers with other weights, or values beyond float16, are left alone.

    Raises:
        CalibrationError: a layer has no range yet.
    """
    return sum(_round(layer) for layer in layers_of(model, example))


def _round(layer: Layer) -> bool:
    quantizer, norm = layer.module.weight_quantizer, layer.norm
    affine = norm is None or (norm.affine and norm.running_var is not None)
    scaled = quantizer.pre_quant_scale is not None  # SmoothQuant: the range is of the scaled weight
    bits = quantizer.num_bits
    if not isinstance(bits, int) or quantizer.block is not None or not affine or scaled:
        return False
    amax = layer.amax
    rounded = _half(amax)
    # Below TINY all integers are zero: nothing is scaled.
    ratio = torch.where((amax > ops.TINY) & (rounded > 0), rounded.double() / amax.double(), 1.0)
    if norm is None:
        if bool(((ratio - 1).abs() > 2.0**-10).any()):  # float16's smallest values are coarse
            return False
    elif not _round_norm(norm, ratio.flatten()):
        return False
    _set_range(layer.module, quantizer, bits, amax, rounded)
    if norm is not None and layer.module.bias is not None:
        layer.module.bias.mul_(ratio.flatten())
    return True


def _half(values: Tensor) -> Tensor:
    return values.half().float()


def _round_norm(norm: Any, ratio: Tensor) -> bool:
    """Let a BatchNorm read ``ratio`` times its old input, with values that float16 holds; False if there are none."""
    old_mean, old_var, weight, bias = norm.running_mean, norm.running_var, norm.weight, norm.bias
    gain = weight.double() * (old_var.double() + norm.eps).rsqrt()
    mean, var = _half(old_mean * ratio), _half(old_var * ratio**2)
    new_weight = _half(gain / ratio * (var.double() + norm.eps).sqrt())
    if not all(bool(torch.isfinite(values).all()) for values in (mean, var, new_weight)):
        return False
    new_gain = new_weight.double() * (var.double() + norm.eps).rsqrt()
    bias.copy_(bias.double() - old_mean.double() * gain + mean.double() * new_gain)
    old_mean.copy_(mean)
    old_var.copy_(var)
    weight.copy_(new_weight)
    return True


def _set_range(layer: Any, quantizer: TensorQuantizer, bits: int, amax: Tensor, rounded: Tensor) -> None:
    q = ops.quantize(layer.weight, amax, bits, narrow_range=quantizer.narrow_range)
    layer.weight.copy_(ops.dequantize(q, rounded, bits))
    quantizer.set_range(rounded)
