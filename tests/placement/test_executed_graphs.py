"""What ``qzoo.quantize`` places runs in int8, and equals the simulation to the bit where nothing needs rounding."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torchvision
from exact import make_exact_, on_levels
from networks import network, share_in_onnxruntime, share_in_openvino, with_statistics
from torch import Tensor, nn

import qzoo
from qzoo.runtimes import load

# Network, side of the image, and the runtimes whose result is the simulation's to the bit: where a network is not
# piecewise linear, or has a BatchNorm that no layer takes up, a runtime may round otherwise.
NETWORKS = [
    ("torchvision:squeezenet1_1", 64, "onnxruntime openvino"),
    ("torchvision:shufflenet_v2_x0_5", 64, "onnxruntime openvino"),
    ("torchvision:mnasnet0_5", 64, "onnxruntime openvino"),
    ("torchvision:googlenet", 96, "onnxruntime openvino"),
    ("torchvision:resnet18", 64, "onnxruntime openvino"),
    ("torchvision:regnet_y_400mf", 64, "onnxruntime openvino"),
    ("torchvision:efficientnet_b0", 64, "onnxruntime"),
    ("torchvision:mobilenet_v3_small", 64, "onnxruntime"),
    ("torchvision:densenet121", 64, ""),
    ("timm:mobilenetv4_conv_small", 64, "onnxruntime openvino"),
    ("timm:ghostnetv2_100", 64, "onnxruntime openvino"),
    ("timm:resnest14d", 64, "onnxruntime openvino"),
    ("timm:res2net50_26w_4s", 64, "onnxruntime openvino"),
    ("timm:vovnet39a", 64, "onnxruntime openvino"),
    ("timm:lcnet_050", 64, "onnxruntime openvino"),
    ("timm:dla34", 64, "onnxruntime openvino"),
    ("timm:tinynet_e", 64, "onnxruntime"),
    ("timm:hrnet_w18_small", 64, "onnxruntime"),
    ("timm:convnext_atto", 64, "onnxruntime"),
    ("timm:levit_128s", 224, "onnxruntime"),
]


def check(model: nn.Module, images: Tensor, exact: str, folder: Path) -> None:
    quantized = qzoo.quantize(model, images)
    assert quantized.qzoo_placement.left == ()
    qzoo.calibrate(quantized, [images], progress=False)
    for target, share in (("onnxruntime", share_in_onnxruntime), ("openvino", share_in_openvino)):
        if target == "openvino":
            pytest.importorskip("openvino")
        rounded = make_exact_(copy.deepcopy(quantized), target, images[:1])
        images = on_levels(rounded, images)
        path = qzoo.export_onnx(rounded, folder / f"{target}.onnx", target=target, example=images[:1])
        assert share(path, images[:1]) >= 0.99
        with torch.no_grad():
            expected = rounded(images[:2])
        result = torch.as_tensor(load(path, target)(images[:2]))
        if target in exact:
            assert torch.equal(result, expected)
        else:
            noise = (result - expected).square().mean() / expected.square().mean()
            assert noise < 10**-1.5


def test_joins_of_what_is_never_negative_with_what_may_be(tmp_path: Path) -> None:
    """The first convolution of a DenseNet, whose ReLU an unsigned range behind it needs."""
    torch.manual_seed(0)
    model, images = (
        torchvision.models.DenseNet(8, (2, 2), 16, num_classes=10),
        torch.randn(2, 3, 32, 32),
    )
    check(with_statistics(model, images), images, "onnxruntime openvino", tmp_path)


class Joined(nn.Module):
    """A layer with a ReLU and one without, joined: their common range has a sign."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.shared = shared
        self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.behind, self.beside, self.fc = nn.Conv2d(16, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x).relu()
        out = self.behind(torch.cat([left, self.right(x)], 1)).relu()
        if self.shared:
            out = out + self.beside(left).relu()
        return self.fc(out.mean((2, 3)))


@pytest.mark.parametrize("shared", [False, True])
def test_a_relu_in_a_signed_join(shared: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = Joined(shared), torch.randn(2, 3, 16, 16)
    check(with_statistics(model, images), images, "onnxruntime openvino", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "exact"), NETWORKS, ids=[row[0] for row in NETWORKS])
def test_networks_run_in_int8(name: str, size: int, exact: str, tmp_path: Path) -> None:
    model, images = network(name, size)
    check(model, images, exact, tmp_path)
