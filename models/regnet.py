"""RegNet X and Y for ImageNet, with torchvision's parameter names.

Paper: "Designing Network Design Spaces" (Radosavovic et al., 2020, arXiv:2003.13678). Y has squeeze and excitation.

Shapes of RegNetX-400MF at 224 pixels: stem [N, 32, 112, 112], then the stages [N, 32, 56, 56], [N, 64, 28, 28],
[N, 160, 14, 14] and [N, 400, 7, 7], logits [N, num_classes].

Quantization: all inputs of layers but the image follow a ReLU, or are a product of such a tensor with gates. Each add
has a ``residual_quantizer`` on its skip input and a ``branch_quantizer`` on the other; a product has a quantizer on
both sides; ``pool_quantizer`` and ``output_quantizer`` close the network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.hub_mixin import HubMixin
from qzoo.models.layers import (
    SqueezeExcitation,
    activation_quantizer,
    conv_norm_activation,
    init_weights,
    linear,
)
from qzoo.registry import Family, register_model, torchvision_weights
from qzoo.scheme import Scheme

_CITATION = """@article{radosavovic2020designing,
  title = {Designing Network Design Spaces},
  author = {Radosavovic, Ilija and Kosaraju, Raj Prateek and Girshick, Ross and He, Kaiming and Doll{\\'a}r, Piotr},
  journal = {arXiv:2003.13678},
  year = {2020}
}
"""
FAMILY = Family(_CITATION, results="NNCF, RegNetX-200MF: 68.76 to 68.52")
STEM = 32


class Bottleneck(nn.Module):
    """1x1, grouped 3x3, gates, 1x1 and a skip: [N, in, H, W] -> [N, width, H / stride, W / stride]."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        group_width: int,
        gated: bool,
        quantize: Scheme | None,
    ) -> None:
        super().__init__()
        relu = nn.ReLU(inplace=True)
        self.proj: nn.Module | None = None
        if stride != 1 or in_channels != width:
            self.proj = conv_norm_activation(
                in_channels, width, 1, function=None, stride=stride, quantize=quantize, nonnegative=True
            )
        self.f = nn.Sequential()
        self.f.a = conv_norm_activation(
            in_channels, width, 1, function=relu, quantize=quantize, nonnegative=True
        )
        self.f.b = conv_norm_activation(
            width,
            width,
            3,
            function=relu,
            stride=stride,
            groups=width // group_width,
            quantize=quantize,
            nonnegative=True,
        )
        if gated:
            squeezed = round(0.25 * in_channels)
            self.f.se = SqueezeExcitation(
                width, squeezed, nn.ReLU(), nn.Sigmoid(), quantize, nonnegative=True
            )
        self.f.c = conv_norm_activation(width, width, 1, function=None, quantize=quantize, nonnegative=True)
        self.activation = relu
        # The skip is the block's input, after a ReLU, unless a projection changes it.
        positive = self.proj is None
        self.residual_quantizer = activation_quantizer(quantize, "residual", nonnegative=positive)
        self.branch_quantizer = activation_quantizer(quantize, "branch")

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.proj is None else self.proj(x)
        return self.activation(self.residual_quantizer(skip) + self.branch_quantizer(self.f(x)))


class RegNet(HubMixin, nn.Module):
    """A stem, four stages of bottlenecks, global average pooling and a linear classifier."""

    def __init__(
        self,
        depths: tuple[int, ...],
        widths: tuple[int, ...],
        group_width: int,
        gated: bool,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        quantize: Scheme | None = None,
    ) -> None:
        super().__init__()
        relu = nn.ReLU(inplace=True)
        self.stem = conv_norm_activation(
            in_channels, STEM, 3, function=relu, stride=2, quantize=quantize, edge=True
        )
        self.trunk_output = nn.Sequential()
        channels = STEM
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
            stage = nn.Sequential()
            for j in range(depth):
                stride = 2 if j == 0 else 1
                block = Bottleneck(channels, width, stride, min(group_width, width), gated, quantize)
                stage.add_module(f"block{i}-{j}", block)
                channels = width
            self.trunk_output.add_module(f"block{i}", stage)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = linear(channels, num_classes, quantize=quantize, nonnegative=True, edge=True)
        self.pool_quantizer = activation_quantizer(quantize, "pool", nonnegative=True)
        self.output_quantizer = activation_quantizer(quantize, "output")
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.pool_quantizer(self.trunk_output(self.stem(x))))
        return self.output_quantizer(self.fc(torch.flatten(x, 1)))


_TIMM_BLOCK = {
    "downsample.conv": "proj.0",
    "downsample.bn": "proj.1",
    "conv1.conv": "f.a.0",
    "conv1.bn": "f.a.1",
    "conv2.conv": "f.b.0",
    "conv2.bn": "f.b.1",
    "se.fc1": "f.se.fc1",
    "se.fc2": "f.se.fc2",
    "conv3.conv": "f.c.0",
    "conv3.bn": "f.c.1",
}
_TIMM = {"stem.conv": "stem.0", "stem.bn": "stem.1", "head.fc": "fc"}


def timm_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the entries of timm's RegNets: ``s1.b1.conv1.conv.weight`` is the first block's first convolution."""
    renamed = {}
    for key, value in state_dict.items():
        layer, _, entry = key.rpartition(".")
        stage, _, rest = layer.partition(".")
        block, _, inner = rest.partition(".")
        if inner in _TIMM_BLOCK and stage[1:].isdecimal() and block[1:].isdecimal():
            number = f"block{stage[1:]}"
            layer = f"trunk_output.{number}.{number}-{int(block[1:]) - 1}.{_TIMM_BLOCK[inner]}"
        renamed[f"{_TIMM.get(layer, layer)}.{entry}"] = value
    return renamed


def _published(
    name: str, first: tuple[str, float], second: tuple[str, float], alias: str
) -> Callable[[Callable], Callable]:
    """Register a network with torchvision's weights, of its first recipe (resized to 256) and its second one (to 232).

    Args:
        first, second: digits in the file's name, and top-1.
        alias: timm's name.
    """
    weights = {
        tag: torchvision_weights(f"regnet_{name}-{digits}.pth", top1, resize=resize)
        for tag, (digits, top1), resize in (("tv_in1k", first, 256), ("tv2_in1k", second, 232))
    }
    return register_model(weights, FAMILY, aliases=[alias], key_map=timm_names)


@_published("x_400mf", ("adf1edd5", 72.834), ("62229a5f", 74.864), "regnetx_004_tv")
def regnet_x_400mf(**options: Any) -> RegNet:
    """RegNetX-400MF: 5.5 M parameters, 0.4 G multiply-adds."""
    return RegNet((1, 2, 7, 12), (32, 64, 160, 400), 16, False, **options)


@_published("x_800mf", ("ad17e45c", 75.212), ("94a99ebd", 77.522), "regnetx_008")
def regnet_x_800mf(**options: Any) -> RegNet:
    """RegNetX-800MF: 7.3 M parameters, 0.8 G multiply-adds."""
    return RegNet((1, 3, 7, 5), (64, 128, 288, 672), 16, False, **options)


@_published("x_1_6gf", ("e3633e7f", 77.04), ("a12f2b72", 79.668), "regnetx_016")
def regnet_x_1_6gf(**options: Any) -> RegNet:
    """RegNetX-1.6GF: 9.2 M parameters, 1.6 G multiply-adds."""
    return RegNet((2, 4, 10, 2), (72, 168, 408, 912), 24, False, **options)


@_published("x_3_2gf", ("f342aeae", 78.364), ("7071aa85", 81.196), "regnetx_032")
def regnet_x_3_2gf(**options: Any) -> RegNet:
    """RegNetX-3.2GF: 15.3 M parameters, 3.2 G multiply-adds."""
    return RegNet((2, 6, 15, 2), (96, 192, 432, 1008), 48, False, **options)


@_published("x_8gf", ("03ceed89", 79.344), ("2b70d774", 81.682), "regnetx_080")
def regnet_x_8gf(**options: Any) -> RegNet:
    """RegNetX-8GF: 39.6 M parameters, 8.0 G multiply-adds."""
    return RegNet((2, 5, 15, 1), (80, 240, 720, 1920), 120, False, **options)


@_published("x_16gf", ("2007eb11", 80.058), ("ba3796d7", 82.716), "regnetx_160")
def regnet_x_16gf(**options: Any) -> RegNet:
    """RegNetX-16GF: 54.3 M parameters, 15.9 G multiply-adds."""
    return RegNet((2, 6, 13, 1), (256, 512, 896, 2048), 128, False, **options)


@_published("x_32gf", ("9d47f8d0", 80.622), ("6eb8fdc6", 83.014), "regnetx_320")
def regnet_x_32gf(**options: Any) -> RegNet:
    """RegNetX-32GF: 107.8 M parameters, 31.7 G multiply-adds."""
    return RegNet((2, 7, 13, 1), (336, 672, 1344, 2520), 168, False, **options)


@_published("y_400mf", ("c65dace8", 74.046), ("e6988f5f", 75.804), "regnety_004")
def regnet_y_400mf(**options: Any) -> RegNet:
    """RegNetY-400MF: 4.3 M parameters, 0.4 G multiply-adds."""
    return RegNet((1, 3, 6, 6), (48, 104, 208, 440), 8, True, **options)


@_published("y_800mf", ("1b27b58c", 76.42), ("58fc7688", 78.828), "regnety_008_tv")
def regnet_y_800mf(**options: Any) -> RegNet:
    """RegNetY-800MF: 6.4 M parameters, 0.8 G multiply-adds."""
    return RegNet((1, 3, 8, 2), (64, 144, 320, 784), 16, True, **options)


@_published("y_1_6gf", ("b11a554e", 77.95), ("0d7bc02a", 80.876), "regnety_016")
def regnet_y_1_6gf(**options: Any) -> RegNet:
    """RegNetY-1.6GF: 11.2 M parameters, 1.6 G multiply-adds."""
    return RegNet((2, 6, 17, 2), (48, 120, 336, 888), 24, True, **options)


@_published("y_3_2gf", ("b5a9779c", 78.948), ("9180c971", 81.982), "regnety_032")
def regnet_y_3_2gf(**options: Any) -> RegNet:
    """RegNetY-3.2GF: 19.4 M parameters, 3.2 G multiply-adds."""
    return RegNet((2, 5, 13, 1), (72, 216, 576, 1512), 24, True, **options)


@_published("y_8gf", ("d0d0e4a8", 80.032), ("dc2b1b54", 82.828), "regnety_080_tv")
def regnet_y_8gf(**options: Any) -> RegNet:
    """RegNetY-8GF: 39.4 M parameters, 8.5 G multiply-adds."""
    return RegNet((2, 4, 10, 1), (224, 448, 896, 2016), 56, True, **options)


@_published("y_16gf", ("9e6ed7dd", 80.424), ("3e4a00f9", 82.886), "regnety_160")
def regnet_y_16gf(**options: Any) -> RegNet:
    """RegNetY-16GF: 83.6 M parameters, 15.9 G multiply-adds."""
    return RegNet((2, 4, 11, 1), (224, 448, 1232, 3024), 112, True, **options)


@_published("y_32gf", ("4dee3f7a", 80.878), ("8db6d4b5", 83.368), "regnety_320")
def regnet_y_32gf(**options: Any) -> RegNet:
    """RegNetY-32GF: 145.0 M parameters, 32.3 G multiply-adds."""
    return RegNet((2, 5, 12, 1), (232, 696, 1392, 3712), 232, True, **options)


_SWAG = torchvision_weights(
    "regnet_y_128gf_swag-c8ce3e52.pth", 88.228, size=384, resize=384, interpolation="bicubic"
)


@register_model(
    {"swag_ft_in1k": dataclasses.replace(_SWAG, license="cc-by-nc-4.0")},
    FAMILY,
    aliases=["regnety_1280"],
    key_map=timm_names,
)
def regnet_y_128gf(**options: Any) -> RegNet:
    """RegNetY-128GF: 644.8 M parameters, 127.5 G multiply-adds."""
    return RegNet((2, 7, 17, 1), (528, 1056, 2904, 7392), 264, True, **options)
