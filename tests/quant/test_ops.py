"""The operators against NumPy, on every backend: one table of cases."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from qzoo.errors import QuantizationError
from qzoo.quant import native, ops
from qzoo.quant.ops.schema import references

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
FORMATS = [  # bits, unsigned, narrow range
    (8, False, True),
    (8, False, False),
    (8, True, True),
    (4, False, True),
    (4, True, False),
    (2, False, False),
    (2, True, True),
    (16, False, True),
    (16, True, True),
]


def in_precision(x: Tensor) -> np.ndarray:
    """`x` as NumPy computes it: float64 stays, the others are float32."""
    return x.numpy() if x.dtype == torch.float64 else x.float().numpy()


def integers(
    x: Tensor, amax: Tensor, bits: int, unsigned: bool, narrow: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The number scheme written down once more, in NumPy: `(q, scale)`."""
    bound = np.float32(2 ** (bits - 1 + unsigned) - 1)
    lowest = np.float32(0) if unsigned else -bound if narrow else -bound - 1
    a = amax.float().numpy()
    tiny = a <= 2.0**-24
    with np.errstate(all="ignore"):
        scale = np.where(tiny, np.float32(1), bound / np.where(tiny, np.float32(1), a))
        q = np.clip(np.rint(in_precision(x) * scale), lowest, bound)
    return np.where(tiny & ~np.isnan(q), np.zeros((), q.dtype), q), scale


def expected_fake(x: Tensor, amax: Tensor, *fmt: Any) -> Tensor:
    q, scale = integers(x, amax, *fmt)
    return torch.from_numpy(np.asarray(q / scale)).to(x.dtype)


def assert_identical(actual: Tensor, wanted: Tensor) -> None:
    assert actual.dtype == wanted.dtype
    assert actual.shape == wanted.shape
    assert torch.equal(torch.isnan(actual), torch.isnan(wanted))
    assert torch.equal(actual.nan_to_num(0.0), wanted.nan_to_num(0.0))


def awkward(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random values with ties, NaN, infinities, denormals and zeros of both signs among them."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    special = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, -1e-7, 2.5, -2.5, 2.5 / 254, 1e30]
    flat = x.view(-1)
    flat[: len(special)] = torch.tensor(special, dtype=torch.float64)[: flat.numel()]
    return x.to(dtype)


def ranges(x: Tensor) -> dict[str, Tensor]:
    """Ranges of every kind a 4-d tensor can have, zero, denormal and NaN ones among them."""
    finite = x.float().nan_to_num(0.0, 3.0, 3.0).clamp(-4, 4).abs()
    channels = finite.amax((0, 2, 3), keepdim=True)
    channels[0, :3, 0, 0] = torch.tensor([0.0, float("nan"), 1e-41])
    return {
        "tensor": torch.tensor(2.5),
        "zero": torch.tensor(0.0),
        "tiny": torch.tensor(2.0**-24),
        "above tiny": torch.tensor(2.0**-24 * (1 + 2**-23)),
        "nan": torch.tensor(float("nan")),
        "half": torch.tensor(1.3, dtype=torch.float16),
        "float64": torch.tensor(0.7, dtype=torch.float64),
        "channels": channels,
        "rows": finite.amax((1, 2, 3), keepdim=True),
        "two axes": finite.amax((2, 3), keepdim=True),
        "outer and inner": finite.amax((1, 2), keepdim=True),
        "last axis": finite.amax((0, 1, 2)),
        "every element": finite,
        "leading ones": torch.full((1, 1, 1, 1, 1, 1), 1.5),
        "strided": finite.amax((0, 2, 3), keepdim=True).repeat(1, 2, 1, 1)[:, ::2],
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_fake_quantize_equals_numpy(
    run: Callable[..., Any], dtype: torch.dtype, fmt: tuple[Any, ...]
) -> None:
    x = awkward((3, 5, 4, 7), dtype)
    for name, amax in ranges(x).items():
        trimmed = amax.reshape(amax.shape[-4:]) if amax.dim() > 4 else amax
        try:
            assert_identical(run("fake_quantize", x, amax, *fmt), expected_fake(x, trimmed, *fmt))
        except AssertionError as error:
            raise AssertionError(f"range {name!r}") from error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_quantize_and_dequantize_equal_numpy(
    run: Callable[..., Any], dtype: torch.dtype, fmt: tuple[Any, ...]
) -> None:
    x = awkward((3, 5, 4, 7), dtype)
    bits, unsigned, _ = fmt
    for name in ("tensor", "zero", "channels", "two axes", "last axis"):
        amax = ranges(x)[name]
        q = run("quantize", x, amax, *fmt)
        wanted, _ = integers(x, amax, *fmt)
        assert q.dtype == ops.integer_dtype(bits, unsigned)
        assert np.array_equal(q.to(torch.int64).numpy(), np.nan_to_num(wanted, nan=0.0).astype(np.int64))
        back = run("dequantize", q, amax, bits, unsigned, dtype)
        fake = expected_fake(x, amax, *fmt)
        number = ~torch.isnan(fake)
        assert torch.equal(back[number], fake[number])


def gradient_of(x: Tensor, amax: Tensor, grad: Tensor) -> Tensor:
    inside = np.abs(in_precision(x)) <= amax.float().numpy()
    return torch.where(torch.from_numpy(np.asarray(inside)), grad, torch.zeros((), dtype=grad.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_passes_inside_the_range(run: Callable[..., Any], dtype: torch.dtype) -> None:
    x = awkward((3, 5, 4, 7), dtype)
    grad = torch.randn(x.shape).to(dtype)
    for name, amax in ranges(x).items():
        if name == "leading ones":
            continue
        wanted = gradient_of(x, amax, grad)
        assert_identical(run("fake_quantize_backward", grad, x, amax), wanted)
        # a gradient that sum() made has stride 0, one through a transpose has strides of its own
        spread = grad.new_ones(()).expand(x.shape)
        assert_identical(run("fake_quantize_backward", spread, x, amax), gradient_of(x, amax, spread))


@pytest.mark.parametrize("rounding", [True, False], ids=["lsq", "pact"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_learned_backward_is_the_sum_of_the_papers_terms(
    run: Callable[..., Any], dtype: torch.dtype, fmt: tuple[Any, ...], rounding: bool
) -> None:
    for shape in ((3, 5, 4, 7), (2, 3, 41, 67), (7,), (0, 3)):
        x = torch.randn(shape).to(dtype)
        if len(shape) == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        grad, amax = torch.randn(shape).to(dtype), torch.tensor(1.3)
        passed, moved = run("fake_quantize_learned_backward", grad, x, amax, *fmt, rounding)
        assert_identical(passed, gradient_of(x, amax, grad))
        exact, g = in_precision(x).astype(np.float64), in_precision(grad).astype(np.float64)
        wide = x if dtype == torch.float64 else x.float()  # a tie rounds as it does there
        y = expected_fake(wide, amax, *fmt).double().numpy()
        inside = np.abs(exact) <= np.float64(amax.item())
        terms = g * np.where(inside, (y - exact) * rounding, y) / amax.item()
        assert (moved.dtype, moved.shape) == (torch.float32, amax.shape)
        assert abs(moved.item() - terms.sum()) <= 1e-6 * (1 + np.abs(g * y).sum())


def test_learned_backward_does_not_depend_on_the_number_of_threads() -> None:
    x, grad, amax = torch.randn(40, 64, 33), torch.randn(40, 64, 33), torch.tensor(1.3)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(ops.fake_quantize_learned_backward(grad, x, amax, 4)[1])
    torch.set_num_threads(before)
    if native.is_loaded():
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
    several = amax.expand(1, 64, 1)
    with pytest.raises(QuantizationError, match="does not broadcast"):
        ops.fake_quantize_learned_backward(grad, x, torch.ones(3))
    passed, moved = ops.fake_quantize_learned_backward(grad, x, several, 4)
    assert moved.shape == several.shape
    assert torch.equal(passed, ops.fake_quantize_backward(grad, x, amax))
    assert torch.allclose(moved.sum(), found[0], rtol=1e-4, atol=1e-3)


# ---- fp8 ----


def fp8_values(exponent_bits: int, mantissa_bits: int, limit: float) -> np.ndarray:
    """All finite non-negative values of the format, from its definition, in the order of their codes."""
    bias = 2 ** (exponent_bits - 1) - 1
    values = []
    for code in range(2 ** (exponent_bits + mantissa_bits)):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        fraction = mantissa / 2**mantissa_bits
        value = fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias)
        if value <= limit:
            values.append(value)
    return np.array(values)


FP8 = {"e4m3": fp8_values(4, 3, 448.0), "e5m2": fp8_values(5, 2, 57344.0)}


def nearest_fp8(x: np.ndarray, fmt: str) -> np.ndarray:
    """Nearest value, ties to the even code, saturating."""
    values = FP8[fmt]
    magnitude = np.minimum(np.abs(x.astype(np.float64)), values[-1])
    upper = np.searchsorted(values, magnitude).clip(max=len(values) - 1)
    lower = np.maximum(upper - 1, 0)
    up, down = values[upper] - magnitude, magnitude - values[lower]
    code = np.where(up < down, upper, np.where(down < up, lower, np.where(upper % 2 == 0, upper, lower)))
    return np.where(np.isnan(x), np.nan, np.copysign(values[code], x)).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_fp8_equals_enumeration(run: Callable[..., Any], dtype: torch.dtype, fmt: str) -> None:
    limit = FP8[fmt][-1]
    middle = (FP8[fmt][1:] + FP8[fmt][:-1]) / 2
    near = np.concatenate(
        [FP8[fmt], middle, np.nextafter(np.float32(middle), 0), np.geomspace(1e-9, 1e6, 4000)]
    )
    x = torch.cat(
        [torch.from_numpy(near).to(dtype), torch.from_numpy(-near).to(dtype), awkward((40,), dtype)]
    )
    wide = x.float().numpy()
    wanted = np.where(np.abs(wide) < 2.0**-24, np.float32(0), nearest_fp8(wide, fmt))
    assert_identical(run("fake_quantize_fp8", x, None, fmt == "e5m2"), torch.from_numpy(wanted).to(dtype))

    amax = torch.tensor(3.7)
    scale = np.float32(limit) / np.float32(3.7)
    with np.errstate(over="ignore"):
        wanted = nearest_fp8(wide * scale, fmt) / scale
    wanted = np.where(np.abs(wide) < 2.0**-24, np.float32(0), wanted)
    assert_identical(run("fake_quantize_fp8", x, amax, fmt == "e5m2"), torch.from_numpy(wanted).to(dtype))


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_fp8_takes_a_range_per_channel(run: Callable[..., Any], fmt: str) -> None:
    x = torch.randn(4, 6, 3) * torch.logspace(-3, 3, 6)[:, None]
    amax = x.abs().amax((0, 2), keepdim=True)
    amax[0, 2] = 0.0
    y = run("fake_quantize_fp8", x, amax, fmt == "e5m2")
    for channel in range(6):
        alone = run("fake_quantize_fp8", x[:, channel].contiguous(), amax[0, channel, 0], fmt == "e5m2")
        assert torch.equal(y[:, channel], alone)
    assert not y[:, 2].any()


# ---- layouts ----


def layouts() -> dict[str, Tensor]:
    x = torch.randn(4, 6, 5, 8)
    return {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 3),
        "sliced": x[:, ::2, :, 1:7],
        "expanded": x[:1].expand(4, -1, -1, -1),
        "one channel": x[:, :1].contiguous(memory_format=torch.channels_last),
        "empty": x[:0],
        "flipped strides": x.permute(3, 2, 1, 0),
    }


@pytest.mark.parametrize("name", layouts())
def test_layout_is_that_of_preserve_format(name: str) -> None:
    x = layouts()[name]
    like = torch.empty_like(x)
    for keep in ([], [0], [1], [3], [0, 2]):
        amax = torch.rand([n if d in keep else 1 for d, n in enumerate(x.shape)]) + 0.5
        wanted = expected_fake(x, amax, 8, False, True)
        for y in (
            ops.fake_quantize(x, amax),
            ops.fake_quantize_backward(x, x, amax + 100),
            ops.fake_quantize_fp8(x, amax),
            ops.quantize(x, amax),
        ):
            assert y.stride() == like.stride()
        assert torch.equal(ops.fake_quantize(x, amax), wanted)
        before = x.clone()
        ops.fake_quantize(x, amax)
        assert torch.equal(x, before)


@pytest.mark.parametrize("name", ["contiguous", "channels_last", "transposed", "sliced"])
def test_out_writes_into_given_memory(name: str) -> None:
    x = layouts()[name]
    amax = torch.rand(1, x.shape[1], 1, 1) + 0.5
    wanted = ops.fake_quantize(x, amax)
    other = torch.zeros(x.shape)
    assert ops.fake_quantize_out(x, amax, out=other) is other
    assert torch.equal(other, wanted)
    assert ops.fake_quantize_out(x, amax, out=x) is x
    assert torch.equal(x, wanted)


def test_out_tells_autograd_that_the_memory_changed() -> None:
    factor, memory = torch.ones(3, requires_grad=True), torch.rand(3)
    product = (factor * memory).sum()
    ops.fake_quantize_out(memory, torch.tensor(1.0), out=memory)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_calls_from_many_threads_do_not_disturb_each_other() -> None:
    inputs = [torch.randn(50, 37, 11) * (i + 1) for i in range(8)]

    def work(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        counts = torch.zeros(300, dtype=torch.int64)
        ops.histogram_(counts, x, 0.1)
        channels = ops.reduce_amax_op(x, [1])
        return ops.fake_quantize(x, channels), channels, counts

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, inputs * 5))
    for x, results in zip(inputs * 5, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(results, work(x), strict=True))


@pytest.mark.parametrize("threads", [1, 2])
def test_large_tensors_split_over_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.randn(3, 37, 41, 43).contiguous(memory_format=torch.channels_last)
        for keep in ([], [1], [0, 3]):
            amax = torch.rand([n if d in keep else 1 for d, n in enumerate(x.shape)]) + 0.5
            assert torch.equal(ops.fake_quantize(x, amax), expected_fake(x, amax, 8, False, True))
            grad = torch.randn_like(x)
            assert torch.equal(ops.fake_quantize_backward(grad, x, amax), gradient_of(x, amax, grad))
            reduced = tuple(d for d in range(4) if d not in keep)
            wanted = np.abs(x.numpy()).max(axis=reduced, keepdims=bool(keep))
            assert np.array_equal(ops.reduce_amax_op(x, keep).numpy(), wanted)
    finally:
        torch.set_num_threads(before)


# ---- autograd, tracing, errors ----


@pytest.mark.parametrize(
    "amax", [torch.tensor(1.0), torch.tensor([[0.5], [1.0], [0.0]])], ids=["tensor", "rows"]
)
def test_gradient_is_straight_through(amax: Tensor) -> None:
    x = torch.tensor([[-2.0, -0.5, 0.5], [-1.0, 1.0, 1.5], [0.0, 0.1, -0.1]], requires_grad=True)
    amax = amax.clone().requires_grad_()
    weight = torch.arange(9.0).reshape(3, 3)
    (ops.fake_quantize(x, amax, narrow_range=False) * weight).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.where(x.detach().abs() <= amax.detach(), weight, 0.0))
    assert amax.grad is None
    x.grad = None
    (ops.fake_quantize_fp8(x, amax) * weight).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.where(x.detach().abs() <= amax.detach(), weight, 0.0))


def test_fp8_without_a_range_passes_the_gradient_up_to_the_limit() -> None:
    x = torch.tensor([-500.0, -448.0, 3.0, 448.0, 449.0, 57344.0, 57345.0], requires_grad=True)
    (grad,) = torch.autograd.grad(ops.fake_quantize_fp8(x).sum(), x)
    assert grad.tolist() == [0, 1, 1, 1, 0, 0, 0]
    (grad,) = torch.autograd.grad(ops.fake_quantize_fp8(x, fmt="e5m2").sum(), x)
    assert grad.tolist() == [1, 1, 1, 1, 1, 1, 0]


def test_second_order_gradient() -> None:
    x = torch.tensor([0.3, -0.8, 2.0], requires_grad=True)
    y = ops.fake_quantize(x, torch.tensor(1.0))
    (first,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(second, torch.tensor([2.0, 2.0, 0.0]))


def test_no_graph_without_grad() -> None:
    x = torch.randn(4, requires_grad=True)
    amax = torch.tensor(1.0, requires_grad=True)
    with torch.no_grad():
        assert not ops.fake_quantize(x, amax).requires_grad
    with torch.inference_mode():
        assert not ops.fake_quantize(x, amax).requires_grad
    assert not ops.fake_quantize(x.detach(), amax).requires_grad
    assert ops.fake_quantize(torch.nn.Parameter(x.detach()), amax).requires_grad


def block(x: Tensor, amax: Tensor) -> Tensor:
    return ops.fake_quantize_fp8(ops.fake_quantize(x, amax, 4) * 2, None, "e5m2").relu()


def test_compiles_in_one_graph_and_gives_the_same_gradient() -> None:
    amax = torch.rand(1, 3, 1) + 0.5
    x = torch.randn(2, 3, 5, requires_grad=True)
    wanted = block(x, amax)
    (grad,) = torch.autograd.grad(wanted.sum(), x)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    y = compiled(x, amax)
    assert torch.equal(y, wanted)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], grad)


def test_exports_with_a_dynamic_batch_and_keeps_the_operator() -> None:
    class Block(torch.nn.Module):
        def forward(self, x: Tensor, amax: Tensor) -> Tensor:
            return block(x, amax)

    amax = torch.tensor(1.0)
    program = torch.export.export(
        Block(), (torch.randn(2, 3), amax), dynamic_shapes=({0: torch.export.Dim("batch")}, None)
    )
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"qzoo.fake_quantize.default", "qzoo.fake_quantize_fp8.default"} <= targets
    x = torch.randn(7, 3)
    assert torch.equal(program.module()(x, amax), block(x, amax))


def test_meta_tensors_keep_shape_and_format() -> None:
    x = torch.empty(2, 3, 4, 5, device="meta").contiguous(memory_format=torch.channels_last)
    amax = torch.empty(1, 3, 1, 1, device="meta")
    y = ops.fake_quantize(x, amax)
    assert y.is_meta
    assert y.stride() == x.stride()
    assert ops.quantize(x, amax, 12, unsigned=True).dtype == torch.uint16
    assert ops.reduce_amax_op(x, [1]).shape == (1, 3, 1, 1)


def opcheck_arguments() -> dict[str, list[tuple[Any, ...]]]:
    x = torch.randn(2, 3, 4, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    amax, channels = torch.tensor(1.5), torch.rand(1, 3, 1, 1) + 0.5
    ends, grown = torch.tensor([-0.4, 1.5]), x.clone().requires_grad_()
    q = torch.randint(-8, 8, (3, 4), dtype=torch.int8)
    counts = torch.randint(0, 50, (200,))
    centers = torch.arange(200.0) + 0.5
    return {
        "fake_quantize": [
            (grown, amax, 8, False, True),
            (last, channels, 4, True, False),
            (x[:, ::2], amax, 8, False, True),
        ],
        "fake_quantize_forward": [(x, amax, 8, False, True)],
        "fake_quantize_out": [(x, channels, 8, False, True, torch.zeros_like(last))],
        "fake_quantize_backward": [(grown, x, amax), (amax.expand(2, 3, 4, 5), last, channels)],
        "fake_quantize_learned_backward": [
            (x, last, amax, 2, False, True, True),
            (last, x[:, ::2].repeat(1, 2, 1, 1)[:, :3], amax, 8, True, False, False),
        ],
        "fake_quantize_affine": [(grown, ends, 8), (last, ends, 4), (x[:, ::2], ends.double(), 8)],
        "fake_quantize_affine_forward": [(x, ends, 8)],
        "fake_quantize_affine_backward": [(grown, x, ends), (amax.expand(2, 3, 4, 5), last, ends)],
        "fake_quantize_affine_learned_backward": [(x, last, ends, 2, True), (last, x, ends, 8, False)],
        "quantize": [(x, amax, 8, False, True), (last, channels, 16, True, False)],
        "dequantize": [(q, amax, 4, False, torch.float16)],
        "pack_int4": [(q,), (q[:, ::2].to(torch.uint8),)],
        "unpack_int4": [(torch.arange(7, dtype=torch.uint8), False)],
        "quantize_int4": [(x, channels, 4, False, True), (last[:, :, 1:], amax, 3, True, True)],
        "dequantize_int4": [
            (torch.arange(8, dtype=torch.uint8), torch.rand(3, 1), [3, 5], 4, False, torch.float16)
        ],
        "fake_quantize_fp8": [(grown, None, True), (last, channels, False)],
        "fake_quantize_fp8_forward": [(x, amax, False)],
        "reduce_amax": [(x, []), (last, [1]), (x[..., ::2], [0, -1])],
        "histogram_": [(counts.clone(), x, 0.01, 2.0, -1.0, False)],
        "entropy_costs": [(counts, 128, 128, 3)],
        "mse_search": [
            (counts, centers, 8, False, 20, 5),
            (counts.expand(3, -1), centers.expand(3, -1), -1, False, 9, 7),
            (counts, centers, -2, False, 9, 7),
        ],
    }


@pytest.mark.parametrize("name", opcheck_arguments())
def test_opcheck(name: str) -> None:
    for args in opcheck_arguments()[name]:
        opcheck(getattr(torch.ops.qzoo, name).default, args)


def test_every_operator_is_opchecked() -> None:
    assert set(opcheck_arguments()) == set(references)


def test_errors_restate_the_input() -> None:
    x = torch.randn(2, 3)
    for call in (ops.fake_quantize, ops.quantize, ops.fake_quantize_fp8):
        with pytest.raises(QuantizationError, match=r"\(4,\).*\(2, 3\)"):
            call(x, torch.rand(4))
    with pytest.raises(QuantizationError, match="agree"):
        ops.fake_quantize_out(x, torch.tensor(1.0), out=torch.zeros(3))
    with pytest.raises(QuantizationError, match="17"):
        ops.quantize(x, torch.tensor(1.0), 17)
    with pytest.raises(QuantizationError, match="e3m4"):
        ops.fake_quantize_fp8(x, None, "e3m4")


def test_operators_check_what_reaches_them_directly() -> None:
    x = torch.randn(2, 3)
    with pytest.raises((RuntimeError, ValueError), match="broadcast"):
        torch.ops.qzoo.fake_quantize(x, torch.rand(2), 8, False, True)
    with pytest.raises((RuntimeError, ValueError), match="broadcast"):
        torch.ops.qzoo.fake_quantize(x, torch.rand(2, 1, 1), 8, False, True)


@pytest.mark.parametrize(
    ("bits", "unsigned", "narrow"), [(1, False, True), (1, False, False), (0, False, True)]
)
def test_formats_without_a_positive_level_hold_only_zero(bits: int, unsigned: bool, narrow: bool) -> None:
    y = ops.fake_quantize(torch.tensor([-3.0, 0.2, 9.0]), torch.tensor(2.0), bits, unsigned, narrow)
    assert not y.any()
