"""AlexNet for ImageNet, with torchvision's parameter names.

Paper: "One weird trick for parallelizing convolutional neural networks" (Krizhevsky, 2014, arXiv:1404.5997), whose
one-tower form torchvision has, of "ImageNet Classification with Deep Convolutional Neural Networks" (2012).

Shapes at 224 pixels: [N, 64, 27, 27] and [N, 192, 13, 13] after the first two poolings, [N, 256, 6, 6] after the
third, then [N, 9216], [N, 4096], [N, 4096] and logits [N, num_classes].

Quantization: all inputs of weighted layers but the image follow a ReLU (max pooling keeps them non-negative).
``output_quantizer`` closes the network. At 224 pixels the adaptive pooling changes nothing, so nothing is quantized
before it; at another size the pooling runs in float.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.hub_mixin import HubMixin
from qzoo.models.layers import activation_quantizer, conv2d, init_weights, linear
from qzoo.registry import Family, register_model, torchvision_weights
from qzoo.scheme import Scheme

_CITATION = """@article{krizhevsky2014weird,
  title = {One weird trick for parallelizing convolutional neural networks},
  author = {Krizhevsky, Alex},
  journal = {arXiv:1404.5997},
  year = {2014}
}
"""
FAMILY = Family(_CITATION)


class AlexNet(HubMixin, nn.Module):
    """Five convolutions, three max poolings and three linear layers."""

    def __init__(
        self, *, num_classes: int = 1000, in_channels: int = 3, quantize: Scheme | None = None
    ) -> None:
        super().__init__()
        conv = partial(conv2d, bias=True, quantize=quantize, nonnegative=True)
        hidden = partial(linear, quantize=quantize, nonnegative=True)
        self.features = nn.Sequential(
            conv2d(in_channels, 64, 11, stride=4, padding=2, bias=True, quantize=quantize, edge=True),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
            conv(64, 192, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
            conv(192, 384, 3, padding=1),
            nn.ReLU(inplace=True),
            conv(384, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            conv(256, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(6)
        self.classifier = nn.Sequential(
            *(nn.Dropout(0.5), hidden(256 * 6 * 6, 4096), nn.ReLU(inplace=True)),
            *(nn.Dropout(0.5), hidden(4096, 4096), nn.ReLU(inplace=True)),
            hidden(4096, num_classes, edge=True),
        )
        self.output_quantizer = activation_quantizer(quantize, "output")
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(self.avgpool(self.features(x)), 1)
        return self.output_quantizer(self.classifier(x))


@register_model({"tv_in1k": torchvision_weights("alexnet-owt-7be5be79.pth", 56.522)}, FAMILY)
def alexnet(**options: Any) -> AlexNet:
    """AlexNet, one tower: 61.1 M parameters, 0.7 G multiply-adds."""
    return AlexNet(**options)
