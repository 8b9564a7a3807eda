"""MobileViT for ImageNet, with timm's parameter names.

Paper: "MobileViT: Light-weight, General-purpose, and Mobile-friendly Vision Transformer" (Mehta and Rastegari, 2021,
arXiv:2110.02178).

Shapes of the smallest one at 256 pixels: stem [N, 16, 128, 128], then the stages [N, 16, 128, 128], [N, 24, 64, 64],
[N, 48, 32, 32], [N, 64, 16, 16] and [N, 80, 8, 8], a 1x1 convolution [N, 320, 8, 8], logits [N, num_classes]. In the
last three stages each pixel of a 2 x 2 patch attends to the same pixels of the other patches: [4 N, patches, dim].

Quantization: SiLU is signed (not below -0.28), and so is all else but its sigmoid and the softmax. A convolution has a
quantizer on what it reads and, before a SiLU, an add or a LayerNorm, behind. The linear layers, the products and the
adds of the transformers are as in a ViT. What a block joins has one range; ``pool_quantizer`` and ``output_quantizer``
close the network.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.errors import ArgumentError
from qzoo.hub_mixin import HubMixin
from qzoo.models.layers import (
    LayerNorm,
    activation_quantizer,
    conv2d,
    conv_norm_activation,
    init_weights,
    linear,
    share_range,
)
from qzoo.models.vit import Attention
from qzoo.registry import HYBRID, Family, FloatWeights, register_model, timm_weights
from qzoo.scheme import Scheme

_CITATION = """@article{mehta2021mobilevit,
  title = {MobileViT: Light-weight, General-purpose, and Mobile-friendly Vision Transformer},
  author = {Mehta, Sachin and Rastegari, Mohammad},
  journal = {arXiv:2110.02178},
  year = {2021}
}
"""
FAMILY = Family(_CITATION, HYBRID)
PATCH, HEADS, STEM = 2, 4, 16
EPSILON = 1e-5  # of LayerNorm


def _conv(
    in_channels: int,
    out_channels: int,
    kernel: int,
    quantize: Scheme | None,
    *,
    stride: int = 1,
    groups: int = 1,
    silu: bool = True,
    image: bool = False,
) -> nn.Sequential:
    """A convolution, its BatchNorm and, if asked for, SiLU."""
    return conv_norm_activation(
        in_channels,
        out_channels,
        kernel,
        function=nn.SiLU() if silu else None,
        names=("conv", "bn", "act"),
        stride=stride,
        groups=groups,
        quantize=quantize,
        edge=image,
    )


class InvertedResidual(nn.Module):
    """1x1, depthwise 3x3, 1x1 and, if shapes allow, a skip: [N, in, H, W] -> [N, out, H / stride, W / stride]."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, ratio: int, quantize: Scheme | None
    ) -> None:
        super().__init__()
        inner = in_channels * ratio
        self.conv1_1x1 = _conv(in_channels, inner, 1, quantize)
        self.conv2_kxk = _conv(inner, inner, 3, quantize, stride=stride, groups=inner)
        self.conv3_1x1 = _conv(inner, out_channels, 1, quantize, silu=False)
        self.has_skip = stride == 1 and in_channels == out_channels
        if self.has_skip:
            self.residual_quantizer = activation_quantizer(quantize, "residual")
            self.branch_quantizer = activation_quantizer(quantize, "branch")

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv3_1x1(self.conv2_kxk(self.conv1_1x1(x)))
        if not self.has_skip:
            return out
        return self.branch_quantizer(out) + self.residual_quantizer(x)


class Mlp(nn.Module):
    """Two linear layers with SiLU between, [N, tokens, dim] -> the same."""

    def __init__(self, dim: int, quantize: Scheme | None) -> None:
        super().__init__()
        self.fc1 = linear(dim, 2 * dim, quantize=quantize)
        self.act = nn.SiLU()
        self.fc2 = linear(2 * dim, dim, quantize=quantize)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class TransformerBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm and beside a skip, [N, tokens, dim] -> the same."""

    def __init__(self, dim: int, first: bool, quantize: Scheme | None) -> None:
        """``first``: the input is a convolution's output, which is int8."""
        super().__init__()
        norm = LayerNorm(dim, quantize, eps=EPSILON) if first else nn.LayerNorm(dim, EPSILON)
        self.norm1 = norm
        self.attn = Attention(dim, HEADS, quantize)
        self.norm2 = nn.LayerNorm(dim, EPSILON)
        self.mlp = Mlp(dim, quantize)
        self.residual_quantizer1 = activation_quantizer(quantize, "activation" if first else "stream")
        self.branch_quantizer1 = activation_quantizer(quantize, "stream")
        self.residual_quantizer2 = activation_quantizer(quantize, "stream")
        self.branch_quantizer2 = activation_quantizer(quantize, "stream")

    def forward(self, x: Tensor) -> Tensor:
        x = self.residual_quantizer1(x) + self.branch_quantizer1(self.attn(self.norm1(x)))
        return self.residual_quantizer2(x) + self.branch_quantizer2(self.mlp(self.norm2(x)))


class MobileViTBlock(nn.Module):
    """Convolutions, a transformer over patches, and a convolution of both: [N, channels, H, W] -> the same."""

    def __init__(self, name: str, channels: int, dim: int, depth: int, quantize: Scheme | None) -> None:
        """``name`` is that of the range of what is joined."""
        super().__init__()
        self.conv_kxk = _conv(channels, channels, 3, quantize)
        self.conv_1x1 = conv2d(channels, dim, 1, quantize=quantize)
        self.transformer = nn.Sequential(*(TransformerBlock(dim, i == 0, quantize) for i in range(depth)))
        self.norm = nn.LayerNorm(dim, EPSILON)
        self.conv_proj = _conv(dim, channels, 1, quantize)
        self.conv_fusion = _conv(2 * channels, channels, 3, quantize)
        self.concat_quantizer = activation_quantizer(quantize, "input")
        share_range(name, self.conv_kxk[0], self.concat_quantizer, self.conv_fusion[0])

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv_1x1(self.conv_kxk(x))
        n, dim, height, width = out.shape
        if height % PATCH or width % PATCH:
            raise ArgumentError(
                f"MobileViT divides [{height}, {width}] into patches of {PATCH} x {PATCH}; give images whose height "
                "and width are multiples of 64"
            )
        rows, columns, area = height // PATCH, width // PATCH, PATCH * PATCH
        out = out.reshape(n * dim * rows, PATCH, columns, PATCH).transpose(1, 2)
        out = out.reshape(n, dim, rows * columns, area).transpose(1, 3).reshape(n * area, rows * columns, dim)
        out = self.norm(self.transformer(out))
        out = out.view(n, area, rows * columns, dim).transpose(1, 3)
        out = out.reshape(n * dim * rows, columns, PATCH, PATCH).transpose(1, 2)
        out = self.conv_proj(out.reshape(n, dim, height, width))
        return self.conv_fusion(torch.cat([self.concat_quantizer(x), self.concat_quantizer(out)], 1))


class MobileViT(HubMixin, nn.Module):
    """A stem, two stages of convolutions, three with transformers, a 1x1 convolution and a linear classifier."""

    def __init__(
        self,
        widths: tuple[int, ...],
        dims: tuple[int, ...],
        ratio: int,
        last: int,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        quantize: Scheme | None = None,
    ) -> None:
        """``widths`` of the stages, ``dims`` of their transformers, ``ratio`` of the inverted residuals."""
        super().__init__()
        self.stem = _conv(in_channels, STEM, 3, quantize, stride=2, image=True)
        channels, stages = STEM, []
        for i, (width, depth) in enumerate(zip(widths, (1, 3, 1, 1, 1), strict=True)):
            blocks: list[nn.Module] = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(InvertedResidual(channels, width, stride, ratio, quantize))
                channels = width
            if i > 1:
                depths = (2, 4, 3)
                blocks.append(MobileViTBlock(f"stages.{i}", width, dims[i - 2], depths[i - 2], quantize))
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.final_conv = _conv(channels, last, 1, quantize)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Sequential()
        self.head.fc = linear(last, num_classes, quantize=quantize, edge=True)
        self.pool_quantizer = activation_quantizer(quantize, "pool")
        self.output_quantizer = activation_quantizer(quantize, "output")
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.final_conv(self.stages(self.stem(x)))
        x = self.avgpool(self.pool_quantizer(x))
        return self.output_quantizer(self.head(torch.flatten(x, 1)))


def _published(name: str, digits: str, top1: float) -> dict[str, FloatWeights]:
    """The authors' weights, from timm's releases; images are neither centred nor scaled."""
    release = f"v0.1-mvit-weights/{name}-{digits}"
    weights = timm_weights(
        f"{name}.cvnets_in1k", top1, release=release, size=256, crop_pct=0.9, license="cvnets-license"
    )
    plain = dataclasses.replace(weights.preprocessing, mean=(0.0,) * 3, std=(1.0,) * 3)
    return {"cvnets_in1k": dataclasses.replace(weights, preprocessing=plain)}


@register_model(_published("mobilevit_xxs", "ad385b40", 68.932), FAMILY)
def mobilevit_xxs(**options: Any) -> MobileViT:
    """MobileViT-XXS: 1.3 M parameters, 0.4 G multiply-adds, 256 pixels."""
    return MobileViT((16, 24, 48, 64, 80), (64, 80, 96), 2, 320, **options)


@register_model(_published("mobilevit_xs", "8fbd6366", 74.636), FAMILY)
def mobilevit_xs(**options: Any) -> MobileViT:
    """MobileViT-XS: 2.3 M parameters, 1.1 G multiply-adds, 256 pixels."""
    return MobileViT((32, 48, 64, 80, 96), (96, 120, 144), 4, 384, **options)


@register_model(_published("mobilevit_s", "38a5a959", 78.312), FAMILY)
def mobilevit_s(**options: Any) -> MobileViT:
    """MobileViT-S: 5.6 M parameters, 2.0 G multiply-adds, 256 pixels."""
    return MobileViT((32, 64, 96, 128, 160), (144, 192, 240), 4, 640, **options)
