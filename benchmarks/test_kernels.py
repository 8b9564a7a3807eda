"""The kernels under pytest-benchmark: `pytest benchmarks --benchmark-only`.

Compares runs of one machine over time (`--benchmark-autosave`, `--benchmark-compare`). The ratios that matter
are measured, interleaved, by `benchmarks.kernels`; every case here checks its result as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.kernels import weights_by_mse
from qzoo.quant import ops

SHAPE = (8, 256, 56, 56)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def forward_cases() -> dict[str, Callable[[], torch.Tensor]]:
    x = torch.randn(SHAPE)
    y = torch.empty_like(x)
    amax, channels = torch.tensor(2.5), torch.rand(1, 256, 1, 1) + 1
    half, half_out = x.half(), y.half()
    bf16, bf16_out = x.bfloat16(), y.bfloat16()
    return {
        "memcpy": lambda: y.copy_(x),
        "per tensor": lambda: ops.fake_quantize_out(x, amax, out=y),
        "per channel": lambda: ops.fake_quantize_out(x, channels, out=y),
        "float16": lambda: ops.fake_quantize_out(half, amax, out=half_out),
        "bfloat16": lambda: ops.fake_quantize_out(bf16, amax, out=bf16_out),
        "torch": lambda: torch.fake_quantize_per_tensor_affine(x, 2.5 / 127, 0, -127, 127),
        "e4m3": lambda: ops.fake_quantize_fp8(x, amax),
        "quantize": lambda: ops.quantize(x, amax),
    }


@pytest.mark.benchmark(group="forward 8x256x56x56")
@pytest.mark.parametrize("name", forward_cases())
def test_forward(benchmark: Any, name: str) -> None:
    y = benchmark(forward_cases()[name])
    assert y.shape == SHAPE


@pytest.mark.benchmark(group="backward 8x256x56x56")
def test_backward(benchmark: Any) -> None:
    x, grad, amax = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor(2.5)
    y = benchmark(lambda: ops.fake_quantize_backward(grad, x, amax))
    assert torch.equal(y, torch.where(x.abs() <= amax, grad, 0.0))


@pytest.mark.benchmark(group="calls on 64 elements")
@pytest.mark.parametrize("name", ["qzoo", "torch"])
def test_small(benchmark: Any, name: str) -> None:
    x, amax = torch.randn(64), torch.tensor(2.5)
    work = {
        "qzoo": lambda: ops.fake_quantize(x, amax),
        "torch": lambda: torch.fake_quantize_per_tensor_affine(x, 2.5 / 127, 0, -127, 127),
    }
    assert benchmark(work[name]).shape == (64,)


@pytest.mark.benchmark(group="statistics 8x256x56x56")
@pytest.mark.parametrize("name", ["amax", "aminmax", "histogram", "histc"])
def test_statistics(benchmark: Any, name: str) -> None:
    x = torch.randn(SHAPE).relu()
    top = x.max().item()
    counts = torch.zeros(2048, dtype=torch.int64)
    work = {
        "amax": lambda: ops.reduce_amax_op(x).item(),
        "aminmax": lambda: torch.aminmax(x).max.item(),
        "histogram": lambda: ops.histogram_(counts, x, top / 2048, limit=top)[0],
        "histc": lambda: torch.histc(x, 2048, 0, top) is not None and top,
    }
    assert benchmark(work[name]) == top


@pytest.mark.benchmark(group="search 2048 bins")
@pytest.mark.parametrize("name", ["entropy", "mse"])
def test_search(benchmark: Any, name: str) -> None:
    x = torch.randn(10**6).relu()
    top = x.max().item()
    counts = torch.zeros(2048, dtype=torch.int64)
    ops.histogram_(counts, x, top / 2048, limit=top)
    centers = (torch.arange(2048) + 0.5) * (top / 2048)
    work = {
        "entropy": lambda: ops.entropy_search(counts),
        "mse": lambda: int(ops.mse_search(counts, centers)),
    }
    assert 128 <= benchmark(work[name]) <= 2048


@pytest.mark.benchmark(group="int4 1024x1024, packed")
@pytest.mark.parametrize("name", ["quantize", "dequantize"])
def test_int4(benchmark: Any, name: str) -> None:
    weight = torch.randn(1024, 1024)
    amax = weight.abs().amax(1, keepdim=True)
    packed = ops.quantize_int4(weight, amax)
    if name == "quantize":
        assert torch.equal(benchmark(lambda: ops.quantize_int4(weight, amax)), packed)
    else:
        back = benchmark(lambda: ops.dequantize_int4(packed, amax, weight.shape))
        assert torch.equal(back, ops.fake_quantize(weight, amax, 4))


@pytest.mark.benchmark(group="weights 512x512x3x3 by mse")
def test_weights(benchmark: Any) -> None:
    weight = torch.randn(512, 512, 3, 3)
    assert benchmark.pedantic(lambda: weights_by_mse(weight), rounds=3).shape == (512,)
