"""A small calibrated model and embedded images."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from qzoo.data import load_data
from qzoo.models.resnet_cifar import CifarResNet
from qzoo.preprocessing import Preprocessing
from qzoo.ptq.ranges import calibrate
from qzoo.scheme import Scheme

Batch = tuple[Tensor, Tensor]


@pytest.fixture(scope="session")
def batches() -> list[Batch]:
    """96 embedded images in three batches."""
    preprocessing = Preprocessing((1, 28, 28), 1.0, "bilinear", (0.2860,), (0.3530,))
    return list(load_data(preprocessing, "fashion-mnist", subset="0:96", batch_size=32))


@pytest.fixture(scope="session")
def others() -> Tensor:
    """128 images that no method has seen."""
    preprocessing = Preprocessing((1, 28, 28), 1.0, "bilinear", (0.2860,), (0.3530,))
    return next(iter(load_data(preprocessing, "fashion-mnist", subset="1000:1128", batch_size=128)))[0]


def make(scheme: str, batches: list[Batch]) -> tuple[CifarResNet, CifarResNet]:
    """A ResNet-8 with settled BatchNorms: float, and quantized and calibrated."""
    torch.manual_seed(0)
    model = CifarResNet(1, in_channels=1, quantize=Scheme.parse(scheme, "onnxruntime"))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.momentum = None  # a plain average over the batches
    exact = CifarResNet(1, in_channels=1)
    exact.load_state_dict(model.state_dict())
    exact.train()
    with torch.no_grad():
        for images, _ in batches:
            exact(images)
    exact.eval()
    model.load_state_dict(exact.state_dict())
    calibrate(model.eval(), batches, progress=False)
    return exact, model


@pytest.fixture(scope="session")
def _w8a8(batches: list[Batch]) -> tuple[CifarResNet, CifarResNet]:
    return make("w8a8", batches)


@pytest.fixture(scope="session")
def _w3a8(batches: list[Batch]) -> tuple[CifarResNet, CifarResNet]:
    return make("w3a8", batches)


@pytest.fixture
def w8a8(_w8a8: tuple[CifarResNet, CifarResNet]) -> tuple[CifarResNet, CifarResNet]:
    return copy.deepcopy(_w8a8)


@pytest.fixture
def w3a8(_w3a8: tuple[CifarResNet, CifarResNet]) -> tuple[CifarResNet, CifarResNet]:
    return copy.deepcopy(_w3a8)
