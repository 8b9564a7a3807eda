"""What ``qzoo.quantize`` places runs in int8, and equals the simulation to the bit where nothing needs rounding."""

from __future__ import annotations

import copy
from collections import Counter
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
from qzoo.runtimes.sessions import onnxruntime_session

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
    # What is joined goes on in integers.
    executed = executed_in_openvino(tmp_path / "openvino.onnx")
    assert executed["Concatenation"] > 0 == executed["Convert"]


def executed_in_openvino(path: Path) -> Counter[str]:
    """The kinds of operators that OpenVINO executes, of a file as it is."""
    import openvino

    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    facts = [op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops()]
    return Counter(fact["layerType"].astype(str) for fact in facts)


class JoinedTwice(nn.Module):
    """A tensor that is joined before a BatchNorm, which takes signed integers, and before a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 8, 3) for _ in range(3))
        self.norm, self.behind, self.beside = nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3), nn.Conv2d(16, 8, 3)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        middle = self.b(x)
        left = self.behind(self.norm(torch.cat([self.a(x), middle], 1)).relu())
        right = self.beside(torch.cat([middle, self.c(x)], 1))
        return self.fc((left.relu() + right.relu()).mean((2, 3)))


def test_joined_before_a_batchnorm_and_before_a_convolution(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = JoinedTwice(), torch.randn(2, 3, 16, 16)
    check(with_statistics(model, images), images, tmp_path)


class Branches(nn.Module):
    """Two convolutions and a BatchNorm that read one tensor, as in the RepVGG that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.point = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 8, 1),
        )
        self.norm, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (self.wide(x) + self.point(x) + self.norm(x)).relu()
        return self.fc(x.mean((2, 3)))


def test_a_batchnorm_beside_layers_reads_their_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = Branches(), torch.randn(2, 3, 16, 16)
    check(with_statistics(model, images), images, tmp_path)
    graph = onnx.load(tmp_path / "openvino.onnx").graph
    (norm,) = [node for node in graph.node if node.op_type == "BatchNormalization"]
    assert [node.op_type for node in graph.node if norm.input[0] in node.input].count("Conv") == 2


class Averages(nn.Module):
    """Averages with padding that counts, of windows that end on the image, and beyond; then a sum of two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.wide = (nn.Conv2d(n, m, 3) for n, m in ((3, 8), (8, 8), (8, 16)))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.avg_pool2d(self.stem(x).relu(), 4, 2, 1)
        x = nn.functional.avg_pool2d(self.middle(x), 2, ceil_mode=True, count_include_pad=False)
        x = self.wide(x).relu()
        x = nn.functional.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
        return self.fc(x.unflatten(1, (2, 8)).sum(1).mean((2, 3)))


def test_averages_are_convolutions_and_sums_of_two_parts_additions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = Averages(), torch.randn(2, 3, 26, 26)
    check(with_statistics(model, images), images, tmp_path)
    executed = tmp_path / "optimized.onnx"
    onnxruntime_session(tmp_path / "onnxruntime.onnx", optimized=executed)
    kinds = Counter(node.op_type for node in onnx.load(executed).graph.node)
    assert kinds["ReduceSum"] == 0
    assert (kinds["QLinearAdd"], kinds["QLinearConv"], kinds["QLinearAveragePool"]) == (1, 5, 1)


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
