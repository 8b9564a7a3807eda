"""SqueezeNet 1.0 and 1.1 for ImageNet, with torchvision's parameter names.

Paper: "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model size" (Iandola et al., 2016,
arXiv:1602.07360); 1.1 is the authors' faster form, which pools earlier.

Shapes of 1.1 at 224 pixels: stem [N, 64, 111, 111], then fire modules at [N, 128, 55, 55], [N, 256, 27, 27] and
[N, 512, 13, 13], classifier [N, num_classes, 13, 13], logits [N, num_classes].

Quantization: all inputs of weighted layers but the image follow a ReLU. A fire module joins two convolutions' outputs:
its ``concat_quantizer`` gives both one range, so that joining moves integers. The logits are averages behind a ReLU,
between ``pool_quantizer`` and ``output_quantizer``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qzoo.hub_mixin import HubMixin
from qzoo.models.layers import activation_quantizer, conv2d, init_weights, share_range
from qzoo.registry import Family, register_model, torchvision_weights
from qzoo.scheme import Scheme

_CITATION = """@article{iandola2016squeezenet,
  title = {SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model size},
  author = {Iandola, Forrest N. and Han, Song and Moskewicz, Matthew W. and others},
  journal = {arXiv:1602.07360},
  year = {2016}
}
"""
FAMILY = Family(_CITATION)

# Squeezed channels and channels of each expansion of the fire modules, in both versions.
FIRES = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))


class Fire(nn.Module):
    """Squeeze 1x1, expand 1x1 and 3x3 side by side: [N, in, H, W] -> [N, 2 expanded, H, W]."""

    def __init__(self, in_channels: int, squeezed: int, expanded: int, quantize: Scheme | None) -> None:
        super().__init__()
        self.squeeze = conv2d(in_channels, squeezed, 1, bias=True, quantize=quantize, nonnegative=True)
        self.expand1x1 = conv2d(squeezed, expanded, 1, bias=True, quantize=quantize, nonnegative=True)
        self.expand3x3 = conv2d(
            squeezed, expanded, 3, padding=1, bias=True, quantize=quantize, nonnegative=True
        )
        self.relu = nn.ReLU(inplace=True)
        self.concat_quantizer = activation_quantizer(quantize, "input", nonnegative=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.squeeze(x))
        parts = [self.relu(self.expand1x1(x)), self.relu(self.expand3x3(x))]
        return torch.cat([self.concat_quantizer(part) for part in parts], 1)


class SqueezeNet(HubMixin, nn.Module):
    """A stem, eight fire modules, and a 1x1 convolution whose outputs are averaged."""

    def __init__(
        self,
        width: int,
        kernel_size: int,
        pools: tuple[int, ...],
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        quantize: Scheme | None = None,
    ) -> None:
        """``pools`` are the numbers of fire modules before each max pooling."""
        super().__init__()
        features: list[nn.Module] = [
            conv2d(in_channels, width, kernel_size, stride=2, bias=True, quantize=quantize, edge=True),
            nn.ReLU(inplace=True),
        ]
        channels = width
        for i, (squeezed, expanded) in enumerate(FIRES):
            if i in pools:
                features.append(nn.MaxPool2d(3, 2, ceil_mode=True))
            features.append(Fire(channels, squeezed, expanded, quantize))
            channels = 2 * expanded
        self.features = nn.Sequential(*features)
        fires = [module for module in features if isinstance(module, Fire)]
        self.classifier = nn.Sequential(
            nn.Dropout(0.5),
            conv2d(channels, num_classes, 1, bias=True, quantize=quantize, nonnegative=True, edge=True),
            nn.ReLU(inplace=True),
        )
        readers = [*(fire.squeeze for fire in fires[1:]), self.classifier[1]]
        for i, (fire, reader) in enumerate(zip(fires, readers, strict=True)):
            share_range(f"concat{i}", fire.concat_quantizer, reader)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.pool_quantizer = activation_quantizer(quantize, "pool", nonnegative=True)
        self.output_quantizer = activation_quantizer(quantize, "output", nonnegative=True)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.classifier(self.features(x))
        x = self.avgpool(self.pool_quantizer(x))
        return self.output_quantizer(torch.flatten(x, 1))


@register_model({"tv_in1k": torchvision_weights("squeezenet1_0-b66bff10.pth", 58.092)}, FAMILY)
def squeezenet1_0(**options: Any) -> SqueezeNet:
    """SqueezeNet 1.0: 1.2 M parameters, 0.8 G multiply-adds."""
    return SqueezeNet(96, 7, (0, 3, 7), **options)


@register_model({"tv_in1k": torchvision_weights("squeezenet1_1-b8a52dc0.pth", 58.178)}, FAMILY)
def squeezenet1_1(**options: Any) -> SqueezeNet:
    """SqueezeNet 1.1: 1.2 M parameters, 0.3 G multiply-adds."""
    return SqueezeNet(64, 3, (0, 2, 4), **options)
