"""EfficientNet B0 to B7 for ImageNet, with torchvision's parameter names.

Paper: "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks" (Tan and Le, 2019, arXiv:1905.11946).

Shapes of B0 at 224 pixels: stem [N, 32, 112, 112], then the stages [N, 16, 112, 112], [N, 24, 56, 56], [N, 40, 28, 28],
[N, 80, 14, 14], [N, 112, 14, 14], [N, 192, 7, 7], [N, 320, 7, 7], head [N, 1280, 7, 7], logits [N, num_classes].

Quantization: only the gates are never negative. ONNX Runtime computes both parts of a SiLU in int8, between two
quantizers; OpenVINO and TensorRT compute it with the layer before. Each add has a ``residual_quantizer`` on its skip
input and a ``branch_quantizer`` on the other; a product of features and gates has a quantizer on both;
``pool_quantizer`` and ``output_quantizer`` close the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qzoo.hub_mixin import HubMixin
from qzoo.models.layers import (
    SqueezeExcitation,
    StochasticDepth,
    activation_quantizer,
    conv_norm_activation,
    init_weights,
    linear,
    round_channels,
)
from qzoo.registry import (
    SWISH,
    Family,
    KeyMap,
    register_model,
    renamed_modules,
    torchvision_weights,
    with_epsilon,
)
from qzoo.scheme import Scheme

_CITATION = """@article{tan2019efficientnet,
  title = {EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks},
  author = {Tan, Mingxing and Le, Quoc V.},
  journal = {arXiv:1905.11946},
  year = {2019}
}
"""
TIMM_EPSILON = 1e-5
FAMILY = Family(_CITATION, SWISH, results="NNCF, B0: 77.70 to 77.10; with full bias correction 77.17")


class Stage(NamedTuple):
    """Blocks of one width: expansion, kernel, first stride, channels in and out, blocks, expansion and 3x3 in one."""

    expansion: int
    kernel_size: int
    stride: int
    in_channels: int
    channels: int
    depth: int
    fused: bool = False


class Architecture(NamedTuple):
    """A network of the family: its stages, channels of the head, dropout, epsilon of the BatchNorms."""

    stages: tuple[Stage, ...]
    head: int
    dropout: float
    epsilon: float = 1e-3
    momentum: float = 0.1

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return sum(stage.depth for stage in self.stages)


B0 = (
    Stage(1, 3, 1, 32, 16, 1),
    Stage(6, 3, 2, 16, 24, 2),
    Stage(6, 5, 2, 24, 40, 2),
    Stage(6, 3, 2, 40, 80, 3),
    Stage(6, 5, 1, 80, 112, 3),
    Stage(6, 5, 2, 112, 192, 4),
    Stage(6, 3, 1, 192, 320, 1),
)


def scaled(width: float, depth: float, dropout: float, **norm: float) -> Architecture:
    """Scale B0: more channels, and more blocks (rounded up)."""
    stages = tuple(
        stage._replace(
            in_channels=round_channels(stage.in_channels * width),
            channels=round_channels(stage.channels * width),
            depth=math.ceil(stage.depth * depth),
        )
        for stage in B0
    )
    return Architecture(stages, 4 * stages[-1].channels, dropout, **norm)


class Block(nn.Module):
    """Expand, depthwise convolution, gates, project 1x1 and a skip: [N, in, H, W] -> [N, out, H / stride, W / stride].

    A fused one expands with the kxk convolution, and has no gates. The skip is there where the shape stays.
    """

    def __init__(
        self, stage: Stage, dropped: float, norm: Callable[[int], nn.Module], quantize: Scheme | None
    ) -> None:
        """``dropped`` is the probability of stochastic depth."""
        super().__init__()
        convolution = partial(conv_norm_activation, norm=norm, quantize=quantize)
        channels, kernel_size, stride = stage.in_channels, stage.kernel_size, stage.stride
        inner = channels * stage.expansion
        layers: list[nn.Module] = []
        if stage.fused:
            width = inner if stage.expansion != 1 else stage.channels
            layers.append(convolution(channels, width, kernel_size, function=_silu(), stride=stride))
        else:
            if stage.expansion != 1:
                layers.append(convolution(channels, inner, 1, function=_silu()))
            layers.append(
                convolution(inner, inner, kernel_size, function=_silu(), stride=stride, groups=inner)
            )
            layers.append(SqueezeExcitation(inner, channels // 4, _silu(), nn.Sigmoid(), quantize))
        projected = not (stage.fused and stage.expansion == 1)
        if projected:
            layers.append(convolution(inner, stage.channels, 1, function=None))
        self.block = nn.Sequential(*layers)
        self.stochastic_depth = StochasticDepth(dropped)
        self.skip = stride == 1 and channels == stage.channels
        if self.skip:
            self.residual_quantizer = activation_quantizer(quantize, "residual")
            self.branch_quantizer = activation_quantizer(quantize, "branch" if projected else "residual")

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(x)
        if not self.skip:
            return out
        return self.branch_quantizer(self.stochastic_depth(out)) + self.residual_quantizer(x)


def _silu() -> nn.Module:
    return nn.SiLU(inplace=True)


class EfficientNet(HubMixin, nn.Module):
    """A stem, stages of blocks, a 1x1 head, global average pooling and a linear classifier."""

    def __init__(
        self,
        architecture: Architecture,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        quantize: Scheme | None = None,
    ) -> None:
        super().__init__()
        stages = architecture.stages
        norm = partial(nn.BatchNorm2d, eps=architecture.epsilon, momentum=architecture.momentum)
        convolution = partial(conv_norm_activation, norm=norm, quantize=quantize)
        stem = convolution(in_channels, stages[0].in_channels, 3, function=_silu(), stride=2, edge=True)
        features: list[nn.Module] = [stem]
        number = 0
        for stage in stages:
            blocks = []
            for i in range(stage.depth):
                shape = stage if i == 0 else stage._replace(in_channels=stage.channels, stride=1)
                blocks.append(Block(shape, 0.2 * number / architecture.depth, norm, quantize))
                number += 1
            features.append(nn.Sequential(*blocks))
        features.append(convolution(stages[-1].channels, architecture.head, 1, function=_silu()))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        classifier = linear(architecture.head, num_classes, quantize=quantize, edge=True)
        self.classifier = nn.Sequential(nn.Dropout(architecture.dropout, inplace=True), classifier)
        self.pool_quantizer = activation_quantizer(quantize, "pool")
        self.output_quantizer = activation_quantizer(quantize, "output")
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.pool_quantizer(self.features(x)))
        return self.output_quantizer(self.classifier(torch.flatten(x, 1)))


def timm_names(architecture: Architecture) -> dict[str, str]:
    """Map the names of timm's ``efficientnet_b0`` and ``efficientnetv2_s`` and their kin to ours."""
    names = {"conv_stem": "features.0.0", "bn1": "features.0.1", "classifier": "classifier.1"}
    for number, stage in enumerate(architecture.stages):
        theirs = ["conv_dw", "bn1", "se.conv_reduce", "se.conv_expand", "conv_pw", "bn2"]
        ours = ["0.0", "0.1", "1.fc1", "1.fc2", "2.0", "2.1"]
        if stage.fused and stage.expansion == 1:
            theirs, ours = ["conv", "bn1"], ["0.0", "0.1"]
        elif stage.fused:
            theirs, ours = ["conv_exp", "bn1", "conv_pwl", "bn2"], ["0.0", "0.1", "1.0", "1.1"]
        elif stage.expansion != 1:
            theirs = [
                "conv_pw",
                "bn1",
                "conv_dw",
                "bn2",
                "se.conv_reduce",
                "se.conv_expand",
                "conv_pwl",
                "bn3",
            ]
            ours = ["0.0", "0.1", "1.0", "1.1", "2.fc1", "2.fc2", "3.0", "3.1"]
        for i in range(stage.depth):
            for layer, own in zip(theirs, ours, strict=True):
                names[f"blocks.{number}.{i}.{layer}"] = f"features.{number + 1}.{i}.block.{own}"
    last = f"features.{len(architecture.stages) + 1}"
    return names | {"conv_head": f"{last}.0", "bn2": f"{last}.1"}


def timm_key_map(architecture: Architecture) -> KeyMap:
    """Map timm's names to ours; its BatchNorms have an epsilon of 1e-5: another one goes into their scale."""
    rename = renamed_modules(timm_names(architecture))

    def key_map(state_dict: Mapping[str, Any]) -> dict[str, Any]:
        state = rename(state_dict)
        if "conv_stem.weight" not in state_dict or architecture.epsilon == TIMM_EPSILON:
            return state
        return with_epsilon(state, architecture.epsilon, TIMM_EPSILON)

    return key_map


SCALED = {
    "b0": scaled(1.0, 1.0, 0.2, epsilon=1e-5),
    "b1": scaled(1.0, 1.1, 0.2, epsilon=1e-5),
    "b2": scaled(1.1, 1.2, 0.3, epsilon=1e-5),
    "b3": scaled(1.2, 1.4, 0.3, epsilon=1e-5),
    "b4": scaled(1.4, 1.8, 0.4, epsilon=1e-5),
    "b5": scaled(1.6, 2.2, 0.4, momentum=0.01),
    "b6": scaled(1.8, 2.6, 0.5, momentum=0.01),
    "b7": scaled(2.0, 3.1, 0.5, momentum=0.01),
}


def _published(name: str, file: str, top1: float, size: int, resize: int) -> Callable[[Callable], Callable]:
    """Register one of B0 to B7 with torchvision's first weights, which are those of timm and of Luke Melas-Kyriazi."""
    weights = torchvision_weights(
        f"efficientnet_{name}_{file}.pth", top1, size=size, resize=resize, interpolation="bicubic"
    )
    return register_model({"tv_in1k": weights}, FAMILY, key_map=timm_key_map(SCALED[name]))


@_published("b0", "rwightman-7f5810bc", 77.692, 224, 256)
def efficientnet_b0(**options: Any) -> EfficientNet:
    """EfficientNet-B0: 5.3 M parameters, 0.4 G multiply-adds at 224 pixels."""
    return EfficientNet(SCALED["b0"], **options)


@_published("b1", "rwightman-bac287d4", 78.642, 240, 256)
def efficientnet_b1(**options: Any) -> EfficientNet:
    """EfficientNet-B1: 7.8 M parameters, 0.7 G multiply-adds at 240 pixels."""
    return EfficientNet(SCALED["b1"], **options)


@_published("b2", "rwightman-c35c1473", 80.608, 288, 288)
def efficientnet_b2(**options: Any) -> EfficientNet:
    """EfficientNet-B2: 9.1 M parameters, 1.1 G multiply-adds at 288 pixels."""
    return EfficientNet(SCALED["b2"], **options)


@_published("b3", "rwightman-b3899882", 82.008, 300, 320)
def efficientnet_b3(**options: Any) -> EfficientNet:
    """EfficientNet-B3: 12.2 M parameters, 1.8 G multiply-adds at 300 pixels."""
    return EfficientNet(SCALED["b3"], **options)


@_published("b4", "rwightman-23ab8bcd", 83.384, 380, 384)
def efficientnet_b4(**options: Any) -> EfficientNet:
    """EfficientNet-B4: 19.3 M parameters, 4.4 G multiply-adds at 380 pixels."""
    return EfficientNet(SCALED["b4"], **options)


@_published("b5", "lukemelas-1a07897c", 83.444, 456, 456)
def efficientnet_b5(**options: Any) -> EfficientNet:
    """EfficientNet-B5: 30.4 M parameters, 10.3 G multiply-adds at 456 pixels."""
    return EfficientNet(SCALED["b5"], **options)


@_published("b6", "lukemelas-24a108a5", 84.008, 528, 528)
def efficientnet_b6(**options: Any) -> EfficientNet:
    """EfficientNet-B6: 43.0 M parameters, 19.1 G multiply-adds at 528 pixels."""
    return EfficientNet(SCALED["b6"], **options)


@_published("b7", "lukemelas-c5b4e57e", 84.122, 600, 600)
def efficientnet_b7(**options: Any) -> EfficientNet:
    """EfficientNet-B7: 66.3 M parameters, 37.7 G multiply-adds at 600 pixels."""
    return EfficientNet(SCALED["b7"], **options)
