"""GhostNetV2 for ImageNet, with timm's parameter names.

Paper: "GhostNetV2: Enhance Cheap Operation with Long-Range Attention" (Tang et al., 2022, arXiv:2211.12905).

Shapes at 224 pixels and width 1: stem [N, 16, 112, 112], then blocks of [N, 16, 112, 112], [N, 24, 56, 56],
[N, 40, 28, 28], [N, 80, 14, 14], [N, 112, 14, 14] and [N, 160, 7, 7], a 1x1 convolution [N, 960, 7, 7], the average, a
1x1 convolution [N, 1280, 1, 1] and the logits [N, num_classes]. A ghost module makes half of its channels by a 1x1
convolution, and of these the other half by a depthwise one.

Quantization: both halves that a ghost module joins have one range with the depthwise convolution's input. The first
module of a block ends in ReLUs, the second does not, so the tensors between blocks are signed. Each add has quantizers
on both sides, and so has a product with gates; ``pool_quantizer`` and ``output_quantizer`` close the network.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qzoo.hub_mixin import HubMixin
from qzoo.models.layers import (
    SqueezeExcitation,
    activation,
    activation_quantizer,
    conv2d,
    conv_norm_activation,
    init_weights,
    linear,
    round_channels,
    share_range,
)
from qzoo.models.lcnet import timm_names
from qzoo.registry import DEPTHWISE, Family, FloatWeights, register_model, timm_weights
from qzoo.scheme import Scheme

_CITATION = """@article{tang2022ghostnetv2,
  title = {GhostNetV2: Enhance Cheap Operation with Long-Range Attention},
  author = {Tang, Yehui and Han, Kai and Guo, Jianyuan and Xu, Chang and Xu, Chao and Wang, Yunhe},
  journal = {arXiv:2211.12905},
  year = {2022}
}
"""
FAMILY = Family(_CITATION, DEPTHWISE)


class Size(NamedTuple):
    """Sizes of a block: kernel, expanded and output channels, squeeze and excitation, stride."""

    kernel: int
    expanded: int
    channels: int
    gated: bool
    stride: int


# By stages, as timm numbers them.
STAGES = (
    (Size(3, 16, 16, False, 1),),
    (Size(3, 48, 24, False, 2),),
    (Size(3, 72, 24, False, 1),),
    (Size(5, 72, 40, True, 2),),
    (Size(5, 120, 40, True, 1),),
    (Size(3, 240, 80, False, 2),),
    (
        Size(3, 200, 80, False, 1),
        Size(3, 184, 80, False, 1),
        Size(3, 184, 80, False, 1),
        Size(3, 480, 112, True, 1),
        Size(3, 672, 112, True, 1),
    ),
    (Size(5, 672, 160, True, 2),),
    (
        Size(5, 960, 160, False, 1),
        Size(5, 960, 160, True, 1),
        Size(5, 960, 160, False, 1),
        Size(5, 960, 160, True, 1),
    ),
)


class GhostModule(nn.Module):
    """Half of the channels by a 1x1 convolution, half by a depthwise one: [N, in, H, W] -> [N, out, H, W]."""

    def __init__(
        self,
        name: str,
        in_channels: int,
        out_channels: int,
        relu: bool,
        positive: bool,
        quantize: Scheme | None,
    ) -> None:
        """``name`` is that of the range of what is joined; ``positive``: the input is never below zero."""
        super().__init__()
        half = out_channels // 2
        primary = conv2d(in_channels, half, 1, quantize=quantize, nonnegative=positive)
        cheap = conv2d(half, half, 3, padding=1, groups=half, quantize=quantize, nonnegative=relu)
        functions = [nn.ReLU(inplace=True) if relu else nn.Identity() for _ in range(2)]
        self.primary_conv = nn.Sequential(primary, nn.BatchNorm2d(half), functions[0])
        self.cheap_operation = nn.Sequential(cheap, nn.BatchNorm2d(half), functions[1])
        self.concat_quantizer = activation_quantizer(quantize, "input", nonnegative=relu)
        share_range(name, cheap, self.concat_quantizer)

    def forward(self, x: Tensor) -> Tensor:
        first = self.primary_conv(x)
        second = self.cheap_operation(first)
        return torch.cat([self.concat_quantizer(first), self.concat_quantizer(second)], 1)


class GatedGhostModule(GhostModule):
    """A ghost module with a gate for each value, made at half the resolution: [N, in, H, W] -> [N, out, H, W]."""

    def __init__(
        self, name: str, in_channels: int, out_channels: int, positive: bool, quantize: Scheme | None
    ) -> None:
        super().__init__(name, in_channels, out_channels, True, positive, quantize)
        self.gate_fn = activation(nn.Sigmoid(), quantize)
        self.short_conv = nn.Sequential(
            conv2d(in_channels, out_channels, 1, quantize=quantize, nonnegative=positive),
            nn.BatchNorm2d(out_channels),
            conv2d(
                out_channels, out_channels, (1, 5), padding=(0, 2), groups=out_channels, quantize=quantize
            ),
            nn.BatchNorm2d(out_channels),
            conv2d(
                out_channels, out_channels, (5, 1), padding=(2, 0), groups=out_channels, quantize=quantize
            ),
            nn.BatchNorm2d(out_channels),
        )
        edge = quantize and quantize.edge
        self.pool_quantizer = activation_quantizer(quantize, "pool", nonnegative=positive)
        self.resize_quantizer = activation_quantizer(quantize, "activation", nonnegative=True)
        self.features_quantizer = activation_quantizer(edge, "input", nonnegative=True)
        self.gate_quantizer = activation_quantizer(edge, "input", nonnegative=True)
        share_range(name, self.features_quantizer)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.short_conv(nn.functional.avg_pool2d(self.pool_quantizer(x), 2, 2))
        out = super().forward(x)
        gates = self.resize_quantizer(self.gate_fn(gates))
        gates = nn.functional.interpolate(gates, size=out.shape[-2:], mode="nearest")
        return self.features_quantizer(out) * self.gate_quantizer(gates)


class Block(nn.Module):
    """Two ghost modules and a skip: [N, in, H, W] -> [N, out, H / stride, W / stride]."""

    def __init__(
        self,
        name: str,
        in_channels: int,
        width: float,
        size: Size,
        first: bool,
        positive: bool,
        quantize: Scheme | None,
    ) -> None:
        """``first``: its first module has no gates; ``positive``: the input is never below zero."""
        super().__init__()
        inner, outer = round_channels(size.expanded * width, 4), round_channels(size.channels * width, 4)
        stride, padding = size.stride, size.kernel // 2
        depthwise = partial(
            conv2d, kernel_size=size.kernel, stride=stride, padding=padding, quantize=quantize
        )
        expanded, joined = f"{name}.expanded", f"{name}.joined"
        if first:
            self.ghost1 = GhostModule(expanded, in_channels, inner, True, positive, quantize)
        else:
            self.ghost1 = GatedGhostModule(expanded, in_channels, inner, positive, quantize)
        self.conv_dw: nn.Module = nn.Identity()
        self.bn_dw: nn.Module = nn.Identity()
        if stride > 1:
            self.conv_dw = depthwise(inner, inner, groups=inner, nonnegative=True)
            self.bn_dw = nn.BatchNorm2d(inner)
        self.se: nn.Module = nn.Identity()
        if size.gated:
            self.se = SqueezeExcitation(
                inner,
                round_channels(inner * 0.25, 4),
                nn.ReLU(),
                nn.Hardsigmoid(),
                quantize,
                nonnegative=stride == 1,
            )
        self.ghost2 = GhostModule(joined, inner, outer, False, stride == 1, quantize)
        self.shortcut = nn.Sequential()
        skip = "residual"
        if stride > 1 or in_channels != outer:
            skip = "branch"  # the side that is a convolution's output: the other is joined of two
            self.shortcut = nn.Sequential(
                depthwise(in_channels, in_channels, groups=in_channels, nonnegative=positive),
                nn.BatchNorm2d(in_channels),
                conv2d(in_channels, outer, 1, quantize=quantize),
                nn.BatchNorm2d(outer),
            )
            positive = False
        self.residual_quantizer = activation_quantizer(quantize, "residual")
        self.skip_quantizer = activation_quantizer(quantize, skip, nonnegative=positive)
        share_range(joined, self.residual_quantizer)
        if first:
            share_range(expanded, self.conv_dw if stride > 1 else self.ghost2.primary_conv[0])

    def forward(self, x: Tensor) -> Tensor:
        out = self.se(self.bn_dw(self.conv_dw(self.ghost1(x))))
        out = self.ghost2(out)
        return self.residual_quantizer(out) + self.skip_quantizer(self.shortcut(x))


class GhostNetV2(HubMixin, nn.Module):
    """A stem, blocks, a 1x1 convolution, global average pooling, another one and a linear classifier."""

    def __init__(
        self,
        width: float,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        quantize: Scheme | None = None,
    ) -> None:
        super().__init__()
        channels = round_channels(16 * width, 4)
        self.conv_stem = conv2d(in_channels, channels, 3, stride=2, padding=1, quantize=quantize, edge=True)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        stages: list[nn.Module] = []
        number = 0
        for i, stage in enumerate(STAGES):
            blocks: list[nn.Module] = []
            for size in stage:
                name = f"blocks.{i}.{len(blocks)}"
                blocks.append(Block(name, channels, width, size, number <= 1, number == 0, quantize))
                channels, number = round_channels(size.channels * width, 4), number + 1
            stages.append(nn.Sequential(*blocks))
        last = round_channels(STAGES[-1][-1].expanded * width, 4)
        conv = conv_norm_activation(
            channels, last, 1, function=self.relu, names=("conv", "bn1", "relu"), quantize=quantize
        )
        self.blocks = nn.Sequential(*stages, nn.Sequential(conv))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.conv_head = conv2d(last, 1280, 1, bias=True, quantize=quantize, nonnegative=True)
        self.dropout = nn.Dropout(0.2)
        self.classifier = linear(1280, num_classes, quantize=quantize, nonnegative=True, edge=True)
        self.pool_quantizer = activation_quantizer(quantize, "pool", nonnegative=True)
        self.output_quantizer = activation_quantizer(quantize, "output")
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu(self.bn1(self.conv_stem(x))))
        x = self.relu(self.conv_head(self.avgpool(self.pool_quantizer(x))))
        return self.output_quantizer(self.classifier(self.dropout(torch.flatten(x, 1))))


def _published(name: str, top1: float) -> dict[str, FloatWeights]:
    """The authors' weights, from timm; top-1 by its table of results at commit 7479d45."""
    return {"in1k": timm_weights(f"{name}.in1k", top1)}


@register_model(_published("ghostnetv2_100", 75.176), FAMILY, key_map=timm_names)
def ghostnetv2_100(**options: Any) -> GhostNetV2:
    """GhostNetV2 x 1.0: 6.2 M parameters, 0.2 G multiply-adds."""
    return GhostNetV2(1.0, **options)


@register_model(_published("ghostnetv2_130", 76.762), FAMILY, key_map=timm_names)
def ghostnetv2_130(**options: Any) -> GhostNetV2:
    """GhostNetV2 x 1.3: 9.0 M parameters, 0.3 G multiply-adds."""
    return GhostNetV2(1.3, **options)


@register_model(_published("ghostnetv2_160", 77.836), FAMILY, key_map=timm_names)
def ghostnetv2_160(**options: Any) -> GhostNetV2:
    """GhostNetV2 x 1.6: 12.4 M parameters, 0.4 G multiply-adds."""
    return GhostNetV2(1.6, **options)
