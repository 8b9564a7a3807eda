"""Swin Transformer, versions 1 and 2, for ImageNet, with torchvision's parameter names.

Papers: "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows" (Liu et al., 2021, arXiv:2103.14030),
"Swin Transformer V2: Scaling Up Capacity and Resolution" (Liu et al., 2021, arXiv:2111.09883).

Shapes of the tiny one at 224 pixels: patches [N, 56, 56, 96], then the stages [N, 56, 56, 96], [N, 28, 28, 192],
[N, 14, 14, 384] and [N, 7, 7, 768], logits [N, num_classes]. An attention sees windows, [N x windows, 49, channels];
in every second block they are shifted by half a window, and what was not together before is masked.

Quantization: as in a ViT, the inputs and weights of all linear layers, both operands of the two products in each
attention (the softmax is never below zero), and the logits. LayerNorm, softmax, GELU and
the stream that the blocks add to stay in float. The position bias is made of weights alone: version 2 computes it with
two small linear layers, which stay in float, as their result is a constant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.hub_mixin import HubMixin
from qzoo.models.layers import LayerNorm, Permute, StochasticDepth, activation_quantizer, conv2d, linear
from qzoo.registry import TRANSFORMER, Family, register_model, torchvision_weights
from qzoo.scheme import Scheme

_CITATION = """@article{liu2021swin,
  title = {Swin Transformer: Hierarchical Vision Transformer using Shifted Windows},
  author = {Liu, Ze and Lin, Yutong and Cao, Yue and Hu, Han and Wei, Yixuan and Zhang, Zheng and others},
  journal = {arXiv:2103.14030},
  year = {2021}
}

@article{liu2021swinv2,
  title = {Swin Transformer V2: Scaling Up Capacity and Resolution},
  author = {Liu, Ze and Hu, Han and Lin, Yutong and Yao, Zhuliang and Xie, Zhenda and Wei, Yixuan and others},
  journal = {arXiv:2111.09883},
  year = {2021}
}
"""
FAMILY = Family(
    _CITATION,
    TRANSFORMER,
    results="NNCF, Swin-B: 85.27 to 83.57 with its default alpha, 0.95, and to 85.21 without SmoothQuant; Swin V2-S "
    "with 0.5: 83.71 to 83.64",
)


@dataclass(frozen=True)
class Settings:
    """What the blocks of a network have in common.

    Attributes:
        window: height and width of an attention's window.
        second: version 2: norms behind the branches, cosine attention, a computed position bias.
        quantize: None builds plain layers.
    """

    window: int
    second: bool
    quantize: Scheme | None


def pairs_of_positions(window: int) -> Tensor:
    """Number the distance of each pair of positions in a window, [window ** 4], of (2 window - 1) ** 2."""
    with torch.device("cpu"):  # without memory, on "meta", torch would load its compiler for such arithmetic
        rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        rows, columns = rows.flatten(), columns.flatten()
        down = rows[:, None] - rows[None, :] + window - 1
        right = columns[:, None] - columns[None, :] + window - 1
        pairs = (down * (2 * window - 1) + right).flatten()
    return pairs.to(torch.get_default_device())


def _distances(window: int) -> Tensor:
    """The distances themselves on a logarithmic scale, [1, 2 window - 1, 2 window - 1, 2]."""
    with torch.device("cpu"):
        steps = torch.arange(-(window - 1), window, dtype=torch.float32)
        table = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1).unsqueeze(0)
        table = table / (window - 1) * 8
        table = torch.sign(table) * torch.log2(torch.abs(table) + 1.0) / 3.0
    return table.to(torch.get_default_device())


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, [N, H, W, dim] -> the same."""

    def __init__(self, dim: int, heads: int, shift: int, settings: Settings) -> None:
        """``shift`` is by how much the windows lie off the grid."""
        super().__init__()
        self.heads, self.window, self.shift = heads, settings.window, shift
        self.second = settings.second
        quantize = settings.quantize
        self.qkv = linear(dim, 3 * dim, quantize=quantize)
        self.proj = linear(dim, dim, quantize=quantize)
        distances = (2 * self.window - 1) ** 2
        if self.second:
            self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10.0)))
            self.cpb_mlp = nn.Sequential(
                nn.Linear(2, 512), nn.ReLU(inplace=True), nn.Linear(512, heads, bias=False)
            )
            self.register_buffer("relative_coords_table", _distances(self.window))
        else:
            self.relative_position_bias_table = nn.Parameter(torch.zeros(distances, heads))
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", pairs_of_positions(self.window))
        self.query_quantizer = activation_quantizer(quantize, "product", symmetric=True)
        self.key_quantizer = activation_quantizer(quantize, "product", symmetric=True)
        self.value_quantizer = activation_quantizer(quantize, "product", symmetric=True)
        self.softmax_quantizer = activation_quantizer(quantize, "product", nonnegative=True)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, dim = x.shape
        right, below = -width % self.window, -height % self.window
        x = nn.functional.pad(x, (0, 0, 0, right, 0, below))
        n, padded_height, padded_width, _ = x.shape
        shifts = [self.shift if size > self.window else 0 for size in (padded_height, padded_width)]
        if any(shifts):
            x = torch.roll(x, (-shifts[0], -shifts[1]), (1, 2))
        down, across, window = padded_height // self.window, padded_width // self.window, self.window
        x = x.view(n, down, window, across, window, dim).permute(0, 1, 3, 2, 4, 5)
        mask = self._mask(x, padded_height, padded_width, shifts) if any(shifts) else None
        x = self._attend(x.reshape(n * down * across, window * window, dim), mask)
        x = x.view(n, down, across, window, window, dim).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(n, padded_height, padded_width, dim)
        if any(shifts):
            x = torch.roll(x, (shifts[0], shifts[1]), (1, 2))
        return x[:, :height, :width, :].contiguous()

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attention within each window, [windows, tokens, dim] -> the same."""
        windows, tokens, dim = x.shape
        qkv = (
            self._project(x).reshape(windows, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        )
        query, key, value = qkv.unbind(0)
        if self.second:
            query, key = nn.functional.normalize(query, dim=-1), nn.functional.normalize(key, dim=-1)
        else:
            query = query * (dim // self.heads) ** -0.5
        weights = self.query_quantizer(query) @ self.key_quantizer(key).transpose(-2, -1)
        if self.second:
            weights = weights * torch.clamp(self.logit_scale, max=math.log(100.0)).exp()
        weights = weights + self._position_bias(tokens)
        if mask is not None:
            weights = weights.view(-1, len(mask), self.heads, tokens, tokens) + mask[None, :, None]
            weights = weights.view(-1, self.heads, tokens, tokens)
        weights = self.softmax_quantizer(weights.softmax(dim=-1))
        x = (weights @ self.value_quantizer(value)).transpose(1, 2).reshape(windows, tokens, dim)
        return self.proj(x)

    def _project(self, x: Tensor) -> Tensor:
        """Queries, keys and values side by side; in version 2 keys have no bias, though it has an entry."""
        if not self.second:
            return self.qkv(x)
        bias: Tensor = self.qkv.get_parameter("bias")
        dim = len(bias) // 3
        bias = torch.cat([bias[:dim], torch.zeros_like(bias[:dim]), bias[2 * dim :]])
        return torch.func.functional_call(self.qkv, {"bias": bias}, x)

    def _position_bias(self, tokens: int) -> Tensor:
        """What is added by the distance of two tokens, [1, heads, tokens, tokens]."""
        if self.second:
            table = self.cpb_mlp(self.relative_coords_table).view(-1, self.heads)
        else:
            table = self.relative_position_bias_table
        bias = table[self.relative_position_index].view(tokens, tokens, -1)
        bias = bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        return 16 * torch.sigmoid(bias) if self.second else bias

    def _mask(self, x: Tensor, height: int, width: int, shifts: Sequence[int]) -> Tensor:
        """-100 for pairs of tokens of one window that the shift brought together, [windows, tokens, tokens]."""
        window, count = self.window, 0
        regions = x.new_zeros((height, width))
        bounds = [((0, -window), (-window, -shift), (-shift, None)) for shift in shifts]
        for top, bottom in bounds[0]:
            for left, right in bounds[1]:
                regions[top:bottom, left:right] = count
                count += 1
        regions = regions.view(height // window, window, width // window, window).permute(0, 2, 1, 3)
        regions = regions.reshape(-1, window * window)
        apart = regions.unsqueeze(1) != regions.unsqueeze(2)
        return x.new_zeros(apart.shape).masked_fill(apart, -100.0)


class Block(nn.Module):
    """Attention and MLP, each beside a skip, [N, H, W, dim] -> the same. The norms are before them, or behind."""

    def __init__(self, dim: int, heads: int, shift: int, dropped: float, settings: Settings) -> None:
        """``dropped`` is the probability of stochastic depth."""
        super().__init__()
        quantize, self.second = settings.quantize, settings.second
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, shift, settings)
        self.stochastic_depth = StochasticDepth(dropped)
        self.norm2 = nn.LayerNorm(dim)
        first, last = linear(dim, 4 * dim, quantize=quantize), linear(4 * dim, dim, quantize=quantize)
        self.mlp = nn.Sequential(first, nn.GELU(), nn.Identity(), last)
        self.residual_quantizer1 = activation_quantizer(quantize, "stream")
        self.branch_quantizer1 = activation_quantizer(quantize, "stream")
        self.residual_quantizer2 = activation_quantizer(quantize, "stream")
        self.branch_quantizer2 = activation_quantizer(quantize, "stream")

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm1(self.attn(x)) if self.second else self.attn(self.norm1(x))
        x = self.residual_quantizer1(x) + self.branch_quantizer1(self.stochastic_depth(out))
        out = self.norm2(self.mlp(x)) if self.second else self.mlp(self.norm2(x))
        return self.residual_quantizer2(x) + self.branch_quantizer2(self.stochastic_depth(out))


class PatchMerging(nn.Module):
    """Four neighbours become one, [N, H, W, dim] -> [N, H / 2, W / 2, 2 dim]."""

    def __init__(self, dim: int, settings: Settings) -> None:
        super().__init__()
        self.second = settings.second
        self.reduction = linear(4 * dim, 2 * dim, bias=False, quantize=settings.quantize)
        self.norm = nn.LayerNorm(2 * dim if self.second else 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x = nn.functional.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        neighbours = [x[:, down::2, right::2] for right in (0, 1) for down in (0, 1)]
        x = torch.cat(neighbours, -1)
        return self.norm(self.reduction(x)) if self.second else self.reduction(self.norm(x))


class SwinTransformer(HubMixin, nn.Module):
    """Patches, four stages of blocks, LayerNorm, global average pooling and a linear classifier."""

    def __init__(
        self,
        dim: int,
        depths: tuple[int, ...],
        dropped: float,
        *,
        head: int = 32,
        window: int = 7,
        second: bool = False,
        num_classes: int = 1000,
        in_channels: int = 3,
        quantize: Scheme | None = None,
    ) -> None:
        """``dropped`` is the probability of stochastic depth in the last block; ``head`` is the width of a head."""
        super().__init__()
        settings = Settings(window, second, quantize)
        patches = conv2d(in_channels, dim, 4, stride=4, bias=True, quantize=quantize, edge=True)
        features: list[nn.Module] = [
            nn.Sequential(patches, Permute(0, 2, 3, 1), LayerNorm(dim, quantize, eps=1e-5))
        ]
        number = 0
        for i, depth in enumerate(depths):
            blocks = []
            for j in range(depth):
                probability = dropped * number / (sum(depths) - 1)
                shift = window // 2 if j % 2 == 1 else 0
                blocks.append(Block(dim, dim // head, shift, probability, settings))
                number += 1
            features.append(nn.Sequential(*blocks))
            if i < len(depths) - 1:
                features.append(PatchMerging(dim, settings))
                dim *= 2
        self.features = nn.Sequential(*features)
        self.norm = nn.LayerNorm(dim)
        self.permute = Permute(0, 3, 1, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.head = linear(dim, num_classes, quantize=quantize, edge=True)
        self.pool_quantizer = activation_quantizer(quantize, "pool")
        self.output_quantizer = activation_quantizer(quantize, "output")
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear) and not module.weight.is_meta:
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.permute(self.norm(self.features(x)))
        x = self.avgpool(self.pool_quantizer(x))
        return self.output_quantizer(self.head(torch.flatten(x, 1)))


_TIMM_NAMES = {
    "patch_embed.proj.": "features.0.0.",
    "patch_embed.norm.": "features.0.2.",
    ".mlp.fc1.": ".mlp.0.",
    ".mlp.fc2.": ".mlp.3.",
    "head.fc.": "head.",
    **{f"layers.{i}.downsample.": f"features.{2 * i}." for i in range(4)},
    **{f"layers.{i}.blocks.": f"features.{2 * i + 1}." for i in range(4)},
}


def timm_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the entries of timm's networks, such as ``swin_tiny_patch4_window7_224``, as torchvision does.

    Their files lack the windows' positions, and version 2 has no bias of the keys.
    """
    if "patch_embed.proj.weight" not in state_dict:
        return dict(state_dict)
    renamed = {}
    for key, value in state_dict.items():
        for theirs, ours in _TIMM_NAMES.items():
            key = key.replace(theirs, ours)
        renamed[key] = value
    for key in [key for key in renamed if key.endswith(".attn.proj.weight")]:
        attention, second = (
            key.removesuffix(".proj.weight"),
            key.replace("proj.weight", "logit_scale") in renamed,
        )
        window = 8 if second else 7
        renamed[f"{attention}.relative_position_index"] = pairs_of_positions(window)
        if second and {f"{attention}.q_bias", f"{attention}.v_bias"} <= renamed.keys():
            query, value = renamed.pop(f"{attention}.q_bias"), renamed.pop(f"{attention}.v_bias")
            renamed[f"{attention}.qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
            renamed[f"{attention}.relative_coords_table"] = _distances(window)
    return renamed


def _published(file: str, top1: float, resize: int, alias: str, size: int = 224) -> Any:
    """Register a network with torchvision's weights; images are cut from the middle after a bicubic resize.

    Args:
        alias: timm's name.
    """
    weights = torchvision_weights(file, top1, size=size, resize=resize, interpolation="bicubic")
    return register_model({"tv_in1k": weights}, FAMILY, aliases=[alias], key_map=timm_names)


@_published("swin_t-704ceda3.pth", 81.474, 232, "swin_tiny_patch4_window7_224")
def swin_t(**options: Any) -> SwinTransformer:
    """Swin-T: 28.3 M parameters, 4.5 G multiply-adds."""
    return SwinTransformer(96, (2, 2, 6, 2), 0.2, **options)


@_published("swin_s-5e29d889.pth", 83.196, 246, "swin_small_patch4_window7_224")
def swin_s(**options: Any) -> SwinTransformer:
    """Swin-S: 49.6 M parameters, 8.7 G multiply-adds."""
    return SwinTransformer(96, (2, 2, 18, 2), 0.3, **options)


@_published("swin_b-68c6b09e.pth", 83.582, 238, "swin_base_patch4_window7_224")
def swin_b(**options: Any) -> SwinTransformer:
    """Swin-B: 87.8 M parameters, 15.4 G multiply-adds."""
    return SwinTransformer(128, (2, 2, 18, 2), 0.5, **options)


@_published("swin_v2_t-b137f0e2.pth", 82.072, 260, "swinv2_tiny_window8_256", 256)
def swin_v2_t(**options: Any) -> SwinTransformer:
    """Swin V2-T: 28.4 M parameters, 5.9 G multiply-adds, 256 pixels."""
    return SwinTransformer(96, (2, 2, 6, 2), 0.2, window=8, second=True, **options)


@_published("swin_v2_s-637d8ceb.pth", 83.712, 260, "swinv2_small_window8_256", 256)
def swin_v2_s(**options: Any) -> SwinTransformer:
    """Swin V2-S: 49.7 M parameters, 11.5 G multiply-adds, 256 pixels."""
    return SwinTransformer(96, (2, 2, 18, 2), 0.3, window=8, second=True, **options)


@_published("swin_v2_b-781e5279.pth", 84.112, 272, "swinv2_base_window8_256", 256)
def swin_v2_b(**options: Any) -> SwinTransformer:
    """Swin V2-B: 87.9 M parameters, 20.3 G multiply-adds, 256 pixels."""
    return SwinTransformer(128, (2, 2, 18, 2), 0.5, window=8, second=True, **options)
