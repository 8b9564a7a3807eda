"""MobileNetV4, small, medium and large without attention, for ImageNet, with timm's parameter names.

Paper: "MobileNetV4: Universal Models for the Mobile Ecosystem" (Qin et al., 2024, arXiv:2404.10518).

Shapes of the small one at 224 pixels: stem [N, 32, 112, 112], then the stages [N, 32, 56, 56], [N, 64, 28, 28],
[N, 96, 14, 14], [N, 128, 7, 7] and [N, 960, 7, 7], the average, a 1x1 convolution [N, 1280, 1, 1] and the logits
[N, num_classes].

Quantization: a block ends without an activation, and may begin with a depthwise convolution without one, so these
tensors are signed; what follows a ReLU is not. Each add has a ``residual_quantizer`` on its skip input and a
``branch_quantizer`` on the other; ``pool_quantizer`` and ``output_quantizer`` close the network.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qzoo.hub_mixin import HubMixin
from qzoo.models.layers import (
    activation_quantizer,
    conv2d,
    conv_norm_activation,
    init_weights,
    linear,
    round_channels,
)
from qzoo.registry import DEPTHWISE, Family, register_model, timm_weights
from qzoo.scheme import Scheme

_CITATION = """@article{qin2024mobilenetv4,
  title = {MobileNetV4: Universal Models for the Mobile Ecosystem},
  author = {Qin, Danfeng and Leichner, Chas and Delakis, Manolis and Fornoni, Marco and Luo, Shixin and others},
  journal = {arXiv:2404.10518},
  year = {2024}
}
"""
FAMILY = Family(_CITATION, DEPTHWISE)


class Conv(NamedTuple):
    """A convolution, BatchNorm and ReLU: kernel, output channels and stride."""

    kernel: int
    channels: int
    stride: int = 1


class Fused(NamedTuple):
    """An inverted bottleneck whose first convolution is no pair of a pointwise and a depthwise one."""

    kernel: int
    channels: int
    stride: int
    expansion: int


class Universal(NamedTuple):
    """An inverted bottleneck: kernels of its depthwise convolutions at the start and in the middle, 0 where none is."""

    start: int
    middle: int
    channels: int
    expansion: int
    stride: int = 1


Block = Conv | Fused | Universal

SMALL: tuple[tuple[Block, ...], ...] = (
    (Conv(3, 32, 2), Conv(1, 32)),
    (Conv(3, 96, 2), Conv(1, 64)),
    (Universal(5, 5, 96, 3, 2), *[Universal(0, 3, 96, 2)] * 4, Universal(3, 0, 96, 4)),
    (
        Universal(3, 3, 128, 6, 2),
        Universal(5, 5, 128, 4),
        Universal(0, 5, 128, 4),
        Universal(0, 5, 128, 3),
        *[Universal(0, 3, 128, 4)] * 2,
    ),
    (Conv(1, 960),),
)
MEDIUM: tuple[tuple[Block, ...], ...] = (
    (Fused(3, 48, 2, 4),),
    (Universal(3, 5, 80, 4, 2), Universal(3, 3, 80, 2)),
    (
        Universal(3, 5, 160, 6, 2),
        *[Universal(3, 3, 160, 4)] * 2,
        Universal(3, 5, 160, 4),
        Universal(3, 3, 160, 4),
        Universal(3, 0, 160, 4),
        Universal(0, 0, 160, 2),
        Universal(3, 0, 160, 4),
    ),
    (
        Universal(5, 5, 256, 6, 2),
        Universal(5, 5, 256, 4),
        *[Universal(3, 5, 256, 4)] * 2,
        Universal(0, 0, 256, 4),
        Universal(3, 0, 256, 4),
        Universal(3, 5, 256, 2),
        Universal(5, 5, 256, 4),
        *[Universal(0, 0, 256, 4)] * 2,
        Universal(5, 0, 256, 2),
    ),
    (Conv(1, 960),),
)
LARGE: tuple[tuple[Block, ...], ...] = (
    (Fused(3, 48, 2, 4),),
    (Universal(3, 5, 96, 4, 2), Universal(3, 3, 96, 4)),
    (
        Universal(3, 5, 192, 4, 2),
        *[Universal(3, 3, 192, 4)] * 3,
        Universal(3, 5, 192, 4),
        *[Universal(5, 3, 192, 4)] * 5,
        Universal(3, 0, 192, 4),
    ),
    (
        Universal(5, 5, 512, 4, 2),
        *[Universal(5, 5, 512, 4)] * 3,
        Universal(5, 0, 512, 4),
        Universal(5, 3, 512, 4),
        *[Universal(5, 0, 512, 4)] * 2,
        Universal(5, 3, 512, 4),
        Universal(5, 5, 512, 4),
        *[Universal(5, 0, 512, 4)] * 3,
    ),
    (Conv(1, 960),),
)


class FusedBlock(nn.Module):
    """A dense convolution that widens and a pointwise one that narrows: [N, in, H, W] -> [N, out, H / 2, W / 2]."""

    def __init__(self, in_channels: int, block: Fused, positive: bool, quantize: Scheme | None) -> None:
        super().__init__()
        inner = round_channels(in_channels * block.expansion)
        self.conv_exp = conv2d(
            in_channels,
            inner,
            block.kernel,
            stride=block.stride,
            padding=block.kernel // 2,
            quantize=quantize,
            nonnegative=positive,
        )
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu = nn.ReLU(inplace=True)
        self.conv_pwl = conv2d(inner, block.channels, 1, quantize=quantize, nonnegative=True)
        self.bn2 = nn.BatchNorm2d(block.channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv_pwl(self.relu(self.bn1(self.conv_exp(x)))))


class UniversalBlock(nn.Module):
    """Up to two depthwise convolutions around a pointwise one, a pointwise one and, if shapes allow, a skip."""

    def __init__(self, in_channels: int, block: Universal, positive: bool, quantize: Scheme | None) -> None:
        super().__init__()
        start, middle, channels, expansion, stride = block
        inner = round_channels(in_channels * expansion)
        conv = partial(conv_norm_activation, names=("conv", "bn", "act"), quantize=quantize)
        relu = nn.ReLU(inplace=True)
        self.dw_start: nn.Module = nn.Identity()
        if start:
            self.dw_start = conv(
                in_channels,
                in_channels,
                start,
                function=None,
                stride=1 if middle else stride,
                groups=in_channels,
                nonnegative=positive,
            )
        self.pw_exp = conv(in_channels, inner, 1, function=relu, nonnegative=positive and not start)
        self.dw_mid: nn.Module = nn.Identity()
        if middle:
            self.dw_mid = conv(
                inner, inner, middle, function=relu, stride=stride, groups=inner, nonnegative=True
            )
        self.pw_proj = conv(inner, channels, 1, function=None, nonnegative=True)
        self.has_skip = stride == 1 and in_channels == channels
        if self.has_skip:
            self.residual_quantizer = activation_quantizer(quantize, "residual", nonnegative=positive)
            self.branch_quantizer = activation_quantizer(quantize, "branch")

    def forward(self, x: Tensor) -> Tensor:
        out = self.pw_proj(self.dw_mid(self.pw_exp(self.dw_start(x))))
        if not self.has_skip:
            return out
        return self.branch_quantizer(out) + self.residual_quantizer(x)


class MobileNetV4(HubMixin, nn.Module):
    """A stem, stages of blocks, global average pooling, a wide 1x1 convolution and a linear classifier."""

    def __init__(
        self,
        stages: tuple[tuple[Block, ...], ...],
        stem: int,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        quantize: Scheme | None = None,
    ) -> None:
        super().__init__()
        self.conv_stem = conv2d(in_channels, stem, 3, stride=2, padding=1, quantize=quantize, edge=True)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        channels, positive, modules = stem, True, []
        for stage in stages:
            blocks: list[nn.Module] = []
            for block in stage:
                if isinstance(block, Conv):
                    conv = conv_norm_activation(
                        channels,
                        block.channels,
                        block.kernel,
                        function=nn.ReLU(inplace=True),
                        names=("conv", "bn1", "relu"),
                        stride=block.stride,
                        quantize=quantize,
                        nonnegative=positive,
                    )
                    blocks.append(conv)
                elif isinstance(block, Fused):
                    blocks.append(FusedBlock(channels, block, positive, quantize))
                else:
                    blocks.append(UniversalBlock(channels, block, positive, quantize))
                channels, positive = block.channels, isinstance(block, Conv)
            modules.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*modules)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.conv_head = conv2d(channels, 1280, 1, quantize=quantize, nonnegative=True)
        self.norm_head = nn.BatchNorm2d(1280)
        self.classifier = linear(1280, num_classes, quantize=quantize, nonnegative=True, edge=True)
        self.pool_quantizer = activation_quantizer(quantize, "pool", nonnegative=True)
        self.output_quantizer = activation_quantizer(quantize, "output")
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu(self.bn1(self.conv_stem(x))))
        x = self.avgpool(self.pool_quantizer(x))
        x = self.relu(self.norm_head(self.conv_head(x)))
        return self.output_quantizer(self.classifier(torch.flatten(x, 1)))


# Top-1 by timm's table of results at commit 7479d45: that which is quoted elsewhere is older than these networks.
@register_model(
    {
        "e2400_r224_in1k": timm_weights("mobilenetv4_conv_small.e2400_r224_in1k", 73.73),
        "e1200_r224_in1k": timm_weights("mobilenetv4_conv_small.e1200_r224_in1k", 73.436),
    },
    FAMILY,
)
def mobilenetv4_conv_small(**options: Any) -> MobileNetV4:
    """MobileNetV4-Conv-S: 3.8 M parameters, 0.2 G multiply-adds."""
    return MobileNetV4(SMALL, 32, **options)


@register_model(
    {"e500_r224_in1k": timm_weights("mobilenetv4_conv_medium.e500_r224_in1k", 79.092, crop_pct=0.95)}, FAMILY
)
def mobilenetv4_conv_medium(**options: Any) -> MobileNetV4:
    """MobileNetV4-Conv-M: 9.7 M parameters, 0.8 G multiply-adds."""
    return MobileNetV4(MEDIUM, 32, **options)


@register_model(
    {
        "e500_r256_in1k": timm_weights(
            "mobilenetv4_conv_large.e500_r256_in1k", 81.864, size=256, crop_pct=0.95
        )
    },
    FAMILY,
)
def mobilenetv4_conv_large(**options: Any) -> MobileNetV4:
    """MobileNetV4-Conv-L: 32.6 M parameters, 2.9 G multiply-adds, 256 pixels."""
    return MobileNetV4(LARGE, 24, **options)
