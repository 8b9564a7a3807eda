"""Affine fake quantization against NumPy and ONNX Runtime, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from qzoo.errors import QuantizationError
from qzoo.quant import native, ops

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LIMITS = {
    "both signs": [-0.278, 3.1],
    "symmetric": [-1.0, 1.0],
    "above zero": [0.5, 2.0],
    "below zero": [-2.0, -0.5],
    "reversed": [2.0, -3.0],
    "zero": [0.0, 0.0],
    "tiny": [-1e-9, 1e-9],
    "nan low": [float("nan"), 1.0],
    "nan high": [-1.0, float("nan")],
    "power of two": [-37 / 64, 218 / 64],
}


def in_precision(x: Tensor) -> np.ndarray:
    return x.numpy() if x.dtype == torch.float64 else x.float().numpy()


def parameters(limits: Tensor, bits: int) -> tuple[np.float32, np.float32, np.float32, np.float32]:
    """`(scale, zero, low, high)`, written down once more in NumPy."""
    low, high = limits.float().numpy()
    low, high, top = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0)), np.float32(2**bits - 1)
    scale = np.maximum(high - low, np.float32(2.0**-24)) / top
    return scale, np.clip(np.rint(-low / scale), np.float32(0), top), low, high


def expected(x: Tensor, limits: Tensor, bits: int) -> Tensor:
    scale, zero, _, _ = parameters(limits, bits)
    with np.errstate(all="ignore"):
        q = np.clip(np.rint(in_precision(x) / scale) + zero, 0, 2**bits - 1)
        return torch.from_numpy(np.asarray((q - zero) * scale)).to(x.dtype)


def awkward(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    special = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, -1e-7, 2.5 / 64, -0.5 / 64, 1e30]
    x.view(-1)[: len(special)] = torch.tensor(special, dtype=torch.float64)
    return x.to(dtype)


def assert_identical(actual: Tensor, wanted: Tensor) -> None:
    assert (actual.dtype, actual.shape) == (wanted.dtype, wanted.shape)
    assert torch.equal(torch.isnan(actual), torch.isnan(wanted))
    assert torch.equal(actual.nan_to_num(0.0), wanted.nan_to_num(0.0))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_numpy(run: Callable[..., Any], dtype: torch.dtype, bits: int) -> None:
    x = awkward((3, 5, 4, 7), dtype)
    for name, ends in LIMITS.items():
        for kind in (torch.float32, torch.float64, torch.float16):
            limits = torch.tensor(ends, dtype=kind)
            try:
                assert_identical(run("fake_quantize_affine", x, limits, bits), expected(x, limits, bits))
            except AssertionError as error:
                raise AssertionError(f"limits {name!r} in {kind}") from error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_is_a_code(run: Callable[..., Any], dtype: torch.dtype) -> None:
    x = torch.zeros(5, dtype=dtype)
    for seed in range(50):
        limits = torch.randn(2, generator=torch.Generator().manual_seed(seed)) * 3
        assert not run("fake_quantize_affine", x, limits, 8).any()


def test_parameters_are_those_of_onnx_and_the_result_is_onnx_runtimes(run: Callable[..., Any]) -> None:
    x = awkward((4, 100), torch.float32).nan_to_num(0.0)
    for ends in ([-0.278, 3.1], [0.0, 6.0], [-5.0, 0.1], [-0.3, 0.0]):
        limits = torch.tensor(ends)
        scale, zero = ops.affine_parameters(limits)
        assert (scale.item(), zero.item()) == tuple(float(v) for v in parameters(limits, 8)[:2])
        session = onnxruntime.InferenceSession(pair(scale.item(), int(zero.item())).SerializeToString())
        assert torch.equal(
            torch.from_numpy(session.run(None, {"x": x.numpy()})[0]),
            run("fake_quantize_affine", x, limits, 8),
        )


def pair(scale: float, zero: int) -> onnx.ModelProto:
    h, kind = onnx.helper, onnx.TensorProto
    nodes = [
        h.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        h.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    ends = [h.make_tensor_value_info(n, kind.FLOAT, None) for n in ("x", "y")]
    stored = [h.make_tensor("s", kind.FLOAT, [], [scale]), h.make_tensor("z", kind.UINT8, [], [zero])]
    graph = h.make_graph(nodes, "pair", ends[:1], ends[1:], stored)
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_passes_within_the_limits(run: Callable[..., Any], dtype: torch.dtype) -> None:
    x = awkward((3, 5, 4, 7), dtype)
    x.view(-1)[20:22] = torch.tensor([-0.278, 3.1], dtype=torch.float32).to(dtype)
    grad = torch.randn(x.shape).to(dtype)
    for ends in LIMITS.values():
        limits = torch.tensor(ends)
        _, _, low, high = parameters(limits, 8)
        inside = torch.from_numpy((in_precision(x) >= low) & (in_precision(x) <= high))
        for g in (grad, grad.new_ones(()).expand(x.shape)):
            wanted = torch.where(inside, g, torch.zeros((), dtype=dtype))
            assert_identical(run("fake_quantize_affine_backward", g, x, limits), wanted)


@pytest.mark.parametrize("rounding", [True, False], ids=["lsq+", "clipping alone"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_learned_backward_is_the_sum_of_the_papers_terms(
    run: Callable[..., Any], dtype: torch.dtype, bits: int, rounding: bool
) -> None:
    for shape in ((3, 5, 4, 7), (2, 3, 41, 67), (7,), (0, 3)):
        x, grad, limits = (
            torch.randn(shape).to(dtype),
            torch.randn(shape).to(dtype),
            torch.tensor([-0.4, 1.3]),
        )
        passed, moved = run("fake_quantize_affine_learned_backward", grad, x, limits, bits, rounding)
        _, _, low, high = parameters(limits, bits)
        exact, g = in_precision(x).astype(np.float64), in_precision(grad).astype(np.float64)
        y = expected(x if dtype == torch.float64 else x.float(), limits, bits).double().numpy()
        below, above = exact < np.float64(low), exact > np.float64(high)
        error = np.where(below | above, 0.0, (y - exact) * rounding) / np.float64(high - low)
        wanted = np.array([(g * (below - error)).sum(), (g * (above + error)).sum()])
        assert_identical(
            passed, torch.where(torch.from_numpy(~(below | above)), grad, torch.zeros((), dtype=dtype))
        )
        assert (moved.dtype, moved.shape) == (torch.float32, (2,))
        assert np.abs(moved.numpy() - wanted).max() <= 1e-6 * (1 + np.abs(g).sum())


def test_learned_backward_does_not_depend_on_the_number_of_threads() -> None:
    x, grad, limits = torch.randn(40, 64, 33), torch.randn(40, 64, 33), torch.tensor([-0.4, 1.3])
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(ops.fake_quantize_affine_learned_backward(grad, x, limits, 4)[1])
    torch.set_num_threads(before)
    if native.is_loaded():
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


def test_layout_is_that_of_preserve_format_and_the_input_stays() -> None:
    x, limits = torch.randn(4, 6, 5, 8), torch.tensor([-0.4, 1.3])
    for view in (
        x,
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(0, 3),
        x[:, ::2, :, 1:7],
        x[:1].expand(4, -1, -1, -1),
        x[:0],
        x[0, 0, 0, 0],
    ):
        before = view.clone()
        for y in (
            ops.fake_quantize_affine(view, limits),
            ops.fake_quantize_affine_backward(view, view, limits),
        ):
            assert y.stride() == torch.empty_like(view).stride()
        assert torch.equal(ops.fake_quantize_affine(view, limits), expected(view, limits, 8))
        assert torch.equal(view, before)
    strided = torch.tensor([-0.4, 9.0, 1.3])[::2]
    assert torch.equal(ops.fake_quantize_affine(x, strided), ops.fake_quantize_affine(x, limits))


def test_gradient_is_straight_through_in_every_mode() -> None:
    x, limits = torch.randn(50), torch.tensor([-0.4, 1.3])
    wanted = ((x >= -0.4) & (x <= 1.3)).float()
    eager = x.clone().requires_grad_()
    ops.fake_quantize_affine(eager, limits.clone().requires_grad_()).sum().backward()
    assert torch.equal(eager.grad, wanted)  # type: ignore[arg-type]
    total = lambda v: ops.fake_quantize_affine(v, limits).sum()  # noqa: E731
    assert torch.equal(torch.func.grad(total)(x), wanted)
    assert torch.equal(torch.vmap(torch.func.grad(total))(x.reshape(5, 10)), wanted.reshape(5, 10))
    _, tangent = torch.func.jvp(lambda v: ops.fake_quantize_affine(v, limits), (x,), (torch.ones(50),))
    assert torch.equal(tangent, wanted)
    exported = torch.export.export(_Affine(limits), (x,))
    assert torch.equal(exported.module()(x), ops.fake_quantize_affine(x, limits))


class _Affine(torch.nn.Module):
    def __init__(self, limits: Tensor) -> None:
        super().__init__()
        self.register_buffer("limits", limits)

    def forward(self, x: Tensor) -> Tensor:
        return ops.fake_quantize_affine(x, self.limits)  # type: ignore[arg-type]


def test_refusals_say_what_is_wrong() -> None:
    x, limits = torch.randn(3), torch.tensor([-1.0, 1.0])
    for bad in (torch.tensor(1.0), torch.ones(3), torch.ones(2, 1), torch.tensor([-1, 1])):
        with pytest.raises(QuantizationError, match="limits"):
            ops.fake_quantize_affine(x, bad)
    with pytest.raises(QuantizationError, match="limits must be a torch tensor"):
        ops.fake_quantize_affine(x, [-1.0, 1.0])  # type: ignore[arg-type]
    for bits in (0, 17, 8.0):
        with pytest.raises(QuantizationError, match="num_bits"):
            ops.fake_quantize_affine(x, limits, bits)  # type: ignore[arg-type]
    with pytest.raises(QuantizationError, match="the input"):
        ops.fake_quantize_affine(torch.arange(3), limits)
