"""TinyNet: a complete small architecture to copy. Say here which network it is and whose names it keeps.

Paper: its title, authors, year and arXiv number.

Shapes at 32 pixels: stem [N, 16, 32, 32], stages [N, 16, 32, 32] and [N, 32, 16, 16], logits
[N, num_classes].

Quantization: what only the author of a definition knows. Which inputs are never negative, where the adds are,
what ends in a quantizer. Here every input of a weighted layer but the image follows a ReLU.

To add a family: copy this file to ``models/<family>.py``, and add a row to ``tests/models/test_families.py``. The
tests then compare outputs and parameter names with torchvision's, and check each of the statements about quantizers
by running it. In a project of your own the file may lie anywhere: import it before its name is used, give it to the
commands with ``--import FILE``, or name it in the entry point group ``qzoo.models``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# What a definition needs of the zoo: from_pretrained and its kin, the layers, the registry, the scheme's type.
from qzoo.hub_mixin import HubMixin
from qzoo.models.layers import activation_quantizer, conv2d, init_weights, linear
from qzoo.registry import register_model
from qzoo.scheme import Scheme


class Block(nn.Module):
    """Two 3x3 convolutions and a skip: [N, channels, H, W] -> [N, width, H / stride, W / stride]."""

    def __init__(self, channels: int, width: int, stride: int = 1, *, quantize: Scheme | None = None) -> None:
        super().__init__()
        # ``conv2d`` gives nn.Conv2d without a scheme, and with one a QuantConv2d whose parameters have the
        # same names. ``nonnegative=True`` states that the *input* is never below zero: the CPU runtimes then
        # use uint8 for it, with a step half as large. Where that is not certain, leave it out.
        self.conv1 = conv2d(channels, width, 3, stride=stride, padding=1, quantize=quantize, nonnegative=True)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv2d(width, width, 3, padding=1, quantize=quantize, nonnegative=True)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

        self.downsample: nn.Module | None = None
        if stride != 1 or channels != width:
            projection = conv2d(channels, width, 1, stride=stride, quantize=quantize, nonnegative=True)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(width))

        # A quantizer that belongs to no weighted layer asks for a role: by it a target switches it on and off;
        # without a scheme it is an nn.Identity. An add has two, one on each input. The skip is the block's
        # input, after a ReLU, unless a convolution and BN make it signed.
        positive = self.downsample is None
        self.residual_quantizer = activation_quantizer(quantize, "residual", nonnegative=positive)
        self.branch_quantizer = activation_quantizer(quantize, "branch")

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        skip = x if self.downsample is None else self.downsample(x)
        return self.relu(self.branch_quantizer(out) + self.residual_quantizer(skip))


class TinyNet(HubMixin, nn.Module):
    """A stem, two stages of one block, global average pooling and a linear classifier."""

    def __init__(self, num_classes: int, in_channels: int, quantize: Scheme | None) -> None:
        super().__init__()
        # The image is signed once its mean is subtracted: no ``nonnegative`` here.
        self.conv1 = conv2d(in_channels, 16, 3, padding=1, quantize=quantize, edge=True)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(Block(16, 16, quantize=quantize))
        self.layer2 = nn.Sequential(Block(16, 32, stride=2, quantize=quantize))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        # Averages of non-negative values are non-negative.
        self.fc = linear(32, num_classes, quantize=quantize, nonnegative=True, edge=True)

        # The CPU runtimes pool in int8 only behind a quantizer; ONNX Runtime classifies in int8 only before one.
        self.pool_quantizer = activation_quantizer(quantize, "pool", nonnegative=True)
        self.output_quantizer = activation_quantizer(quantize, "output")
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        x = self.avgpool(self.pool_quantizer(x))
        return self.output_quantizer(self.fc(torch.flatten(x, 1)))


# The function's name is the architecture's. Public float weights go in by tag, with pinned sources, preprocessing
# and licence, and so does what a card cites: ``@register_model({"in1k": FloatWeights(...)}, Family(citation=...))``.
# Of a network with SiLU or hard-swish ``Family(defaults=SWISH)`` gives the activations zero points; qzoo.registry has
# more defaults.
@register_model(num_classes=10)
def tiny_net(**options: Any) -> TinyNet:
    """TinyNet: 0.02 M parameters."""
    return TinyNet(**options)
