"""RepVGG for ImageNet, as it is trained and as it is deployed, with timm's parameter names.

Paper: "RepVGG: Making VGG-style ConvNets Great Again" (Ding et al., 2021, arXiv:2101.03697).

Shapes of A0 at 224 pixels: stem [N, 48, 112, 112], then the stages [N, 48, 56, 56], [N, 96, 28, 28], [N, 192, 14, 14]
and [N, 1280, 7, 7], logits [N, num_classes].

A block of the network that is trained adds a 3x3 convolution, a 1x1 convolution and, where shapes allow, its input,
each behind a BatchNorm. In the network that is deployed, ``repvgg_*_reparam``, it is one 3x3 convolution that computes
the same; :func:`reparameterized` makes its parameters, also where ``load_weights`` is given those of the other form.

Quantization: all inputs of layers but the image follow a ReLU. In the trained form the sum of the convolutions is
signed, and so is the input behind its BatchNorm, which has no layer to be folded into and stays in float; both
inputs of each add are quantized. ``pool_quantizer`` and ``output_quantizer`` close the network.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.errors import CheckpointError
from qzoo.hub_mixin import HubMixin
from qzoo.models.layers import activation_quantizer, conv2d, conv_norm_activation, init_weights, linear
from qzoo.registry import Family, FloatWeights, register_model, timm_weights
from qzoo.scheme import Scheme
from qzoo.zoo.tensors import listed

_CITATION = """@article{ding2021repvgg,
  title = {RepVGG: Making VGG-style ConvNets Great Again},
  author = {Ding, Xiaohan and Zhang, Xiangyu and Ma, Ningning and Han, Jungong and Ding, Guiguang and Sun, Jian},
  journal = {arXiv:2101.03697},
  year = {2021}
}
"""
FAMILY = Family(_CITATION)
EPSILON = 1e-5  # of BatchNorm, PyTorch's


def _conv(
    in_channels: int, out_channels: int, kernel: int, stride: int, quantize: Scheme | None, image: bool
) -> nn.Module:
    """A convolution and its BatchNorm; ``image``: the input is the image, which is signed."""
    return conv_norm_activation(
        in_channels,
        out_channels,
        kernel,
        function=None,
        names=("conv", "bn", "act"),
        stride=stride,
        quantize=quantize,
        nonnegative=not image,
        edge=image,
    )


class Block(nn.Module):
    """Branches of 3x3, 1x1 and the input itself, and a ReLU: [N, in, H, W] -> [N, out, H / stride, W / stride]."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, quantize: Scheme | None, image: bool = False
    ) -> None:
        """``image``: the input is the image, which is signed."""
        super().__init__()
        self.identity: nn.Module | None = None
        if in_channels == out_channels and stride == 1:
            self.identity = nn.BatchNorm2d(out_channels)
            self.norm_quantizer = activation_quantizer(quantize, "pool", nonnegative=not image)
            self.sum_quantizer = activation_quantizer(quantize, "residual")
            self.skip_quantizer = activation_quantizer(quantize, "residual")
        self.conv_kxk = _conv(in_channels, out_channels, 3, stride, quantize, image)
        self.conv_1x1 = _conv(in_channels, out_channels, 1, stride, quantize, image)
        self.act = nn.ReLU(inplace=True)
        self.residual_quantizer = activation_quantizer(quantize, "residual")
        self.branch_quantizer = activation_quantizer(quantize, "branch")

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch_quantizer(self.conv_1x1(x)) + self.residual_quantizer(self.conv_kxk(x))
        if self.identity is not None:
            skip = self.identity(self.norm_quantizer(x))
            out = self.sum_quantizer(out) + self.skip_quantizer(skip)
        return self.act(out)


class Reparameterized(nn.Module):
    """One 3x3 convolution and a ReLU, in place of a :class:`Block`."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, quantize: Scheme | None, image: bool = False
    ) -> None:
        super().__init__()
        self.reparam_conv = conv2d(
            in_channels,
            out_channels,
            3,
            stride=stride,
            padding=1,
            bias=True,
            quantize=quantize,
            nonnegative=not image,
            edge=image,
        )
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.reparam_conv(x))


class RepVGG(HubMixin, nn.Module):
    """A stem, four stages of blocks, global average pooling and a linear classifier."""

    def __init__(
        self,
        block: type[Block] | type[Reparameterized],
        depths: tuple[int, ...],
        widths: tuple[int, ...],
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        quantize: Scheme | None = None,
    ) -> None:
        super().__init__()
        channels = min(64, widths[0])
        self.stem = block(in_channels, channels, 2, quantize, image=True)
        stages = []
        for depth, width in zip(depths, widths, strict=True):
            blocks = []
            for i in range(depth):
                blocks.append(block(channels, width, 1 if i else 2, quantize))
                channels = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Sequential()
        self.head.fc = linear(channels, num_classes, quantize=quantize, nonnegative=True, edge=True)
        self.pool_quantizer = activation_quantizer(quantize, "pool", nonnegative=True)
        self.output_quantizer = activation_quantizer(quantize, "output")
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.pool_quantizer(self.stages(self.stem(x))))
        return self.output_quantizer(self.head(torch.flatten(x, 1)))


def reparameterized(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Add up the branches of each block of a trained RepVGG in one 3x3 convolution (section 3.3 of the paper).

    Args:
        state_dict: of the form that is trained. What is of the other form already stays.

    Returns:
        The state dict of the form that is deployed.

    Raises:
        CheckpointError: a tensor of a block is missing, or its shape is not that of the others.
    """
    merged = {key: value for key, value in state_dict.items() if not _BRANCH.match(key)}
    blocks = dict.fromkeys(found[1] for found in map(_BRANCH.match, state_dict) if found)
    _check_branches(state_dict, blocks)
    for block in blocks:
        merged.update(_merged(state_dict, block))
    return merged


_BRANCH = re.compile(r"(.+)\.(?:conv_kxk|conv_1x1|identity)\.")
_NORM = ("running_mean", "running_var", "weight", "bias")


def _check_branches(state_dict: Mapping[str, Any], blocks: Iterable[str]) -> None:
    """Check that the blocks have all their tensors; those that keep the shape of their input have an identity, too."""
    missing, misshaped, known = [], [], set()
    for block in blocks:
        kernel = state_dict.get(f"{block}.conv_kxk.conv.weight")
        channels = () if kernel is None else tuple(kernel.shape[:2])
        shapes = {
            f"{block}.conv_kxk.conv.weight": (*channels, 3, 3),
            f"{block}.conv_1x1.conv.weight": (*channels, 1, 1),
        }
        norms = [f"{block}.conv_kxk.bn", f"{block}.conv_1x1.bn"]
        if block.startswith("stages.") and not block.endswith(".0"):
            norms.append(f"{block}.identity")
        shapes |= {f"{norm}.{entry}": channels[:1] for norm in norms for entry in _NORM}
        known |= {*shapes, *(f"{norm}.num_batches_tracked" for norm in norms)}
        missing += [key for key in shapes if key not in state_dict]
        if kernel is not None:
            misshaped += [
                f"{key} {list(state_dict[key].shape)} (not {list(shape)})"
                for key, shape in shapes.items()
                if key in state_dict and tuple(state_dict[key].shape) != shape
            ]
    unexpected = [key for key in state_dict if _BRANCH.match(key) and key not in known]
    found = {"missing": missing, "unexpected": unexpected, "misshaped": misshaped}
    if any(found.values()):
        text = "; ".join(f"{kind}: {listed(keys)}" for kind, keys in found.items() if keys)
        raise CheckpointError(
            f"the branches of a trained RepVGG can't be added up: {text}; give its whole state dict"
        )


def _merged(state_dict: Mapping[str, Any], block: str) -> dict[str, Tensor]:
    """The convolution of one block."""
    dense = state_dict[f"{block}.conv_kxk.conv.weight"]
    pointwise = nn.functional.pad(state_dict[f"{block}.conv_1x1.conv.weight"], [1, 1, 1, 1])
    branches = [(dense, f"{block}.conv_kxk.bn"), (pointwise, f"{block}.conv_1x1.bn")]
    if f"{block}.identity.weight" in state_dict:
        channels = torch.arange(len(dense))
        identity = torch.zeros_like(dense)
        identity[channels, channels, 1, 1] = 1
        branches.append((identity, f"{block}.identity"))
    weight, bias = torch.zeros_like(dense), torch.zeros_like(dense[:, 0, 0, 0])
    for kernel, norm in branches:
        mean, variance, scale, shift = (state_dict[f"{norm}.{entry}"] for entry in _NORM)
        factor = scale / (variance + EPSILON).sqrt()
        weight = weight + kernel * factor[:, None, None, None]
        bias = bias + shift - mean * factor
    return {f"{block}.reparam_conv.weight": weight, f"{block}.reparam_conv.bias": bias}


def _published(name: str, top1: float, digits: str = "") -> dict[str, FloatWeights]:
    """The authors' weights, from timm; ``digits`` where the file is one of timm's releases."""
    release = f"v0.1-repvgg-weights/{name}-{digits}" if digits else ""
    weights = timm_weights(
        f"{name}.rvgg_in1k", top1, release=release, interpolation="bilinear", license="mit"
    )
    return {"rvgg_in1k": weights}


A, B = (2, 4, 14, 1), (4, 6, 16, 1)  # blocks by stage
A0, A1, A2 = (48, 96, 192, 1280), (64, 128, 256, 1280), (96, 192, 384, 1408)
B0, B1 = (64, 128, 256, 1280), (128, 256, 512, 2048)


@register_model(_published("repvgg_a0", 72.424), FAMILY)
def repvgg_a0(**options: Any) -> RepVGG:
    """RepVGG-A0, as it is trained: 9.1 M parameters."""
    return RepVGG(Block, A, A0, **options)


@register_model(_published("repvgg_a1", 74.468), FAMILY)
def repvgg_a1(**options: Any) -> RepVGG:
    """RepVGG-A1, as it is trained: 14.1 M parameters."""
    return RepVGG(Block, A, A1, **options)


@register_model(_published("repvgg_a2", 76.458, "c1ee6d2b"), FAMILY)
def repvgg_a2(**options: Any) -> RepVGG:
    """RepVGG-A2, as it is trained: 28.2 M parameters."""
    return RepVGG(Block, A, A2, **options)


@register_model(_published("repvgg_b0", 75.142, "80ac3f1b"), FAMILY)
def repvgg_b0(**options: Any) -> RepVGG:
    """RepVGG-B0, as it is trained: 15.8 M parameters."""
    return RepVGG(Block, B, B0, **options)


@register_model(_published("repvgg_b1", 78.368, "77ca2989"), FAMILY)
def repvgg_b1(**options: Any) -> RepVGG:
    """RepVGG-B1, as it is trained: 57.4 M parameters."""
    return RepVGG(Block, B, B1, **options)


@register_model(_published("repvgg_a0", 72.424), FAMILY, key_map=reparameterized)
def repvgg_a0_reparam(**options: Any) -> RepVGG:
    """RepVGG-A0, as it is deployed: 8.3 M parameters, 1.4 G multiply-adds."""
    return RepVGG(Reparameterized, A, A0, **options)


@register_model(_published("repvgg_a1", 74.468), FAMILY, key_map=reparameterized)
def repvgg_a1_reparam(**options: Any) -> RepVGG:
    """RepVGG-A1, as it is deployed: 12.8 M parameters, 2.4 G multiply-adds."""
    return RepVGG(Reparameterized, A, A1, **options)


@register_model(_published("repvgg_a2", 76.458, "c1ee6d2b"), FAMILY, key_map=reparameterized)
def repvgg_a2_reparam(**options: Any) -> RepVGG:
    """RepVGG-A2, as it is deployed: 25.5 M parameters, 5.1 G multiply-adds."""
    return RepVGG(Reparameterized, A, A2, **options)


@register_model(_published("repvgg_b0", 75.142, "80ac3f1b"), FAMILY, key_map=reparameterized)
def repvgg_b0_reparam(**options: Any) -> RepVGG:
    """RepVGG-B0, as it is deployed: 14.3 M parameters, 3.1 G multiply-adds."""
    return RepVGG(Reparameterized, B, B0, **options)


@register_model(_published("repvgg_b1", 78.368, "77ca2989"), FAMILY, key_map=reparameterized)
def repvgg_b1_reparam(**options: Any) -> RepVGG:
    """RepVGG-B1, as it is deployed: 51.8 M parameters, 11.8 G multiply-adds."""
    return RepVGG(Reparameterized, B, B1, **options)
