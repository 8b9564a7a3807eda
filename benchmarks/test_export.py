"""Writing ONNX, opening and running it, under pytest-benchmark: `pytest benchmarks --benchmark-only`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qzoo


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return qzoo.create_model("resnet20.fmnist-w8a8", pretrained=True)


@pytest.fixture(scope="module")
def path(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qzoo.export_onnx(model, tmp_path_factory.mktemp("m") / "model.onnx")


@pytest.mark.benchmark(group="export ResNet-20")
@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_export(benchmark: Any, model: nn.Module, tmp_path: Path, target: str) -> None:
    work = lambda: qzoo.export_onnx(model, tmp_path / "model.onnx", target=target)  # noqa: E731
    written = benchmark.pedantic(work, rounds=3, warmup_rounds=1)
    assert written.stat().st_size < 0.35 * sum(p.numel() * 4 for p in model.parameters())


@pytest.mark.benchmark(group="open ResNet-20 in ONNX Runtime")
def test_open(benchmark: Any, path: Path) -> None:
    fast = benchmark.pedantic(lambda: qzoo.deploy(path, threads=1), rounds=5, warmup_rounds=1)
    assert fast(torch.zeros(1, 1, 28, 28)).shape == (1, 10)


@pytest.mark.benchmark(group="run ResNet-20, batch 1")
@pytest.mark.parametrize("way", ["deployed", "session"])
def test_run(benchmark: Any, path: Path, way: str) -> None:
    """The tensor interface beside the bare session: what it adds to a short call."""
    fast = qzoo.deploy(path, threads=1)
    images = torch.randn(1, 1, 28, 28)
    array, session = images.numpy(), fast.runner._session
    work = {"deployed": lambda: fast(images), "session": lambda: session.run(None, {"image": array})[0]}
    assert benchmark(work[way]).shape == (1, 10)
