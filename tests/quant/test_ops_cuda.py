"""The CUDA kernels of statistics, packing and searches give what the CPU's give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qzoo.errors import QuantizationError
from qzoo.quant import calib, native, ops
from qzoo.quant import nn as qnn
from qzoo.quant.tensor_quant import QuantDescriptor

pytestmark = pytest.mark.cuda

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def layouts() -> dict[str, Tensor]:
    x = torch.randn(5, 6, 7, 9) * 3
    return {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "sliced": x[:, ::2, 1:],
        "expanded": x[:1].expand(4, -1, -1, -1),
        "one value": x[:1, :1, :1, :1],
        "empty": x[:0],
    }


def test_the_library_is_loaded_where_it_was_built() -> None:
    assert native.is_loaded("cuda"), native.describe()["cuda"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", layouts())
@pytest.mark.parametrize("keep", [[], [0], [1], [-1], [0, 2], [0, 1, 2, 3]], ids=str)
def test_largest_magnitudes(dtype: torch.dtype, name: str, keep: list[int]) -> None:
    x = layouts()[name].to(dtype)
    found = ops.reduce_amax_op(x.cuda(), keep)
    assert found.is_cuda
    assert torch.equal(found.cpu(), ops.reduce_amax_op(x, keep))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_come_through_the_maximum_and_count_nothing(bad: float) -> None:
    x = torch.randn(10_000)
    x[777] = bad
    assert torch.equal(ops.reduce_amax_op(x.cuda()).cpu().isnan(), ops.reduce_amax_op(x).isnan())
    counts = torch.zeros(64, dtype=torch.int64, device="cuda")
    largest, _ = ops.histogram_(counts, x.cuda(), 0.1)
    assert not largest < float("inf")
    assert not counts.any()


@pytest.mark.parametrize("skip_zeros", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "bins"), [(1, 1), (1000, 7), (100_003, 2048), (300_000, 20_000)])
def test_histograms(size: int, bins: int, dtype: torch.dtype, skip_zeros: bool) -> None:
    x = torch.randn(size).relu().to(dtype)
    results: list[Any] = []
    for device in ("cpu", "cuda"):
        counts = torch.ones(bins, dtype=torch.int64, device=device)
        stats = ops.histogram_(counts, x.to(device), 2.5 / bins, skip_zeros=skip_zeros)
        again = ops.histogram_(counts, x.to(device), 2.5 / bins, limit=4.0, above=2.5)
        results.append((counts.cpu().tolist(), stats, again))
    assert results[0] == results[1]


def test_more_values_than_one_pass_of_the_grid() -> None:
    x = torch.randn(40_000_000, device="cuda")
    counts = torch.zeros(2048, dtype=torch.int64, device="cuda")
    largest, overflow = ops.histogram_(counts, x, 1.0 / 2048)
    assert largest == x.abs().max().item()
    assert overflow == int((x.abs() > 1).sum())
    assert int(counts.sum()) == x.numel() - overflow
    assert ops.reduce_amax_op(x).item() == largest
    assert torch.equal(ops.fake_quantize(x, torch.tensor(2.0, device="cuda"))[-1000:].cpu(),
                       ops.fake_quantize(x[-1000:].cpu(), torch.tensor(2.0)))  # fmt: skip


def test_histogram_refuses_what_it_cannot_count_into() -> None:
    x = torch.ones(3, device="cuda")
    for counts in (torch.zeros(4, dtype=torch.int64), torch.zeros(8, dtype=torch.int64, device="cuda")[::2]):
        with pytest.raises((RuntimeError, QuantizationError), match="counts"):
            ops.histogram_(counts, x, 1.0)
    counts = torch.zeros(4, dtype=torch.int64, device="cuda")
    with pytest.raises(RuntimeError, match="width"):
        torch.ops.qzoo.histogram_(counts, x, -1.0, 4.0, -1.0, False)


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_int4(layout: str, dtype: torch.dtype) -> None:
    x = layouts()[layout].to(dtype)
    for amax in (torch.tensor(1.7), torch.rand(1, x.shape[1], 1, 1) + 0.5, torch.rand(x.shape[-1]) + 0.5):
        for unsigned in (False, True):
            packed = ops.quantize_int4(x, amax, unsigned=unsigned)
            assert torch.equal(ops.quantize_int4(x.cuda(), amax.cuda(), unsigned=unsigned).cpu(), packed)
            back = ops.dequantize_int4(packed, amax, x.shape, unsigned=unsigned, dtype=dtype)
            there = ops.dequantize_int4(packed.cuda(), amax.cuda(), x.shape, unsigned=unsigned, dtype=dtype)
            assert torch.equal(there.cpu(), back)


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(layout: str, dtype: torch.dtype) -> None:
    x = layouts()[layout].to(dtype)
    grad = torch.randn(x.shape).to(dtype)
    for amax in (torch.tensor(1.7), torch.rand(1, x.shape[1], 1, 1) + 0.5):
        found = ops.fake_quantize_backward(grad.cuda(), x.cuda(), amax.cuda())
        assert found.stride() == torch.empty_like(x).stride()
        assert torch.equal(found.cpu(), ops.fake_quantize_backward(grad, x, amax))


@pytest.mark.parametrize("num_bits", [8, (4, 3)])
def test_searches_give_the_index_on_the_gpu(num_bits: Any) -> None:
    counts = torch.randint(0, 1000, (3, 512))
    centers = (torch.arange(512) + 0.5).expand(3, -1) * torch.tensor([[0.01], [0.02], [0.5]])
    best = ops.mse_search(counts.cuda(), centers.cuda(), num_bits)
    assert best.is_cuda
    assert torch.equal(best.cpu(), ops.mse_search(counts, centers, num_bits))
    assert ops.entropy_search(counts[0].cuda()) == ops.entropy_search(counts[0])


@pytest.mark.parametrize("method", ["max", "percentile", "mse"])
@pytest.mark.parametrize("block", [None, (1, 16)])
def test_ranges_of_weights(method: str, block: Any) -> None:
    layer = qnn.QuantLinear(64, 6, quant_desc_weight=QuantDescriptor(4, axis=0, block=block))
    other = qnn.QuantLinear(64, 6, quant_desc_weight=QuantDescriptor(4, axis=0, block=block)).cuda()
    other.load_state_dict(layer.state_dict())
    calib.calibrate_weights(layer, method)
    calib.calibrate_weights(other, method)
    assert torch.equal(other.weight_quantizer.amax.cpu(), layer.weight_quantizer.amax)


def test_ranges_on_another_device_are_refused_unless_single() -> None:
    x = torch.randn(3, 4, device="cuda")
    assert torch.equal(
        ops.fake_quantize(x, torch.tensor(1.0)), ops.fake_quantize(x, torch.tensor(1.0, device="cuda"))
    )
    with pytest.raises(RuntimeError, match="device"):
        ops.fake_quantize(x, torch.ones(3, 1))


def test_kernels_run_on_the_current_stream() -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x = torch.randn(1 << 22, device="cuda")
        y = ops.fake_quantize(x, torch.tensor(1.0, device="cuda"))
        found = (y - x).abs().clamp(max=1).mean()
    stream.synchronize()
    assert torch.equal(y.cpu(), ops.fake_quantize(x.cpu(), torch.tensor(1.0)))
    assert torch.isfinite(found)


def test_data_parallel_equals_the_module() -> None:
    model = torch.nn.Sequential(qnn.QuantLinear(8, 8), torch.nn.ReLU(), qnn.QuantLinear(8, 2)).cuda()
    for quantizer in (model[0].input_quantizer, model[2].input_quantizer):
        quantizer.amax = 2.0
    calib.calibrate_weights(model, "max")
    x = torch.randn(16, 8, device="cuda")
    torch.testing.assert_close(torch.nn.DataParallel(model)(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    layer = qnn.QuantLinear(16, 4).cuda()
    with torch.autocast("cuda", dtype):
        y = layer(torch.randn(3, 16, device="cuda"))
    assert y.dtype == dtype
    y.sum().backward()
    assert layer.weight.grad is not None
