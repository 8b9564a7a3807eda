"""ResNet, ResNeXt, Wide ResNet and SE-ResNet for ImageNet, with torchvision's parameter names.

Papers: "Deep Residual Learning for Image Recognition" (He et al., 2015, arXiv:1512.03385), "Aggregated
Residual Transformations" (Xie et al., 2016, arXiv:1611.05431), "Wide Residual Networks" (Zagoruyko and
Komodakis, 2016, arXiv:1605.07146), "Squeeze-and-Excitation Networks" (Hu et al., 2017, arXiv:1709.01507).
The stride of a bottleneck is on its 3x3 convolution, as in torchvision ("ResNet v1.5").

Shapes at 224 pixels: stem [N, 64, 56, 56], then the stages [N, 64e, 56, 56], [N, 128e, 28, 28],
[N, 256e, 14, 14], [N, 512e, 7, 7] with e = 1 for basic blocks and 4 for bottlenecks, logits [N, num_classes].

Quantization: all inputs of weighted layers but the image follow a ReLU. Each add has a ``residual_quantizer``
on its skip input and a ``branch_quantizer`` on the other; ``pool_quantizer`` and ``output_quantizer`` close
the network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.hub_mixin import HubMixin
from qzoo.models.layers import SqueezeExcitation, activation_quantizer, conv2d, init_weights, linear
from qzoo.preprocessing import Preprocessing
from qzoo.registry import Family, FloatWeights, register_model, timm_weights
from qzoo.scheme import Scheme

_CITATION = """@article{he2015deep,
  title = {Deep Residual Learning for Image Recognition},
  author = {He, Kaiming and Zhang, Xiangyu and Ren, Shaoqing and Sun, Jian},
  journal = {arXiv:1512.03385},
  year = {2015}
}
"""
FAMILY = Family(
    _CITATION,
    results="NNCF, ResNet-18: 69.78 to 69.48; Wide ResNet-50: 81.45 to 81.23. Tutorial of pytorch-quantization, "
    "ResNet-50, 1,024 images: 76.2 to 76.1 by the 99.99th percentile, to above 76 by mse and entropy",
)
EXPANSION = 4  # of a bottleneck's width


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip: [N, in, H, W] -> [N, width, H / stride, W / stride]."""

    def __init__(self, in_channels: int, width: int, stride: int = 1, quantize: Scheme | None = None) -> None:
        super().__init__()
        self.out_channels = width
        self.conv1 = conv2d(
            in_channels, width, 3, stride=stride, padding=1, quantize=quantize, nonnegative=True
        )
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv2d(width, width, 3, padding=1, quantize=quantize, nonnegative=True)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = projection(in_channels, width, stride, quantize)
        # The skip is the block's input, after a ReLU, unless a projection (convolution + BN) changes it.
        self.residual_quantizer = activation_quantizer(
            quantize, "residual", nonnegative=self.downsample is None
        )
        self.branch_quantizer = activation_quantizer(quantize, "branch")

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        skip = x if self.downsample is None else self.downsample(x)
        return self.relu(self.branch_quantizer(out) + self.residual_quantizer(skip))


class Bottleneck(nn.Module):
    """1x1, 3x3 (grouped in ResNeXt), 1x1 and a skip: [N, in, H, W] -> [N, 4 width, H / stride, W / stride]"""

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int = 1,
        quantize: Scheme | None = None,
        *,
        groups: int = 1,
        base_width: int = 64,
    ) -> None:
        super().__init__()
        inner = int(width * (base_width / 64.0)) * groups
        outer = self.out_channels = width * EXPANSION
        self.conv1 = conv2d(in_channels, inner, 1, quantize=quantize, nonnegative=True)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = conv2d(
            inner, inner, 3, stride=stride, padding=1, groups=groups, quantize=quantize, nonnegative=True
        )
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = conv2d(inner, outer, 1, quantize=quantize, nonnegative=True)
        self.bn3 = nn.BatchNorm2d(outer)
        self.se: nn.Module = nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        self.downsample = projection(in_channels, outer, stride, quantize)
        self.residual_quantizer = activation_quantizer(
            quantize, "residual", nonnegative=self.downsample is None
        )
        self.branch_quantizer = activation_quantizer(quantize, "branch")

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.se(self.bn3(self.conv3(out)))
        skip = x if self.downsample is None else self.downsample(x)
        return self.relu(self.branch_quantizer(out) + self.residual_quantizer(skip))


class SEBottleneck(Bottleneck):
    """A bottleneck whose branch has a gate for each channel (squeeze and excitation)."""

    def __init__(self, in_channels: int, width: int, stride: int = 1, quantize: Scheme | None = None) -> None:
        super().__init__(in_channels, width, stride, quantize)
        channels = self.out_channels
        self.se = SqueezeExcitation(channels, channels // 16, nn.ReLU(), nn.Sigmoid(), quantize)
        # The branch ends in a product: what the runtimes fuse with an add is the convolution of the skip, if any.
        self.branch_quantizer = activation_quantizer(quantize, "residual")
        if self.downsample is not None:
            self.residual_quantizer = activation_quantizer(quantize, "branch")


class ResNet(HubMixin, nn.Module):
    """A stem, four stages of blocks, global average pooling and a linear classifier."""

    def __init__(
        self,
        block: Callable[[int, int, int, Scheme | None], Any],
        depths: Sequence[int],
        *,
        stem: nn.Module | None = None,
        num_classes: int = 1000,
        in_channels: int = 3,
        quantize: Scheme | None = None,
    ) -> None:
        """
        Args:
            block: makes a block of input channels, width, stride and scheme.
            depths: blocks in each stage.
            stem: convolutions from the image to 64 channels of half its size, in place of one of 7x7.
            num_classes, in_channels, quantize: as of :func:`qzoo.create_model`.
        """
        super().__init__()
        if stem is None:
            stem = conv2d(in_channels, 64, 7, stride=2, padding=3, quantize=quantize, edge=True)
        self.conv1 = stem
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

        channels, stages = 64, []
        for i, depth in enumerate(depths):
            width, blocks = 64 * 2**i, []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(block(channels, width, stride, quantize))
                channels = blocks[-1].out_channels
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages

        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = linear(channels, num_classes, quantize=quantize, nonnegative=True, edge=True)
        self.pool_quantizer = activation_quantizer(quantize, "pool", nonnegative=True)
        self.output_quantizer = activation_quantizer(quantize, "output")
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.avgpool(self.pool_quantizer(x))
        return self.output_quantizer(self.fc(torch.flatten(x, 1)))


def projection(in_channels: int, out_channels: int, stride: int, quantize: Scheme | None) -> nn.Module | None:
    """Make the projection of a skip whose shape changes: 1x1 convolution and BN. None where the shape stays."""
    if stride == 1 and in_channels == out_channels:
        return None
    conv = conv2d(in_channels, out_channels, 1, stride=stride, quantize=quantize, nonnegative=True)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


def _published(
    top1: float,
    sha256: str,
    revision: str = "",
    hub_sha256: str = "",
    crop_pct: float = 0.875,
    tuning: Mapping[str, Any] | None = None,
) -> Callable[[Callable], Callable]:
    """Register a network with torchvision's first weights: from timm's Hub repository, if its file is known, or by URL.

    Args:
        top1: on ImageNet, in percent, from the ``meta`` of torchvision's weights.
        sha256: SHA-256 of torchvision's file, or the first 8 of its hex digits where no more is known; these are
            part of its URL.
        revision: commit of ``timm/<arch>.tv_in1k``, "" for its default branch; hub_sha256: SHA-256 of its
            ``model.safetensors``.
        tuning: as of :func:`register_model`.
    """

    def register(build: Callable) -> Callable:
        url = f"https://download.pytorch.org/models/{build.__name__}-{sha256[:8]}.pth"
        hub = f"hf:timm/{build.__name__}.tv_in1k/model.safetensors"
        weights = FloatWeights(
            sources=(hub, url) if hub_sha256 else (url,),
            sha256=(hub_sha256, sha256) if hub_sha256 else (sha256,),
            revision=revision,
            preprocessing=Preprocessing(crop_pct=crop_pct),
            license="bsd-3-clause",
            top1=top1,
        )
        return register_model({"tv_in1k": weights}, FAMILY, tuning=tuning)(build)

    return register


@_published(
    69.758,
    "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec",
    "bbd144b3e5565108aad885f145491d11bc6ce807",
    "694f673df6520a3158624e8a89af086f59923ee4cd7436fe5bc3bc71d295ad81",
    tuning={"epochs": 9, "lr": 0.001, "weight_decay": 1e-4},
)
def resnet18(**options: Any) -> ResNet:
    """ResNet-18: 11.7 M parameters, 1.8 G multiply-adds."""
    return ResNet(BasicBlock, (2, 2, 2, 2), **options)


@_published(
    73.314,
    "b627a593bcbe140c234610266fe4f8ae95ea42fc881d091c9b6052e6b1d0590f",
    "1b7b21cca82ff974d341713f777bf740c2db38c4",
    "0bb82595a564991a9d424708b33f5d843f5aaed7f6c0886ff10849ff97022235",
)
def resnet34(**options: Any) -> ResNet:
    """ResNet-34: 21.8 M parameters, 3.7 G multiply-adds."""
    return ResNet(BasicBlock, (3, 4, 6, 3), **options)


@_published(
    76.13,
    "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a",
    "78f3ecfdb38e06d9b8397f662e7ab8fee96026fa",
    "5d061a3c593d795bfe682d9b152bafbcf550579873492def3515b46db1189888",
    tuning={"epochs": 15, "lr": 0.001, "weight_decay": 1e-4},
)
def resnet50(**options: Any) -> ResNet:
    """ResNet-50: 25.6 M parameters, 4.1 G multiply-adds."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **options)


@_published(77.374, "63fe2227b86e8f1f2063f43a75c84d195911b6a0eace650907dd3dc62dd49a0a")
def resnet101(**options: Any) -> ResNet:
    """ResNet-101: 44.5 M parameters, 7.8 G multiply-adds."""
    return ResNet(Bottleneck, (3, 4, 23, 3), **options)


@_published(
    78.312,
    "394f9c45966e3651a89bbb78a48410a6755854ce4a5ab64927cf1c7247f85e58",
    "2a9b5c2460893a2ab13d8625db2383f3094d704f",
    "15897077afdf4d6334dc0c3f8e6fb483afb3faa9298c139f3c6eb29bca6ae5b2",
)
def resnet152(**options: Any) -> ResNet:
    """ResNet-152: 60.2 M parameters, 11.5 G multiply-adds."""
    return ResNet(Bottleneck, (3, 8, 36, 3), **options)


@_published(
    77.618,
    "7cdf4587",
    "ac4eef0c61cc63cb64d8c416bf9b518f757bed1f",
    "c0d85cba49c0e9dedbcf6d4e572e2c5ea5eb68e9d64d0564811fd54d4f72939a",
)
def resnext50_32x4d(**options: Any) -> ResNet:
    """ResNeXt-50, 32 groups of width 4: 25.0 M parameters."""
    return ResNet(partial(Bottleneck, groups=32, base_width=4), (3, 4, 6, 3), **options)


@_published(79.312, "8ba56ff5", hub_sha256="71c7427e233904ad828b768b9683876dc71f143876cbadaa26428bfea3560fc3")
def resnext101_32x8d(**options: Any) -> ResNet:
    """ResNeXt-101, 32 groups of width 8: 88.8 M parameters."""
    return ResNet(partial(Bottleneck, groups=32, base_width=8), (3, 4, 23, 3), **options)


@_published(
    83.246,
    "173b62eb",
    "56d0407ee160d0f4436a455f9d3f66f4454010ac",
    "47528f24e5cd6844249c9e4ea11aed6619431b83a0596afe80efdfffdb369900",
    crop_pct=0.965,
)  # resized to 232
def resnext101_64x4d(**options: Any) -> ResNet:
    """ResNeXt-101, 64 groups of width 4: 83.5 M parameters."""
    return ResNet(partial(Bottleneck, groups=64, base_width=4), (3, 4, 23, 3), **options)


@_published(
    78.468,
    "95faca4d11227dddf8633dbb5ff6c8a9003c1aa5b8945c73834b8007b10950b8",
    "343c5fa59ca8a131e0cdf42144a641b36a0387c2",
    "df6fb6c4824769769de18e14088475fd6ee94236849aa4e5d8022ba9d9a9a16c",
)
def wide_resnet50_2(**options: Any) -> ResNet:
    """Wide ResNet-50-2, inner width doubled: 68.9 M parameters."""
    return ResNet(partial(Bottleneck, base_width=128), (3, 4, 6, 3), **options)


@_published(78.848, "32ee11565f95f2f07223b243ada444a6457c4b90a88e6e293922813faf6dfd06")
def wide_resnet101_2(**options: Any) -> ResNet:
    """Wide ResNet-101-2, inner width doubled: 126.9 M parameters."""
    return ResNet(partial(Bottleneck, base_width=128), (3, 4, 23, 3), **options)


@register_model(
    {
        "a1_in1k": timm_weights(
            "seresnet50.a1_in1k",
            81.102,
            release="v0.1-rsb-weights/seresnet50_a1_0-ffa00869",
            size=288,
            crop_pct=1.0,
        )
    },
    FAMILY,
)
def seresnet50(**options: Any) -> ResNet:
    """SE-ResNet-50: 28.1 M parameters, 4.1 G multiply-adds at 224 pixels."""
    return ResNet(SEBottleneck, (3, 4, 6, 3), **options)
