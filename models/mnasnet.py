"""MNASNet for ImageNet, with torchvision's parameter names.

Paper: "MnasNet: Platform-Aware Neural Architecture Search for Mobile" (Tan et al., 2018, arXiv:1807.11626); this is
the B1 form, without squeeze-and-excitation.

Shapes of width 1.0 at 224 pixels: stem [N, 32, 112, 112], [N, 16, 112, 112], then the stages [N, 24, 56, 56],
[N, 40, 28, 28], [N, 80, 14, 14], [N, 96, 14, 14], [N, 192, 7, 7], [N, 320, 7, 7], head [N, 1280, 7, 7], logits
[N, num_classes].

Quantization: a block ends without an activation, so the tensors between blocks are signed: the inputs of the
expansions, of the head and of both sides of an add. Inside a block, and before the pooling, everything follows a ReLU.
Each add has a ``residual_quantizer`` on its skip input and a ``branch_quantizer`` on the other; ``pool_quantizer`` and
``output_quantizer`` close the network.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from qzoo.hub_mixin import HubMixin
from qzoo.models.layers import activation_quantizer, conv2d, init_weights, linear, round_channels
from qzoo.registry import DEPTHWISE, Family, register_model, renamed_modules, torchvision_weights
from qzoo.scheme import Scheme

_CITATION = """@article{tan2018mnasnet,
  title = {MnasNet: Platform-Aware Neural Architecture Search for Mobile},
  author = {Tan, Mingxing and Chen, Bo and Pang, Ruoming and Vasudevan, Vijay and Sandler, Mark and others},
  journal = {arXiv:1807.11626},
  year = {2018}
}
"""
FAMILY = Family(_CITATION, DEPTHWISE)

# Kernel size, first block's stride, expansion, output channels at width 1.0 and blocks of each stage.
STAGES = (
    (3, 2, 3, 24, 3),
    (5, 2, 3, 40, 3),
    (5, 2, 6, 80, 3),
    (3, 1, 6, 96, 2),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


def bn(channels: int) -> nn.BatchNorm2d:
    """Make a BatchNorm with TensorFlow's momentum of 0.9997."""
    return nn.BatchNorm2d(channels, momentum=1 - 0.9997)


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise kxk, project 1x1 and a skip: [N, in, H, W] -> [N, out, H / stride, W / stride].

    The skip is there where the shape stays.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        expansion: int,
        quantize: Scheme | None,
    ) -> None:
        super().__init__()
        inner = in_channels * expansion
        conv = partial(conv2d, quantize=quantize, nonnegative=True)
        self.layers = nn.Sequential(
            conv2d(in_channels, inner, 1, quantize=quantize),
            bn(inner),
            nn.ReLU(inplace=True),
            conv(inner, inner, kernel_size, stride=stride, padding=kernel_size // 2, groups=inner),
            bn(inner),
            nn.ReLU(inplace=True),
            conv(inner, out_channels, 1),
            bn(out_channels),
        )
        self.skip = stride == 1 and in_channels == out_channels
        if self.skip:
            self.residual_quantizer = activation_quantizer(quantize, "residual")
            self.branch_quantizer = activation_quantizer(quantize, "branch")

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(x)
        if not self.skip:
            return out
        return self.branch_quantizer(out) + self.residual_quantizer(x)


class MNASNet(HubMixin, nn.Module):
    """A stem, a depthwise separable convolution, six stages of blocks, a 1x1 head, pooling and a linear classifier."""

    def __init__(
        self,
        width: float,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        quantize: Scheme | None = None,
    ) -> None:
        super().__init__()
        stem, channels = round_channels(32 * width), round_channels(16 * width)
        layers: list[nn.Module] = [
            conv2d(in_channels, stem, 3, stride=2, padding=1, quantize=quantize, edge=True),
            bn(stem),
            nn.ReLU(inplace=True),
            conv2d(stem, stem, 3, padding=1, groups=stem, quantize=quantize, nonnegative=True),
            bn(stem),
            nn.ReLU(inplace=True),
            conv2d(stem, channels, 1, quantize=quantize, nonnegative=True),
            bn(channels),
        ]
        for kernel_size, first_stride, expansion, base, depth in STAGES:
            out_channels, blocks = round_channels(base * width), []
            for i in range(depth):
                stride = first_stride if i == 0 else 1
                blocks.append(
                    InvertedResidual(channels, out_channels, kernel_size, stride, expansion, quantize)
                )
                channels = out_channels
            layers.append(nn.Sequential(*blocks))
        layers += [conv2d(channels, 1280, 1, quantize=quantize), bn(1280), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)
        classifier = linear(1280, num_classes, quantize=quantize, nonnegative=True, edge=True)
        self.classifier = nn.Sequential(nn.Dropout(0.2, inplace=True), classifier)
        self.pool_quantizer = activation_quantizer(quantize, "pool", nonnegative=True)
        self.output_quantizer = activation_quantizer(quantize, "output")
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool_quantizer(self.layers(x)).mean([2, 3], keepdim=True)
        return self.output_quantizer(self.classifier(x.flatten(1)))


def timm_names() -> dict[str, str]:
    """Return the names of timm's MNASNets, ``mnasnet_100`` and its kin, and ours."""
    names = {"conv_stem": "layers.0", "bn1": "layers.1", "conv_head": "layers.14", "bn2": "layers.15"}
    names |= zip(
        [f"blocks.0.0.{layer}" for layer in ("conv_dw", "bn1", "conv_pw", "bn2")],
        [f"layers.{number}" for number in (3, 4, 6, 7)],
        strict=True,
    )
    theirs = ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")
    for stage, (_, _, _, _, depth) in enumerate(STAGES, start=1):
        for i in range(depth):
            for layer, number in zip(theirs, (0, 1, 3, 4, 6, 7), strict=True):
                names[f"blocks.{stage}.{i}.{layer}"] = f"layers.{stage + 7}.{i}.layers.{number}"
    return names | {"classifier": "classifier.1"}


KEY_MAP = renamed_modules(timm_names())


@register_model(
    {"tv_in1k": torchvision_weights("mnasnet0.5_top1_67.823-3ffadce67e.pth", 67.734)},
    FAMILY,
    aliases=["mnasnet_050"],
    key_map=KEY_MAP,
)
def mnasnet0_5(**options: Any) -> MNASNet:
    """MNASNet-B1, width 0.5: 2.2 M parameters, 0.1 G multiply-adds."""
    return MNASNet(0.5, **options)


@register_model(
    {"tv_in1k": torchvision_weights("mnasnet0_75-7090bc5f.pth", 71.18, resize=232)},
    FAMILY,
    aliases=["mnasnet_075"],
    key_map=KEY_MAP,
)
def mnasnet0_75(**options: Any) -> MNASNet:
    """MNASNet-B1, width 0.75: 3.2 M parameters, 0.2 G multiply-adds."""
    return MNASNet(0.75, **options)


@register_model(
    {"tv_in1k": torchvision_weights("mnasnet1.0_top1_73.512-f206786ef8.pth", 73.456)},
    FAMILY,
    aliases=["mnasnet_100"],
    key_map=KEY_MAP,
)
def mnasnet1_0(**options: Any) -> MNASNet:
    """MNASNet-B1, width 1.0: 4.4 M parameters, 0.3 G multiply-adds."""
    return MNASNet(1.0, **options)


@register_model(
    {"tv_in1k": torchvision_weights("mnasnet1_3-a4c69d6f.pth", 76.506, resize=232)}, FAMILY, key_map=KEY_MAP
)
def mnasnet1_3(**options: Any) -> MNASNet:
    """MNASNet-B1, width 1.3: 6.3 M parameters, 0.5 G multiply-adds."""
    return MNASNet(1.3, **options)
