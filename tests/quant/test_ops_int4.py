"""Two 4-bit integers a byte, and ranges per block, against NumPy on every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qzoo.errors import QuantizationError
from qzoo.quant import block as blocks
from qzoo.quant import ops
from qzoo.quant.ops.schema import references

BACKENDS = ["reference", "dispatched", pytest.param("cuda", marks=pytest.mark.cuda)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(0,), (1,), (7,), (3, 5), (5, 3, 3, 3), (2, 64, 33), (7, 4099)]


def call(backend: str, name: str, *args: Any) -> Tensor:
    if backend == "reference":
        result: Tensor = references[name](*args)
        return result
    if backend == "cuda":
        args = tuple(a.cuda() if isinstance(a, Tensor) else a for a in args)
    result = getattr(torch.ops.qzoo, name)(*args)
    return result.cpu()


def packed_by_numpy(q: np.ndarray) -> np.ndarray:
    """Row-major, the first of two values low."""
    halves = np.append(q.ravel().astype(np.int64), np.zeros(q.size % 2, np.int64)).reshape(-1, 2) & 15
    return (halves[:, 0] + 16 * halves[:, 1]).astype(np.uint8)


def quantized_by_numpy(x: Tensor, amax: Tensor, bits: int, unsigned: bool, narrow: bool) -> np.ndarray:
    wide = x.numpy() if x.dtype == torch.float64 else x.float().numpy()
    high = 2 ** (bits - 1 + unsigned) - 1
    low = 0 if unsigned else -high if narrow else -high - 1
    a = amax.float().numpy()
    with np.errstate(all="ignore"):
        scale = np.where(a <= 2.0**-24, np.float32(1), np.float32(high) / a)
        q = np.where(a <= 2.0**-24, 0, np.clip(np.rint(wide * scale), low, high))
    return np.nan_to_num(q, nan=0.0).astype(np.int8)


def fake_by_numpy(x: Tensor, amax: Tensor, bits: int) -> np.ndarray:
    scale = np.float32(2 ** (bits - 1) - 1) / amax.numpy()
    return quantized_by_numpy(x, amax, bits, False, True).astype(np.float32) / scale


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("unsigned", [False, True])
def test_packing_equals_numpy_and_comes_back(backend: str, shape: tuple[int, ...], unsigned: bool) -> None:
    low, high, dtype = (0, 16, torch.uint8) if unsigned else (-8, 8, torch.int8)
    q = torch.randint(low, high, shape, dtype=dtype)
    packed = call(backend, "pack_int4", q)
    assert np.array_equal(packed.numpy(), packed_by_numpy(q.numpy()))
    back = call(backend, "unpack_int4", packed, unsigned)
    assert back.dtype == dtype
    assert torch.equal(back[: q.numel()].reshape(shape), q)
    assert torch.equal(ops.unpack_int4(ops.pack_int4(q), shape, unsigned), q)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("bits", "unsigned", "narrow"), [(4, False, True), (4, False, False), (4, True, True), (3, False, False)]
)
def test_quantizing_in_one_pass_equals_numpy(
    backend: str, dtype: torch.dtype, bits: int, unsigned: bool, narrow: bool
) -> None:
    for shape in SHAPES:
        x = (torch.randn(shape) * 2).to(dtype)
        x.view(-1)[1:4] = torch.tensor([float("nan"), 1e30, -1e30]).to(dtype)[: max(x.numel() - 1, 0)]
        rows = torch.rand(shape[0], *[1] * (len(shape) - 1)) + 0.5
        if shape[0] > 2:
            rows.view(-1)[1] = 0.0
        last = torch.rand(shape[-1]) + 0.5
        for amax in (torch.tensor(1.7), rows, last, torch.rand(shape) + 0.2):
            packed = call(backend, "quantize_int4", x, amax, bits, unsigned, narrow)
            wanted = quantized_by_numpy(x, amax, bits, unsigned, narrow)
            assert np.array_equal(packed.numpy(), packed_by_numpy(wanted))
            back = call(backend, "dequantize_int4", packed, amax, list(shape), bits, unsigned, dtype)
            q = torch.from_numpy(wanted).to(torch.uint8 if unsigned else torch.int8)
            assert torch.equal(back, references["dequantize"](q, amax, bits, unsigned, dtype))


@pytest.mark.parametrize("threads", [1, 2])
def test_any_strides_and_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.randn(6, 41, 37, 21)
        for view in (x, x.contiguous(memory_format=torch.channels_last), x[:, ::2, 1:], x.transpose(0, 3)):
            amax = torch.rand(1, view.shape[1], 1, 1) + 0.5
            packed = ops.quantize_int4(view, amax)
            assert np.array_equal(
                packed.numpy(), packed_by_numpy(quantized_by_numpy(view, amax, 4, False, True))
            )
            back = ops.dequantize_int4(packed, amax, view.shape)
            assert torch.equal(back, ops.fake_quantize(view, amax, 4) + 0.0)
    finally:
        torch.set_num_threads(before)


def test_blocks_pack_as_they_fake_quantize() -> None:
    weight, block = torch.randn(24, 96), (1, 32)
    grouped = blocks.split(weight, block)
    amax = ops.reduce_amax_op(grouped, blocks.kept_axes(0, block, 2))
    packed = ops.quantize_int4(grouped, amax)
    assert packed.numel() == weight.numel() // 2
    back = ops.dequantize_int4(packed, amax, grouped.shape).reshape(weight.shape)
    assert np.array_equal(back.numpy(), fake_by_numpy(grouped, amax, 4).reshape(24, 96))


def test_refusals_restate_the_input() -> None:
    with pytest.raises(QuantizationError, match=r"-8 \.\.\. 7"):
        ops.pack_int4(torch.tensor([8], dtype=torch.int8))
    with pytest.raises(QuantizationError, match="float32"):
        ops.pack_int4(torch.zeros(2))
    with pytest.raises(QuantizationError, match=r"\(3,\).*\[2\]"):
        ops.unpack_int4(torch.zeros(1, dtype=torch.uint8), (3,))
    with pytest.raises(QuantizationError, match="num_bits=5"):
        ops.quantize_int4(torch.zeros(2), torch.tensor(1.0), 5)
    with pytest.raises(QuantizationError, match="broadcast"):
        ops.quantize_int4(torch.zeros(2, 3), torch.ones(2))
    packed = torch.zeros(3, dtype=torch.uint8)
    for shape in ([7], [-1, -6]):
        with pytest.raises((RuntimeError, ValueError)):
            torch.ops.qzoo.dequantize_int4(packed, torch.tensor(1.0), shape, 4, False, torch.float32)
    with pytest.raises((RuntimeError, ValueError), match="broadcast"):
        torch.ops.qzoo.dequantize_int4(packed, torch.ones(4), [2, 3], 4, False, torch.float32)
    with pytest.raises((RuntimeError, ValueError), match="int8 or uint8"):
        torch.ops.qzoo.pack_int4(torch.zeros(2))


# ---- ranges per block ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "axis", "block"),
    [
        ((6, 64), 0, (1, 32)),
        ((6, 64), None, (1, 16)),
        ((4, 32, 3, 3), 0, (1, 8)),
        ((4, 6, 5), (0, 2), (-2, 3)),
    ],
)
def test_blocks_forward_and_backward_equal_numpy(backend: str, shape: Any, axis: Any, block: Any) -> None:
    x = torch.randn(shape)
    grouped = blocks.split(x, block)
    kept = blocks.kept_axes(axis, block, x.dim())
    reduced = tuple(d for d in range(grouped.dim()) if d not in kept)
    amax = call(backend, "reduce_amax", grouped, kept)
    assert np.array_equal(amax.numpy(), np.abs(grouped.numpy()).max(axis=reduced, keepdims=True))
    amax = amax * 0.6
    y = call(backend, "fake_quantize", grouped, amax, 4, False, True)
    assert np.array_equal(y.numpy(), fake_by_numpy(grouped, amax, 4))
    grad = torch.randn(grouped.shape)
    passed = call(backend, "fake_quantize_backward", grad, grouped, amax)
    assert np.array_equal(passed.numpy(), np.where(np.abs(grouped.numpy()) <= amax.numpy(), grad.numpy(), 0))
    rounded = call(backend, "fake_quantize_fp8", grouped, amax, False)
    assert torch.equal(rounded, references["fake_quantize_fp8"](grouped, amax, False))
