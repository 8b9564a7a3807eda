"""Inception v3 for ImageNet, with torchvision's parameter names.

Paper: "Rethinking the Inception Architecture for Computer Vision" (Szegedy et al., 2015, arXiv:1512.00567). The
auxiliary classifier, which only the training of the published weights used, is left out.

Shapes at 299 pixels: stem [N, 192, 35, 35], three modules [N, 256 ... 288, 35, 35], five of [N, 768, 17, 17], three of
[N, 1280 ... 2048, 8, 8], logits [N, num_classes].

Quantization: all inputs of layers but the image follow a ReLU. The parts of a concatenation have one range, with all
that reads it (``concat_quantizer``), so that the runtimes join and pool integers as they are. An average in a module
has a ``pool_quantizer``, a maximum an ``activation_quantizer``; ``pool_quantizer`` and ``output_quantizer`` close the
network.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qzoo.hub_mixin import HubMixin
from qzoo.models.googlenet import conv
from qzoo.models.layers import activation_quantizer, init_weights, linear, share_range
from qzoo.registry import Family, register_model, torchvision_weights
from qzoo.scheme import Scheme

_CITATION = """@article{szegedy2015rethinking,
  title = {Rethinking the Inception Architecture for Computer Vision},
  author = {Szegedy, Christian and Vanhoucke, Vincent and Ioffe, Sergey and Shlens, Jonathon and Wojna, Zbigniew},
  journal = {arXiv:1512.00567},
  year = {2015}
}
"""
FAMILY = Family(_CITATION, results="NNCF, with TensorFlow's weights: 77.86 to 77.75")


class Module(nn.Module):
    """Branches side by side, joined: what its quantizers, and those of its input, have in common.

    ``entries`` are the layers that read the input.
    """

    entries: tuple[str, ...] = ()
    pool_quantizer: nn.Module
    activation_quantizer: nn.Module

    def __init__(self, quantize: Scheme | None, maximum: bool = False) -> None:
        """``maximum`` is about the branch that pools."""
        super().__init__()
        if maximum:
            self.activation_quantizer = activation_quantizer(quantize, "activation", nonnegative=True)
        else:
            self.pool_quantizer = activation_quantizer(quantize, "pool", nonnegative=True)
        self.concat_quantizer = activation_quantizer(quantize, "input", nonnegative=True)
        self.layer = partial(conv, quantize=quantize)

    def average(self, x: Tensor) -> Tensor:
        """Average windows of 3x3, at the same size."""
        return F.avg_pool2d(self.pool_quantizer(x), kernel_size=3, stride=1, padding=1)

    def maximum(self, x: Tensor) -> Tensor:
        """Take the maxima of windows of 3x3, at half the size."""
        return F.max_pool2d(self.activation_quantizer(x), kernel_size=3, stride=2)

    def join(self, parts: list[Tensor]) -> Tensor:
        """Join the parts, quantized alike."""
        return torch.cat([self.concat_quantizer(part) for part in parts], 1)

    @property
    def readers(self) -> list[nn.Module]:
        """What reads the input."""
        pooled = [
            module
            for name, module in self.named_children()
            if name in ("pool_quantizer", "activation_quantizer")
        ]
        return [*pooled, *(self.get_submodule(f"{name}.conv") for name in self.entries)]

    @property
    def joined(self) -> list[nn.Module]:
        """The quantizers of what it joins."""
        return [module for name, module in self.named_children() if name.startswith("concat_quantizer")]


class ModuleA(Module):
    """1x1; 5x5; two 3x3; average: [N, in, 35, 35] -> [N, 224 + pooled, 35, 35]."""

    entries = ("branch1x1", "branch5x5_1", "branch3x3dbl_1")

    def __init__(self, in_channels: int, pooled: int, quantize: Scheme | None) -> None:
        super().__init__(quantize)
        self.branch1x1 = self.layer(in_channels, 64, 1)
        self.branch5x5_1 = self.layer(in_channels, 48, 1)
        self.branch5x5_2 = self.layer(48, 64, 5)
        self.branch3x3dbl_1 = self.layer(in_channels, 64, 1)
        self.branch3x3dbl_2 = self.layer(64, 96, 3)
        self.branch3x3dbl_3 = self.layer(96, 96, 3)
        self.branch_pool = self.layer(in_channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return self.join([self.branch1x1(x), five, double, self.branch_pool(self.average(x))])


class ModuleB(Module):
    """3x3; two 3x3; maximum: [N, in, 35, 35] -> [N, 480 + in, 17, 17]."""

    entries = ("branch3x3", "branch3x3dbl_1")

    def __init__(self, in_channels: int, quantize: Scheme | None) -> None:
        super().__init__(quantize, maximum=True)
        self.branch3x3 = self.layer(in_channels, 384, 3, stride=2, padding=0)
        self.branch3x3dbl_1 = self.layer(in_channels, 64, 1)
        self.branch3x3dbl_2 = self.layer(64, 96, 3)
        self.branch3x3dbl_3 = self.layer(96, 96, 3, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return self.join([self.branch3x3(x), double, self.maximum(x)])


class ModuleC(Module):
    """1x1; 7x7 as 1x7 and 7x1; two such; average: [N, 768, 17, 17] -> the same."""

    entries = ("branch1x1", "branch7x7_1", "branch7x7dbl_1")

    def __init__(self, inner: int, quantize: Scheme | None) -> None:
        super().__init__(quantize)
        self.branch1x1 = self.layer(768, 192, 1)
        self.branch7x7_1 = self.layer(768, inner, 1)
        self.branch7x7_2 = self.layer(inner, inner, (1, 7))
        self.branch7x7_3 = self.layer(inner, 192, (7, 1))
        self.branch7x7dbl_1 = self.layer(768, inner, 1)
        self.branch7x7dbl_2 = self.layer(inner, inner, (7, 1))
        self.branch7x7dbl_3 = self.layer(inner, inner, (1, 7))
        self.branch7x7dbl_4 = self.layer(inner, inner, (7, 1))
        self.branch7x7dbl_5 = self.layer(inner, 192, (1, 7))
        self.branch_pool = self.layer(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return self.join([self.branch1x1(x), seven, double, self.branch_pool(self.average(x))])


class ModuleD(Module):
    """3x3; 7x7 and 3x3; maximum: [N, in, 17, 17] -> [N, 512 + in, 8, 8]."""

    entries = ("branch3x3_1", "branch7x7x3_1")

    def __init__(self, in_channels: int, quantize: Scheme | None) -> None:
        super().__init__(quantize, maximum=True)
        self.branch3x3_1 = self.layer(in_channels, 192, 1)
        self.branch3x3_2 = self.layer(192, 320, 3, stride=2, padding=0)
        self.branch7x7x3_1 = self.layer(in_channels, 192, 1)
        self.branch7x7x3_2 = self.layer(192, 192, (1, 7))
        self.branch7x7x3_3 = self.layer(192, 192, (7, 1))
        self.branch7x7x3_4 = self.layer(192, 192, 3, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        three = self.branch3x3_2(self.branch3x3_1(x))
        return self.join([three, self.branch7x7x3_4(seven), self.maximum(x)])


class ModuleE(Module):
    """1x1; 3x3 as 1x3 beside 3x1; two such; average: [N, in, 8, 8] -> [N, 2048, 8, 8]."""

    entries = ("branch1x1", "branch3x3_1", "branch3x3dbl_1")

    def __init__(self, in_channels: int, quantize: Scheme | None) -> None:
        super().__init__(quantize)
        self.branch1x1 = self.layer(in_channels, 320, 1)
        self.branch3x3_1 = self.layer(in_channels, 384, 1)
        self.branch3x3_2a = self.layer(384, 384, (1, 3))
        self.branch3x3_2b = self.layer(384, 384, (3, 1))
        self.branch3x3dbl_1 = self.layer(in_channels, 448, 1)
        self.branch3x3dbl_2 = self.layer(448, 384, 3)
        self.branch3x3dbl_3a = self.layer(384, 384, (1, 3))
        self.branch3x3dbl_3b = self.layer(384, 384, (3, 1))
        self.branch_pool = self.layer(in_channels, 192, 1)
        self.concat_quantizer_3x3 = activation_quantizer(quantize, "input", nonnegative=True)
        self.concat_quantizer_3x3dbl = activation_quantizer(quantize, "input", nonnegative=True)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        parts = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        three = torch.cat([self.concat_quantizer_3x3(part) for part in parts], 1)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        double = torch.cat([self.concat_quantizer_3x3dbl(part) for part in parts], 1)
        return self.join([self.branch1x1(x), three, double, self.branch_pool(self.average(x))])


class InceptionV3(HubMixin, nn.Module):
    """A stem, eleven modules, global average pooling and a linear classifier."""

    def __init__(
        self, *, num_classes: int = 1000, in_channels: int = 3, quantize: Scheme | None = None
    ) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = conv(in_channels, 32, 3, quantize, stride=2, padding=0, image=True)
        self.Conv2d_2a_3x3 = conv(32, 32, 3, quantize, padding=0)
        self.Conv2d_2b_3x3 = conv(32, 64, 3, quantize)
        self.maxpool1 = nn.MaxPool2d(3, stride=2)
        self.Conv2d_3b_1x1 = conv(64, 80, 1, quantize)
        self.Conv2d_4a_3x3 = conv(80, 192, 3, quantize, padding=0)
        self.maxpool2 = nn.MaxPool2d(3, stride=2)
        self.Mixed_5b = ModuleA(192, 32, quantize)
        self.Mixed_5c = ModuleA(256, 64, quantize)
        self.Mixed_5d = ModuleA(288, 64, quantize)
        self.Mixed_6a = ModuleB(288, quantize)
        self.Mixed_6b = ModuleC(128, quantize)
        self.Mixed_6c = ModuleC(160, quantize)
        self.Mixed_6d = ModuleC(160, quantize)
        self.Mixed_6e = ModuleC(192, quantize)
        self.Mixed_7a = ModuleD(768, quantize)
        self.Mixed_7b = ModuleE(1280, quantize)
        self.Mixed_7c = ModuleE(2048, quantize)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.5)
        self.fc = linear(2048, num_classes, quantize=quantize, nonnegative=True, edge=True)
        self.pool_quantizer = activation_quantizer(quantize, "pool", nonnegative=True)
        self.output_quantizer = activation_quantizer(quantize, "output")
        self.modules_in_order = [name for name, child in self.named_children() if isinstance(child, Module)]
        self._share_ranges()
        init_weights(self)

    def _share_ranges(self) -> None:
        mixed = [child for child in self.children() if isinstance(child, Module)]
        group = 0
        for module, behind in pairwise(mixed):
            share_range(f"concat{group}", *module.joined, *behind.readers)
            group += not isinstance(
                behind, ModuleB | ModuleD
            )  # maxima go into the next concatenation as they are
        share_range(f"concat{group}", *mixed[-1].joined, self.pool_quantizer)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool1(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = self.maxpool2(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        for name in self.modules_in_order:
            x = self.get_submodule(name)(x)
        x = self.dropout(self.avgpool(self.pool_quantizer(x)))
        return self.output_quantizer(self.fc(torch.flatten(x, 1)))


def without_auxiliary(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the auxiliary classifier, which torchvision's file has."""
    return {key: value for key, value in state_dict.items() if not key.startswith("AuxLogits.")}


# torchvision's network changes the mean and the deviation of its images to 0.5 before the first layer.
@register_model(
    {
        "tv_in1k": torchvision_weights(
            "inception_v3_google-0cc3c7bd.pth", 77.294, size=299, resize=342, half=True
        )
    },
    FAMILY,
    key_map=without_auxiliary,
)
def inception_v3(**options: Any) -> InceptionV3:
    """Inception v3: 23.8 M parameters, 5.7 G multiply-adds at 299 pixels."""
    return InceptionV3(**options)
