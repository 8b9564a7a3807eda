"""The two weighted layers of every definition: plain ``torch.nn`` without a scheme, quantized with one.

Both have the same parameters under the same names, initialized by the same draws.
"""

from __future__ import annotations

from torch import nn

from qzoo.quant.nn import QuantConv2d, QuantLinear
from qzoo.scheme import Scheme


def conv2d(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    bias: bool = False,
    quantize: Scheme | None = None,
    nonnegative: bool = False,
) -> nn.Module:
    """A 2-d convolution, [N, in, H, W] -> [N, out, H', W'].

    Args:
        quantize: quantizes input (per tensor) and weight (per output channel) when given.
        nonnegative: the input is never below zero.
    """
    if quantize is None:
        return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=bias)
    layer = QuantConv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride,
        padding,
        groups=groups,
        bias=bias,
        quant_desc_input=quantize.activation_descriptor(),
        quant_desc_weight=quantize.weight_descriptor(),
    )
    quantize.adopt(layer.input_quantizer, "input", nonnegative)
    quantize.adopt(layer.weight_quantizer, "weight")
    return layer


def linear(
    in_features: int, out_features: int, *, quantize: Scheme | None = None, nonnegative: bool = False
) -> nn.Module:
    """A linear layer with bias, [..., in] -> [..., out]; arguments as in :func:`conv2d`."""
    if quantize is None:
        return nn.Linear(in_features, out_features)
    layer = QuantLinear(
        in_features,
        out_features,
        quant_desc_input=quantize.activation_descriptor(),
        quant_desc_weight=quantize.weight_descriptor(),
    )
    quantize.adopt(layer.input_quantizer, "input", nonnegative)
    quantize.adopt(layer.weight_quantizer, "weight")
    return layer
