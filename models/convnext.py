"""ConvNeXt, versions 1 and 2, for ImageNet, with torchvision's parameter names.

Papers: "A ConvNet for the 2020s" (Liu et al., 2022, arXiv:2201.03545), "ConvNeXt V2: Co-designing and Scaling ConvNets
with Masked Autoencoders" (Woo et al., 2023, arXiv:2301.00808), which has a norm of responses in place of the scales.

Shapes of the tiny one at 224 pixels: stem [N, 96, 56, 56], then the stages [N, 96, 56, 56], [N, 192, 28, 28],
[N, 384, 14, 14] and [N, 768, 7, 7], logits [N, num_classes]. The linear layers of a block see [N, H, W, channels].

Quantization: no tensor is known to be non-negative: GELU goes down to -0.17. Behind a convolution a LayerNorm has a
``norm_quantizer``, with which the convolution writes int8; the norm itself stays in float. Each add has a
``residual_quantizer`` on its skip input and a ``branch_quantizer`` on the other; beside a LayerNorm, at the ends of the
stages, the add stays in float, and these have the roles of a transformer. ``pool_quantizer`` and ``output_quantizer``
close the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.hub_mixin import HubMixin
from qzoo.models.layers import LayerNorm, Permute, StochasticDepth, activation_quantizer, conv2d, linear
from qzoo.registry import TRANSFORMER, Family, FloatWeights, register_model, timm_weights, torchvision_weights
from qzoo.scheme import Scheme

_CITATION = """@article{liu2022convnet,
  title = {A ConvNet for the 2020s},
  author = {Liu, Zhuang and Mao, Hanzi and Wu, Chao-Yuan and Feichtenhofer, Christoph and Darrell, Trevor and others},
  journal = {arXiv:2201.03545},
  year = {2022}
}

@article{woo2023convnextv2,
  title = {ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders},
  author = {Woo, Sanghyun and Debnath, Shoubhik and Hu, Ronghang and Chen, Xinlei and Liu, Zhuang and others},
  journal = {arXiv:2301.00808},
  year = {2023}
}
"""
FAMILY = Family(_CITATION, TRANSFORMER)


class LayerNorm2d(LayerNorm):
    """LayerNorm over the channels of [N, channels, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResponseNorm(nn.Module):
    """Scale each channel by its norm over the image, relative to the mean of all: [N, H, W, channels] -> the same."""

    def __init__(self, channels: int, quantize: Scheme | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.residual_quantizer = activation_quantizer(quantize, "residual")
        self.scaled_quantizer = activation_quantizer(quantize, "residual")

    def forward(self, x: Tensor) -> Tensor:
        norms = x.norm(p=2, dim=(1, 2), keepdim=True)
        relative = norms / (norms.mean(dim=-1, keepdim=True) + 1e-6)
        scaled = torch.addcmul(self.bias, self.weight, x * relative)
        return self.residual_quantizer(x) + self.scaled_quantizer(scaled)


class Block(nn.Module):
    """Depthwise 7x7, LayerNorm, two linear layers, a scale and a skip: [N, channels, H, W] -> the same."""

    def __init__(
        self,
        channels: int,
        dropped: float,
        second: bool,
        quantize: Scheme | None,
        residual: str = "residual",
        branch: str = "branch",
    ) -> None:
        """``dropped`` is the probability of stochastic depth; ``residual`` and ``branch`` are the add's roles."""
        super().__init__()
        activation = nn.Sequential(nn.GELU(), ResponseNorm(4 * channels, quantize)) if second else nn.GELU()
        self.block = nn.Sequential(
            conv2d(channels, channels, 7, padding=3, groups=channels, bias=True, quantize=quantize),
            Permute(0, 2, 3, 1),
            LayerNorm(channels, quantize),
            linear(channels, 4 * channels, quantize=quantize),
            activation,
            linear(4 * channels, channels, quantize=quantize),
            Permute(0, 3, 1, 2),
        )
        self.layer_scale = None if second else nn.Parameter(torch.full((channels, 1, 1), 1e-6))
        self.stochastic_depth = StochasticDepth(dropped)
        self.residual_quantizer = activation_quantizer(quantize, residual)
        self.branch_quantizer = activation_quantizer(quantize, branch)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(x)
        if self.layer_scale is not None:
            out = self.layer_scale * out
        out = self.stochastic_depth(out)
        return self.branch_quantizer(out) + self.residual_quantizer(x)


def init_truncated(model: nn.Module) -> None:
    """Draw weights from a normal distribution of deviation 0.02 that is cut off at 2, in place; biases are zero."""
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear) and not module.weight.is_meta:
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class ConvNeXt(HubMixin, nn.Module):
    """A stem of patches, four stages of blocks, global average pooling, LayerNorm and a linear classifier."""

    def __init__(
        self,
        depths: tuple[int, ...],
        widths: tuple[int, ...],
        dropped: float,
        *,
        second: bool = False,
        num_classes: int = 1000,
        in_channels: int = 3,
        quantize: Scheme | None = None,
    ) -> None:
        """``dropped`` is the probability of stochastic depth in the last block; ``second``: version 2."""
        super().__init__()
        stem = conv2d(in_channels, widths[0], 4, stride=4, bias=True, quantize=quantize, edge=True)
        features: list[nn.Module] = [nn.Sequential(stem, LayerNorm2d(widths[0], quantize))]
        number = 0
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            if i > 0:
                halving = conv2d(widths[i - 1], width, 2, stride=2, bias=True, quantize=quantize)
                features.append(nn.Sequential(LayerNorm2d(widths[i - 1]), halving))
            blocks = []
            for j in range(depth):
                roles = ("residual", "branch")
                if i == j == 0:
                    roles = ("stream", "stream")  # the LayerNorm before is in float
                elif j == depth - 1 and i < len(depths) - 1:
                    roles = ("activation", "stream")  # and the one behind reads a float
                blocks.append(Block(width, dropped * number / (sum(depths) - 1), second, quantize, *roles))
                number += 1
            features.append(nn.Sequential(*blocks))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        classifier = linear(widths[-1], num_classes, quantize=quantize, edge=True)
        self.classifier = nn.Sequential(
            LayerNorm2d(widths[-1], quantize, "activation"), nn.Flatten(1), classifier
        )
        self.pool_quantizer = activation_quantizer(quantize, "pool")
        self.output_quantizer = activation_quantizer(quantize, "output")
        init_truncated(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.pool_quantizer(self.features(x)))
        return self.output_quantizer(self.classifier(x))


_TIMM_BLOCK = {
    "conv_dw": "block.0",
    "norm": "block.2",
    "mlp.fc1": "block.3",
    "mlp.grn": "block.4.1",
    "mlp.fc2": "block.5",
}
_TIMM = {
    "stem.0": "features.0.0",
    "stem.1": "features.0.1",
    "head.norm": "classifier.0",
    "head.fc": "classifier.2",
}


def timm_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the entries of timm's ConvNeXts: ``stages.0.blocks.0.mlp.fc1.weight``, and ``gamma`` for the scale."""
    renamed = {}
    for key, value in state_dict.items():
        layer, _, entry = key.rpartition(".")
        parts = layer.split(".")
        if parts[0] == "stages" and len(parts) > 3:
            stage, kind, number = 2 * int(parts[1]) + 1, parts[2], parts[3]
            if kind == "downsample":
                layer = f"features.{stage - 1}.{number}"
            else:
                inner = ".".join(parts[4:])
                layer = f"features.{stage}.{number}.{_TIMM_BLOCK.get(inner, inner)}".rstrip(".")
            if entry == "gamma":
                entry, value = "layer_scale", value.reshape(-1, 1, 1)
        renamed[f"{_TIMM.get(layer, layer)}.{entry}"] = value
    return renamed


@register_model(
    {"tv_in1k": torchvision_weights("convnext_tiny-983f1562.pth", 82.52, resize=236)},
    FAMILY,
    key_map=timm_names,
)
def convnext_tiny(**options: Any) -> ConvNeXt:
    """ConvNeXt-T: 28.6 M parameters, 4.5 G multiply-adds."""
    return ConvNeXt((3, 3, 9, 3), (96, 192, 384, 768), 0.1, **options)


@register_model(
    {"tv_in1k": torchvision_weights("convnext_small-0c510722.pth", 83.616, resize=230)},
    FAMILY,
    key_map=timm_names,
)
def convnext_small(**options: Any) -> ConvNeXt:
    """ConvNeXt-S: 50.2 M parameters, 8.7 G multiply-adds."""
    return ConvNeXt((3, 3, 27, 3), (96, 192, 384, 768), 0.4, **options)


@register_model(
    {"tv_in1k": torchvision_weights("convnext_base-6075fbad.pth", 84.062, resize=232)},
    FAMILY,
    key_map=timm_names,
)
def convnext_base(**options: Any) -> ConvNeXt:
    """ConvNeXt-B: 88.6 M parameters, 15.4 G multiply-adds."""
    return ConvNeXt((3, 3, 27, 3), (128, 256, 512, 1024), 0.5, **options)


@register_model(
    {"tv_in1k": torchvision_weights("convnext_large-ea097f82.pth", 84.414, resize=232)},
    FAMILY,
    key_map=timm_names,
)
def convnext_large(**options: Any) -> ConvNeXt:
    """ConvNeXt-L: 197.8 M parameters, 34.4 G multiply-adds."""
    return ConvNeXt((3, 3, 27, 3), (192, 384, 768, 1536), 0.5, **options)


def _second(name: str, top1: float) -> dict[str, FloatWeights]:
    """The authors' weights of version 2, from timm."""
    weights = timm_weights(f"{name}.fcmae_ft_in1k", top1, size=288, crop_pct=1.0, license="cc-by-nc-4.0")
    return {"fcmae_ft_in1k": weights}


@register_model(_second("convnextv2_tiny", 83.464), FAMILY, key_map=timm_names)
def convnextv2_tiny(**options: Any) -> ConvNeXt:
    """ConvNeXt V2-T: 28.6 M parameters, 4.5 G multiply-adds at 224 pixels."""
    return ConvNeXt((3, 3, 9, 3), (96, 192, 384, 768), 0.0, second=True, **options)


@register_model(_second("convnextv2_base", 85.474), FAMILY, key_map=timm_names)
def convnextv2_base(**options: Any) -> ConvNeXt:
    """ConvNeXt V2-B: 88.7 M parameters, 15.4 G multiply-adds at 224 pixels."""
    return ConvNeXt((3, 3, 27, 3), (128, 256, 512, 1024), 0.0, second=True, **options)


@register_model(_second("convnextv2_large", 86.118), FAMILY, key_map=timm_names)
def convnextv2_large(**options: Any) -> ConvNeXt:
    """ConvNeXt V2-L: 198.0 M parameters, 34.4 G multiply-adds at 224 pixels."""
    return ConvNeXt((3, 3, 27, 3), (192, 384, 768, 1536), 0.0, second=True, **options)
