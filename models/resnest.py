"""ResNeSt for ImageNet, with timm's parameter names.

Paper: "ResNeSt: Split-Attention Networks" (Zhang et al., 2020, arXiv:2004.08955).

Shapes at 224 pixels: stem of three convolutions [N, 64, 112, 112], pooled [N, 64, 56, 56], then the stages
[N, 256, 56, 56], [N, 512, 28, 28], [N, 1024, 14, 14] and [N, 2048, 7, 7], logits [N, num_classes]. In a block a 3x3
convolution makes two splits [N, 2, width, H, W]; their sum, weighted by attention, goes on.

Quantization: what a convolution, a softmax, a sum or a product of the splits reads is quantized. Each add has a
``residual_quantizer`` on its skip input and a ``branch_quantizer`` on the other; ``pool_quantizer`` and
``output_quantizer`` close the network.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qzoo.models.layers import activation_quantizer, conv2d
from qzoo.models.resnet import EXPANSION, ResNet
from qzoo.registry import Family, FloatWeights, register_model, timm_weights
from qzoo.scheme import Scheme

_CITATION = """@article{zhang2020resnest,
  title = {ResNeSt: Split-Attention Networks},
  author = {Zhang, Hang and Wu, Chongruo and Zhang, Zhongyue and Zhu, Yi and Lin, Haibin and Zhang, Zhi and others},
  journal = {arXiv:2004.08955},
  year = {2020}
}
"""
FAMILY = Family(_CITATION, results="NNCF, 14d: 75.52 to 75.00")
SPLITS = 2


class SplitAttention(nn.Module):
    """A grouped 3x3 convolution to two splits, and their weighted sum: [N, width, H, W] -> the same."""

    def __init__(self, width: int, quantize: Scheme | None) -> None:
        super().__init__()
        squeezed = max(32, width * SPLITS // 4)
        self.conv = conv2d(
            width, width * SPLITS, 3, padding=1, groups=SPLITS, quantize=quantize, nonnegative=True
        )
        self.bn0 = nn.BatchNorm2d(width * SPLITS)
        self.relu = nn.ReLU(inplace=True)
        self.fc1 = conv2d(width, squeezed, 1, bias=True, quantize=quantize, nonnegative=True)
        self.bn1 = nn.BatchNorm2d(squeezed)
        self.fc2 = conv2d(squeezed, width * SPLITS, 1, bias=True, quantize=quantize, nonnegative=True)
        edge = quantize and quantize.edge
        self.move_quantizer = activation_quantizer(quantize, "activation", nonnegative=True)
        self.pool_quantizer = activation_quantizer(quantize, "pool", nonnegative=True)
        self.attention_quantizer = activation_quantizer(quantize, "activation")
        self.split_quantizer = activation_quantizer(edge, "input", nonnegative=True)
        self.gate_quantizer = activation_quantizer(edge, "input", nonnegative=True)
        self.product_quantizer = activation_quantizer(quantize, "activation", nonnegative=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn0(self.conv(x)))
        n, channels, height, width = x.shape
        splits = (n, SPLITS, channels // SPLITS)
        x = self.move_quantizer(x).reshape(*splits, height, width)
        squeezed = self.pool_quantizer(x.sum(dim=1)).mean((2, 3), keepdim=True)
        attention = self.fc2(self.relu(self.bn1(self.fc1(squeezed))))
        attention = self.attention_quantizer(attention).view(n, 1, SPLITS, -1).transpose(1, 2).softmax(dim=1)
        attention = self.gate_quantizer(attention.reshape(*splits, 1, 1))
        return self.product_quantizer(self.split_quantizer(x) * attention).sum(dim=1).contiguous()


class Bottleneck(nn.Module):
    """1x1, split attention, an average where it halves, 1x1 and a skip: [N, in, H, W] -> [N, 4 width, H / s, W / s]."""

    def __init__(self, in_channels: int, width: int, stride: int, quantize: Scheme | None) -> None:
        super().__init__()
        outer = self.out_channels = width * EXPANSION
        self.conv1 = conv2d(in_channels, width, 1, quantize=quantize, nonnegative=True)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = SplitAttention(width, quantize)
        self.avd_last: nn.Module = nn.Identity()
        if stride > 1:
            self.avd_last = nn.Sequential(
                activation_quantizer(quantize, "pool", nonnegative=True), nn.AvgPool2d(3, 2, padding=1)
            )
        self.conv3 = conv2d(width, outer, 1, quantize=quantize, nonnegative=True)
        self.bn3 = nn.BatchNorm2d(outer)
        self.downsample: nn.Module | None = None
        self.skip_quantizer: nn.Module = nn.Identity()
        if stride != 1 or in_channels != outer:
            pool: nn.Module = nn.Identity()
            if stride > 1:
                self.skip_quantizer = activation_quantizer(quantize, "pool", nonnegative=True)
                pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)
            conv = conv2d(in_channels, outer, 1, quantize=quantize, nonnegative=True)
            self.downsample = nn.Sequential(pool, conv, nn.BatchNorm2d(outer))
        positive = self.downsample is None
        self.residual_quantizer = activation_quantizer(quantize, "residual", nonnegative=positive)
        self.branch_quantizer = activation_quantizer(quantize, "branch")

    def forward(self, x: Tensor) -> Tensor:
        out = self.avd_last(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out = self.bn3(self.conv3(out))
        skip = x if self.downsample is None else self.downsample(self.skip_quantizer(x))
        return self.relu(self.branch_quantizer(out) + self.residual_quantizer(skip))


class ResNeSt(ResNet):
    """A ResNet of such blocks, with a stem of three convolutions."""

    def __init__(
        self,
        depths: tuple[int, ...],
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        quantize: Scheme | None = None,
    ) -> None:
        stem = nn.Sequential(
            conv2d(in_channels, 32, 3, stride=2, padding=1, quantize=quantize, edge=True),
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
            conv2d(32, 32, 3, padding=1, quantize=quantize, nonnegative=True),
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
            conv2d(32, 64, 3, padding=1, quantize=quantize, nonnegative=True),
        )
        super().__init__(
            Bottleneck,
            depths,
            stem=stem,
            num_classes=num_classes,
            in_channels=in_channels,
            quantize=quantize,
        )


def _published(name: str, tag: str, file: str, top1: float) -> dict[str, FloatWeights]:
    """The weights of timm's releases, in that file."""
    return {tag: timm_weights(f"{name}.{tag}", top1, release=file, interpolation="bilinear")}


@register_model(
    _published("resnest14d", "gluon_in1k", "v0.1-weights/gluon_resnest14-9c8fe254", 75.51), FAMILY
)
def resnest14d(**options: Any) -> ResNeSt:
    """ResNeSt-14: 10.6 M parameters, 2.8 G multiply-adds."""
    return ResNeSt((1, 1, 1, 1), **options)


@register_model(
    _published("resnest26d", "gluon_in1k", "v0.1-weights/gluon_resnest26-50eb607c", 78.484), FAMILY
)
def resnest26d(**options: Any) -> ResNeSt:
    """ResNeSt-26: 17.1 M parameters, 3.6 G multiply-adds."""
    return ResNeSt((2, 2, 2, 2), **options)


@register_model(_published("resnest50d", "in1k", "v0.1-resnest/resnest50-528c19ca", 80.964), FAMILY)
def resnest50d(**options: Any) -> ResNeSt:
    """ResNeSt-50: 27.5 M parameters, 5.4 G multiply-adds."""
    return ResNeSt((3, 4, 6, 3), **options)
