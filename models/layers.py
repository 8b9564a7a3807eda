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
    kernel_size: int | tuple[int, int],
    *,
    stride: int = 1,
    padding: int | tuple[int, int] | str = 0,
    groups: int = 1,
    bias: bool = False,
    quantize: Scheme | None = None,
    nonnegative: bool = False,
    edge: bool = False,
) -> nn.Module:
    """Make a 2-d convolution of a network, [N, in, H, W] -> [N, out, H', W'], quantized or not.

    Args:
        in_channels, out_channels, kernel_size, stride, groups, bias: as of ``nn.Conv2d``.
        padding: zeros on every side, or ``"same"``: TensorFlow's rule, H' = ceil(H / stride) (:func:`pad_same`).
        quantize: quantizes input (per tensor) and weight (per output channel) when given.
        nonnegative: the input is never below zero.
        edge: the model's first or last layer, which keeps 8 bits where others have few (``Scheme.edge_bits``).

    Returns:
        ``nn.Conv2d``, or the quantized layer with the same parameters.

    Example:
        >>> conv2d(3, 16, 3, padding=1)
        Conv2d(3, 16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)
        >>> type(conv2d(3, 16, 3, padding=1, quantize=qzoo.Scheme()))
        <class 'qzoo.quant.nn.modules.quant_conv.QuantConv2d'>
    """
    if edge and quantize is not None:
        quantize = quantize.edge
    float_class, quant_class = nn.Conv2d, QuantConv2d
    if padding == "same":
        if stride == 1 and isinstance(kernel_size, int) and kernel_size % 2 == 1:
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
    """Make a linear layer of a network, with bias, [..., in] -> [..., out], quantized or not.

    Args:
        in_features, out_features: sizes of the last dimension.
        quantize, nonnegative, edge: as of :func:`conv2d`.

    Returns:
        ``nn.Linear``, or the quantized layer with the same parameters.

    Example:
        >>> linear(64, 10)
        Linear(in_features=64, out_features=10, bias=True)
    """
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
    """Convolution with TensorFlow's "same" padding: [N, in, H, W] -> [N, out, ceil(H / stride), ceil(W / stride)].

    Args:
        in_channels, ..., dtype: as of ``nn.Conv2d``; the padding is not used.

    Example:
        >>> Conv2dSame(3, 8, 3, stride=2)(torch.zeros(1, 3, 15, 15)).shape
        torch.Size([1, 8, 8, 8])
    """

    quantized_form = QuantConv2dSame

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(pad_same(input, self.kernel_size, self.stride), weight, bias)


def init_weights(model: nn.Module) -> None:
    """Initialize a network's convolutions as He et al. do (arXiv:1502.01852, fan-out), in place.

    BatchNorm starts as the identity. A grouped convolution's fan-out counts the outputs that one of its inputs
    reaches, so depthwise ones start as large as dense ones do.

    Args:
        model: the network.

    Example:
        >>> network = torch.nn.Sequential(conv2d(3, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.ReLU())
        >>> init_weights(network)
    """
    for module in model.modules():
        # Without memory (a checkpoint is being loaded) there is nothing to draw, and pretending to costs a fifth of it.
        if isinstance(module, nn.modules.conv._ConvNd) and not module.weight.is_meta:
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
