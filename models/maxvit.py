"""MaxViT for ImageNet, with torchvision's parameter names.

Paper: "MaxViT: Multi-Axis Vision Transformer" (Tu et al., 2022, arXiv:2204.01697).

Shapes of the tiny one at 224 pixels: stem [N, 64, 112, 112], then the stages [N, 64, 56, 56], [N, 128, 28, 28],
[N, 256, 14, 14] and [N, 512, 7, 7], logits [N, num_classes]. An attention sees [N * groups, 49, channels]; a group is
the 7 x 7 neighbours of a window, or 7 x 7 pixels of a grid over the whole image, which fixes the image's size.

Quantization: as in a ViT, the linear layers, both operands of the products in each attention, and
the logits; as in an EfficientNet, the convolutions, the gates and the averages. The adds that a LayerNorm
reads stay in float, as do LayerNorm, softmax and GELU.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.hub_mixin import HubMixin
from qzoo.models.layers import (
    LayerNorm,
    SqueezeExcitation,
    StochasticDepth,
    activation_quantizer,
    conv2d,
    conv_norm_activation,
    linear,
)
from qzoo.models.swin import pairs_of_positions
from qzoo.registry import HYBRID, Family, register_model, torchvision_weights
from qzoo.scheme import Scheme

_CITATION = """@article{tu2022maxvit,
  title = {MaxViT: Multi-Axis Vision Transformer},
  author = {Tu, Zhengzhong and Talebi, Hossein and Zhang, Han and Yang, Feng and Milanfar, Peyman and others},
  journal = {arXiv:2204.01697},
  year = {2022}
}
"""
FAMILY = Family(_CITATION, HYBRID)
IMAGE, WINDOW, HEAD = 224, 7, 32

BatchNorm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)


class MBConv(nn.Module):
    """Inverted bottleneck with gates and a skip, [N, in, H, W] -> [N, out, H / stride, W / stride]."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, dropped: float, quantize: Scheme | None
    ) -> None:
        """``dropped`` is the probability of stochastic depth."""
        super().__init__()
        self.proj: nn.Module = nn.Identity()
        self.pool_quantizer: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            pool = nn.AvgPool2d(3, stride, padding=1)
            self.proj = nn.Sequential(
                pool, conv2d(in_channels, out_channels, 1, bias=True, quantize=quantize)
            )
            self.pool_quantizer = activation_quantizer(quantize, "pool")
        self.stochastic_depth = StochasticDepth(dropped)
        inner = 4 * out_channels
        self.layers = nn.Sequential()
        self.layers.pre_norm = BatchNorm(in_channels)
        self.layers.conv_a = conv_norm_activation(
            in_channels, inner, 1, function=nn.GELU(), norm=BatchNorm, quantize=quantize
        )
        self.layers.conv_b = conv_norm_activation(
            inner,
            inner,
            3,
            function=nn.GELU(),
            norm=BatchNorm,
            stride=stride,
            groups=inner,
            quantize=quantize,
        )
        self.layers.squeeze_excitation = SqueezeExcitation(
            inner, out_channels // 4, nn.SiLU(), nn.Sigmoid(), quantize
        )
        self.layers.conv_c = conv2d(inner, out_channels, 1, bias=True, quantize=quantize)
        # A LayerNorm reads the sum: it is in float, between layers that write int8.
        self.norm_quantizer = activation_quantizer(quantize, "activation")
        self.residual_quantizer = activation_quantizer(quantize, "activation")
        self.branch_quantizer = activation_quantizer(quantize, "activation")

    def forward(self, x: Tensor) -> Tensor:
        skip = self.proj(self.pool_quantizer(x))
        out = self.stochastic_depth(self.layers(self.norm_quantizer(x)))
        return self.residual_quantizer(skip) + self.branch_quantizer(out)


class Attention(nn.Module):
    """Multi-head self-attention with a position bias, [groups, 49, dim] -> the same."""

    relative_position_index: Tensor

    def __init__(self, dim: int, quantize: Scheme | None) -> None:
        super().__init__()
        self.heads = dim // HEAD
        self.scale = dim**-0.5
        self.to_qkv = linear(dim, 3 * dim, quantize=quantize)
        self.merge = linear(dim, dim, quantize=quantize)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * WINDOW - 1) ** 2, self.heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        tokens = WINDOW**2
        self.register_buffer("relative_position_index", pairs_of_positions(WINDOW).view(tokens, tokens))
        self.query_quantizer = activation_quantizer(quantize, "product", symmetric=True)
        self.key_quantizer = activation_quantizer(quantize, "product", symmetric=True)
        self.value_quantizer = activation_quantizer(quantize, "product", symmetric=True)
        self.softmax_quantizer = activation_quantizer(quantize, "product", nonnegative=True)

    def forward(self, x: Tensor) -> Tensor:
        groups, tokens, dim = x.shape
        qkv = self.to_qkv(x).reshape(groups, tokens, 3, self.heads, HEAD).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        key = self.key_quantizer(key * self.scale)
        weights = self.query_quantizer(query) @ key.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        bias = bias.view(tokens, tokens, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        weights = self.softmax_quantizer((weights + bias).softmax(dim=-1))
        out = weights @ self.value_quantizer(value)
        return self.merge(out.transpose(1, 2).reshape(groups, tokens, dim))


class PartitionAttention(nn.Module):
    """Attention and MLP in windows, or in a grid, each behind a LayerNorm and beside a skip, [N, H, W, C] -> same."""

    def __init__(self, dim: int, grid: bool, dropped: float, last: bool, quantize: Scheme | None) -> None:
        """``dropped`` is the probability of stochastic depth; ``last``: no LayerNorm reads the result."""
        super().__init__()
        self.grid = grid
        self.attn_layer = nn.Sequential(nn.LayerNorm(dim), Attention(dim, quantize))
        first, second = linear(dim, 4 * dim, quantize=quantize), linear(4 * dim, dim, quantize=quantize)
        self.mlp_layer = nn.Sequential(nn.LayerNorm(dim), first, nn.GELU(), second)
        self.stochastic_dropout = StochasticDepth(dropped)
        self.residual_quantizer1 = activation_quantizer(quantize, "stream")
        self.branch_quantizer1 = activation_quantizer(quantize, "stream")
        roles = ("residual", "branch") if last else ("stream", "stream")
        self.residual_quantizer2 = activation_quantizer(quantize, roles[0])
        self.branch_quantizer2 = activation_quantizer(quantize, roles[1])

    def forward(self, x: Tensor) -> Tensor:
        n, height, width, channels = x.shape
        down, across = height // WINDOW, width // WINDOW
        if self.grid:
            x = x.reshape(n, WINDOW, down, WINDOW, across, channels).permute(0, 2, 4, 1, 3, 5)
        else:
            x = x.reshape(n, down, WINDOW, across, WINDOW, channels).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(n * down * across, WINDOW**2, channels)
        out = self._drop(self.attn_layer(x), n)
        x = self.residual_quantizer1(x) + self.branch_quantizer1(out)
        out = self._drop(self.mlp_layer(x), n)
        x = self.residual_quantizer2(x) + self.branch_quantizer2(out)
        x = x.reshape(n, down, across, WINDOW, WINDOW, channels)
        x = x.permute(0, 3, 1, 4, 2, 5) if self.grid else x.permute(0, 1, 3, 2, 4, 5)
        return x.reshape(n, height, width, channels)

    def _drop(self, x: Tensor, images: int) -> Tensor:
        """Stochastic depth of images, each of which is many groups."""
        return self.stochastic_dropout(x.reshape(images, -1)).reshape(x.shape) if self.training else x


class Layer(nn.Module):
    """A convolution block, attention in windows and attention in a grid."""

    def __init__(
        self, in_channels: int, dim: int, stride: int, dropped: float, quantize: Scheme | None
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {
                "MBconv": MBConv(in_channels, dim, stride, dropped, quantize),
                "window_attention": PartitionAttention(dim, False, dropped, False, quantize),
                "grid_attention": PartitionAttention(dim, True, dropped, True, quantize),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers["MBconv"](x).permute(0, 2, 3, 1)
        x = self.layers["grid_attention"](self.layers["window_attention"](x))
        return x.permute(0, 3, 1, 2).contiguous()


class Stage(nn.Module):
    """Layers, the first of which halves height and width."""

    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class MaxViT(HubMixin, nn.Module):
    """Two convolutions, four stages, global average pooling, LayerNorm and a classifier with a hidden layer."""

    def __init__(
        self,
        depths: tuple[int, ...],
        widths: tuple[int, ...],
        dropped: float,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        quantize: Scheme | None = None,
    ) -> None:
        """``dropped`` is the probability of stochastic depth in the last layer."""
        super().__init__()
        channels = widths[0]
        self.stem = nn.Sequential(
            conv_norm_activation(
                in_channels,
                channels,
                3,
                function=nn.GELU(),
                norm=BatchNorm,
                stride=2,
                quantize=quantize,
                edge=True,
            ),
            nn.Sequential(conv2d(channels, channels, 3, padding=1, bias=True, quantize=quantize)),
        )
        stages, number = [], 0
        for depth, width in zip(depths, widths, strict=True):
            layers = []
            for j in range(depth):
                probability = dropped * number / (sum(depths) - 1)
                layers.append(Layer(channels, width, 2 if j == 0 else 1, probability, quantize))
                channels, number = width, number + 1
            stages.append(Stage(layers))
        self.blocks = nn.Sequential(*stages)
        self.pool_quantizer = activation_quantizer(quantize, "pool")
        self.classifier = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            LayerNorm(channels, quantize, "activation", eps=1e-5),
            linear(channels, channels, quantize=quantize),
            nn.Sequential(activation_quantizer(quantize, "activation"), nn.Tanh()),
            linear(channels, num_classes, bias=False, quantize=quantize, edge=True),
        )
        self.output_quantizer = activation_quantizer(quantize, "output")
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and not module.weight.is_meta:
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.output_quantizer(self.classifier(self.pool_quantizer(x)))


@register_model(
    {"tv_in1k": torchvision_weights("maxvit_t-bc5ab103.pth", 83.7, resize=224, interpolation="bicubic")},
    FAMILY,
)
def maxvit_t(**options: Any) -> MaxViT:
    """MaxViT-T: 30.9 M parameters, 5.6 G multiply-adds, 224 pixels."""
    return MaxViT((2, 2, 5, 2), (64, 128, 256, 512), 0.2, **options)
