"""Vision Transformers for ImageNet, with timm's parameter names.

Paper: "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale" (Dosovitskiy et al., 2020,
arXiv:2010.11929); ``deit_*`` are the same networks as "Training data-efficient image transformers & distillation
through attention" (Touvron et al., 2020, arXiv:2012.12877) trained them. ``deit3_*`` are those of "DeiT III: Revenge of
the ViT" (Touvron et al., 2022, arXiv:2204.07118), whose branches have a learned scale and whose class token has no
position. ``*_dinov2`` are the image encoders of "DINOv2: Learning Robust Visual Features without Supervision" (Oquab et
al., 2023, arXiv:2304.07193): without a classifier they give the class token, [N, dim], as features.

Shapes at 224 pixels with patches of 16: patches [N, 196, dim], with the class token [N, 197, dim] through all blocks,
logits [N, num_classes]; an attention has [N, heads, 197, 197]. The position embedding fixes the size of the image.

Quantization: the inputs and weights of all linear layers and of the patch embedding, both operands of the two
products in each attention (the softmax is never below zero), and the logits. LayerNorm,
softmax and GELU stay in float, and so does the stream that the blocks add to: per tensor its few large channels cost
most of the accuracy (Lin et al., 2022, FQ-ViT, arXiv:2111.13824), and no kernel is faster for it. Attention is written
out, because its operands are quantized; fused kernels differ from it in the last bits.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.hub_mixin import HubMixin
from qzoo.models.layers import activation_quantizer, conv2d, linear
from qzoo.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from qzoo.registry import TRANSFORMER, Family, FloatWeights, register_model, timm_weights, torchvision_weights
from qzoo.scheme import Scheme

_CITATION = """@article{dosovitskiy2020image,
  title = {An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale},
  author = {Dosovitskiy, Alexey and Beyer, Lucas and Kolesnikov, Alexander and others},
  journal = {arXiv:2010.11929},
  year = {2020}
}

@article{touvron2020training,
  title = {Training data-efficient image transformers and distillation through attention},
  author = {Touvron, Hugo and Cord, Matthieu and Douze, Matthijs and others},
  journal = {arXiv:2012.12877},
  year = {2020}
}

@article{oquab2023dinov2,
  title = {DINOv2: Learning Robust Visual Features without Supervision},
  author = {Oquab, Maxime and Darcet, Timoth{\\'e}e and Moutakanni, Th{\\'e}o and Vo, Huy and others},
  journal = {arXiv:2304.07193},
  year = {2023}
}

@article{touvron2022deit,
  title = {DeiT III: Revenge of the ViT},
  author = {Touvron, Hugo and Cord, Matthieu and J{\\'e}gou, Herv{\\'e}},
  journal = {arXiv:2204.07118},
  year = {2022}
}
"""
FAMILY = Family(
    _CITATION,
    TRANSFORMER,
    results="NNCF, ViT-B/16 with alpha 0.15: 81.07 to 80.95; DeiT III-S without SmoothQuant: 81.36 to 81.28",
)

IMAGE, PATCH = 224, 16


class PatchEmbed(nn.Module):
    """[N, C, H, W] -> [N, H W / patch ** 2, dim]: a convolution whose stride is its size."""

    def __init__(self, in_channels: int, dim: int, patch: int, quantize: Scheme | None) -> None:
        super().__init__()
        self.proj = conv2d(in_channels, dim, patch, stride=patch, bias=True, quantize=quantize, edge=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention, [N, tokens, dim] -> the same."""

    def __init__(self, dim: int, heads: int, quantize: Scheme | None) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv = linear(dim, 3 * dim, quantize=quantize)
        self.proj = linear(dim, dim, quantize=quantize)
        self.query_quantizer = activation_quantizer(quantize, "product", symmetric=True)
        self.key_quantizer = activation_quantizer(quantize, "product", symmetric=True)
        self.value_quantizer = activation_quantizer(quantize, "product", symmetric=True)
        self.softmax_quantizer = activation_quantizer(quantize, "product", nonnegative=True)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        query, key = self.query_quantizer(query * self.scale), self.key_quantizer(key)
        weights = self.softmax_quantizer((query @ key.transpose(-2, -1)).softmax(dim=-1))
        value = self.value_quantizer(value)
        return self.proj((weights @ value).transpose(1, 2).reshape(n, tokens, dim))


class Mlp(nn.Module):
    """Two linear layers with GELU between, [N, tokens, dim] -> the same."""

    def __init__(self, dim: int, quantize: Scheme | None) -> None:
        super().__init__()
        self.fc1 = linear(dim, 4 * dim, quantize=quantize)
        self.act = nn.GELU()
        self.fc2 = linear(4 * dim, dim, quantize=quantize)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class LayerScale(nn.Module):
    """A factor for each channel, [N, tokens, dim] -> the same."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and beside a skip, [N, tokens, dim] -> the same."""

    def __init__(self, dim: int, heads: int, scale: float | None, quantize: Scheme | None) -> None:
        """``scale`` is what the learned scales of the branches start with; None makes none."""
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, 1e-6)
        self.attn = Attention(dim, heads, quantize)
        self.ls1 = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.norm2 = nn.LayerNorm(dim, 1e-6)
        self.mlp = Mlp(dim, quantize)
        self.ls2 = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.residual_quantizer1 = activation_quantizer(quantize, "stream")
        self.branch_quantizer1 = activation_quantizer(quantize, "stream")
        self.residual_quantizer2 = activation_quantizer(quantize, "stream")
        self.branch_quantizer2 = activation_quantizer(quantize, "stream")

    def forward(self, x: Tensor) -> Tensor:
        out = self.ls1(self.attn(self.norm1(x)))
        x = self.residual_quantizer1(x) + self.branch_quantizer1(out)
        out = self.ls2(self.mlp(self.norm2(x)))
        return self.residual_quantizer2(x) + self.branch_quantizer2(out)


class VisionTransformer(HubMixin, nn.Module):
    """Patches, a class token, blocks, and a linear classifier on the class token, if there are classes."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        depth: int = 12,
        image: int = IMAGE,
        patch: int = PATCH,
        class_position: bool = True,
        scale: float | None = None,
        quantize: Scheme | None = None,
    ) -> None:
        """``class_position``: the class token has a position; ``scale``: see :class:`Block`.

        Without classes there is no classifier: the class token behind the last LayerNorm is the output, [N, dim].
        """
        super().__init__()
        self.class_position = class_position
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image // patch) ** 2 + class_position, dim))
        self.patch_embed = PatchEmbed(in_channels, dim, patch, quantize)
        self.blocks = nn.Sequential(*(Block(dim, heads, scale, quantize) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, 1e-6)
        self.head: nn.Module = nn.Identity()
        self.output_quantizer: nn.Module = nn.Identity()  # a LayerNorm gives floats
        if num_classes > 0:
            self.head = linear(dim, num_classes, quantize=quantize, edge=True)
            self.output_quantizer = activation_quantizer(quantize, "output")
        _init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        token = self.cls_token.expand(x.shape[0], -1, -1)
        if self.class_position:
            x = torch.cat([token, x], dim=1) + self.pos_embed
        else:
            x = torch.cat([token, x + self.pos_embed], dim=1)
        x = self.norm(self.blocks(x))
        return self.output_quantizer(self.head(x[:, 0]))


def _init_weights(model: nn.Module) -> None:
    """The paper's: small normal weights, biases of zero."""
    for name, parameter in model.named_parameters():
        if name in ("cls_token", "pos_embed") or (parameter.dim() > 1 and "patch_embed" not in name):
            nn.init.trunc_normal_(parameter, std=0.02)
        elif name.endswith("bias") and "norm" not in name:
            nn.init.zeros_(parameter)


def _deit(arch: str, top1: float, sha256: str, revision: str, hub_sha256: str) -> dict[str, FloatWeights]:
    """Facebook's weights: from timm's Hub repository, or from where they were published.

    Args:
        top1: in timm's ``results-imagenet.csv``.
        sha256: of the published file; its first 8 hex digits are part of its name.
        revision: commit of ``timm/<arch>.fb_in1k``; hub_sha256: SHA-256 of its ``model.safetensors``.
    """
    hub = f"hf:timm/{arch}.fb_in1k/model.safetensors"
    url = f"https://dl.fbaipublicfiles.com/deit/{arch}-{sha256[:8]}.pth"
    preprocessing = Preprocessing((3, IMAGE, IMAGE), 0.9, "bicubic", IMAGENET_MEAN, IMAGENET_STD)
    weights = FloatWeights((hub, url), (hub_sha256, sha256), revision, preprocessing=preprocessing, top1=top1)
    return {"fb_in1k": weights}


_TORCHVISION_NAMES = {
    "class_token": "cls_token",
    "encoder.pos_embedding": "pos_embed",
    "conv_proj": "patch_embed.proj",
    "encoder.layers.encoder_layer_": "blocks.",
    ".ln_": ".norm",
    ".self_attention.in_proj_": ".attn.qkv.",
    ".self_attention.out_proj": ".attn.proj",
    ".mlp.0": ".mlp.fc1",
    ".mlp.3": ".mlp.fc2",
    ".mlp.linear_": ".mlp.fc",  # so in the files of torchvision 0.12, when the weights were published
    "encoder.ln": "norm",
    "heads.head": "head",
}


def torchvision_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the entries of torchvision's networks, such as ``vit_b_16``, as timm does; the tensors are the same."""
    renamed = {}
    for key, value in state_dict.items():
        for theirs, ours in _TORCHVISION_NAMES.items():
            key = key.replace(theirs, ours)
        renamed[key] = value
    return renamed


def _augreg(arch: str, top1: float) -> dict[str, FloatWeights]:
    """Google's weights, from timm's Hub repository; images are scaled to -1 to 1.

    Args:
        top1: in timm's ``results-imagenet.csv``.
    """
    weights = timm_weights(f"{arch}.augreg_in21k_ft_in1k", top1, crop_pct=0.9)
    half = (0.5, 0.5, 0.5)
    return {
        "augreg_in21k_ft_in1k": dataclasses.replace(
            weights, preprocessing=dataclasses.replace(weights.preprocessing, mean=half, std=half)
        )
    }


def _deit3(size: str, top1: float) -> dict[str, FloatWeights]:
    """Facebook's weights from where they were published; of these files no SHA-256 is known.

    Args:
        size: in the file's name; top1: in timm's ``results-imagenet.csv``.
    """
    url = f"https://dl.fbaipublicfiles.com/deit/deit_3_{size}_224_1k.pth"
    preprocessing = Preprocessing((3, IMAGE, IMAGE), 0.9, "bicubic", IMAGENET_MEAN, IMAGENET_STD)
    return {"fb_in1k": FloatWeights((url,), ("",), preprocessing=preprocessing, top1=top1)}


def published_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the scales of the branches in Facebook's files of DeiT III, ``blocks.0.gamma_1``, as timm does."""
    return {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", key): value for key, value in state_dict.items()}


def _dinov2(arch: str, file: str) -> dict[str, FloatWeights]:
    """Facebook's encoder, from timm's Hub repository or from where it was published; there is no top-1 of it."""
    hub = f"hf:timm/{arch}.lvd142m/model.safetensors"
    url = f"https://dl.fbaipublicfiles.com/dinov2/{file}/{file}_pretrain.pth"
    preprocessing = Preprocessing((3, 518, 518), 1.0, "bicubic", IMAGENET_MEAN, IMAGENET_STD)
    return {"lvd142m": FloatWeights((hub, url), ("", ""), preprocessing=preprocessing, labels="")}


def without_mask(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the token that stood for hidden patches in the training of a DINOv2."""
    return {key: value for key, value in state_dict.items() if key != "mask_token"}


_TV_IN1K = FloatWeights(
    sources=("https://download.pytorch.org/models/vit_b_16-c867db91.pth",),
    sha256=("c867db91d3e12c6cbadabb610d73c24a546bf82d8c03a9fea34f43a712ddb0e9",),
    license="bsd-3-clause",
    top1=81.072,
)


@register_model(_augreg("vit_tiny_patch16_224", 75.454), FAMILY)
def vit_tiny_patch16_224(**options: Any) -> VisionTransformer:
    """ViT-Ti/16: 5.7 M parameters, 224 pixels."""
    return VisionTransformer(192, 3, **options)


@register_model(_augreg("vit_small_patch16_224", 81.384), FAMILY)
def vit_small_patch16_224(**options: Any) -> VisionTransformer:
    """ViT-S/16: 22.1 M parameters, 224 pixels."""
    return VisionTransformer(384, 6, **options)


@register_model({"tv_in1k": _TV_IN1K}, FAMILY, aliases=["vit_b_16"], key_map=torchvision_names)
def vit_base_patch16_224(**options: Any) -> VisionTransformer:
    """ViT-B/16: 86.6 M parameters, 224 pixels."""
    return VisionTransformer(768, 12, **options)


@register_model(
    {"tv_in1k": torchvision_weights("vit_b_32-d86f8d99.pth", 75.912)},
    FAMILY,
    aliases=["vit_b_32"],
    key_map=torchvision_names,
)
def vit_base_patch32_224(**options: Any) -> VisionTransformer:
    """ViT-B/32: 88.2 M parameters, 224 pixels."""
    return VisionTransformer(768, 12, patch=32, **options)


@register_model(
    {"tv_in1k": torchvision_weights("vit_l_16-852ce7e3.pth", 79.662, resize=242)},
    FAMILY,
    aliases=["vit_l_16"],
    key_map=torchvision_names,
)
def vit_large_patch16_224(**options: Any) -> VisionTransformer:
    """ViT-L/16: 304.3 M parameters, 224 pixels."""
    return VisionTransformer(1024, 16, depth=24, **options)


@register_model(
    {"tv_in1k": torchvision_weights("vit_l_32-c7638314.pth", 76.972)},
    FAMILY,
    aliases=["vit_l_32"],
    key_map=torchvision_names,
)
def vit_large_patch32_224(**options: Any) -> VisionTransformer:
    """ViT-L/32: 306.5 M parameters, 224 pixels."""
    return VisionTransformer(1024, 16, depth=24, patch=32, **options)


# SWAG's encoder with a linear classifier; the one that was tuned as a whole wants images of 518 pixels.
_SWAG = torchvision_weights("vit_h_14_lc_swag-c1eb923e.pth", 85.708, resize=224, interpolation="bicubic")


@register_model(
    {"swag_lc_in1k": dataclasses.replace(_SWAG, license="cc-by-nc-4.0")},
    FAMILY,
    aliases=["vit_h_14"],
    key_map=torchvision_names,
)
def vit_huge_patch14_224(**options: Any) -> VisionTransformer:
    """ViT-H/14: 632.0 M parameters, 224 pixels."""
    return VisionTransformer(1280, 16, depth=32, patch=14, **options)


@register_model(
    _deit(
        "deit_tiny_patch16_224",
        72.172,
        "a1311bcf4f24e3c95adaa75535db67bc4412d95535b98f7c1dfd1164dda41c97",
        "80e968688553f219e4a86f940ed945a23709c16f",
        "21d4764d94f6c3ffdb6da3581115a0a1ee2d505537d96883b540e54766407c9e",
    ),
    FAMILY,
)
def deit_tiny_patch16_224(**options: Any) -> VisionTransformer:
    """DeiT-Ti: 5.7 M parameters, 224 pixels."""
    return VisionTransformer(192, 3, **options)


@register_model(
    _deit(
        "deit_small_patch16_224",
        79.844,
        "cd65a15597004d0ce19d7a9daef969903972db5b398e3a5febcd3c4df1d8f59f",
        "91327a9c99f98fe6b524cd4d397b7226b80e1365",
        "1e747b4a8d0df2cfbd3c450e8c97685d867448ab0c2ddbfb34b6885f5cb23e5b",
    ),
    FAMILY,
)
def deit_small_patch16_224(**options: Any) -> VisionTransformer:
    """DeiT-S: 22.1 M parameters, 224 pixels."""
    return VisionTransformer(384, 6, **options)


@register_model(
    _deit(
        "deit_base_patch16_224",
        81.98,
        "b5f2ef4d686982dcdab24fe285fd08fff40db01550d8d4833167a73dd85ca7a8",
        "b78cc5532a69df6bcad9c3a8d76653fd20b31ac6",
        "cd2da27b74ed7f68b599f16c77af3e1e80f01c75f9ad96029d22ce747a247e8e",
    ),
    FAMILY,
)
def deit_base_patch16_224(**options: Any) -> VisionTransformer:
    """DeiT-B: 86.6 M parameters, 224 pixels."""
    return VisionTransformer(768, 12, **options)


@register_model(_deit3("small", 81.37), FAMILY, key_map=published_names)
def deit3_small_patch16_224(**options: Any) -> VisionTransformer:
    """DeiT III-S: 22.1 M parameters, 224 pixels."""
    return VisionTransformer(384, 6, class_position=False, scale=1e-6, **options)


@register_model(_deit3("medium", 83.086), FAMILY, key_map=published_names)
def deit3_medium_patch16_224(**options: Any) -> VisionTransformer:
    """DeiT III-M: 38.8 M parameters, 224 pixels."""
    return VisionTransformer(512, 8, class_position=False, scale=1e-6, **options)


@register_model(_deit3("base", 83.786), FAMILY, key_map=published_names)
def deit3_base_patch16_224(**options: Any) -> VisionTransformer:
    """DeiT III-B: 86.6 M parameters, 224 pixels."""
    return VisionTransformer(768, 12, class_position=False, scale=1e-6, **options)


@register_model(_deit3("large", 84.776), FAMILY, key_map=published_names)
def deit3_large_patch16_224(**options: Any) -> VisionTransformer:
    """DeiT III-L: 304.4 M parameters, 224 pixels."""
    return VisionTransformer(1024, 16, depth=24, class_position=False, scale=1e-6, **options)


@register_model(
    _dinov2("vit_small_patch14_dinov2", "dinov2_vits14"), FAMILY, num_classes=0, key_map=without_mask
)
def vit_small_patch14_dinov2(**options: Any) -> VisionTransformer:
    """DINOv2 ViT-S/14, an image encoder: 22.1 M parameters, 518 pixels, 384 features."""
    return VisionTransformer(384, 6, image=518, patch=14, scale=1e-5, **options)


@register_model(
    _dinov2("vit_base_patch14_dinov2", "dinov2_vitb14"), FAMILY, num_classes=0, key_map=without_mask
)
def vit_base_patch14_dinov2(**options: Any) -> VisionTransformer:
    """DINOv2 ViT-B/14, an image encoder: 86.6 M parameters, 518 pixels, 768 features."""
    return VisionTransformer(768, 12, image=518, patch=14, scale=1e-5, **options)
