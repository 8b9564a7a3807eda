"""MobileNetV3, small and large, for ImageNet, with torchvision's parameter names.

Paper: "Searching for MobileNetV3" (Howard et al., 2019, arXiv:1905.02244).

Shapes of the small one at 224 pixels: stem [N, 16, 112, 112], then blocks of [N, 16, 56, 56], [N, 24, 28, 28],
[N, 40, 14, 14], [N, 48, 14, 14] and [N, 96, 7, 7], a 1x1 convolution [N, 576, 7, 7], the average, a linear layer
[N, 1024] and the logits [N, num_classes].

Quantization: a block ends without an activation, so the tensors between blocks are signed. Hard-swish is signed, too
(not below -3/8); what follows a ReLU, and the gates of squeeze and excitation, is not. Each add has a
``residual_quantizer`` on its skip input and a ``branch_quantizer`` on the other; a product of features and gates has a
quantizer on both; ``pool_quantizer`` and ``output_quantizer`` close the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qzoo.hub_mixin import HubMixin
from qzoo.models.layers import (
    SqueezeExcitation,
    activation,
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

_CITATION = """@article{howard2019searching,
  title = {Searching for MobileNetV3},
  author = {Howard, Andrew and Sandler, Mark and Chu, Grace and Chen, Liang-Chieh and Chen, Bo and others},
  journal = {arXiv:1905.02244},
  year = {2019}
}
"""
FAMILY = Family(
    _CITATION,
    SWISH,
    results="NNCF, Small: 67.66 to 66.81 with full bias correction; half as wide, 57.91 to 41.87 with fast bias "
    "correction and 56.55 with full",
)
EPSILON = 1e-3


class Size(NamedTuple):
    """Sizes of a block: kernel, expanded and output channels, gates, hard-swish in place of ReLU, stride."""

    kernel_size: int
    expanded: int
    channels: int
    gated: bool
    hard_swish: bool
    stride: int


# By stages of one resolution and width, as timm numbers them.
SMALL = (
    (Size(3, 16, 16, True, False, 2),),
    (Size(3, 72, 24, False, False, 2), Size(3, 88, 24, False, False, 1)),
    (Size(5, 96, 40, True, True, 2), Size(5, 240, 40, True, True, 1), Size(5, 240, 40, True, True, 1)),
    (Size(5, 120, 48, True, True, 1), Size(5, 144, 48, True, True, 1)),
    (Size(5, 288, 96, True, True, 2), Size(5, 576, 96, True, True, 1), Size(5, 576, 96, True, True, 1)),
)
LARGE = (
    (Size(3, 16, 16, False, False, 1),),
    (Size(3, 64, 24, False, False, 2), Size(3, 72, 24, False, False, 1)),
    (Size(5, 72, 40, True, False, 2), Size(5, 120, 40, True, False, 1), Size(5, 120, 40, True, False, 1)),
    (
        Size(3, 240, 80, False, True, 2),
        Size(3, 200, 80, False, True, 1),
        Size(3, 184, 80, False, True, 1),
        Size(3, 184, 80, False, True, 1),
    ),
    (Size(3, 480, 112, True, True, 1), Size(3, 672, 112, True, True, 1)),
    (Size(5, 672, 160, True, True, 2), Size(5, 960, 160, True, True, 1), Size(5, 960, 160, True, True, 1)),
)


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise kxk, gates, project 1x1 and a skip: [N, in, H, W] -> [N, out, H / stride, W / stride].

    The skip is there where the shape stays; the expansion where it changes the number of channels.
    """

    def __init__(self, in_channels: int, size: Size, positive: bool, quantize: Scheme | None) -> None:
        """``positive`` says that the input is never below zero."""
        super().__init__()
        function = nn.Hardswish if size.hard_swish else nn.ReLU
        norm = partial(nn.BatchNorm2d, eps=EPSILON, momentum=0.01)
        convolution = partial(conv_norm_activation, norm=norm, quantize=quantize)
        inner = size.expanded
        layers: list[nn.Module] = []
        if inner != in_channels:
            expand = convolution(in_channels, inner, 1, function=function(inplace=True), nonnegative=positive)
            layers, positive = [expand], not size.hard_swish
        layers.append(
            convolution(
                inner,
                inner,
                size.kernel_size,
                function=function(inplace=True),
                stride=size.stride,
                groups=inner,
                nonnegative=positive,
            )
        )
        positive = not size.hard_swish
        if size.gated:
            squeezed = round_channels(inner // 4)
            layers.append(SqueezeExcitation(inner, squeezed, nn.ReLU(), nn.Hardsigmoid(), quantize, positive))
        layers.append(convolution(inner, size.channels, 1, function=None, nonnegative=positive))
        self.block = nn.Sequential(*layers)
        self.skip = size.stride == 1 and in_channels == size.channels
        if self.skip:
            self.residual_quantizer = activation_quantizer(quantize, "residual")
            self.branch_quantizer = activation_quantizer(quantize, "branch")

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(x)
        if not self.skip:
            return out
        return self.branch_quantizer(out) + self.residual_quantizer(x)


class MobileNetV3(HubMixin, nn.Module):
    """A stem, stages of blocks, a 1x1 head, average pooling and two linear layers."""

    def __init__(
        self,
        stages: tuple[tuple[Size, ...], ...],
        hidden: int,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        quantize: Scheme | None = None,
    ) -> None:
        """``hidden`` is the width of the first linear layer."""
        super().__init__()
        norm = partial(nn.BatchNorm2d, eps=EPSILON, momentum=0.01)
        convolution = partial(conv_norm_activation, norm=norm, quantize=quantize)
        stem = convolution(in_channels, 16, 3, function=nn.Hardswish(inplace=True), stride=2, edge=True)
        features: list[nn.Module] = [stem]
        channels = 16
        for size in (size for stage in stages for size in stage):
            features.append(InvertedResidual(channels, size, False, quantize))
            channels = size.channels
        features.append(convolution(channels, 6 * channels, 1, function=nn.Hardswish(inplace=True)))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            linear(6 * channels, hidden, quantize=quantize),
            activation(nn.Hardswish(inplace=True), quantize),
            nn.Dropout(0.2, inplace=True),
            linear(hidden, num_classes, quantize=quantize, edge=True),
        )
        self.pool_quantizer = activation_quantizer(quantize, "pool")
        self.output_quantizer = activation_quantizer(quantize, "output")
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.pool_quantizer(self.features(x)))
        return self.output_quantizer(self.classifier(torch.flatten(x, 1)))


def timm_names(stages: tuple[tuple[Size, ...], ...]) -> dict[str, str]:
    """Map the names of timm's ``mobilenetv3_small_100`` and ``mobilenetv3_large_100`` to ours."""
    names = {"conv_stem": "features.0.0", "bn1": "features.0.1"}
    blocks = [(i, j, size) for i, stage in enumerate(stages) for j, size in enumerate(stage)]
    for number, (i, j, size) in enumerate(blocks, start=1):
        theirs = ["conv_dw", "bn1"] if i == 0 else ["conv_pw", "bn1", "conv_dw", "bn2"]
        ours = [f"{layer // 2}.{layer % 2}" for layer in range(len(theirs))]
        after = len(theirs) // 2
        if size.gated:
            theirs += ["se.conv_reduce", "se.conv_expand"]
            ours += [f"{after}.fc1", f"{after}.fc2"]
        theirs += ["conv_pw", "bn2"] if i == 0 else ["conv_pwl", "bn3"]
        ours += [f"{after + size.gated}.{layer}" for layer in range(2)]
        for layer, own in zip(theirs, ours, strict=True):
            names[f"blocks.{i}.{j}.{layer}"] = f"features.{number}.block.{own}"
    last = f"blocks.{len(stages)}.0"
    names |= {f"{last}.conv": f"features.{len(blocks) + 1}.0", f"{last}.bn1": f"features.{len(blocks) + 1}.1"}
    return names | {"conv_head": "classifier.0", "classifier": "classifier.3"}


def timm_key_map(stages: tuple[tuple[Size, ...], ...]) -> KeyMap:
    """Map timm's names to ours; its BatchNorms have an epsilon of 1e-5, which goes into their scale."""
    rename = renamed_modules(timm_names(stages))

    def key_map(state_dict: Mapping[str, Any]) -> dict[str, Any]:
        state = rename(state_dict)
        if "conv_stem.weight" not in state_dict or "classifier.0.weight" not in state:
            return state
        state["classifier.0.weight"] = state["classifier.0.weight"].flatten(1)  # of a 1x1 convolution
        return with_epsilon(state, EPSILON)

    return key_map


@register_model(
    {"tv_in1k": torchvision_weights("mobilenet_v3_small-047dcff4.pth", 67.668)},
    FAMILY,
    aliases=["mobilenetv3_small_100"],
    key_map=timm_key_map(SMALL),
)
def mobilenet_v3_small(**options: Any) -> MobileNetV3:
    """MobileNetV3-Small: 2.5 M parameters, 0.06 G multiply-adds."""
    return MobileNetV3(SMALL, 1024, **options)


@register_model(
    {
        "tv_in1k": torchvision_weights("mobilenet_v3_large-8738ca79.pth", 74.042),
        "tv2_in1k": torchvision_weights("mobilenet_v3_large-5c1a4163.pth", 75.274, resize=232),
    },
    FAMILY,
    aliases=["mobilenetv3_large_100"],
    key_map=timm_key_map(LARGE),
)
def mobilenet_v3_large(**options: Any) -> MobileNetV3:
    """MobileNetV3-Large: 5.5 M parameters, 0.2 G multiply-adds."""
    return MobileNetV3(LARGE, 1280, **options)
