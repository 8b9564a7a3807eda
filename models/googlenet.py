"""GoogLeNet (Inception v1 with BatchNorm) for ImageNet, with torchvision's parameter names.

Paper: "Going Deeper with Convolutions" (Szegedy et al., 2014, arXiv:1409.4842). As in torchvision, the 5x5
convolutions are 3x3 ones. The auxiliary classifiers, which only the training of the published weights used, are left
out.

Shapes at 224 pixels: stem [N, 192, 28, 28], then the modules [N, 256, 28, 28], [N, 480, 28, 28], five of
[N, 512 ... 832, 14, 14], two of [N, 832 ... 1024, 7, 7], logits [N, num_classes].

Quantization: all inputs of layers but the image follow a ReLU. The four parts of a concatenation have one range, with
all that reads it (``concat_quantizer``, and the ``move_quantizer`` before a module's max pooling), so that the runtimes
join and pool integers as they are; ``pool_quantizer`` and ``output_quantizer`` close the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.hub_mixin import HubMixin
from qzoo.models.layers import activation_quantizer, conv_norm_activation, init_weights, linear, share_range
from qzoo.registry import Family, register_model, torchvision_weights
from qzoo.scheme import Scheme

_CITATION = """@article{szegedy2014going,
  title = {Going Deeper with Convolutions},
  author = {Szegedy, Christian and Liu, Wei and Jia, Yangqing and Sermanet, Pierre and Reed, Scott and others},
  journal = {arXiv:1409.4842},
  year = {2014}
}
"""
FAMILY = Family(_CITATION)

# Of each module: channels of the 1x1 branch, before and behind the two 3x3 ones, and behind the pooling.
MODULES = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


def conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int | tuple[int, int],
    quantize: Scheme | None,
    stride: int = 1,
    padding: int | None = None,
    image: bool = False,
) -> nn.Module:
    """Make a convolution, BatchNorm and ReLU; ``image``: the input is the image, which is signed."""
    return conv_norm_activation(
        in_channels,
        out_channels,
        kernel_size,
        function=nn.ReLU(inplace=True),
        norm=partial(nn.BatchNorm2d, eps=0.001),
        names=("conv", "bn", "relu"),
        stride=stride,
        padding=padding,
        quantize=quantize,
        nonnegative=not image,
        edge=image,
    )


class Inception(nn.Module):
    """Four branches side by side: [N, in, H, W] -> [N, the sum of their channels, H, W]."""

    def __init__(self, in_channels: int, channels: tuple[int, ...], quantize: Scheme | None) -> None:
        super().__init__()
        one, before3, behind3, before5, behind5, pooled = channels
        self.branch1 = conv(in_channels, one, 1, quantize)
        self.branch2 = nn.Sequential(
            conv(in_channels, before3, 1, quantize), conv(before3, behind3, 3, quantize)
        )
        self.branch3 = nn.Sequential(
            conv(in_channels, before5, 1, quantize), conv(before5, behind5, 3, quantize)
        )
        pool = nn.MaxPool2d(3, stride=1, padding=1, ceil_mode=True)
        self.branch4 = nn.Sequential(pool, conv(in_channels, pooled, 1, quantize))
        self.move_quantizer = activation_quantizer(quantize, "input", nonnegative=True)
        self.concat_quantizer = activation_quantizer(quantize, "input", nonnegative=True)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(self.move_quantizer(x))]
        return torch.cat([self.concat_quantizer(part) for part in parts], 1)

    @property
    def readers(self) -> list[nn.Module]:
        """What reads the input."""
        layers = ("branch1.conv", "branch2.0.conv", "branch3.0.conv", "branch4.1.conv")
        return [self.move_quantizer, *map(self.get_submodule, layers)]


class GoogLeNet(HubMixin, nn.Module):
    """A stem, nine modules, global average pooling and a linear classifier."""

    def __init__(
        self, *, num_classes: int = 1000, in_channels: int = 3, quantize: Scheme | None = None
    ) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, 64, 7, quantize, stride=2, image=True)
        self.maxpool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.conv2 = conv(64, 64, 1, quantize)
        self.conv3 = conv(64, 192, 3, quantize)
        self.maxpool2 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        channels = 192
        for name, widths in MODULES.items():
            self.add_module(f"inception{name}", Inception(channels, widths, quantize))
            channels = widths[0] + widths[2] + widths[4] + widths[5]
        self.maxpool3 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.maxpool4 = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.fc = linear(channels, num_classes, quantize=quantize, nonnegative=True, edge=True)
        self.pool_quantizer = activation_quantizer(quantize, "pool", nonnegative=True)
        self.output_quantizer = activation_quantizer(quantize, "output")
        self._share_ranges()
        init_weights(self)

    def _share_ranges(self) -> None:
        modules = [module for module in self.children() if isinstance(module, Inception)]
        share_range("stem", *modules[0].readers)
        for i, (module, behind) in enumerate(pairwise(modules)):
            share_range(f"concat{i}", module.concat_quantizer, *behind.readers)
        share_range("concat", modules[-1].concat_quantizer, self.pool_quantizer)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool1(self.conv1(x))
        x = self.maxpool2(self.conv3(self.conv2(x)))
        for name in MODULES:
            if name[1] == "a" and name[0] != "3":
                x = self.maxpool3(x) if name[0] == "4" else self.maxpool4(x)
            x = self.get_submodule(f"inception{name}")(x)
        x = self.avgpool(self.pool_quantizer(x))
        return self.output_quantizer(self.fc(self.dropout(torch.flatten(x, 1))))


def without_auxiliaries(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the auxiliary classifiers, which torchvision's file has."""
    return {key: value for key, value in state_dict.items() if not key.startswith(("aux1.", "aux2."))}


# torchvision's network changes the mean and the deviation of its images to 0.5 before the first layer.
@register_model(
    {"tv_in1k": torchvision_weights("googlenet-1378be20.pth", 69.778, half=True)},
    FAMILY,
    key_map=without_auxiliaries,
)
def googlenet(**options: Any) -> GoogLeNet:
    """GoogLeNet: 6.6 M parameters, 1.5 G multiply-adds."""
    return GoogLeNet(**options)
