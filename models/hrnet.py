"""HRNet for ImageNet, with timm's parameter names.

Paper: "Deep High-Resolution Representation Learning for Visual Recognition" (Wang et al., 2019, arXiv:1908.07919).

Shapes of W18 at 224 pixels: stem [N, 64, 56, 56], then two, three and four branches side by side, [N, 18, 56, 56],
[N, 36, 28, 28], [N, 72, 14, 14] and [N, 144, 7, 7]; behind each module every branch gets the sum of all, made smaller
by convolutions or larger by repetition. The head gathers them in [N, 2048, 7, 7]; logits [N, num_classes].

Quantization: all inputs of layers but the image follow a ReLU. Each add has quantizers on both sides; the one on a
convolution's output has the role ``branch``. ``pool_quantizer`` and ``output_quantizer`` close the network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qzoo.hub_mixin import HubMixin
from qzoo.models.layers import activation_quantizer, conv_norm_activation, init_weights, linear
from qzoo.models.resnet import EXPANSION, BasicBlock, Bottleneck
from qzoo.registry import Family, FloatWeights, register_model, timm_weights
from qzoo.scheme import Scheme

_CITATION = """@article{wang2019deep,
  title = {Deep High-Resolution Representation Learning for Visual Recognition},
  author = {Wang, Jingdong and Sun, Ke and Cheng, Tianheng and Jiang, Borui and Deng, Chaorui and others},
  journal = {arXiv:1908.07919},
  year = {2019}
}
"""
FAMILY = Family(_CITATION, results="NNCF, W18: 78.12 to 77.43")
HEAD = (32, 64, 128, 256)  # widths of the bottlenecks behind the branches


def _conv(
    channels: int,
    width: int,
    kernel: int,
    stride: int,
    quantize: Scheme | None,
    *,
    relu: bool = True,
    bias: bool = False,
    image: bool = False,
) -> nn.Sequential:
    """A convolution, its BatchNorm and, unless an add follows, a ReLU."""
    return conv_norm_activation(
        channels,
        width,
        kernel,
        function=nn.ReLU(inplace=True) if relu else None,
        stride=stride,
        bias=bias,
        quantize=quantize,
        nonnegative=not image,
        edge=image,
    )


class Fusion(nn.ModuleList):
    """The sum of all branches for one of them, and a ReLU: tensors [N, C_j, H_j, W_j] -> [N, C_i, H_i, W_i]."""

    def __init__(self, target: int, widths: tuple[int, ...], quantize: Scheme | None) -> None:
        """``target`` is the number i of the branch."""
        terms: list[nn.Module] = []
        for j, width in enumerate(widths):
            if j > target:
                conv = _conv(width, widths[target], 1, 1, quantize, relu=False)
                terms.append(conv.append(nn.Upsample(scale_factor=2 ** (j - target), mode="nearest")))
            elif j == target:
                terms.append(nn.Identity())
            else:
                steps = [_conv(width, width, 3, 2, quantize) for _ in range(target - j - 1)]
                terms.append(nn.Sequential(*steps, _conv(width, widths[target], 3, 2, quantize, relu=False)))
        super().__init__(terms)


class Module(nn.Module):
    """Branches of residual blocks, and their fusions: tensors [N, C_j, H_j, W_j] -> the same."""

    def __init__(self, depth: int, widths: tuple[int, ...], quantize: Scheme | None) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(*(BasicBlock(width, width, quantize=quantize) for _ in range(depth)))
            for width in widths
        )
        count = len(widths)
        self.fuse_layers = nn.ModuleList(Fusion(i, widths, quantize) for i in range(count))
        self.relu = nn.ReLU()
        self.resize_quantizers = nn.ModuleDict()
        self.left_quantizers, self.right_quantizers = nn.ModuleDict(), nn.ModuleDict()
        for i in range(count):
            for j in range(count):
                if j > i:
                    self.resize_quantizers[f"{i}_{j}"] = activation_quantizer(quantize, "activation")
                if j > 0:
                    # The first sum is of two terms: a branch as it is, or what convolutions made of it.
                    left = "branch" if j == 1 and i > 0 else "residual"
                    right = "branch" if 1 < j < i else "residual"
                    positive = j == 1 and i == 0
                    self.left_quantizers[f"{i}_{j}"] = activation_quantizer(
                        quantize, left, nonnegative=positive
                    )
                    self.right_quantizers[f"{i}_{j}"] = activation_quantizer(
                        quantize, right, nonnegative=j == i
                    )

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        x = [branch(part) for branch, part in zip(self.branches, x, strict=True)]
        return [self.relu(self._sum(i, fusion, x)) for i, fusion in enumerate(self.fuse_layers)]

    def _sum(self, i: int, fusion: Any, x: list[Tensor]) -> Tensor:
        total = fusion[0](x[0])
        for j in range(1, len(x)):
            term = x[j]
            if j > i:
                conv, norm, larger = fusion[j]
                term = larger(self.resize_quantizers[f"{i}_{j}"](norm(conv(term))))
            else:
                term = fusion[j](term)
            total = self.left_quantizers[f"{i}_{j}"](total) + self.right_quantizers[f"{i}_{j}"](term)
        return total


class HRNet(HubMixin, nn.Module):
    """A stem, a stage of bottlenecks, three stages of parallel branches, and a head that gathers them."""

    def __init__(
        self,
        first: tuple[int, int],
        depth: int,
        modules: tuple[int, int, int],
        width: int,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        quantize: Scheme | None = None,
    ) -> None:
        """
        Args:
            first: number and width of the bottlenecks.
            depth: residual blocks of a branch; modules: of the three stages.
            width: of the branch of the highest resolution.
        """
        super().__init__()
        self.conv1, self.bn1, self.relu = _conv(in_channels, 64, 3, 2, quantize, image=True)
        self.conv2, self.bn2, _ = _conv(64, 64, 3, 2, quantize)
        channels, blocks = 64, []
        for _ in range(first[0]):
            blocks.append(Bottleneck(channels, first[1], quantize=quantize))
            channels = blocks[-1].out_channels
        self.layer1 = nn.Sequential(*blocks)
        before: tuple[int, ...] = (channels,)
        for stage, count in enumerate(modules, start=2):
            widths = tuple(width * 2**i for i in range(stage))
            same = [
                nn.Identity() if old == new else _conv(old, new, 3, 1, quantize)
                for old, new in zip(before, widths, strict=False)
            ]
            new = nn.Sequential(_conv(before[-1], widths[-1], 3, 2, quantize))
            self.add_module(f"transition{stage - 1}", nn.ModuleList([*same, new]))
            self.add_module(
                f"stage{stage}", nn.Sequential(*(Module(depth, widths, quantize) for _ in range(count)))
            )
            before = widths
        self.incre_modules = nn.ModuleList(
            nn.Sequential(Bottleneck(old, wide, quantize=quantize))
            for old, wide in zip(before, HEAD, strict=True)
        )
        outer = [wide * EXPANSION for wide in HEAD]
        self.downsamp_modules = nn.ModuleList(
            _conv(outer[i], outer[i + 1], 3, 2, quantize, bias=True) for i in range(3)
        )
        self.branch_quantizers = nn.ModuleList(
            activation_quantizer(quantize, "branch", nonnegative=True) for _ in range(3)
        )
        self.residual_quantizers = nn.ModuleList(
            activation_quantizer(quantize, "residual", nonnegative=True) for _ in range(3)
        )
        self.final_layer = _conv(outer[-1], 2048, 1, 1, quantize, bias=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = linear(2048, num_classes, quantize=quantize, nonnegative=True, edge=True)
        self.pool_quantizer = activation_quantizer(quantize, "pool", nonnegative=True)
        self.output_quantizer = activation_quantizer(quantize, "output")
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        parts = [self.layer1(self.relu(self.bn2(self.conv2(x))))]
        for stage in (2, 3, 4):
            *kept, new = self.get_submodule(f"transition{stage - 1}").children()
            added = new(parts[-1])
            parts = [transition(part) for transition, part in zip(kept, parts, strict=True)]
            parts = self.get_submodule(f"stage{stage}")([*parts, added])
        total, *others = (widen(part) for widen, part in zip(self.incre_modules, parts, strict=True))
        for i, other in enumerate(others):
            smaller = self.downsamp_modules[i](total)
            total = self.residual_quantizers[i](other) + self.branch_quantizers[i](smaller)
        x = self.avgpool(self.pool_quantizer(self.final_layer(total)))
        return self.output_quantizer(self.classifier(torch.flatten(x, 1)))


def _published(name: str, file: str, top1: float) -> dict[str, FloatWeights]:
    """The authors' weights, from timm's releases, in a file of that name."""
    weights = timm_weights(
        f"{name}.ms_in1k", top1, release=f"v0.1-hrnet/{file}", interpolation="bilinear", license="mit"
    )
    return {"ms_in1k": weights}


@register_model(_published("hrnet_w18_small", "hrnet_w18_small_v1-f460c6bc", 72.338), FAMILY)
def hrnet_w18_small(**options: Any) -> HRNet:
    """HRNet-W18, small: 13.2 M parameters, 1.6 G multiply-adds."""
    return HRNet((1, 32), 2, (1, 1, 1), 16, **options)


@register_model(_published("hrnet_w18", "hrnetv2_w18-8cb57bb9", 76.752), FAMILY)
def hrnet_w18(**options: Any) -> HRNet:
    """HRNet-W18: 21.3 M parameters, 4.3 G multiply-adds."""
    return HRNet((4, 64), 4, (1, 4, 3), 18, **options)
