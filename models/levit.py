"""LeViT for ImageNet, with timm's parameter names.

Paper: "LeViT: a Vision Transformer in ConvNet's Clothing for Faster Inference" (Graham et al., 2021, arXiv:2104.01136).

Shapes of the smallest one at 224 pixels: four convolutions to [N, 128, 14, 14], then tokens in three stages,
[N, 196, 128], [N, 49, 256] and [N, 16, 384]; an attention has [N, heads, 196, 196], and between stages, where every
second row and column asks, [N, heads, 49, 196]. The mean of the tokens goes to two classifiers, one trained by the
labels and one by a teacher, and the logits [N, num_classes] are the mean of both. The position bias fixes the size of
the image.

Quantization: there is no LayerNorm, but a BatchNorm behind each layer, which is folded, so that the tokens between
blocks are int8: each add has quantizers on both sides, and what is added on has one range with the layer that reads
it. Hard-swish is signed (not below -0.375), and so is all else but the softmax. Both operands of the two products in
each attention are quantized. The two BatchNorms before the classifiers stay in float.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.hub_mixin import HubMixin
from qzoo.models.layers import activation, activation_quantizer, conv_norm_activation, linear, share_range
from qzoo.registry import SWISH, Family, register_model, timm_weights
from qzoo.scheme import Scheme

_CITATION = """@article{graham2021levit,
  title = {LeViT: a Vision Transformer in ConvNet's Clothing for Faster Inference},
  author = {Graham, Ben and El-Nouby, Alaaeldin and Touvron, Hugo and Stock, Pierre and Joulin, Armand and others},
  journal = {arXiv:2104.01136},
  year = {2021}
}
"""
FAMILY = Family(_CITATION, SWISH, results="NNCF, LeViT-128: 78.47 to 77.64")
RESOLUTION = 14  # rows and columns of tokens in the first stage, of images of 224 pixels


class LinearNorm(nn.Module):
    """A linear layer and its BatchNorm, [N, tokens, in] -> [N, tokens, out]."""

    def __init__(self, dim: int, out: int, quantize: Scheme | None, *, zero: bool = False) -> None:
        """``zero``: the BatchNorm starts with factors of zero, as the last one of a branch does."""
        super().__init__()
        self.linear = linear(dim, out, bias=False, quantize=quantize)
        self.bn = nn.BatchNorm1d(out)
        if zero:
            nn.init.zeros_(self.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        return self.bn(self.linear(x).flatten(0, 1)).view(n, tokens, -1)


class NormLinear(nn.Module):
    """A BatchNorm and a linear classifier, [N, dim] -> [N, num_classes]."""

    def __init__(self, dim: int, num_classes: int, quantize: Scheme | None) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(dim)
        self.linear = linear(dim, num_classes, quantize=quantize, edge=True)
        nn.init.trunc_normal_(self.linear.get_parameter("weight"), std=0.02)
        nn.init.zeros_(self.linear.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.bn(x))


class Attention(nn.Module):
    """What both forms of multi-head attention have: the two products, and a bias for each distance of two tokens."""

    def __init__(
        self,
        out: int,
        key: int,
        value: int,
        heads: int,
        resolution: int,
        stride: int,
        quantize: Scheme | None,
    ) -> None:
        """``key`` and ``value`` are widths in a head; ``resolution`` is the number of rows of tokens."""
        super().__init__()
        self.heads, self.key, self.value = heads, key, value
        self.resolution, self.stride = resolution, stride
        self.proj = nn.Sequential()
        self.proj.act = nn.Hardswish()
        self.proj.ln = LinearNorm(value * heads, out, quantize, zero=stride == 1)
        self.attention_biases = nn.Parameter(torch.zeros(heads, resolution**2))
        self.query_quantizer = activation_quantizer(quantize, "input", symmetric=True)
        self.key_quantizer = activation_quantizer(quantize, "input", symmetric=True)
        self.softmax_quantizer = activation_quantizer(quantize, "input", nonnegative=True)
        self.value_quantizer = activation_quantizer(quantize, "input", symmetric=True)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend: query [N, queries, heads, key], key and value [N, tokens, heads, ...] -> [N, queries, out]."""
        query, key, value = query.permute(0, 2, 1, 3), key.permute(0, 2, 3, 1), value.permute(0, 2, 1, 3)
        weights = self.query_quantizer(query) @ self.key_quantizer(key) * self.key**-0.5
        weights = weights + self.attention_biases[:, self._distances()]
        out = self.softmax_quantizer(weights.softmax(-1)) @ self.value_quantizer(value)
        return self.proj(out.transpose(1, 2).flatten(2))

    def _distances(self) -> Tensor:
        """The number of the distance of each query and each token, [queries, tokens]."""
        places = torch.arange(self.resolution, device=self.attention_biases.device)
        apart = (places[:: self.stride, None] - places).abs()  # along one side
        count = self.resolution
        return (count * apart[:, None, :, None] + apart[None, :, None, :]).reshape(-1, count * count)


class SelfAttention(Attention):
    """Each token asks, [N, tokens, dim] -> the same."""

    def __init__(self, dim: int, key: int, heads: int, resolution: int, quantize: Scheme | None) -> None:
        super().__init__(dim, key, 2 * key, heads, resolution, 1, quantize)
        self.qkv = LinearNorm(dim, 4 * key * heads, quantize)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).view(len(x), -1, self.heads, 4 * self.key)
        query, key, value = parts.split([self.key, self.key, self.value], 3)
        return self.attend(query, key, value)


class HalvingAttention(Attention):
    """The tokens of every second row and column ask, [N, tokens, dim] -> [N, tokens / 4, out]."""

    def __init__(
        self, name: str, dim: int, out: int, key: int, resolution: int, quantize: Scheme | None
    ) -> None:
        """``name`` is that of the range of the input."""
        heads = dim // key
        super().__init__(out, key, 4 * key, heads, resolution, 2, quantize)
        self.kv = LinearNorm(dim, 5 * key * heads, quantize)
        self.q = nn.Sequential()
        self.q.ln = LinearNorm(dim, key * heads, quantize)
        self.asking_quantizer = activation_quantizer(quantize, "input")
        share_range(name, self.kv.linear, self.asking_quantizer, self.q.ln.linear)

    def forward(self, x: Tensor) -> Tensor:
        key, value = self.kv(x).view(len(x), -1, self.heads, 5 * self.key).split([self.key, self.value], 3)
        rows = self.asking_quantizer(x).view(len(x), self.resolution, self.resolution, -1)
        query = self.q(rows[:, :: self.stride, :: self.stride].flatten(1, 2))
        return self.attend(query.view(len(x), -1, self.heads, self.key), key, value)


class Mlp(nn.Module):
    """Two linear layers with hard-swish between, beside a skip, [N, tokens, dim] -> the same."""

    def __init__(self, dim: int, quantize: Scheme | None) -> None:
        super().__init__()
        self.ln1 = LinearNorm(dim, 2 * dim, quantize)
        self.act = nn.Hardswish()
        self.ln2 = LinearNorm(2 * dim, dim, quantize, zero=True)
        self.residual_quantizer = activation_quantizer(quantize, "residual")
        self.branch_quantizer = activation_quantizer(quantize, "branch")

    def forward(self, x: Tensor) -> Tensor:
        return self.residual_quantizer(x) + self.branch_quantizer(self.ln2(self.act(self.ln1(x))))


class Block(nn.Module):
    """Attention and MLP, each beside a skip, [N, tokens, dim] -> the same."""

    def __init__(self, dim: int, key: int, heads: int, resolution: int, quantize: Scheme | None) -> None:
        super().__init__()
        self.attn = SelfAttention(dim, key, heads, resolution, quantize)
        self.mlp = Mlp(dim, quantize)
        self.residual_quantizer = activation_quantizer(quantize, "residual")
        self.branch_quantizer = activation_quantizer(quantize, "branch")

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.residual_quantizer(x) + self.branch_quantizer(self.attn(x)))


class LeViT(HubMixin, nn.Module):
    """Convolutions, three stages of attention, the mean of the tokens, and the mean of two linear classifiers."""

    def __init__(
        self,
        dims: tuple[int, ...],
        key: int,
        heads: tuple[int, ...],
        depths: tuple[int, ...] = (4, 4, 4),
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        quantize: Scheme | None = None,
    ) -> None:
        """``dims``, ``heads`` and ``depths`` are of the stages; ``key`` is the width of a key."""
        super().__init__()
        self.stem = nn.Sequential()
        channels = in_channels
        for i, part in enumerate((8, 4, 2, 1), 1):
            conv = conv_norm_activation(
                channels,
                dims[0] // part,
                3,
                function=None,
                names=("linear", "bn", "act"),
                stride=2,
                quantize=quantize,
                edge=i == 1,
            )
            self.stem.add_module(f"conv{i}", conv)
            if part > 1:
                self.stem.add_module(f"act{i}", activation(nn.Hardswish(), quantize))
            channels = dims[0] // part
        self.stages = nn.Sequential()
        resolution = RESOLUTION
        for i, (dim, count, depth) in enumerate(zip(dims, heads, depths, strict=True)):
            stage = nn.Sequential()
            if i > 0:
                stage.downsample = nn.Sequential()
                stage.downsample.attn_downsample = HalvingAttention(
                    f"stages.{i}", channels, dim, key, resolution, quantize
                )
                stage.downsample.mlp = Mlp(dim, quantize)
                channels, resolution = dim, (resolution + 1) // 2
            stage.blocks = nn.Sequential(
                *(Block(dim, key, count, resolution, quantize) for _ in range(depth))
            )
            self.stages.append(stage)
        self.head = NormLinear(dims[-1], num_classes, quantize)
        self.head_dist = NormLinear(dims[-1], num_classes, quantize)
        self.pool_quantizer = activation_quantizer(quantize, "activation")
        self.residual_quantizer = activation_quantizer(quantize, "residual")
        self.branch_quantizer = activation_quantizer(quantize, "branch")
        self.output_quantizer = activation_quantizer(quantize, "activation")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.stem(x).flatten(2).transpose(1, 2))
        x = self.pool_quantizer(x).mean(1)
        x = self.branch_quantizer(self.head(x)) + self.residual_quantizer(self.head_dist(x))
        return self.output_quantizer(x) / 2


def conv_weights(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Reshape the 1x1 convolutions of timm's ``levit_conv_128s`` and its kin to linear layers, [O, I]."""
    return {
        key: value.flatten(1) if key.startswith("stages.") and key.endswith(".linear.weight") else value
        for key, value in state_dict.items()
    }


def _published(size: str, top1: float) -> Callable[[Callable], Callable]:
    """Register a network with the authors' weights, distilled, from timm, which has it with 1x1 convolutions, too."""
    weights = timm_weights(f"levit_{size}.fb_dist_in1k", top1, crop_pct=0.9)
    return register_model(
        {"fb_dist_in1k": weights}, FAMILY, aliases=[f"levit_conv_{size}"], key_map=conv_weights
    )


@_published("128s", 76.526)
def levit_128s(**options: Any) -> LeViT:
    """LeViT-128S: 7.8 M parameters, 0.3 G multiply-adds, 224 pixels."""
    return LeViT((128, 256, 384), 16, (4, 6, 8), (2, 3, 4), **options)


@_published("128", 78.49)
def levit_128(**options: Any) -> LeViT:
    """LeViT-128: 9.2 M parameters, 0.4 G multiply-adds, 224 pixels."""
    return LeViT((128, 256, 384), 16, (4, 8, 12), **options)


@_published("192", 79.838)
def levit_192(**options: Any) -> LeViT:
    """LeViT-192: 10.9 M parameters, 0.7 G multiply-adds, 224 pixels."""
    return LeViT((192, 288, 384), 32, (3, 5, 6), **options)


@_published("256", 81.514)
def levit_256(**options: Any) -> LeViT:
    """LeViT-256: 18.9 M parameters, 1.1 G multiply-adds, 224 pixels."""
    return LeViT((256, 384, 512), 32, (4, 6, 8), **options)


@_published("384", 82.596)
def levit_384(**options: Any) -> LeViT:
    """LeViT-384: 39.1 M parameters, 2.4 G multiply-adds, 224 pixels."""
    return LeViT((384, 512, 768), 32, (6, 9, 12), **options)
