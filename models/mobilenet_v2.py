"""MobileNetV2 for ImageNet, with torchvision's parameter names.

Paper: "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (Sandler et al., 2018, arXiv:1801.04381),
table 2.

Shapes at 224 pixels: stem [N, 32, 112, 112], then the stages [N, 16, 112, 112], [N, 24, 56, 56],
[N, 32, 28, 28], [N, 64, 14, 14], [N, 96, 14, 14], [N, 160, 7, 7], [N, 320, 7, 7], head [N, 1280, 7, 7],
logits [N, num_classes].

Quantization: a block ends in a linear bottleneck, so the tensors between blocks are signed: the inputs of the
expansions, of the head and of both sides of an add. Inside a block, and before the pooling, everything
follows a ReLU6. Each add has a ``residual_quantizer`` on its skip input and a ``branch_quantizer`` on the
other; ``pool_quantizer`` and ``output_quantizer`` close the network.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.hub_mixin import HubMixin
from qzoo.models.layers import activation_quantizer, conv2d, conv_norm_activation, init_weights, linear
from qzoo.registry import DEPTHWISE, Family, FloatWeights, register_model, renamed_modules
from qzoo.scheme import Scheme

_CITATION = """@article{sandler2018mobilenetv2,
  title = {MobileNetV2: Inverted Residuals and Linear Bottlenecks},
  author = {Sandler, Mark and Howard, Andrew and Zhu, Menglong and Zhmoginov, Andrey and Chen, Liang-Chieh},
  journal = {arXiv:1801.04381},
  year = {2018}
}
"""
FAMILY = Family(_CITATION, DEPTHWISE, results="NNCF, half width: 65.94 to 65.31")

# Expansion, output channels, number of blocks and first block's stride of each stage.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _relu6() -> nn.Module:
    return nn.ReLU6(inplace=True)


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1 and a skip: [N, in, H, W] -> [N, out, H / stride, W / stride].

    The skip is there where the shape stays. With ``expansion`` 1 the block has no expanding convolution, and
    its input must be non-negative (it is the stem's).
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, expansion: int, quantize: Scheme | None
    ) -> None:
        super().__init__()
        inner = in_channels * expansion
        convolution = partial(conv_norm_activation, quantize=quantize)
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(convolution(in_channels, inner, 1, function=_relu6()))
        layers += [
            convolution(inner, inner, 3, function=_relu6(), stride=stride, groups=inner, nonnegative=True),
            conv2d(inner, out_channels, 1, quantize=quantize, nonnegative=True),
            nn.BatchNorm2d(out_channels),
        ]
        self.conv = nn.Sequential(*layers)
        self.skip = stride == 1 and in_channels == out_channels
        if self.skip:
            self.residual_quantizer = activation_quantizer(quantize, "residual")
            self.branch_quantizer = activation_quantizer(quantize, "branch")

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        if not self.skip:
            return out
        return self.residual_quantizer(x) + self.branch_quantizer(out)


class MobileNetV2(HubMixin, nn.Module):
    """A stem, seven stages of inverted residuals, a 1x1 head, average pooling and a linear classifier."""

    def __init__(
        self, *, num_classes: int = 1000, in_channels: int = 3, quantize: Scheme | None = None
    ) -> None:
        super().__init__()
        convolution = partial(conv_norm_activation, quantize=quantize)
        features: list[nn.Module] = [convolution(in_channels, 32, 3, function=_relu6(), stride=2, edge=True)]
        channels = 32
        for expansion, out_channels, blocks, first_stride in STAGES:
            for i in range(blocks):
                stride = first_stride if i == 0 else 1
                features.append(InvertedResidual(channels, out_channels, stride, expansion, quantize))
                channels = out_channels
        features.append(convolution(channels, 1280, 1, function=_relu6()))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Dropout(0.2), linear(1280, num_classes, quantize=quantize, nonnegative=True, edge=True)
        )
        self.pool_quantizer = activation_quantizer(quantize, "pool", nonnegative=True)
        self.output_quantizer = activation_quantizer(quantize, "output")
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = self.avgpool(self.pool_quantizer(x))
        return self.output_quantizer(self.classifier(torch.flatten(x, 1)))


def timm_names() -> dict[str, str]:
    """Return the names of timm's ``mobilenetv2_100``, whose blocks are numbered within their stages, and ours."""
    names = {"conv_stem": "features.0.0", "bn1": "features.0.1", "classifier": "classifier.1"}
    blocks = [(stage, i) for stage, (_, _, depth, _) in enumerate(STAGES) for i in range(depth)]
    for number, (stage, i) in enumerate(blocks, start=1):
        theirs, ours = ["conv_dw", "bn1", "conv_pw", "bn2"], ["0.0", "0.1", "1", "2"]
        if stage > 0:
            theirs = ["conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"]
            ours = ["0.0", "0.1", "1.0", "1.1", "2", "3"]
        for layer, own in zip(theirs, ours, strict=True):
            names[f"blocks.{stage}.{i}.{layer}"] = f"features.{number}.conv.{own}"
    last = f"features.{len(blocks) + 1}"
    return names | {"conv_head": f"{last}.0", "bn2": f"{last}.1"}


_TV_IN1K = FloatWeights(
    sources=("https://download.pytorch.org/models/mobilenet_v2-b0353104.pth",),
    sha256=("b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",),
    license="bsd-3-clause",
    top1=71.878,
)


@register_model(
    {"tv_in1k": _TV_IN1K},
    FAMILY,
    tuning={"epochs": 30, "lr": 0.00045, "weight_decay": 4e-5, "freeze_bn": 0.5},
    aliases=["mobilenetv2_100"],
    key_map=renamed_modules(timm_names()),
)
def mobilenet_v2(**options: Any) -> MobileNetV2:
    """MobileNetV2, width 1.0: 3.5 M parameters, 0.3 G multiply-adds."""
    return MobileNetV2(**options)
