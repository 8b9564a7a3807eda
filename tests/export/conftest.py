"""Calibrated zoo models without data: random weights, BatchNorm statistics and ranges of random images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from qzoo.models.resnet_cifar import CifarResNet
from qzoo.quant.nn import TensorQuantizer
from qzoo.quantizers import set_target
from qzoo.registry import architecture
from qzoo.scheme import Scheme

Build = Callable[..., tuple[nn.Module, Tensor]]


def calibrate_randomly(model: nn.Module, images: Tensor) -> nn.Module:
    """Give BatchNorm the statistics, and every quantizer the largest magnitude, of the images."""
    quantizers = [m for m in model.modules() if isinstance(m, TensorQuantizer)]
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for q in quantizers:
            q.disable()
        for norm in norms:
            norm.momentum = None
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.1)
        model.train()(images)
        model.eval()
        for q in quantizers:
            q.enable()
            q.disable_quant()
            q.enable_calib()
        model(images)
        for q in quantizers:
            histogram = q.role != "weight"
            q.load_calib_amax(
                *(["percentile"] if histogram else []), **({"percentile": 100.0} if histogram else {})
            )
            q.disable_calib()
            q.enable_quant()
    return set_target(model, "tensorrt")


@pytest.fixture(scope="session")
def calibrated() -> Callable[[nn.Module, Tensor], nn.Module]:
    """:func:`calibrate_randomly`, for models that ``build`` does not make."""
    return calibrate_randomly


@pytest.fixture(scope="session")
def build() -> Build:
    """``build(name, size, in_channels=3, scheme="w8a8", affine=False)`` -> calibrated model, images [8, C, size, size].

    The name ``"resnet8"`` is the smallest of the CIFAR family, which the zoo does not list.
    """

    def make(
        name: str, size: int, in_channels: int = 3, scheme: str = "w8a8", affine: bool = False
    ) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        quantize = replace(Scheme.parse(scheme), affine=affine)
        options = {"num_classes": 20, "in_channels": in_channels, "quantize": quantize}
        model = CifarResNet(1, **options) if name == "resnet8" else architecture(name).build(**options)
        images = torch.randn(8, in_channels, size, size)
        return calibrate_randomly(model, images), images

    return make
