"""DenseNet for ImageNet, with torchvision's parameter names.

Paper: "Densely Connected Convolutional Networks" (Huang et al., 2016, arXiv:1608.06993), the form with bottlenecks and
compression (DenseNet-BC).

Shapes of DenseNet-121 at 224 pixels: stem [N, 64, 56, 56], then the blocks [N, 256, 56, 56], [N, 512, 28, 28],
[N, 1024, 14, 14] and [N, 1024, 7, 7], each but the last halved in channels and size behind, logits [N, num_classes].

Quantization: all inputs of layers but the image follow a ReLU. What a block joins are outputs of convolutions, which
are signed; all concatenations of a block have one range (``concat_quantizer``), so that the runtimes join integers as
they are. A BatchNorm before a convolution folds into none: it has a ``norm_quantizer``, for ONNX Runtime, where what is
joined goes on in int8. ``pool_quantizer`` and ``output_quantizer`` close the network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.hub_mixin import HubMixin
from qzoo.models.layers import activation_quantizer, conv2d, init_weights, linear, share_range
from qzoo.registry import Family, register_model, torchvision_weights
from qzoo.scheme import Scheme

_CITATION = """@article{huang2016densely,
  title = {Densely Connected Convolutional Networks},
  author = {Huang, Gao and Liu, Zhuang and van der Maaten, Laurens and Weinberger, Kilian Q.},
  journal = {arXiv:1608.06993},
  year = {2016}
}
"""
FAMILY = Family(_CITATION)
BOTTLENECK = 4


class DenseLayer(nn.Module):
    """BatchNorm, ReLU, 1x1, BatchNorm, ReLU, 3x3 on all features so far: [N, in, H, W] in parts -> [N, growth, H, W].

    ``positive`` says that the features are never below zero.
    """

    def __init__(self, in_channels: int, growth: int, positive: bool, quantize: Scheme | None) -> None:
        super().__init__()
        inner = BOTTLENECK * growth
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = conv2d(in_channels, inner, 1, quantize=quantize, nonnegative=True)
        self.norm2 = nn.BatchNorm2d(inner)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = conv2d(inner, growth, 3, padding=1, quantize=quantize, nonnegative=True)
        self.concat_quantizer = activation_quantizer(quantize, "input")
        self.norm_quantizer = activation_quantizer(quantize, "activation", nonnegative=positive)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = features[0]
        if len(features) > 1:
            x = torch.cat([self.concat_quantizer(part) for part in features], 1)
        x = self.relu1(self.norm1(self.norm_quantizer(x)))
        return self.conv2(self.relu2(self.norm2(self.conv1(x))))


class DenseBlock(nn.Module):
    """Layers that each add ``growth`` channels: [N, in, H, W] -> [N, in + depth growth, H, W]."""

    def __init__(
        self, depth: int, in_channels: int, growth: int, positive: bool, quantize: Scheme | None
    ) -> None:
        """``positive`` says that the input is never below zero."""
        super().__init__()
        self.layers = [f"denselayer{i + 1}" for i in range(depth)]
        for i, name in enumerate(self.layers):
            layer = DenseLayer(in_channels + i * growth, growth, positive and i == 0, quantize)
            if i == 0:
                layer.concat_quantizer = nn.Identity()  # one part is not joined
            self.add_module(name, layer)
        self.concat_quantizer = activation_quantizer(quantize, "input")

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for name in self.layers:
            features.append(self.get_submodule(name)(features))
        return torch.cat([self.concat_quantizer(part) for part in features], 1)

    def share_range(self, group: str, behind: nn.Module, positive: bool) -> None:
        """Give all that joins, and what reads it, one range; ``behind`` is the quantizer behind the block."""
        layers = [module for module in self.children() if isinstance(module, DenseLayer)]
        first = [] if positive else [layers[0].norm_quantizer]
        joined = [q for layer in layers[1:] for q in (layer.concat_quantizer, layer.norm_quantizer)]
        share_range(group, self.concat_quantizer, behind, *first, *joined)


class Transition(nn.Module):
    """BatchNorm, ReLU, 1x1 and averages of 2x2: [N, in, H, W] -> [N, in / 2, H / 2, W / 2]."""

    def __init__(self, channels: int, quantize: Scheme | None) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv = conv2d(channels, channels // 2, 1, quantize=quantize, nonnegative=True)
        self.pool = nn.AvgPool2d(2, stride=2)
        self.norm_quantizer = activation_quantizer(quantize, "activation")
        self.pool_quantizer = activation_quantizer(quantize, "pool")

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.relu(self.norm(self.norm_quantizer(x))))
        return self.pool(self.pool_quantizer(x))


class DenseNet(HubMixin, nn.Module):
    """A stem, four dense blocks with transitions between, global average pooling and a linear classifier."""

    def __init__(
        self,
        growth: int,
        depths: tuple[int, ...],
        width: int,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        quantize: Scheme | None = None,
    ) -> None:
        """``width`` is the stem's number of channels."""
        super().__init__()
        self.features = nn.Sequential()
        self.features.conv0 = conv2d(in_channels, width, 7, stride=2, padding=3, quantize=quantize, edge=True)
        self.features.norm0 = nn.BatchNorm2d(width)
        self.features.relu0 = nn.ReLU(inplace=True)
        # What is pooled joins signed values: ONNX Runtime drops the ReLU only before an unsigned Q of its own.
        self.features.stem_quantizer = activation_quantizer(quantize, "activation", nonnegative=True)
        self.features.pool0 = nn.MaxPool2d(3, stride=2, padding=1)
        channels, stem = width, self.features.stem_quantizer
        for i, depth in enumerate(depths):
            block = DenseBlock(depth, channels, growth, i == 0, quantize)
            channels += depth * growth
            self.features.add_module(f"denseblock{i + 1}", block)
            if i < len(depths) - 1:
                transition = Transition(channels, quantize)
                block.share_range(f"block{i + 1}", transition.norm_quantizer, positive=i == 0)
                if i == 0:
                    share_range("stem", stem, block.get_submodule("denselayer1.norm_quantizer"))
                self.features.add_module(f"transition{i + 1}", transition)
                channels //= 2
        last = activation_quantizer(quantize, "activation")
        block.share_range(f"block{len(depths)}", last, positive=False)
        self.features.norm_quantizer = last
        self.features.norm5 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = linear(channels, num_classes, quantize=quantize, nonnegative=True, edge=True)
        self.pool_quantizer = activation_quantizer(quantize, "pool", nonnegative=True)
        self.output_quantizer = activation_quantizer(quantize, "output")
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.pool_quantizer(self.relu(self.features(x))))
        return self.output_quantizer(self.classifier(torch.flatten(x, 1)))


def published_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the entries of torchvision's files, which have its older names: ``denselayer1.norm.1.bias``."""
    pattern = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
    return {pattern.sub(r"\1\2", key): value for key, value in state_dict.items()}


@register_model(
    {"tv_in1k": torchvision_weights("densenet121-a639ec97.pth", 74.434)}, FAMILY, key_map=published_names
)
def densenet121(**options: Any) -> DenseNet:
    """DenseNet-121: 8.0 M parameters, 2.8 G multiply-adds."""
    return DenseNet(32, (6, 12, 24, 16), 64, **options)


@register_model(
    {"tv_in1k": torchvision_weights("densenet161-8d451a50.pth", 77.138)}, FAMILY, key_map=published_names
)
def densenet161(**options: Any) -> DenseNet:
    """DenseNet-161, growth 48: 28.7 M parameters, 7.7 G multiply-adds."""
    return DenseNet(48, (6, 12, 36, 24), 96, **options)


@register_model(
    {"tv_in1k": torchvision_weights("densenet169-b2777c0a.pth", 75.6)}, FAMILY, key_map=published_names
)
def densenet169(**options: Any) -> DenseNet:
    """DenseNet-169: 14.1 M parameters, 3.4 G multiply-adds."""
    return DenseNet(32, (6, 12, 32, 32), 64, **options)


@register_model(
    {"tv_in1k": torchvision_weights("densenet201-c1103571.pth", 76.896)}, FAMILY, key_map=published_names
)
def densenet201(**options: Any) -> DenseNet:
    """DenseNet-201: 20.0 M parameters, 4.3 G multiply-adds."""
    return DenseNet(32, (6, 12, 48, 32), 64, **options)
