"""The small ResNets for 32x32 images (and 28x28 ones): 20, 32, 44, 56 and 110 layers.

Paper: "Deep Residual Learning for Image Recognition" (He et al., 2015, arXiv:1512.03385), section 4.2. Where
a stage changes the shape, the skip is a 1x1 convolution with BN (the paper's option B), not a padded slice:
the padded slice has no int8 kernel in the runtimes.

Shapes at 32 pixels: stem and first stage [N, 16, 32, 32], then [N, 32, 16, 16], [N, 64, 8, 8], logits
[N, num_classes]. Depth = 6 n + 2 with n blocks a stage.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qzoo.hub_mixin import HubMixin
from qzoo.models.layers import activation_quantizer, conv2d, init_weights, linear
from qzoo.models.resnet import FAMILY, BasicBlock
from qzoo.preprocessing import Preprocessing
from qzoo.registry import FloatWeights, register_model
from qzoo.scheme import Scheme


class CifarResNet(HubMixin, nn.Module):
    """A 3x3 stem, three stages of ``blocks`` basic blocks, global average pooling and a linear classifier."""

    def __init__(
        self, blocks: int, *, num_classes: int = 10, in_channels: int = 3, quantize: Scheme | None = None
    ) -> None:
        super().__init__()
        self.conv1 = conv2d(in_channels, 16, 3, padding=1, quantize=quantize, edge=True)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(16, 16, blocks, 1, quantize)
        self.layer2 = _stage(16, 32, blocks, 2, quantize)
        self.layer3 = _stage(32, 64, blocks, 2, quantize)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = linear(64, num_classes, quantize=quantize, nonnegative=True, edge=True)
        self.pool_quantizer = activation_quantizer(quantize, "pool", nonnegative=True)
        self.output_quantizer = activation_quantizer(quantize, "output")
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = self.avgpool(self.pool_quantizer(x))
        return self.output_quantizer(self.fc(torch.flatten(x, 1)))


def _stage(in_channels: int, width: int, blocks: int, stride: int, quantize: Scheme | None) -> nn.Sequential:
    first = BasicBlock(in_channels, width, stride, quantize=quantize)
    return nn.Sequential(first, *(BasicBlock(width, width, quantize=quantize) for _ in range(blocks - 1)))


def fashion_mnist_weights(arch: str) -> dict[str, FloatWeights]:
    """Describe weights that the zoo trains itself; once trained, they are a checkpoint of their own."""
    return {
        "fmnist": FloatWeights(
            sources=(f"qzoo:{arch}.fmnist",),
            preprocessing=Preprocessing((1, 28, 28), 1.0, "bilinear", (0.2860,), (0.3530,)),
            labels="fashion-mnist",
        )
    }


@register_model(fashion_mnist_weights("resnet20"), FAMILY, num_classes=10)
def resnet20(**options: Any) -> CifarResNet:
    """ResNet-20: 0.27 M parameters."""
    return CifarResNet(3, **options)


@register_model(fashion_mnist_weights("resnet32"), FAMILY, num_classes=10)
def resnet32(**options: Any) -> CifarResNet:
    """ResNet-32: 0.47 M parameters."""
    return CifarResNet(5, **options)


@register_model(fashion_mnist_weights("resnet44"), FAMILY, num_classes=10)
def resnet44(**options: Any) -> CifarResNet:
    """ResNet-44: 0.66 M parameters."""
    return CifarResNet(7, **options)


@register_model(fashion_mnist_weights("resnet56"), FAMILY, num_classes=10)
def resnet56(**options: Any) -> CifarResNet:
    """ResNet-56: 0.86 M parameters."""
    return CifarResNet(9, **options)


@register_model(fashion_mnist_weights("resnet110"), FAMILY, num_classes=10)
def resnet110(**options: Any) -> CifarResNet:
    """ResNet-110: 1.73 M parameters."""
    return CifarResNet(18, **options)
