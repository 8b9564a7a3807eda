"""Build the layers of a model definition: plain ``torch.nn`` without a scheme, quantized with one.

:func:`conv2d` and :func:`linear` are the weighted layers; both forms have the same parameters under the same names,
initialized by the same draws. :func:`activation_quantizer` quantizes a tensor that no weighted layer reads: an
``nn.Identity`` without a scheme, so that ``forward`` asks for nothing.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from qzoo.quant.nn import QuantConv2d, QuantConv2dSame, QuantLinear
from qzoo.quant.nn.modules.quant_conv_same import pad_same
from qzoo.quantizers import activation_descriptor, activation_quantizer, adopt, weight_descriptor
from qzoo.scheme import Scheme

__all__ = ["Conv2dSame", "activation_quantizer", "conv2d", "init_weights", "linear"]


def conv2d(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    stride: int = 1,
    padding: int | str = 0,
    groups: int = 1,
    bias: bool = False,
    quantize: Scheme | None = None,
    nonnegative: bool = False,
    edge: bool = False,
) -> nn.Module:
    """A 2-d convolution, [N, in, H, W] -> [N, out, H', W'].

    Args:
        padding: zeros on every side, or ``"same"``: TensorFlow's rule, H' = ceil(H / stride) (:func:`pad_same`).
        quantize: quantizes input (per tensor) and weight (per output channel) when given.
        nonnegative: the input is never below zero.
        edge: the model's first or last layer, which keeps 8 bits where others have few (``Scheme.edge_bits``).
    """
    if edge and quantize is not None:
        quantize = quantize.edge
    float_class, quant_class = nn.Conv2d, QuantConv2d
    if padding == "same":
        if stride == 1 and kernel_size % 2 == 1:
            padding = kernel_size // 2  # the rule is symmetric here, whatever the input's size
        else:
            padding, float_class, quant_class = 0, Conv2dSame, QuantConv2dSame
    if quantize is None:
        return float_class(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=bias)
    layer = quant_class(
        in_channels,
        out_channels,
        kernel_size,
        stride,
        padding,
        groups=groups,
        bias=bias,
        quant_desc_input=activation_descriptor(quantize),
        quant_desc_weight=weight_descriptor(quantize, in_channels // groups),
    )
    adopt(quantize, layer.input_quantizer, "input", nonnegative)
    adopt(quantize, layer.weight_quantizer, "weight")
    return layer


def linear(
    in_features: int,
    out_features: int,
    *,
    quantize: Scheme | None = None,
    nonnegative: bool = False,
    edge: bool = False,
) -> nn.Module:
    """A linear layer with bias, [..., in] -> [..., out]; arguments as in :func:`conv2d`."""
    if quantize is None:
        return nn.Linear(in_features, out_features)
    if edge:
        quantize = quantize.edge
    layer = QuantLinear(
        in_features,
        out_features,
        quant_desc_input=activation_descriptor(quantize),
        quant_desc_weight=weight_descriptor(quantize, in_features),
    )
    adopt(quantize, layer.input_quantizer, "input", nonnegative)
    adopt(quantize, layer.weight_quantizer, "weight")
    return layer


class Conv2dSame(nn.Conv2d):
    """``nn.Conv2d`` with TensorFlow's "SAME" padding."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(pad_same(input, self.kernel_size, self.stride), weight, bias)


def init_weights(model: nn.Module) -> None:
    """He initialization of the convolutions (arXiv:1502.01852, fan-out); BatchNorm starts as the identity.

    A grouped convolution's fan-out counts the outputs that one of its inputs reaches, so depthwise ones start
    as large as dense ones do.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
