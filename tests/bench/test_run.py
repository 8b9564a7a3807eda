"""The benchmark's rows against independent figures, on a small network and few images."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from small_data import write_folder
from torch import Tensor, nn

import qzoo
from qzoo import runtimes
from qzoo.bench import batches
from qzoo.bench.options import Options
from qzoo.bench.process import Process
from qzoo.bench.report import print_table, write_report
from qzoo.bench.results import Report, Row
from qzoo.bench.run import measure, new_report
from qzoo.bench.subject import Checkpoint, Source
from qzoo.data import load_data
from qzoo.errors import ArgumentError, BenchmarkError, DataError, MissingDependencyError
from qzoo.models.resnet_cifar import CifarResNet
from qzoo.preprocessing import Preprocessing
from qzoo.ptq.ranges import calibrate
from qzoo.quantizers import set_target
from qzoo.scheme import Scheme

Batches = list[tuple[Tensor, Tensor]]
NAMES = [name for name in runtimes.installed() if runtimes.runtime_named(name).default]


@pytest.fixture(scope="module")
def setting() -> tuple[nn.Module, nn.Module, Batches]:
    torch.manual_seed(0)
    reference = CifarResNet(1, in_channels=1).eval()
    quantized = CifarResNet(1, in_channels=1, quantize=Scheme()).eval()
    quantized.load_state_dict(reference.state_dict())
    images = torch.randn(40, 1, 12, 12)
    with torch.no_grad():
        labels = reference(images).argmax(1)
    labels[:10] = (labels[:10] + 1) % 10  # the float model is wrong on exactly these
    calibrate(quantized, [(images, labels)], progress=False)
    return quantized, reference, [(images[:30], labels[:30]), (images[30:], labels[30:])]


@pytest.fixture(scope="module")
def report(setting) -> Report:
    compare = ("quantize_static", "torchvision")
    options = Options((*NAMES, "tensorrt"), (1, 2), 1, 0.01, compare, details=True, progress=False)
    return new_report(
        [measure(Checkpoint("small-w8a8", *setting, torch.randn(16, 1, 12, 12)), options)], options
    )


def test_one_row_for_each_runtime_and_precision(report: Report) -> None:
    found = [(row.runtime, row.precision) for row in report.rows]
    expected = [("pytorch", "float32"), ("pytorch", "fake-quant int8")]
    for name in NAMES[1:]:
        expected += [(name, "float32"), (name, "int8")]
    expected.append(("onnxruntime", "int8"))
    assert found == expected
    assert [row.source for row in report.rows] == ["qzoo"] * (len(expected) - 1) + ["quantize_static"]
    assert report.notes[-1] == "small-w8a8: torchvision has no quantized model of this kind: not compared"


def test_accuracy_and_agreement(setting, report: Report) -> None:
    quantized, reference, batches = setting
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    simulation = set_target(copy.deepcopy(quantized), "onnxruntime")
    with torch.no_grad():
        expected, simulated = reference(images).argmax(1), simulation(images).argmax(1)
    for row in report.rows:
        assert row.images == 40
        if row.precision == "float32":
            assert (row.top1, row.agreement) == (75.0, 100.0)
            assert row.sqnr_db > 80
            assert [round(edge, 1) for edge in row.top1_interval] == [59.8, 85.8]  # Wilson, 30 of 40
        else:
            assert 10 < row.sqnr_db < 60, row.label
    fake = report.rows[1]
    assert fake.top1 == 100 * (simulated == labels).float().mean().item()
    assert fake.agreement == pytest.approx(100 * (simulated == expected).float().mean().item())


def test_latency_and_size(report: Report) -> None:
    for row in report.rows:
        assert set(row.latency) == set(row.speedup) == {1, 2}
        for timing in row.latency.values():
            assert 0 < timing.wall <= timing.wall_p90
            assert timing.calls > 15, "of a tiny network, several calls a round"
        assert row.images_per_second == pytest.approx(2e3 / row.latency[2].wall)
        assert row.load_seconds > 0
        assert row.first_ms > 0
        if row.precision == "float32":
            assert all(value == (1.0, 1.0, 1.0) for value in row.speedup.values())
        if sys.platform == "linux":
            assert 10e6 < row.idle_rss_bytes < row.peak_rss_bytes < 2e9
    sizes = {(row.runtime, row.precision): row.file_bytes for row in report.rows}
    assert sizes["pytorch", "fake-quant int8"] is None
    assert sizes["onnxruntime", "int8"] < 0.5 * sizes["onnxruntime", "float32"]


def test_clock(report: Report) -> None:
    """One thread: CPU time. Row and bootstrap are of the same clock, and both are reported."""
    for row in report.rows:
        assert row.clock == "cpu"
        assert row.speedup == row.cpu_speedup
        for batch, (ratio, low, high) in row.cpu_speedup.items():
            base = next(r for r in report.rows if (r.runtime, r.precision) == (row.runtime, "float32"))
            assert ratio == pytest.approx(base.latency[batch].cpu / row.latency[batch].cpu)
            assert low <= ratio <= high


def test_report_says_what_the_figures_depend_on(report: Report) -> None:
    values = report.to_dict()
    assert values["settings"]["batches"] == [1, 2]
    assert values["settings"]["compare"] == ["quantize_static", "torchvision"]
    assert {"torch", "processor", "qzoo"} <= set(values["machine"])
    assert values["date"].endswith("+00:00")


def test_refusals(setting) -> None:
    quantized, reference, _ = setting
    with pytest.raises(DataError, match="no images"):
        measure(Checkpoint("x", quantized, reference, []), Options(progress=False))
    with pytest.raises(ValueError, match="add it to the runtimes"):
        Options(("pytorch",), compare=("quantize_static",))
    with pytest.raises(ValueError, match="no peer 'tflite'"):
        Options(compare=("tflite",))
    with pytest.raises(DataError, match="start at 128"):
        qzoo.benchmark("resnet20.fmnist-w8a8", compare=["quantize_static"], subset="100:")
    for bad in (
        {"runtimes": ("tflite",)},
        {"batches": ()},
        {"batches": (0,)},
        {"threads": 0},
        {"seconds": 0.0},
        {"seconds": float("nan")},
        {"limit": float("inf")},
    ):
        with pytest.raises(ValueError):
            Options(**bad)


def test_a_float_checkpoint_is_no_contender() -> None:
    with pytest.raises(BenchmarkError, match=r"resnet20.fmnist is a float model; .*resnet20.fmnist-w8a8"):
        qzoo.benchmark("resnet20.fmnist")


@pytest.mark.slow
def test_two_checkpoints_of_one_name_are_told_apart(tmp_path: Path) -> None:
    name = "resnet20.fmnist-w8a8"
    folder = qzoo.create_model(name, pretrained=True).save_pretrained(tmp_path / "mine")
    options = {"runtimes": ["pytorch"], "subset": "0:20", "seconds": 0.001, "batches": [1], "progress": False}
    assert {row.model for row in qzoo.benchmark([name, str(folder)], **options).rows} == {name, str(folder)}
    assert {row.model for row in qzoo.benchmark(str(folder), **options).rows} == {name}


@pytest.mark.skipif("tensorrt" in runtimes.installed(), reason="TensorRT is here")
def test_of_tensorrt_the_file_is_checked(report: Report) -> None:
    note = report.notes[0]
    assert "was not run (the package 'tensorrt' is not installed: pip install" in note
    assert "no finding(s)" in note
    agreement, sqnr = re.search(r"in ONNX Runtime ([\d.]+) % top-1 agreement and ([\d.]+) dB", note).groups()
    assert float(agreement) >= 90
    assert float(sqnr) > 30


def test_speed_against_the_peer(report: Report) -> None:
    ours = next(row for row in report.rows if row.label == "onnxruntime int8")
    theirs = report.rows[-1]
    assert [(a.peer, a.runtime, a.batch) for a in ours.against] == [
        ("quantize_static", "onnxruntime", 1),
        ("quantize_static", "onnxruntime", 2),
    ]
    for entry in ours.against:
        assert entry.ratio == pytest.approx(theirs.latency[entry.batch].cpu / ours.latency[entry.batch].cpu)
        assert 0 < entry.low <= entry.ratio <= entry.high


def test_details(setting, report: Report) -> None:
    (details,) = report.details
    layers = {layer["name"] for layer in details["sensitivity"]["layers"]}
    assert {"conv1", "fc", "layer1.0.conv1"} < layers
    weight = next(h for h in details["histograms"] if h["name"] == "conv1._weight_quantizer")
    values = setting[0].conv1.weight.detach().numpy()
    counts, _ = np.histogram(values, 64, (values.min(), values.max()))
    assert sum(weight["counts"]) == values.size
    assert np.abs(np.array(weight["counts"]) - counts).sum() <= 4, "an edge may fall either way"
    assert weight["amax"][1] == pytest.approx(np.abs(values).max(), rel=1e-4)
    for profile in details["profiles"]:
        total = sum(node["micros"] for node in profile["nodes"])
        assert total > 0
        kinds = {node["precision"] for node in profile["nodes"]}
        assert ("int8" in kinds) == (profile["precision"] == "int8"), profile
    first = next(p for p in details["profiles"] if (p["runtime"], p["precision"]) == ("onnxruntime", "int8"))
    assert any(node["op"] == "QLinearConv" for node in first["nodes"])


def test_runs_the_same_kernels_as_quantize_static(report: Report) -> None:
    """Never slower, without a clock: operator by operator the graph that ONNX Runtime makes of the peer's file.

    Only the image's channels are padded to four besides, for a faster first convolution.
    """
    (details,) = report.details
    kernels = [
        Counter((node["op"], node["precision"]) for node in profile["nodes"])
        for profile in details["profiles"]
        if (profile["runtime"], profile["precision"]) == ("onnxruntime", "int8")
    ]
    assert len(kernels) == 2
    assert kernels[0] == kernels[1] + Counter({("Pad", "int8"): 1})


def test_peer_that_is_not_installed() -> None:
    pytest.importorskip("openvino")
    try:
        import nncf  # noqa: F401
    except ImportError:
        with pytest.raises(MissingDependencyError, match="pip install nncf"):
            Options(("openvino",), compare=("nncf",))


def test_torchvision_as_a_peer(tmp_path) -> None:
    """The same weights in torchvision's quantized definition: int8 kernels of torch, near the float logits."""
    from qzoo.bench import peers

    torch.manual_seed(0)
    reference = qzoo.create_model("resnet18", num_classes=5).eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        reference.train()(images)  # BatchNorm statistics that belong to the weights
        expected = reference.eval()(images)
    made = peers.make("torchvision", reference, None, images, tmp_path)
    torch.save(made.model, tmp_path / "peer.pt")
    loaded = torch.load(tmp_path / "peer.pt", weights_only=False)
    logits = runtimes.load(loaded, "pytorch")(images)
    assert 10 * torch.log10(expected.square().sum() / (expected - logits).square().sum()) > 15
    assert any("quantized" in type(m).__module__ for m in loaded.modules())


def test_quantize_static_has_its_best_settings(setting, tmp_path) -> None:
    from qzoo.bench import peers

    path = qzoo.export_onnx(setting[1], tmp_path / "float.onnx", example=torch.zeros(1, 1, 12, 12))
    made = peers.make("quantize_static", setting[1], path, torch.randn(8, 1, 12, 12), tmp_path)
    graph = onnx.load(made.model).graph
    scales = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    conv = next(node for node in graph.node if node.op_type == "Conv")
    pair = next(node for node in graph.node if conv.input[1] in node.output)
    assert scales[pair.input[1]].shape == (16,), "a scale a channel"
    assert made.bytes == made.model.stat().st_size


def test_nncf_as_a_peer(setting, tmp_path) -> None:
    pytest.importorskip("nncf", reason="the peer nncf is not installed: pip install nncf")
    from qzoo.bench import peers

    images = setting[2][0][0]
    path = qzoo.export_onnx(setting[1], tmp_path / "float.onnx", target="openvino", example=images[:1])
    made = peers.make("nncf", setting[1], path, images, tmp_path)
    with torch.no_grad():
        expected = setting[1](images)
    with Process("nncf") as process:
        process.load("openvino", made.model, 1, [])
        process.images(images.numpy())
        noise = torch.from_numpy(process.run()) - expected
        kinds = {node["precision"] for node in process.profile("openvino", made.model, 1, 2)}
    assert 10 < 10 * torch.log10(expected.square().sum() / noise.square().sum()) < 60
    assert "int8" in kinds


@pytest.fixture(scope="module")
def files(setting, tmp_path_factory) -> tuple[Path, Path]:
    """The quantized and the float model as files that say nothing of their images."""
    folder = tmp_path_factory.mktemp("files")
    quantized, reference, batches = setting
    image = batches[0][0][:1]
    return (
        qzoo.export_onnx(quantized, folder / "int8.onnx", target="onnxruntime", example=image),
        qzoo.export_onnx(reference, folder / "float.onnx", example=image, batch=4),
    )


def test_onnx_files_are_measured(files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    int8, exact = files
    data = write_folder(tmp_path / "data", tuple("abcdefghij"), 1, size=12)
    options = {"runtimes": "onnxruntime", "seconds": 0.01, "progress": False, "threads": 1}
    report = qzoo.benchmark(int8, float_weights=exact, data=data, batches=(4,), **options)
    assert [(row.precision, row.source, row.images) for row in report.rows] == [
        ("float32", "qzoo", 10),
        ("int8", "qzoo", 10),
    ]
    plain = Preprocessing((1, 12, 12), mean=(0.5,), std=(0.5,))
    images, labels = next(iter(load_data(plain, "folders", data, batch_size=10)))
    found = {}
    for path in files:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        rows = [
            session.run(None, {session.get_inputs()[0].name: images[i : i + 4].numpy()})[0] for i in (0, 4, 6)
        ]
        found[path] = np.concatenate([rows[0], rows[1], rows[2][2:]]).argmax(1)
    for row, path in zip(report.rows, (exact, int8), strict=True):
        assert row.top1 == pytest.approx(100 * (found[path] == labels.numpy()).mean())
        assert row.agreement == pytest.approx(100 * (found[path] == found[exact]).mean())
        assert row.cpu_speedup.keys() == row.latency.keys() == {4}
    assert "1 x 12 x 12, mean 0.5 and standard deviation 0.5 are assumed" in report.notes[0]

    alone = qzoo.benchmark([int8], batches=(1, 2), **options)
    (row,) = alone.rows
    assert (row.images, row.top1, row.agreement, row.cpu_speedup) == (0, None, None, {})
    assert row.latency[2].wall > 0
    assert "timed on noise" in alone.notes[-1]
    print_table(alone)
    assert "int8" in capsys.readouterr().out
    paths = write_report(alone, tmp_path / "report")
    values = json.loads(paths[0].read_text())["rows"][0]
    assert (values["top1"], values["batches"][0]["speedup_cpu"]) == (None, None)


def test_onnx_files_that_can_not_be_measured_as_asked(files, setting) -> None:
    int8, exact = files
    with pytest.raises(ArgumentError, match=r"float\.onnx takes batches of 4 only; .*--batch 4"):
        qzoo.benchmark(exact, runtimes="onnxruntime")
    with pytest.raises(ArgumentError, match=r"pytorch can't run; add onnxruntime"):
        qzoo.benchmark(int8, runtimes="pytorch")
    with pytest.raises(ArgumentError, match="compared with another file"):
        qzoo.benchmark(int8, float_weights="folder", runtimes="onnxruntime")
    with pytest.raises(ArgumentError, match="peers are made from a checkpoint"):
        qzoo.benchmark(int8, runtimes="onnxruntime", compare="quantize_static")


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches of the setting don't fit."""
    monkeypatch.setattr(batches, "_CACHE_BYTES", 20_000)


def pytorch_only(setting, loader) -> list[Row]:
    quantized, reference, _ = setting
    options = Options(("pytorch",), (1,), 1, 0.01, progress=False)
    return measure(Checkpoint("small-w8a8", quantized, reference, loader), options).rows


class Listed:
    """A loader over batches that can be read again, in the order of each pass."""

    def __init__(self, batches: Batches, orders: list[list[int]]) -> None:
        self.batches, self.orders, self.reads = batches, orders, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = self.orders[min(self.reads, len(self.orders) - 1)]
        self.reads += 1
        return iter([self.batches[i] for i in order])


@pytest.mark.slow
def test_an_iterator_is_measured_whole(setting) -> None:
    assert [row.images for row in pytorch_only(setting, iter(setting[2]))] == [40, 40]


def test_an_iterator_that_does_not_fit_is_refused(setting, small_cache) -> None:
    with pytest.raises(DataError, match="can be read once"):
        pytorch_only(setting, iter(setting[2]))


@pytest.mark.slow
def test_a_large_loader_is_read_again_for_every_model(setting, small_cache) -> None:
    again = Listed(setting[2], [[0, 1]])
    figures = [(row.images, row.top1, row.agreement) for row in pytorch_only(setting, again)]
    kept = [(row.images, row.top1, row.agreement) for row in pytorch_only(setting, iter(setting[2][:1]))]
    assert figures[0] == (40, 75.0, 100.0)
    assert again.reads > 2
    assert kept[0][0] == 30


@pytest.mark.parametrize("orders", [[[0, 1], [1, 0]], [[0, 1], [0, 1], [1, 0]], [[0, 1], [0, 1], [0]]])
def test_a_large_loader_that_changes_is_refused(setting, small_cache, orders: list[list[int]]) -> None:
    """The float model's logits would be compared with those of other images."""
    loader = batches.repeatable(Listed(setting[2], orders))
    with pytest.raises(DataError, match="does not give the same batches in every pass"):
        _ = [list(loader) for _ in orders]


def test_what_is_no_name_is_refused_in_one_line(setting) -> None:
    with pytest.raises(
        TypeError, match=r"takes names or folders of checkpoints, not CifarResNet: .*save_pretrained"
    ):
        qzoo.benchmark(setting[0])
    with pytest.raises(TypeError, match="not CifarResNet"):
        qzoo.benchmark([setting[0]])
    with pytest.raises(ArgumentError, match="no names"):
        qzoo.benchmark([])
    with pytest.raises(ArgumentError, match="no runtime 'onnxrt'; expected"):
        qzoo.benchmark("resnet20.fmnist-w8a8", runtimes="onnxrt")


def test_the_process_imports_nothing_from_the_current_folder(tmp_path, monkeypatch) -> None:
    for name in ("numpy", "onnxruntime", "json", "qzoo"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the current folder was run')")
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    path = qzoo.export_onnx(model, tmp_path / "model.onnx", example=torch.zeros(1, 1, 2, 2))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])  # as the command has it
    with Process("in a hostile folder") as process:
        process.load("onnxruntime", path, 1, [])
        process.images(np.ones((1, 1, 2, 2), np.float32))
        assert process.run().shape == (1, 2)


def test_a_process_that_fails_says_why(tmp_path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    with Process("broken") as process:
        with pytest.raises(BenchmarkError, match=r"broken: .*(protobuf|INVALID)"):
            process.load("onnxruntime", tmp_path / "broken.onnx", 1, [])
        process._child.kill()
        with pytest.raises(BenchmarkError, match="ended with status -9"):
            process.run()


def test_a_process_that_does_not_answer_is_ended(tmp_path) -> None:
    with (
        Process("slow", limit=0.02) as process,
        pytest.raises(BenchmarkError, match=r"slow: no answer to 'load' within 0\.02 s"),
    ):
        process.load("pytorch", tmp_path / "model.pt", 1, [])  # importing torch alone takes longer


@pytest.mark.slow
def test_compiled_in_its_process(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    torch.save(model, tmp_path / "model.pt")
    images = torch.randn(2, 3, 8, 8)
    with Process("compiled") as process:
        process.load("torch.compile", tmp_path / "model.pt", 1, ["torch.nn.modules.container"])
        process.images(images.numpy())
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(process.run()), model(images), rtol=1e-4, atol=1e-5)
        assert process.first() > 0
        walls, cpu = process.turn()
    assert 0 < cpu < 10
    assert len(walls) > 1, "calls of less than 20 ms"
    assert sum(walls) >= 0.02


def test_models_of_several_label_sets_share_a_folder() -> None:
    """The folder is for those whose images are not embedded; alone, Fashion-MNIST may have a folder of its own."""
    both = {"fashion-mnist", "imagenet-1k"}
    assert Source("images", label_sets=both).folder("imagenet-1k") == "images"
    assert Source("images", label_sets=both).folder("fashion-mnist") is None
    assert Source("images", label_sets={"fashion-mnist"}).folder("fashion-mnist") == "images"
    assert Source(None, label_sets={"fashion-mnist"}).folder("fashion-mnist") is None
