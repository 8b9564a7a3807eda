"""The same architectures from torchvision and timm, and weights that no layer passes by unnoticed."""

from __future__ import annotations

import importlib
import math
import re
import sys
from unittest import mock

import timm
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.resnet import BasicBlock
from torchvision.models.swin_transformer import SwinTransformer

from qzoo import registry
from qzoo.quant.nn import TensorQuantizer
from qzoo.registry import ModelEntry


class CifarReference(nn.Module):
    """The small ResNets, which torchvision does not have, put together from its blocks."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(BasicBlock(16, 16) for _ in range(blocks)))
        self.layer2 = self._halving_stage(16, blocks)
        self.layer3 = self._halving_stage(32, blocks)
        self.fc = nn.Linear(64, 10)

    @staticmethod
    def _halving_stage(width: int, blocks: int) -> nn.Sequential:
        convolution = nn.Conv2d(width, 2 * width, 1, 2, bias=False)
        projection = nn.Sequential(convolution, nn.BatchNorm2d(2 * width))
        first = BasicBlock(width, 2 * width, 2, projection)
        return nn.Sequential(first, *(BasicBlock(2 * width, 2 * width) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


class TemplateReference(nn.Module):
    """What the template in ``models/`` says it is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(BasicBlock(16, 16))
        projection = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
        self.layer2 = nn.Sequential(BasicBlock(16, 32, 2, projection))
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.bn1(self.conv1(x)).relu()))
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def stem(channels: int, width: int, *strides: int) -> nn.Sequential:
    """3x3 convolutions with BatchNorm and ReLU, each twice as wide as the one before, and a 1x1 one."""
    widths = [channels, *(width >> shift for shift in reversed(range(len(strides))))]
    layers: list[nn.Module] = []
    for inputs, outputs, stride in zip(widths, widths[1:], strides, strict=False):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, width, 1))


def mini(arch: str) -> nn.Module:
    """The small transformers and the small ConvNeXt, put together from timm's and torchvision's blocks."""
    model: nn.Module
    if arch == "vit_mini":
        model = VisionTransformer(28, 4, num_classes=10, embed_dim=64, depth=4, num_heads=4)
        model.patch_embed.proj = stem(3, 64, 1, 2, 2)
        for block in model.blocks:
            block.attn.fused_attn = False
    elif arch == "swin_mini":
        model = SwinTransformer([2, 2], 32, [2, 2], [2, 4], [7, 7], stochastic_depth_prob=0.0, num_classes=10)
        model.features[0][0] = stem(3, 32, 1, 2)
    else:
        blocks = [CNBlockConfig(32, 64, 2), CNBlockConfig(64, None, 3)]
        model = ConvNeXt(blocks, stochastic_depth_prob=0.0, layer_scale=1.0, num_classes=10)
        model.features[0][0] = nn.Conv2d(3, 32, 2, 2)
    return model


TEMPLATE = "tiny_net"


def entry(arch: str) -> ModelEntry:
    """The registry's entry; the template's too, which is registered for that moment only."""
    if arch != TEMPLATE:
        return registry.architecture(arch)
    with mock.patch.dict(registry._entries):
        sys.modules.pop("qzoo.models._template", None)
        importlib.import_module("qzoo.models._template")
        return registry._entries[TEMPLATE]


def reference(arch: str) -> nn.Module:
    """The architecture as others wrote it, in eval mode, without storage for its parameters."""
    with torch.device("meta"):
        if arch == TEMPLATE:
            model = TemplateReference()
        elif "efficientnet" in arch:
            model = timm.create_model(arch)
        elif (small := re.fullmatch(r"resnet(20|32|44|56|110)", arch)) is not None:
            model = CifarReference((int(small[1]) - 2) // 6)
        else:
            model = torchvision.models.get_model(arch, weights=None)
    return model.eval()


def random_state(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a size that keeps signals alive, and BatchNorm statistics other than 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in model.state_dict().items():
        new = torch.empty(value.shape, dtype=value.dtype)
        if not value.is_floating_point():
            new.fill_(3)
        elif value.dim() > 1:
            new.normal_(0.0, math.sqrt(2.0 / value[0].numel()), generator=generator)
        elif name.endswith(("weight", "running_var")):
            new.uniform_(0.5, 1.5, generator=generator)
        else:
            new.normal_(0.0, 0.3, generator=generator)
        state[name] = new
    return state


def with_state(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Load the state, strictly, sharing its memory; in eval mode."""
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def quantizers(model: nn.Module) -> dict[str, TensorQuantizer]:
    """Every quantizer of a model, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, TensorQuantizer)}
