"""Loading and saving under pytest-benchmark: `pytest benchmarks --benchmark-only`.

Whole processes and their memory are measured by `benchmarks.loading`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qzoo


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("checkpoints")
    model = qzoo.create_model("resnet18-w8a8").eval()
    qzoo.calibrate(model, [torch.randn(1, 3, 64, 64)], progress=False)
    for form in ("packed", "master"):
        qzoo.save_pretrained(model, out / form, form=form)
    return out


@pytest.mark.benchmark(group="load ResNet-18")
@pytest.mark.parametrize("form", ["packed", "master"])
def test_load(benchmark: Any, folder: Path, form: str) -> None:
    model = benchmark.pedantic(lambda: qzoo.load_pretrained(folder / form), rounds=5, warmup_rounds=1)
    assert model.fc.weight_quantizer.amax.shape == (1000, 1)


@pytest.mark.benchmark(group="save ResNet-18")
def test_save(benchmark: Any, folder: Path, tmp_path: Path) -> None:
    model = qzoo.load_pretrained(folder / "packed")
    numbers = iter(range(100))
    work = lambda: qzoo.save_pretrained(model, tmp_path / str(next(numbers)))  # noqa: E731
    benchmark.pedantic(work, rounds=3, warmup_rounds=1)
    saved = (tmp_path / "0" / "model.safetensors").read_bytes()
    assert saved == (folder / "packed" / "model.safetensors").read_bytes()


@pytest.mark.benchmark(group="create without weights")
@pytest.mark.parametrize("name", ["resnet50", "resnet50-w8a8"])
def test_create(benchmark: Any, name: str) -> None:
    model = benchmark.pedantic(lambda: qzoo.create_model(name), rounds=3)
    assert sum(p.numel() for p in model.parameters()) == 25_557_032


@pytest.mark.benchmark(group="embedded checkpoint")
def test_embedded(benchmark: Any) -> None:
    model = benchmark.pedantic(
        lambda: qzoo.create_model("resnet20.fmnist-w8a8", pretrained=True), rounds=5, warmup_rounds=1
    )
    assert not model.training
