"""The benchmark's rows against independent figures, on a small network and few images."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from qzoo import runtimes
from qzoo.benchmark import Options, benchmark_models, new_report
from qzoo.calibrate import calibrate
from qzoo.errors import DataError
from qzoo.models.resnet_cifar import CifarResNet
from qzoo.results import Report
from qzoo.scheme import Scheme, set_target

Batches = list[tuple[Tensor, Tensor]]


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
    options = Options(tuple(runtimes.installed()), (1, 2), 1, seconds=0.01, progress=False)
    return new_report(benchmark_models("small-w8a8", *setting, options), options)


def test_one_row_for_each_runtime_and_precision(report: Report) -> None:
    found = [(row.runtime, row.precision) for row in report.rows]
    expected = [("pytorch", "float32"), ("pytorch", "fake-quant int8")]
    for name in runtimes.installed()[1:]:
        expected += [(name, "float32"), (name, "int8")]
    assert found == expected


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
            assert 10 < row.sqnr_db < 60
    fake = report.rows[1]
    assert fake.top1 == 100 * (simulated == labels).float().mean().item()
    assert fake.agreement == pytest.approx(100 * (simulated == expected).float().mean().item())


def test_latency_and_size(report: Report) -> None:
    for row in report.rows:
        assert set(row.latency) == set(row.speedup) == {1, 2}
        for timing in row.latency.values():
            assert 0 < timing.wall <= timing.wall_p90
            assert timing.calls >= 15
        assert row.images_per_second == pytest.approx(2e3 / row.latency[2].wall)
        assert row.load_seconds > 0
        assert row.first_ms > 0
        if row.precision == "float32":
            assert all(value == (1.0, 1.0, 1.0) for value in row.speedup.values())
    sizes = {(row.runtime, row.precision): row.file_bytes for row in report.rows}
    assert sizes["pytorch", "fake-quant int8"] is None
    assert sizes["onnxruntime", "int8"] < 0.5 * sizes["onnxruntime", "float32"]


def test_report_says_what_the_figures_depend_on(report: Report) -> None:
    values = report.to_dict()
    assert values["settings"] == {"threads": 1, "batches": [1, 2], "seconds": 0.01}
    assert {"torch", "processor", "qzoo"} <= set(values["machine"])
    assert values["date"].endswith("+00:00")


def test_refusals(setting) -> None:
    quantized, reference, _ = setting
    with pytest.raises(DataError, match="no images"):
        benchmark_models("x", quantized, reference, [], Options(progress=False))
    for bad in (
        {"runtimes": ("tflite",)},
        {"batches": ()},
        {"batches": (0,)},
        {"threads": 0},
        {"seconds": 0.0},
    ):
        with pytest.raises(ValueError):
            Options(**bad)
