"""What ``qzoo.quantize`` places runs in int8, and equals the simulation to the bit where nothing needs rounding."""

from __future__ import annotations

import copy
from pathlib import Path

import onnx
import pytest
import torch
import torchvision
from exact import make_exact_, on_levels
from networks import (
    ANY,
    NETWORKS,
    Network,
    network,
    share_in_onnxruntime,
    share_in_openvino,
    with_statistics,
)
from torch import Tensor, nn

import qzoo
from qzoo.accuracy import Fidelity
from qzoo.runtimes import load

SHARES = {"onnxruntime": share_in_onnxruntime, "openvino": share_in_openvino}


def check(model: nn.Module, images: Tensor, folder: Path, wanted: Network = ANY) -> None:
    """Int8 in both runtimes, and equality with the simulation; else ranges as they are, and noise as in the other."""
    quantized = qzoo.quantize(model, images)
    assert quantized.qzoo_placement.left == ()
    qzoo.calibrate(quantized, [images], progress=False)
    pytest.importorskip("openvino")
    for target, share in SHARES.items():
        rounded = make_exact_(copy.deepcopy(quantized), target, images[:1], even=True)
        levels = on_levels(rounded, images)[:2]
        path = qzoo.export_onnx(rounded, folder / f"{target}.onnx", target=target, example=levels[:1])
        assert share(path, levels[:1]) >= wanted.share
        if target in wanted.exact:
            with torch.no_grad():
                assert torch.equal(torch.as_tensor(load(path, target)(levels)), rounded(levels))
    if "openvino" not in wanted.exact:
        more = torch.cat([images, torch.randn(wanted.images - len(images), *images.shape[1:])])
        noise = {target: sqnr(quantized, more, target, folder) for target in SHARES}
        assert noise["openvino"] > noise["onnxruntime"] - 6.0


def sqnr(model: nn.Module, images: Tensor, target: str, folder: Path) -> float:
    """Of the runtime against the simulation for its target, in dB."""
    qzoo.set_target(model, target)
    path = qzoo.export_onnx(model, folder / "ordinary.onnx", target=target, example=images[:1])
    with torch.no_grad():
        expected = model(images)
    return Fidelity.of(torch.as_tensor(load(path, target)(images)), expected).sqnr_db


def test_joins_of_what_is_never_negative_with_what_may_be(tmp_path: Path) -> None:
    """The first convolution of a DenseNet, whose ReLU an unsigned range behind it needs."""
    torch.manual_seed(0)
    model, images = (
        torchvision.models.DenseNet(8, (2, 2), 16, num_classes=10),
        torch.randn(2, 3, 32, 32),
    )
    check(with_statistics(model, images), images, tmp_path)


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
    check(with_statistics(model, images), images, tmp_path)


class Scaled(nn.Module):
    """LayerScale behind a convolution, a BatchNorm, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.gamma = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 0.0, -0.25, 1.0, 4.0, -1.0]))
        self.mix, self.last, self.fc = nn.Linear(8, 8), nn.Conv2d(8, 8, 1, bias=False), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        gamma = self.gamma.reshape(1, -1, 1, 1)
        x = self.stem(x).relu()
        x = x + gamma * self.norm(self.conv(x))
        x = x + (self.mix(x.permute(0, 2, 3, 1)) * self.gamma).permute(0, 3, 1, 2)
        x = self.last(x) * gamma
        return self.fc(x.relu().mean((2, 3)))


def test_scales_of_channels_are_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = Scaled(), torch.randn(2, 3, 16, 16)
    check(with_statistics(model, images), images, tmp_path)
    for path in tmp_path.glob("*.onnx"):
        graph = onnx.load(path).graph
        assert not [node for node in graph.node if node.op_type == "Mul"]
        weights = [
            onnx.numpy_helper.to_array(t) for t in graph.initializer if t.data_type == onnx.TensorProto.INT8
        ]
        assert sum(not w[3].any() for w in weights if w.shape[:1] == (8,) and w.ndim > 1) == 3  # factor zero


class Strided(nn.Module):
    """A shortcut with strides that reads a tensor before its activation, as in Xception."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.last, self.shortcut = nn.Conv2d(8, 8, 3, 2, padding=1), nn.Conv2d(8, 8, 1, 2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.first(x.relu())
        return self.fc((self.last(x.relu()) + self.shortcut(x)).relu().mean((2, 3)))


def test_a_shortcut_with_strides(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = Strided(), torch.randn(2, 3, 18, 18)
    check(with_statistics(model, images), images, tmp_path)


class Contrast(nn.Module):
    """An average that leaves padding out, less another tensor; of one, two and four pixels, which is exact."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 2, padding=1), nn.Linear(8, 5)
        self.pool = nn.AvgPool2d(2, 1, 1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.fc((self.pool(x) - self.conv(x)).relu().mean((2, 3)))


def test_an_average_that_leaves_padding_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = Contrast(), torch.randn(2, 3, 18, 18)
    check(with_statistics(model, images), images, tmp_path)


class Normed(nn.Module):
    """A sum of two quantized tensors, normalized with an epsilon that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)
        self.group = nn.GroupNorm(1, 8, eps=0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.fc(self.group(x + self.conv(x)).relu().mean((2, 3)))


def test_openvino_keeps_epsilon(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    model, images = Normed().eval(), torch.randn(2, 3, 16, 16)
    quantized = qzoo.quantize(model, images)
    qzoo.calibrate(quantized, [images], progress=False)
    assert sqnr(quantized, images, "openvino", tmp_path) > 40.0


@pytest.mark.slow
def test_a_channel_shuffle_is_one_operation(tmp_path: Path) -> None:
    """OpenVINO has a kernel for it, which a Q between its three nodes hides."""
    openvino = pytest.importorskip("openvino")
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    model = torchvision.models.ShuffleNetV2([2, 1, 1], [8, 16, 32, 64, 32], num_classes=4)
    quantized = qzoo.quantize(with_statistics(model, images), images)
    qzoo.calibrate(quantized, [images], progress=False)
    path = qzoo.export_onnx(quantized, tmp_path / "net.onnx", target="openvino", example=images[:1])
    network = openvino.Core().read_model(str(path))
    network.reshape([1, 3, 32, 32])
    executed = openvino.compile_model(network, "CPU").get_runtime_model().get_ordered_ops()
    facts = [(op.get_rt_info()["layerType"], op.get_rt_info()["runtimePrecision"]) for op in executed]
    kinds = [kind.astype(str) for kind, _ in facts]
    assert (kinds.count("ShuffleChannels"), kinds.count("Transpose")) == (4, 0)
    assert {precision.astype(str) for kind, precision in facts if kind.astype(str) == "ShuffleChannels"} == {
        "u8"
    }


@pytest.mark.slow
@pytest.mark.parametrize("wanted", NETWORKS, ids=[wanted.name for wanted in NETWORKS])
def test_networks_run_in_int8(wanted: Network, tmp_path: Path) -> None:
    check(*network(wanted.name, wanted.size), tmp_path, wanted)
