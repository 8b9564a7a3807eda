"""Calibration under pytest-benchmark: `pytest benchmarks --benchmark-only`. Every case checks its result as well."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import qzoo
from qzoo.quant.nn import TensorQuantizer

IMAGES = 32


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return qzoo.create_model("resnet20", quantize=True).eval()


@pytest.fixture(scope="module")
def loader(model: nn.Module) -> list[torch.Tensor]:
    size = model.qzoo_config.preprocessing.input_size
    return list(torch.randn(IMAGES, *size).split(16))


@pytest.mark.benchmark(group=f"calibrate ResNet-20, {IMAGES} images")
@pytest.mark.parametrize("method", ["max", "percentile", "mse", "entropy"])
def test_calibrate(benchmark: Any, model: nn.Module, loader: list[torch.Tensor], method: str) -> None:
    work = lambda: qzoo.calibrate(model, loader, method=method, progress=False)  # noqa: E731
    assert benchmark.pedantic(work, rounds=5, warmup_rounds=1).images == IMAGES
    assert all(m.amax is not None for m in model.modules() if isinstance(m, TensorQuantizer))


@pytest.mark.benchmark(group="float pass of the same images")
def test_float_pass(benchmark: Any, loader: list[torch.Tensor]) -> None:
    reference = qzoo.create_model("resnet20").eval()

    def work() -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([reference(images) for images in loader])

    assert benchmark.pedantic(work, rounds=5, warmup_rounds=1).shape == (IMAGES, 10)


@pytest.mark.benchmark(group="sensitivity of ResNet-20, 16 images")
def test_sensitivity(benchmark: Any, model: nn.Module, loader: list[torch.Tensor]) -> None:
    qzoo.calibrate(model, loader, progress=False)
    work = lambda: qzoo.sensitivity(model, loader, images=16, progress=False)  # noqa: E731
    assert benchmark.pedantic(work, rounds=3).images == 16
