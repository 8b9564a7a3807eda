"""Res2Net for ImageNet, with timm's parameter names.

Paper: "Res2Net: A New Multi-scale Backbone Architecture" (Gao et al., 2019, arXiv:1904.01169).

Shapes at 224 pixels: as of ResNet-50, stem [N, 64, 56, 56], then the stages [N, 256, 56, 56], [N, 512, 28, 28],
[N, 1024, 14, 14] and [N, 2048, 7, 7], logits [N, num_classes]. In a block of 4 scales each 3x3 convolution sees a
quarter of the channels, and every one but the first adds the output of the one before.

Quantization: all inputs of weighted layers but the image follow a ReLU. The parts that a block splits, adds and joins
have one range. Each residual add has a ``residual_quantizer`` on its skip input and a ``branch_quantizer`` on the
other; ``pool_quantizer`` and ``output_quantizer`` close the network.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.models.layers import activation_quantizer, conv2d, share_range
from qzoo.models.resnet import EXPANSION, ResNet, projection
from qzoo.registry import Family, FloatWeights, register_model, timm_weights
from qzoo.scheme import Scheme

_CITATION = """@article{gao2019res2net,
  title = {Res2Net: A New Multi-scale Backbone Architecture},
  author = {Gao, Shang-Hua and Cheng, Ming-Ming and Zhao, Kai and Zhang, Xin-Yu and Yang, Ming-Hsuan and Torr, Philip},
  journal = {arXiv:1904.01169},
  year = {2019}
}
"""
FAMILY = Family(_CITATION)


class Bottle2neck(nn.Module):
    """1x1, 3x3 convolutions of parts, 1x1 and a skip: [N, in, H, W] -> [N, 4 width, H / stride, W / stride]."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        quantize: Scheme | None,
        *,
        base_width: int,
        scales: int,
    ) -> None:
        super().__init__()
        part = self.part = math.floor(width * (base_width / 64))
        outer = self.out_channels = width * EXPANSION
        self.conv1 = conv2d(in_channels, part * scales, 1, quantize=quantize, nonnegative=True)
        self.bn1 = nn.BatchNorm2d(part * scales)
        self.convs = nn.ModuleList(
            conv2d(part, part, 3, stride=stride, padding=1, quantize=quantize, nonnegative=True)
            for _ in range(scales - 1)
        )
        self.bns = nn.ModuleList(nn.BatchNorm2d(part) for _ in range(scales - 1))
        self.conv3 = conv2d(part * scales, outer, 1, quantize=quantize, nonnegative=True)
        self.bn3 = nn.BatchNorm2d(outer)
        self.relu = nn.ReLU(inplace=True)
        self.move_quantizer = activation_quantizer(quantize, "input", nonnegative=True)
        self.concat_quantizer = activation_quantizer(quantize, "input", nonnegative=True)
        self.branch_quantizer = activation_quantizer(quantize, "branch")
        self.downsample = projection(in_channels, outer, stride, quantize)
        self.is_first = self.downsample is not None
        self.pool: nn.Module = nn.Identity()
        self.residual_quantizer = activation_quantizer(quantize, "residual", nonnegative=not self.is_first)
        if self.is_first:
            self.pool = nn.AvgPool2d(3, stride, padding=1)
            self.pool_quantizer = activation_quantizer(quantize, "pool", nonnegative=True)
        else:
            self.pool_quantizer = nn.Identity()
            self.part_quantizer = activation_quantizer(quantize, "branch", nonnegative=True)
            self.last_quantizer = activation_quantizer(quantize, "residual", nonnegative=True)

    def share_ranges(self, name: str) -> None:
        """Give the parts that are split, added and joined one range; ``name`` is that of the block."""
        if self.is_first:
            share_range(f"{name}.split", self.move_quantizer, *self.convs, self.pool_quantizer)
            share_range(f"{name}.concat", self.concat_quantizer, self.conv3)
        else:
            joined = (self.part_quantizer, self.last_quantizer, self.concat_quantizer, self.conv3)
            share_range(f"{name}.split", self.move_quantizer, self.convs[0], *joined)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        parts = self.move_quantizer(out).split(self.part, 1)
        outputs: list[Tensor] = []
        for i, (conv, norm) in enumerate(zip(self.convs, self.bns, strict=True)):
            part = parts[i]
            if i > 0 and not self.is_first:
                part = self.last_quantizer(outputs[-1]) + self.part_quantizer(part)
            outputs.append(self.relu(norm(conv(part))))
        outputs.append(self.pool(self.pool_quantizer(parts[-1])))
        out = torch.cat([self.concat_quantizer(part) for part in outputs], 1)
        out = self.bn3(self.conv3(out))
        skip = x if self.downsample is None else self.downsample(x)
        return self.relu(self.branch_quantizer(out) + self.residual_quantizer(skip))


class Res2Net(ResNet):
    """A ResNet of such blocks."""

    def __init__(self, depths: tuple[int, ...], base_width: int, scales: int, **options: Any) -> None:
        super().__init__(partial(Bottle2neck, base_width=base_width, scales=scales), depths, **options)
        for name, block in self.named_modules():
            if isinstance(block, Bottle2neck):
                block.share_ranges(name)


def _published(name: str, digits: str, top1: float) -> dict[str, FloatWeights]:
    """The authors' weights, from timm's releases; their licence is not told."""
    release = f"v0.1-res2net/{name}-{digits}"
    weights = timm_weights(f"{name}.in1k", top1, release=release, interpolation="bilinear", license="unknown")
    return {"in1k": weights}


@register_model(_published("res2net50_26w_4s", "06e79181", 77.95), FAMILY)
def res2net50_26w_4s(**options: Any) -> Res2Net:
    """Res2Net-50, 4 scales of width 26: 25.7 M parameters, 4.3 G multiply-adds."""
    return Res2Net((3, 4, 6, 3), 26, 4, **options)


@register_model(_published("res2net50_14w_8s", "6527dddc", 78.158), FAMILY)
def res2net50_14w_8s(**options: Any) -> Res2Net:
    """Res2Net-50, 8 scales of width 14: 25.1 M parameters, 4.2 G multiply-adds."""
    return Res2Net((3, 4, 6, 3), 14, 8, **options)


@register_model(_published("res2net101_26w_4s", "02a759a1", 79.202), FAMILY)
def res2net101_26w_4s(**options: Any) -> Res2Net:
    """Res2Net-101, 4 scales of width 26: 45.2 M parameters, 8.1 G multiply-adds."""
    return Res2Net((3, 4, 23, 3), 26, 4, **options)
