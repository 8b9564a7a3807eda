"""VGG for ImageNet, with and without BatchNorm, with torchvision's parameter names.

Paper: "Very Deep Convolutional Networks for Large-Scale Image Recognition" (Simonyan and Zisserman, 2014,
arXiv:1409.1556), table 1; BatchNorm is torchvision's addition.

Shapes at 224 pixels, after each stage's pooling: [N, 64, 112, 112], [N, 128, 56, 56], [N, 256, 28, 28],
[N, 512, 14, 14], [N, 512, 7, 7], then [N, 25088], [N, 4096], [N, 4096] and logits [N, num_classes].

Quantization: all inputs of weighted layers but the image follow a ReLU (max pooling keeps them non-negative).
``output_quantizer`` closes the network. At 224 pixels the adaptive pooling changes nothing, so nothing is quantized
before it; at another size the pooling runs in float.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.hub_mixin import HubMixin
from qzoo.models.layers import activation_quantizer, conv2d, init_weights, linear
from qzoo.registry import Family, register_model, torchvision_weights
from qzoo.scheme import Scheme

_CITATION = """@article{simonyan2014very,
  title = {Very Deep Convolutional Networks for Large-Scale Image Recognition},
  author = {Simonyan, Karen and Zisserman, Andrew},
  journal = {arXiv:1409.1556},
  year = {2014}
}
"""
FAMILY = Family(_CITATION, results="NNCF, VGG-11: 69.04 to 68.79")

WIDTHS = (64, 128, 256, 512, 512)
# Convolutions in each stage: configurations A, B, D and E of the paper.
VGG11, VGG13, VGG16, VGG19 = (1, 1, 2, 2, 2), (2, 2, 2, 2, 2), (2, 2, 3, 3, 3), (2, 2, 4, 4, 4)


class VGG(HubMixin, nn.Module):
    """Five stages of 3x3 convolutions, each behind a max pooling, and three linear layers."""

    def __init__(
        self,
        depths: tuple[int, ...],
        batch_norm: bool = False,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        quantize: Scheme | None = None,
    ) -> None:
        super().__init__()
        conv = partial(conv2d, padding=1, bias=True, quantize=quantize)
        hidden = partial(linear, quantize=quantize, nonnegative=True)
        features: list[nn.Module] = []
        channels = in_channels
        for width, depth in zip(WIDTHS, depths, strict=True):
            for _ in range(depth):
                first = not features
                features.append(conv(channels, width, 3, nonnegative=not first, edge=first))
                features += [nn.BatchNorm2d(width)] if batch_norm else []
                features.append(nn.ReLU(inplace=True))
                channels = width
            features.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            *(hidden(512 * 7 * 7, 4096), nn.ReLU(inplace=True), nn.Dropout(0.5)),
            *(hidden(4096, 4096), nn.ReLU(inplace=True), nn.Dropout(0.5)),
            hidden(4096, num_classes, edge=True),
        )
        self.output_quantizer = activation_quantizer(quantize, "output")
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(self.avgpool(self.features(x)), 1)
        return self.output_quantizer(self.classifier(x))


_TIMM_LAYERS = {"pre_logits.fc1": "classifier.0", "pre_logits.fc2": "classifier.3", "head.fc": "classifier.6"}


def timm_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the entries of timm's VGGs, whose first two linear layers are convolutions, as torchvision does."""
    renamed = {}
    for key, value in state_dict.items():
        layer, _, entry = key.rpartition(".")
        hidden = layer.startswith("pre_logits.") and entry == "weight"
        renamed[f"{_TIMM_LAYERS.get(layer, layer)}.{entry}"] = value.flatten(1) if hidden else value
    return renamed


@register_model({"tv_in1k": torchvision_weights("vgg11-8a719046.pth", 69.02)}, FAMILY, key_map=timm_names)
def vgg11(**options: Any) -> VGG:
    """VGG-11 (configuration A): 132.9 M parameters, 7.6 G multiply-adds."""
    return VGG(VGG11, **options)


@register_model({"tv_in1k": torchvision_weights("vgg11_bn-6002323d.pth", 70.37)}, FAMILY, key_map=timm_names)
def vgg11_bn(**options: Any) -> VGG:
    """VGG-11 with BatchNorm: 132.9 M parameters, 7.6 G multiply-adds."""
    return VGG(VGG11, True, **options)


@register_model({"tv_in1k": torchvision_weights("vgg13-19584684.pth", 69.928)}, FAMILY, key_map=timm_names)
def vgg13(**options: Any) -> VGG:
    """VGG-13 (configuration B): 133.0 M parameters, 11.3 G multiply-adds."""
    return VGG(VGG13, **options)


@register_model({"tv_in1k": torchvision_weights("vgg13_bn-abd245e5.pth", 71.586)}, FAMILY, key_map=timm_names)
def vgg13_bn(**options: Any) -> VGG:
    """VGG-13 with BatchNorm: 133.1 M parameters, 11.3 G multiply-adds."""
    return VGG(VGG13, True, **options)


@register_model({"tv_in1k": torchvision_weights("vgg16-397923af.pth", 71.592)}, FAMILY, key_map=timm_names)
def vgg16(**options: Any) -> VGG:
    """VGG-16 (configuration D): 138.4 M parameters, 15.5 G multiply-adds."""
    return VGG(VGG16, **options)


@register_model({"tv_in1k": torchvision_weights("vgg16_bn-6c64b313.pth", 73.36)}, FAMILY, key_map=timm_names)
def vgg16_bn(**options: Any) -> VGG:
    """VGG-16 with BatchNorm: 138.4 M parameters, 15.5 G multiply-adds."""
    return VGG(VGG16, True, **options)


@register_model({"tv_in1k": torchvision_weights("vgg19-dcbb9e9d.pth", 72.376)}, FAMILY, key_map=timm_names)
def vgg19(**options: Any) -> VGG:
    """VGG-19 (configuration E): 143.7 M parameters, 19.6 G multiply-adds."""
    return VGG(VGG19, **options)


@register_model({"tv_in1k": torchvision_weights("vgg19_bn-c79401a0.pth", 74.218)}, FAMILY, key_map=timm_names)
def vgg19_bn(**options: Any) -> VGG:
    """VGG-19 with BatchNorm: 143.7 M parameters, 19.6 G multiply-adds."""
    return VGG(VGG19, True, **options)
