"""Build the layers of a model definition: plain ``torch.nn`` without a scheme, quantized with one.

:func:`conv2d` and :func:`linear` are the weighted layers; both forms have the same parameters under the same names,
initialized by the same draws. :func:`activation_quantizer` quantizes a tensor that no weighted layer reads: an
``nn.Identity`` without a scheme, so that ``forward`` asks for nothing.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qzoo.quant.nn import QuantConv2d, QuantConv2dSame, QuantLinear, TensorQuantizer
from qzoo.quant.nn.modules.quant_conv_same import pad_same
from qzoo.quantizers import activation_descriptor, activation_quantizer, adopt, is_idle, weight_descriptor
from qzoo.scheme import Scheme

__all__ = [
    "Conv2dSame",
    "LayerNorm",
    "Permute",
    "QuantSiLU",
    "SqueezeExcitation",
    "StochasticDepth",
    "activation",
    "activation_quantizer",
    "conv2d",
    "conv_norm_activation",
    "init_weights",
    "linear",
    "round_channels",
    "share_range",
]


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
    bias: bool = True,
    quantize: Scheme | None = None,
    nonnegative: bool = False,
    edge: bool = False,
) -> nn.Module:
    """Make a linear layer of a network, [..., in] -> [..., out], quantized or not.

    Args:
        in_features, out_features: sizes of the last dimension.
        bias: as of ``nn.Linear``.
        quantize, nonnegative, edge: as of :func:`conv2d`.

    Returns:
        ``nn.Linear``, or the quantized layer with the same parameters.

    Example:
        >>> linear(64, 10)
        Linear(in_features=64, out_features=10, bias=True)
    """
    if quantize is None:
        return nn.Linear(in_features, out_features, bias)
    if edge:
        quantize = quantize.edge
    layer = QuantLinear(
        in_features,
        out_features,
        bias,
        quant_desc_input=activation_descriptor(quantize),
        quant_desc_weight=weight_descriptor(quantize, in_features),
    )
    adopt(quantize, layer.input_quantizer, "input", nonnegative)
    adopt(quantize, layer.weight_quantizer, "weight")
    return layer


def conv_norm_activation(
    in_channels: int,
    out_channels: int,
    kernel_size: int | tuple[int, int],
    *,
    function: nn.Module | None,
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    names: tuple[str, str, str] = ("0", "1", "2"),
    stride: int = 1,
    padding: int | None = None,
    groups: int = 1,
    bias: bool = False,
    quantize: Scheme | None = None,
    nonnegative: bool = False,
    edge: bool = False,
) -> nn.Sequential:
    """Make a convolution, its BatchNorm and its activation, [N, in, H, W] -> [N, out, H / stride, W / stride].

    Args:
        function: the activation; None where the BatchNorm's output goes on as it is.
        norm: makes the BatchNorm of so many channels.
        names: of the three layers; the default is that of torchvision's ``Conv2dNormActivation``.
        padding: zeros on every side; half the kernel if it is not given.
        in_channels, out_channels, kernel_size, stride, groups, bias, quantize, nonnegative, edge: as of :func:`conv2d`.

    Returns:
        The layers, by their names.

    Example:
        >>> [type(layer).__name__ for layer in conv_norm_activation(3, 16, 3, function=torch.nn.ReLU())]
        ['Conv2d', 'BatchNorm2d', 'ReLU']
    """
    height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    conv = conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=((height - 1) // 2, (width - 1) // 2) if padding is None else padding,
        groups=groups,
        bias=bias,
        quantize=quantize,
        nonnegative=nonnegative,
        edge=edge,
    )
    layers = [conv, norm(out_channels), *([] if function is None else [activation(function, quantize)])]
    return nn.Sequential(OrderedDict(zip(names, layers, strict=False)))


def activation(function: nn.Module, quantize: Scheme | None = None) -> nn.Module:
    """Put the quantizer before an activation that ONNX Runtime's integer kernels need behind a layer.

    They compute a ReLU, and a ReLU6, with the layer before; for any other function they need a Q right behind the
    layer. OpenVINO and TensorRT compute all of them with it.

    Args:
        function: ``nn.Hardswish()``, ``nn.SiLU()``, ``nn.Sigmoid()`` ...
        quantize: None makes no quantizer.

    Returns:
        The function itself where it needs none, else a module that has the quantizer and computes the function.

    Example:
        >>> activation(torch.nn.Hardswish())
        Hardswish()
        >>> [type(layer).__name__ for layer in activation(torch.nn.Hardswish(), qzoo.Scheme())]
        ['TensorQuantizer', 'Hardswish']
    """
    if quantize is None or isinstance(function, nn.ReLU | nn.ReLU6):
        return function
    if isinstance(function, nn.SiLU):
        return QuantSiLU(quantize)
    return nn.Sequential(activation_quantizer(quantize, "activation"), function)


class QuantSiLU(nn.Module):
    """SiLU behind an integer kernel: x * sigmoid(x), of which ONNX Runtime computes both parts in int8.

    Args:
        quantize: of the quantizers before the sigmoid and behind it.

    Example:
        >>> layer = QuantSiLU(qzoo.Scheme())
        >>> _ = qzoo.calibrate(layer, [torch.linspace(-4, 4, 32)], progress=False)
        >>> layer(torch.zeros(1)).item()
        0.0
    """

    def __init__(self, quantize: Scheme) -> None:
        super().__init__()
        self.activation_quantizer = activation_quantizer(quantize, "activation")
        self.sigmoid_quantizer = activation_quantizer(quantize, "activation", nonnegative=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation_quantizer(x)
        if is_idle(self.sigmoid_quantizer):
            return nn.functional.silu(x)
        return x * self.sigmoid_quantizer(torch.sigmoid(x))


class SqueezeExcitation(nn.Module):
    """Squeeze and excitation, a gate for each channel: [N, channels, H, W] -> the same.

    Paper: "Squeeze-and-Excitation Networks" (Hu et al., 2017, arXiv:1709.01507). Parameters as in torchvision.

    Args:
        channels: of input and output.
        squeezed: channels between the two layers.
        function: between the layers, ``nn.ReLU()`` or ``nn.SiLU()``.
        gate: whose outputs are in 0..1, ``nn.Sigmoid()`` or ``nn.Hardsigmoid()``.
        quantize: quantizes both layers, the average, and both sides of the product.
        nonnegative: the input is never below zero.

    Example:
        >>> SqueezeExcitation(16, 4, torch.nn.ReLU(), torch.nn.Sigmoid())(torch.ones(2, 16, 7, 7)).shape
        torch.Size([2, 16, 7, 7])
    """

    def __init__(
        self,
        channels: int,
        squeezed: int,
        function: nn.Module,
        gate: nn.Module,
        quantize: Scheme | None = None,
        nonnegative: bool = False,
    ) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = conv2d(channels, squeezed, 1, bias=True, quantize=quantize, nonnegative=nonnegative)
        positive = isinstance(function, nn.ReLU)
        self.fc2 = conv2d(squeezed, channels, 1, bias=True, quantize=quantize, nonnegative=positive)
        self.activation = activation(function, quantize)
        self.scale_activation = activation(gate, quantize)
        self.pool_quantizer = activation_quantizer(quantize, "pool", nonnegative=nonnegative)
        edge = quantize and quantize.edge
        self.gate_quantizer = activation_quantizer(edge, "input", nonnegative=True)
        self.scaled_quantizer = activation_quantizer(edge, "input", nonnegative=nonnegative)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.activation(self.fc1(self.avgpool(self.pool_quantizer(x))))
        gate = self.scale_activation(self.fc2(gate))
        return self.gate_quantizer(gate) * self.scaled_quantizer(x)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the channels, the last dimension, whose input has a quantizer.

    The runtimes compute the norm in float. A convolution before it writes int8 only with a Q behind.

    Args:
        channels: size of the last dimension.
        quantize: of the quantizer; None makes none.
        role: of the quantizer, ``"norm"`` behind a convolution.
        eps: as of ``nn.LayerNorm``.

    Example:
        >>> LayerNorm(8)(torch.ones(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self, channels: int, quantize: Scheme | None = None, role: str = "norm", eps: float = 1e-6
    ) -> None:
        super().__init__(channels, eps)
        self.norm_quantizer = activation_quantizer(quantize, role)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm_quantizer(x))


class Permute(nn.Module):
    """Put the dimensions into another order.

    Args:
        order: the old number of each new dimension.

    Example:
        >>> Permute(0, 2, 3, 1)(torch.zeros(1, 8, 5, 5)).shape
        torch.Size([1, 5, 5, 8])
    """

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)


class StochasticDepth(nn.Module):
    """Drop the branch of a residual block for some images, in training: [N, ...] -> the same.

    Paper: "Deep Networks with Stochastic Depth" (Huang et al., 2016, arXiv:1603.09382).

    Args:
        probability: of an image's branch to be dropped.

    Example:
        >>> StochasticDepth(0.5).eval()(torch.ones(2, 1)).tolist()
        [[1.0], [1.0]]
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        mask = torch.empty([len(x)] + [1] * (x.dim() - 1), dtype=x.dtype, device=x.device)
        mask.bernoulli_(1 - self.probability)
        if self.probability < 1:
            mask.div_(1 - self.probability)
        return x * mask


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


def share_range(group: str, *modules: nn.Module) -> None:
    """Calibrate quantizers together, to one range: of values that are joined or moved, and what reads them.

    Runtimes concatenate, pick and pool integers as they are, at no cost, where all have the same scale.

    Args:
        group: names those that belong together.
        modules: quantizers, or layers, whose inputs' quantizers are meant; those of a float model are passed over.

    Example:
        >>> first, second = (conv2d(16, 8, 1, quantize=qzoo.Scheme()) for _ in range(2))
        >>> share_range("stage1", first, second)
        >>> first.input_quantizer.group
        'stage1'
    """
    for module in modules:
        quantizer = getattr(module, "input_quantizer", module)
        if isinstance(quantizer, TensorQuantizer):
            quantizer.group = group


def round_channels(channels: float, multiple: int = 8) -> int:
    """Round a number of channels to a multiple of 8, as the MobileNets and EfficientNets do.

    Args:
        channels: of a network that is made wider or narrower.
        multiple: another in place of 8.

    Returns:
        The nearest multiple, one at least; where that is less than 90 % of ``channels``, the next one.

    Example:
        >>> [round_channels(32 * width) for width in (0.1, 0.35, 1.1)]
        [8, 16, 32]
    """
    rounded = max(multiple, int(channels + multiple / 2) // multiple * multiple)
    return rounded if rounded >= 0.9 * channels else rounded + multiple


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
