"""Small transformers and a small ConvNeXt for images of 28 pixels, whose weights come with the package.

The blocks are those of :mod:`qzoo.models.vit`, :mod:`qzoo.models.swin` and :mod:`qzoo.models.convnext`, narrow and few.
The transformers begin with 3x3 convolutions in place of patches, which small data sets want: "Early Convolutions Help
Transformers See Better" (Xiao et al., 2021, arXiv:2106.14881). ``python -m benchmarks.zero_points`` trains them.

Shapes at 28 pixels: ViT: 50 tokens of 64, 4 blocks; Swin: [N, 14, 14, 32], then [N, 7, 7, 64], windows of 7; ConvNeXt:
[N, 32, 14, 14], then [N, 64, 7, 7].
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from qzoo.models import convnext, swin, vit
from qzoo.models.layers import activation_quantizer, conv2d
from qzoo.models.resnet_cifar import fashion_mnist_weights
from qzoo.registry import TRANSFORMER, Family, register_model
from qzoo.scheme import Scheme

_STEM = """@article{xiao2021early,
  title = {Early Convolutions Help Transformers See Better},
  author = {Xiao, Tete and Singh, Mannat and Mintun, Eric and Darrell, Trevor and Dollar, Piotr and Girshick, Ross},
  journal = {arXiv:2106.14881},
  year = {2021}
}
"""


def stem(in_channels: int, width: int, strides: tuple[int, ...], quantize: Scheme | None) -> nn.Sequential:
    """Make 3x3 convolutions with BatchNorm and ReLU, each twice as wide as the last, and a 1x1 one to ``width``."""
    layers: list[nn.Module] = []
    inputs = in_channels
    for i, stride in enumerate(strides):
        outputs = width // 2 ** (len(strides) - 1 - i)
        first = i == 0
        layers += [
            conv2d(
                inputs,
                outputs,
                3,
                stride=stride,
                padding=1,
                quantize=quantize,
                nonnegative=not first,
                edge=first,
            ),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
        inputs = outputs
    return nn.Sequential(*layers, conv2d(width, width, 1, bias=True, quantize=quantize, nonnegative=True))


class MiniViT(vit.VisionTransformer):
    """ViT of 4 blocks, 64 wide, with 4 heads; its 7 x 7 patches come from :func:`stem`."""

    def __init__(
        self, *, num_classes: int = 10, in_channels: int = 1, quantize: Scheme | None = None
    ) -> None:
        super().__init__(
            64,
            4,
            num_classes=num_classes,
            in_channels=in_channels,
            depth=4,
            image=28,
            patch=4,
            quantize=quantize,
        )
        # The last convolution runs in int8 in ONNX Runtime only with a quantizer behind.
        self.patch_embed.proj = stem(in_channels, 64, (1, 2, 2), quantize).append(
            activation_quantizer(quantize, "activation")
        )


class MiniSwin(swin.SwinTransformer):
    """Swin of 2 + 2 blocks, 32 and 64 wide, with heads of 16, behind :func:`stem`."""

    def __init__(
        self, *, num_classes: int = 10, in_channels: int = 1, quantize: Scheme | None = None
    ) -> None:
        super().__init__(
            32, (2, 2), 0.0, head=16, num_classes=num_classes, in_channels=in_channels, quantize=quantize
        )
        cast(nn.Sequential, self.features[0])[0] = stem(in_channels, 32, (1, 2), quantize)


class MiniConvNeXt(convnext.ConvNeXt):
    """ConvNeXt of 2 + 3 blocks, 32 and 64 wide; its patches have 2 x 2 pixels."""

    def __init__(
        self, *, num_classes: int = 10, in_channels: int = 1, quantize: Scheme | None = None
    ) -> None:
        super().__init__(
            (2, 3), (32, 64), 0.0, num_classes=num_classes, in_channels=in_channels, quantize=quantize
        )
        cast(nn.Sequential, self.features[0])[0] = conv2d(
            in_channels, 32, 2, stride=2, bias=True, quantize=quantize, edge=True
        )
        for module in self.modules():
            if isinstance(module, convnext.Block) and module.layer_scale is not None:
                nn.init.ones_(
                    module.layer_scale
                )  # five blocks learn without the tiny start that deep networks want


@register_model(
    fashion_mnist_weights("vit_mini"), Family(vit.FAMILY.citation + "\n" + _STEM, TRANSFORMER), num_classes=10
)
def vit_mini(**options: Any) -> MiniViT:
    """ViT for 28 pixels: 0.2 M parameters."""
    return MiniViT(**options)


@register_model(
    fashion_mnist_weights("swin_mini"),
    Family(swin.FAMILY.citation + "\n" + _STEM, TRANSFORMER),
    num_classes=10,
)
def swin_mini(**options: Any) -> MiniSwin:
    """Swin for 28 pixels: 0.1 M parameters."""
    return MiniSwin(**options)


@register_model(
    fashion_mnist_weights("convnext_mini"), Family(convnext.FAMILY.citation, TRANSFORMER), num_classes=10
)
def convnext_mini(**options: Any) -> MiniConvNeXt:
    """ConvNeXt for 28 pixels: 0.1 M parameters."""
    return MiniConvNeXt(**options)
