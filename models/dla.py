"""DLA-34 for ImageNet, with timm's parameter names.

Paper: "Deep Layer Aggregation" (Yu et al., 2017, arXiv:1707.06484).

Shapes at 224 pixels: the first convolution [N, 16, 224, 224], then the levels [N, 16, 224, 224], [N, 32, 112, 112],
[N, 64, 56, 56], [N, 128, 28, 28], [N, 256, 14, 14] and [N, 512, 7, 7], logits [N, num_classes]. A tree has two blocks
and a root, which joins the outputs of both, and those of the trees before it, in one 1x1 convolution.

Quantization: all inputs of layers but the image follow a ReLU. What a root joins has one range, and so has what a
maximum is taken of; these are the same where the root joins the tree's input. Each add has a
``residual_quantizer`` on its skip input and a ``branch_quantizer`` on the other; ``pool_quantizer`` and
``output_quantizer`` close the network.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.hub_mixin import HubMixin
from qzoo.models.layers import activation_quantizer, conv2d, conv_norm_activation, init_weights, share_range
from qzoo.registry import Family, register_model, timm_weights
from qzoo.scheme import Scheme

_CITATION = """@article{yu2017deep,
  title = {Deep Layer Aggregation},
  author = {Yu, Fisher and Wang, Dequan and Shelhamer, Evan and Darrell, Trevor},
  journal = {arXiv:1707.06484},
  year = {2017}
}
"""
FAMILY = Family(_CITATION, results="NNCF, DLA-34: 74.63 to 74.53")


class Block(nn.Module):
    """Two 3x3 convolutions beside a skip that is given: [N, in, H, W] -> [N, width, H / stride, W / stride]."""

    def __init__(
        self, in_channels: int, width: int, stride: int, positive: bool, quantize: Scheme | None
    ) -> None:
        """``positive``: the skip is never below zero."""
        super().__init__()
        self.conv1 = conv2d(
            in_channels, width, 3, stride=stride, padding=1, quantize=quantize, nonnegative=True
        )
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv2d(width, width, 3, padding=1, quantize=quantize, nonnegative=True)
        self.bn2 = nn.BatchNorm2d(width)
        self.residual_quantizer = activation_quantizer(quantize, "residual", nonnegative=positive)
        self.branch_quantizer = activation_quantizer(quantize, "branch")

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(self.branch_quantizer(out) + self.residual_quantizer(skip))


class Root(nn.Module):
    """Join tensors in a 1x1 convolution, BatchNorm and a ReLU: [N, in, H, W] -> [N, out, H, W]."""

    def __init__(self, in_channels: int, out_channels: int, quantize: Scheme | None) -> None:
        super().__init__()
        self.conv = conv2d(in_channels, out_channels, 1, quantize=quantize, nonnegative=True)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.concat_quantizer = activation_quantizer(quantize, "input", nonnegative=True)

    def forward(self, parts: list[Tensor]) -> Tensor:
        joined = torch.cat([self.concat_quantizer(part) for part in parts], 1)
        return self.relu(self.bn(self.conv(joined)))


class Tree(nn.Module):
    """Two blocks and their root, or two trees of one level less: [N, in, H, W] -> [N, out, H / stride, W / stride]."""

    def __init__(
        self,
        name: str,
        levels: int,
        in_channels: int,
        out_channels: int,
        stride: int,
        quantize: Scheme | None,
        *,
        keeps_input: bool = False,
        others: int = 0,
    ) -> None:
        """
        Args:
            name: for the ranges that it shares.
            keeps_input: the root joins the tree's input, too.
            others: channels of what trees before it give to the root.

        What reads the input is in ``readers``, what reads the parts that the root joins in ``joined``.
        """
        super().__init__()
        self.readers: list[nn.Module]
        self.joined: list[nn.Module]
        self.keeps_input = keeps_input
        others += in_channels if keeps_input else 0
        self.downsample: nn.Module = nn.Identity()
        self.move_quantizer: nn.Module = nn.Identity()
        if stride > 1:
            self.downsample = nn.MaxPool2d(stride, stride)
            role = "activation" if levels > 1 else "input"
            self.move_quantizer = activation_quantizer(quantize, role, nonnegative=True)
        self.project: nn.Module = nn.Identity()
        self.tree1: Block | Tree
        self.tree2: Block | Tree
        self.root: Root
        if levels > 1:
            self.tree1 = Tree(f"{name}.1", levels - 1, in_channels, out_channels, stride, quantize)
            self.tree2 = Tree(
                f"{name}.2", levels - 1, out_channels, out_channels, 1, quantize, others=others + out_channels
            )
            self.readers = [self.move_quantizer, *self.tree1.readers]
            self.joined = [*self.tree2.readers, *self.tree2.joined]
            share_range(name, *self.readers, *self.joined)
            return
        projected = in_channels != out_channels
        self.tree1 = Block(in_channels, out_channels, stride, not projected, quantize)
        self.tree2 = Block(out_channels, out_channels, 1, True, quantize)
        skip = self.tree1.residual_quantizer
        if projected:
            skip = conv2d(in_channels, out_channels, 1, quantize=quantize, nonnegative=True)
            self.project = nn.Sequential(skip, nn.BatchNorm2d(out_channels))
        self.root = Root(2 * out_channels + others, out_channels, quantize)
        self.readers = [self.move_quantizer, self.tree1.conv1, skip]
        second = [self.tree2.conv1, self.tree2.residual_quantizer]
        self.joined = [self.root.concat_quantizer, self.root.conv, *second]
        share_range(name, *self.readers)
        share_range(name if keeps_input else f"{name}.root", *self.joined)

    def forward(self, x: Tensor, children: tuple[Tensor, ...] = ()) -> Tensor:
        bottom = self.downsample(self.move_quantizer(x))
        if self.keeps_input:
            children = (*children, bottom)
        if isinstance(self.tree1, Tree):
            first = self.tree1(x)
            return self.tree2(first, (*children, first))
        first = self.tree1(x, self.project(bottom))
        second = self.tree2(first, first)
        return self.root([second, first, *children])


class DLA(HubMixin, nn.Module):
    """Three convolutions, four trees, global average pooling and a classifier that is a 1x1 convolution."""

    def __init__(
        self,
        levels: tuple[int, ...],
        widths: tuple[int, ...],
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        quantize: Scheme | None = None,
    ) -> None:
        """``levels`` are those of the trees; ``widths`` also of the two convolutions before."""
        super().__init__()

        conv = partial(conv_norm_activation, function=nn.ReLU(inplace=True), quantize=quantize)
        self.base_layer = conv(in_channels, widths[0], 7, edge=True)
        self.level0 = conv(widths[0], widths[0], 3, nonnegative=True)
        self.level1 = conv(widths[0], widths[1], 3, stride=2, nonnegative=True)
        for i, depth in enumerate(levels, start=2):
            tree = Tree(f"level{i}", depth, widths[i - 1], widths[i], 2, quantize, keeps_input=i > 2)
            self.add_module(f"level{i}", tree)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = conv2d(
            widths[-1], num_classes, 1, bias=True, quantize=quantize, nonnegative=True, edge=True
        )
        self.pool_quantizer = activation_quantizer(quantize, "pool", nonnegative=True)
        self.output_quantizer = activation_quantizer(quantize, "output")
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.level1(self.level0(self.base_layer(x)))
        for i in range(2, 6):
            x = self.get_submodule(f"level{i}")(x)
        x = self.fc(self.avgpool(self.pool_quantizer(x)))
        return self.output_quantizer(torch.flatten(x, 1))


@register_model(
    {"in1k": timm_weights("dla34.in1k", 74.638, interpolation="bilinear", license="bsd-3-clause")},
    FAMILY,
)
def dla34(**options: Any) -> DLA:
    """DLA-34: 15.7 M parameters, 3.1 G multiply-adds."""
    return DLA((1, 2, 2, 1), (16, 32, 64, 128, 256, 512), **options)
