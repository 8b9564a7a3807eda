"""ShuffleNetV2 for ImageNet, with torchvision's parameter names.

Paper: "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design" (Ma et al., 2018, arXiv:1807.11164).

Shapes of width 1.0 at 224 pixels: stem [N, 24, 56, 56], then the stages [N, 116, 28, 28], [N, 232, 14, 14] and
[N, 464, 7, 7], a 1x1 convolution [N, 1024, 7, 7], logits [N, num_classes].

Quantization: what a block joins follows a ReLU. Half of the channels passes a block as it is, so all that a stage joins
has one range, with what reads it: the runtimes then split, shuffle and join integers as they are. Between a depthwise
convolution and the 1x1 behind it there is no activation: that input is signed. ``pool_quantizer`` and
``output_quantizer`` close the network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qzoo.hub_mixin import HubMixin
from qzoo.models.layers import activation_quantizer, conv2d, init_weights, linear, share_range
from qzoo.registry import DEPTHWISE, Family, register_model, torchvision_weights
from qzoo.scheme import Scheme

_CITATION = """@article{ma2018shufflenet,
  title = {ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design},
  author = {Ma, Ningning and Zhang, Xiangyu and Zheng, Hai-Tao and Sun, Jian},
  journal = {arXiv:1807.11164},
  year = {2018}
}
"""
FAMILY = Family(_CITATION, DEPTHWISE)
DEPTHS = (4, 8, 4)


class Block(nn.Module):
    """Two branches of half the channels, shuffled: [N, in, H, W] -> [N, out, H / stride, W / stride].

    With stride 1 the first branch is half of the input, and the second one reads the other half.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, quantize: Scheme | None) -> None:
        super().__init__()
        half = out_channels // 2
        self.halves = stride == 1
        self.branch1 = nn.Sequential()
        if not self.halves:
            self.branch1 = nn.Sequential(
                *_depthwise(in_channels, stride, quantize), *_pointwise(in_channels, half, quantize, False)
            )
        self.branch2 = nn.Sequential(
            *_pointwise(half if self.halves else in_channels, half, quantize, True),
            *_depthwise(half, stride, quantize),
            *_pointwise(half, half, quantize, False),
        )
        if self.halves:
            self.move_quantizer = activation_quantizer(quantize, "input", nonnegative=True)
        self.concat_quantizer = activation_quantizer(quantize, "input", nonnegative=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.halves:
            skip, x = self.move_quantizer(x).chunk(2, dim=1)
        else:
            skip = self.branch1(x)
        parts = [self.concat_quantizer(part) for part in (skip, self.branch2(x))]
        n, _, height, width = parts[0].shape
        pairs = torch.cat(parts, 1).view(n, 2, -1, height, width)
        return pairs.transpose(1, 2).contiguous().view(n, -1, height, width)

    @property
    def readers(self) -> list[nn.Module]:
        """What reads the input."""
        return [self.branch2[0], self.move_quantizer if self.halves else self.branch1[0]]


def _depthwise(channels: int, stride: int, quantize: Scheme | None) -> list[nn.Module]:
    conv = conv2d(
        channels,
        channels,
        3,
        stride=stride,
        padding=1,
        groups=channels,
        quantize=quantize,
        nonnegative=True,
    )
    return [conv, nn.BatchNorm2d(channels)]


def _pointwise(
    in_channels: int, out_channels: int, quantize: Scheme | None, nonnegative: bool
) -> list[nn.Module]:
    conv = conv2d(in_channels, out_channels, 1, quantize=quantize, nonnegative=nonnegative)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


class ShuffleNetV2(HubMixin, nn.Module):
    """A stem, three stages of blocks, a 1x1 convolution, global average pooling and a linear classifier."""

    def __init__(
        self,
        widths: tuple[int, int, int],
        last: int,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        quantize: Scheme | None = None,
    ) -> None:
        """``last`` is the number of channels that are averaged."""
        super().__init__()
        stem = conv2d(in_channels, 24, 3, stride=2, padding=1, quantize=quantize, edge=True)
        self.conv1 = nn.Sequential(stem, nn.BatchNorm2d(24), nn.ReLU(inplace=True))
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels, stages = 24, []
        for width, depth in zip(widths, DEPTHS, strict=True):
            blocks = [Block(channels, width, 2, quantize)]
            blocks += [Block(width, width, 1, quantize) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
            channels = width
        self.stage2, self.stage3, self.stage4 = stages
        self.conv5 = nn.Sequential(*_pointwise(channels, last, quantize, True))
        self.fc = linear(last, num_classes, quantize=quantize, nonnegative=True, edge=True)
        self.pool_quantizer = activation_quantizer(quantize, "pool", nonnegative=True)
        self.output_quantizer = activation_quantizer(quantize, "output")
        self._share_ranges(stages)
        init_weights(self)

    def _share_ranges(self, stages: list[nn.Sequential]) -> None:
        blocks = [[block for block in stage if isinstance(block, Block)] for stage in stages]
        behind = [*(stage[0].readers for stage in blocks[1:]), [self.conv5[0]]]
        for i, (stage, readers) in enumerate(zip(blocks, behind, strict=True)):
            readers = [*readers, *(reader for block in stage[1:] for reader in block.readers)]
            share_range(f"stage{i + 2}", *(block.concat_quantizer for block in stage), *readers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.conv1(x))
        x = self.stage4(self.stage3(self.stage2(x)))
        x = self.pool_quantizer(self.conv5(x)).mean([2, 3])
        return self.output_quantizer(self.fc(x))


@register_model({"tv_in1k": torchvision_weights("shufflenetv2_x0.5-f707e7126e.pth", 60.552)}, FAMILY)
def shufflenet_v2_x0_5(**options: Any) -> ShuffleNetV2:
    """ShuffleNetV2, width 0.5: 1.4 M parameters, 0.04 G multiply-adds."""
    return ShuffleNetV2((48, 96, 192), 1024, **options)


@register_model({"tv_in1k": torchvision_weights("shufflenetv2_x1-5666bf0f80.pth", 69.362)}, FAMILY)
def shufflenet_v2_x1_0(**options: Any) -> ShuffleNetV2:
    """ShuffleNetV2, width 1.0: 2.3 M parameters, 0.1 G multiply-adds."""
    return ShuffleNetV2((116, 232, 464), 1024, **options)


@register_model(
    {"tv_in1k": torchvision_weights("shufflenetv2_x1_5-3c479a10.pth", 72.996, resize=232)}, FAMILY
)
def shufflenet_v2_x1_5(**options: Any) -> ShuffleNetV2:
    """ShuffleNetV2, width 1.5: 3.5 M parameters, 0.3 G multiply-adds."""
    return ShuffleNetV2((176, 352, 704), 1024, **options)


@register_model({"tv_in1k": torchvision_weights("shufflenetv2_x2_0-8be3c8ee.pth", 76.23, resize=232)}, FAMILY)
def shufflenet_v2_x2_0(**options: Any) -> ShuffleNetV2:
    """ShuffleNetV2, width 2.0: 7.4 M parameters, 0.6 G multiply-adds."""
    return ShuffleNetV2((244, 488, 976), 2048, **options)
