"""EdgeNeXt for ImageNet, with timm's parameter names.

Paper: "EdgeNeXt: Efficiently Amalgamated CNN-Transformer Architecture for Mobile Vision Applications" (Maaz et al.,
2022, arXiv:2206.10589).

Shapes of the smallest one at 256 pixels: stem [N, 24, 64, 64], then the stages [N, 24, 64, 64], [N, 48, 32, 32],
[N, 88, 16, 16] and [N, 168, 8, 8], logits [N, num_classes]. The last block of each stage but the first splits the
channels, and attends over channels in place of tokens: its attention has [N, heads, dim / heads, dim / heads].

Quantization: no tensor but the softmax is known to be non-negative: GELU goes down to -0.17. The blocks of convolutions
are as ConvNeXt's: a ``norm_quantizer`` behind the convolution, quantizers on both sides of an add, which beside a
LayerNorm stays in float. Where channels are split, the whole, each part, and what a convolution makes of a part have
one range; ``qzoo.quantize`` has fewer quantizers there, where one follows another. The linear layers and the products
of the attention are as in a ViT. The position encoding is made of weights alone: its convolution stays in float, as its
result is a constant.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.hub_mixin import HubMixin
from qzoo.models.convnext import LayerNorm2d, init_truncated
from qzoo.models.layers import LayerNorm, activation_quantizer, conv2d, linear, share_range
from qzoo.models.vit import Attention, Mlp
from qzoo.registry import TRANSFORMER, Family, FloatWeights, register_model, timm_weights
from qzoo.scheme import Scheme

_CITATION = """@article{maaz2022edgenext,
  title = {EdgeNeXt: Efficiently Amalgamated CNN-Transformer Architecture for Mobile Vision Applications},
  author = {Maaz, Muhammad and Shaker, Abdelrahman and Cholakkal, Hisham and Khan, Salman and others},
  journal = {arXiv:2206.10589},
  year = {2022}
}
"""
FAMILY = Family(_CITATION, TRANSFORMER)
KERNELS, SCALES = (3, 5, 7, 9), (1, 2, 3, 4)  # by stage; with one scale there is no attention
WAVES = 32  # of the position encoding, along each side
Roles = tuple[str, str]


def _roles(integer: bool, stream: bool) -> Roles:
    """The roles of the quantizers of an add, on the skip and on the branch.

    Args:
        integer: the skip is the output of an int8 kernel.
        stream: a LayerNorm made the skip or reads the sum, which stays in float.
    """
    if not stream:
        return "residual", "branch"
    return "activation" if integer else "stream", "stream"


class ConvBlock(nn.Module):
    """Depthwise convolution, LayerNorm, two linear layers, a scale and a skip: [N, dim, H, W] -> the same."""

    def __init__(self, dim: int, kernel: int, roles: Roles, quantize: Scheme | None) -> None:
        super().__init__()
        self.conv_dw = conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=True, quantize=quantize)
        self.norm = LayerNorm(dim, quantize)
        self.mlp = Mlp(dim, quantize)
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))
        self.residual_quantizer = activation_quantizer(quantize, roles[0])
        self.branch_quantizer = activation_quantizer(quantize, roles[1])

    def forward(self, x: Tensor) -> Tensor:
        out = self.mlp(self.norm(self.conv_dw(x).permute(0, 2, 3, 1)))
        out = (self.gamma * out).permute(0, 3, 1, 2)
        return self.residual_quantizer(x) + self.branch_quantizer(out)


class PositionEncoding(nn.Module):
    """Sines and cosines of the place, and a 1x1 convolution: (H, W) -> [1, dim, H, W]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token_projection = nn.Conv2d(2 * WAVES, dim, 1)

    def forward(self, height: int, width: int) -> Tensor:
        weight = self.token_projection.weight
        number = torch.arange(WAVES, device=weight.device).float()
        lengths = 10000 ** (2 * torch.div(number, 2, rounding_mode="floor") / WAVES)
        sides = []
        for count in (height, width):
            place = torch.arange(1, count + 1, device=weight.device).float()
            place = place / (place[-1:] + 1e-6) * (2 * math.pi)
            angles = place[:, None] / lengths
            sides.append(torch.stack((angles[:, 0::2].sin(), angles[:, 1::2].cos()), 2).flatten(1))
        down = sides[0][:, None].expand(height, width, WAVES)
        across = sides[1][None].expand(height, width, WAVES)
        waves = torch.cat((down, across), 2).permute(2, 0, 1).unsqueeze(0)
        return self.token_projection(waves.to(weight.dtype))


class ChannelAttention(Attention):
    """Multi-head self-attention over the channels, [N, tokens, dim] -> the same."""

    def __init__(self, dim: int, heads: int, quantize: Scheme | None) -> None:
        super().__init__(dim, heads, quantize)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 4, 1)
        query, key, value = qkv.unbind(0)
        query = self.query_quantizer(nn.functional.normalize(query, dim=-1))
        key = self.key_quantizer(nn.functional.normalize(key, dim=-1))
        weights = (query @ key.transpose(-2, -1)) * self.temperature
        weights = self.softmax_quantizer(weights.softmax(dim=-1))
        out = weights @ self.value_quantizer(value)
        return self.proj(out.permute(0, 3, 1, 2).reshape(n, tokens, dim))


class SplitBlock(nn.Module):
    """Depthwise convolutions of parts of the channels, attention, two linear layers: [N, dim, H, W] -> the same."""

    def __init__(
        self,
        name: str,
        dim: int,
        scales: int,
        heads: int,
        position: bool,
        roles: Roles,
        quantize: Scheme | None,
    ) -> None:
        """``name`` is that of the range of the parts; ``position``: with a position encoding."""
        super().__init__()
        width = math.ceil(dim / scales)
        self.convs = nn.ModuleList(
            conv2d(width, width, 3, padding=1, groups=width, bias=True, quantize=quantize)
            for _ in range(scales - 1)
        )
        self.pos_embd = PositionEncoding(dim) if position else None
        self.norm_xca = nn.LayerNorm(dim, 1e-6)
        self.gamma_xca = nn.Parameter(torch.full((dim,), 1e-6))
        self.xca = ChannelAttention(dim, heads, quantize)
        self.norm = nn.LayerNorm(dim, 1e-6)
        self.mlp = Mlp(dim, quantize)
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))
        self.split_quantizer = activation_quantizer(quantize, "input")
        self.concat_quantizer = activation_quantizer(quantize, "input")
        self.joined_quantizer = activation_quantizer(quantize, "activation")
        share_range(name, self.split_quantizer, self.convs[0], self.concat_quantizer, self.joined_quantizer)
        self.residual_quantizer1 = activation_quantizer(quantize, "stream")
        self.branch_quantizer1 = activation_quantizer(quantize, "stream")
        self.residual_quantizer2 = activation_quantizer(quantize, roles[0])
        self.branch_quantizer2 = activation_quantizer(quantize, roles[1])

    def forward(self, x: Tensor) -> Tensor:
        n, dim, height, width = x.shape
        tokens = self.joined_quantizer(self._convolve(x)).reshape(n, dim, height * width).permute(0, 2, 1)
        if self.pos_embd is not None:
            tokens = tokens + self.pos_embd(height, width).reshape(1, dim, -1).permute(0, 2, 1)
        out = self.gamma_xca * self.xca(self.norm_xca(tokens))
        tokens = self.residual_quantizer1(tokens) + self.branch_quantizer1(out)
        out = self.gamma * self.mlp(self.norm(tokens.reshape(n, height, width, dim)))
        return self.residual_quantizer2(x) + self.branch_quantizer2(out.permute(0, 3, 1, 2))

    def _convolve(self, x: Tensor) -> Tensor:
        """Each part but the last by a convolution, which also sees what the one before it gives."""
        first, *parts = self.split_quantizer(x).chunk(len(self.convs) + 1, 1)
        parts = [self.concat_quantizer(part) for part in parts]
        out = [self.concat_quantizer(self.convs[0](first))]
        for conv, part in zip(self.convs[1:], parts, strict=False):
            out.append(self.concat_quantizer(conv(out[-1] + part)))
        return torch.cat([*out, parts[-1]], 1)


class EdgeNeXt(HubMixin, nn.Module):
    """A stem of patches, four stages of blocks, global average pooling, LayerNorm and a linear classifier."""

    def __init__(
        self,
        depths: tuple[int, ...],
        widths: tuple[int, ...],
        heads: int,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        quantize: Scheme | None = None,
    ) -> None:
        super().__init__()
        stem = conv2d(in_channels, widths[0], 4, stride=4, bias=True, quantize=quantize, edge=True)
        self.stem = nn.Sequential(stem, LayerNorm2d(widths[0], quantize))
        self.stages = nn.Sequential()
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            stage = nn.Sequential()
            if i > 0:
                halving = conv2d(widths[i - 1], width, 2, stride=2, bias=True, quantize=quantize)
                stage.downsample = nn.Sequential(LayerNorm2d(widths[i - 1]), halving)
            stage.blocks = nn.Sequential()
            integer = i > 0
            for j in range(depth):
                last, position = j == depth - 1, i == 1
                # A norm reads what the stages give but the last, and, without a position, what an attention gets.
                normed = (last and i < 3) or (j == depth - 2 and i > 1)
                roles = _roles(integer, normed or i == j == 0)
                if last and SCALES[i] > 1:
                    name = f"stages.{i}.blocks.{j}"
                    stage.blocks.append(SplitBlock(name, width, SCALES[i], heads, position, roles, quantize))
                else:
                    stage.blocks.append(ConvBlock(width, KERNELS[i], roles, quantize))
                integer = roles[0] == "residual"
            self.stages.append(stage)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Sequential()
        self.head.norm = LayerNorm2d(widths[-1], quantize, "activation")
        self.head.flatten = nn.Flatten(1)
        self.head.fc = linear(widths[-1], num_classes, quantize=quantize, edge=True)
        self.pool_quantizer = activation_quantizer(quantize, "pool")
        self.output_quantizer = activation_quantizer(quantize, "output")
        init_truncated(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.pool_quantizer(self.stages(self.stem(x))))
        return self.output_quantizer(self.head(x))


def _published(name: str, top1: float, *, tag: str = "in1k", size: int = 288) -> dict[str, FloatWeights]:
    """The authors' weights, from timm, with the images of its evaluation, which are larger than the training's."""
    return {tag: timm_weights(f"{name}.{tag}", top1, size=size, crop_pct=1.0, license="mit")}


@register_model(_published("edgenext_xx_small", 71.878), FAMILY)
def edgenext_xx_small(**options: Any) -> EdgeNeXt:
    """EdgeNeXt-XXS: 1.3 M parameters, 0.3 G multiply-adds at 256 pixels."""
    return EdgeNeXt((2, 2, 6, 2), (24, 48, 88, 168), 4, **options)


@register_model(_published("edgenext_x_small", 75.688), FAMILY)
def edgenext_x_small(**options: Any) -> EdgeNeXt:
    """EdgeNeXt-XS: 2.3 M parameters, 0.5 G multiply-adds at 256 pixels."""
    return EdgeNeXt((3, 3, 9, 3), (32, 64, 100, 192), 4, **options)


@register_model(_published("edgenext_small", 81.564, tag="usi_in1k", size=320), FAMILY)
def edgenext_small(**options: Any) -> EdgeNeXt:
    """EdgeNeXt-S: 5.6 M parameters, 1.3 G multiply-adds at 256 pixels."""
    return EdgeNeXt((3, 3, 9, 3), (48, 96, 160, 304), 8, **options)


@register_model(
    {
        **_published("edgenext_base", 83.958, tag="usi_in1k", size=320),
        **_published("edgenext_base", 84.054, tag="in21k_ft_in1k", size=320),
    },
    FAMILY,
)
def edgenext_base(**options: Any) -> EdgeNeXt:
    """EdgeNeXt-B: 18.5 M parameters, 3.8 G multiply-adds at 256 pixels."""
    return EdgeNeXt((3, 3, 9, 3), (80, 160, 288, 584), 8, **options)
