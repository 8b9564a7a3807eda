"""PP-LCNet for ImageNet, with timm's parameter names.

Paper: "PP-LCNet: A Lightweight CPU Convolutional Neural Network" (Cui et al., 2021, arXiv:2109.15099).

Shapes of the widest one at 224 pixels: stem [N, 16, 112, 112], then stages of [N, 32, 112, 112], [N, 64, 56, 56],
[N, 128, 28, 28], [N, 256, 14, 14] twice and [N, 512, 7, 7], the average, a 1x1 convolution [N, 1280, 1, 1] and the
logits [N, num_classes]. No block has a skip.

Quantization: hard-swish is signed (not below -3/8); what follows a ReLU, and the gates of squeeze and excitation, is
not. A product of features and gates has a quantizer on both sides; ``pool_quantizer`` and ``output_quantizer`` close
the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.hub_mixin import HubMixin
from qzoo.models.layers import (
    SqueezeExcitation,
    activation,
    activation_quantizer,
    conv2d,
    init_weights,
    linear,
    round_channels,
)
from qzoo.registry import SWISH, Family, register_model, timm_weights
from qzoo.scheme import Scheme

_CITATION = """@article{cui2021pplcnet,
  title = {PP-LCNet: A Lightweight CPU Convolutional Neural Network},
  author = {Cui, Cheng and Gao, Tingquan and Wei, Shengyu and Du, Yuning and Guo, Ruoyu and others},
  journal = {arXiv:2109.15099},
  year = {2021}
}
"""
FAMILY = Family(_CITATION, SWISH)

# By stages: kernel, channels, stride of the first block, number of blocks, gates.
STAGES = (
    ((3, 32, 1, 1, False),),
    ((3, 64, 2, 2, False),),
    ((3, 128, 2, 2, False),),
    ((3, 256, 2, 1, False), (5, 256, 1, 1, False)),
    ((5, 256, 1, 4, False),),
    ((5, 512, 2, 2, True),),
)


class Block(nn.Module):
    """A depthwise convolution, gates if asked for, and a pointwise one: [N, in, H, W] -> [N, out, H / s, W / s]."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int,
        gated: bool,
        quantize: Scheme | None,
    ) -> None:
        super().__init__()
        self.conv_dw = conv2d(
            in_channels,
            in_channels,
            kernel,
            stride=stride,
            padding=kernel // 2,
            groups=in_channels,
            quantize=quantize,
        )
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.act1 = activation(nn.Hardswish(), quantize)
        self.se: nn.Module = nn.Identity()
        if gated:
            squeezed = round_channels(in_channels / 4)
            self.se = SqueezeExcitation(in_channels, squeezed, nn.ReLU(), nn.Hardsigmoid(), quantize)
        self.conv_pw = conv2d(in_channels, out_channels, 1, quantize=quantize)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.act2 = activation(nn.Hardswish(), quantize)

    def forward(self, x: Tensor) -> Tensor:
        x = self.se(self.act1(self.bn1(self.conv_dw(x))))
        return self.act2(self.bn2(self.conv_pw(x)))


class LCNet(HubMixin, nn.Module):
    """A stem, six stages of blocks, global average pooling, a wide 1x1 convolution and a linear classifier."""

    def __init__(
        self,
        width: float,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        quantize: Scheme | None = None,
    ) -> None:
        super().__init__()
        channels = round_channels(16 * width)
        self.conv_stem = conv2d(in_channels, channels, 3, stride=2, padding=1, quantize=quantize, edge=True)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = activation(nn.Hardswish(), quantize)
        stages = []
        for stage in STAGES:
            blocks = []
            for kernel, wide, first, depth, gated in stage:
                for i in range(depth):
                    wider = round_channels(wide * width)
                    blocks.append(Block(channels, wider, kernel, 1 if i else first, gated, quantize))
                    channels = wider
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.conv_head = conv2d(channels, 1280, 1, bias=True, quantize=quantize)
        self.act2 = activation(nn.Hardswish(), quantize)
        self.classifier = linear(1280, num_classes, quantize=quantize, edge=True)
        self.pool_quantizer = activation_quantizer(quantize, "pool")
        self.output_quantizer = activation_quantizer(quantize, "output")
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.act1(self.bn1(self.conv_stem(x))))
        x = self.act2(self.conv_head(self.avgpool(self.pool_quantizer(x))))
        return self.output_quantizer(self.classifier(torch.flatten(x, 1)))


def timm_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the layers of timm's squeeze and excitation: ``conv_reduce`` and ``conv_expand``."""
    return {
        key.replace(".se.conv_reduce.", ".se.fc1.").replace(".se.conv_expand.", ".se.fc2."): value
        for key, value in state_dict.items()
    }


def _published(name: str, top1: float) -> dict[str, Any]:
    """timm's weights, in a file of that name."""
    weights = timm_weights(f"{name.partition('-')[0]}.ra2_in1k", top1, release=f"v0.1-weights/{name}")
    return {"ra2_in1k": weights}


@register_model(_published("lcnet_050-f447553b", 63.12), FAMILY, key_map=timm_names)
def lcnet_050(**options: Any) -> LCNet:
    """PP-LCNet x 0.5: 1.9 M parameters, 0.05 G multiply-adds."""
    return LCNet(0.5, **options)


@register_model(_published("lcnet_075-318cad2c", 68.782), FAMILY, key_map=timm_names)
def lcnet_075(**options: Any) -> LCNet:
    """PP-LCNet x 0.75: 2.4 M parameters, 0.1 G multiply-adds."""
    return LCNet(0.75, **options)


@register_model(_published("lcnet_100-a929038c", 72.096), FAMILY, key_map=timm_names)
def lcnet_100(**options: Any) -> LCNet:
    """PP-LCNet x 1.0: 3.0 M parameters, 0.2 G multiply-adds."""
    return LCNet(1.0, **options)
