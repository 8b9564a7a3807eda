"""How the quantization operators are written in ONNX: ``QuantizeLinear`` and ``DequantizeLinear``.

Two ways lead here. Inside ``enable_onnx_export()`` the quantizers record the pair themselves
(:func:`int8_pair`, :func:`fp8_pair`), for both exporters of torch. And a program that holds
``torch.ops.qzoo.fake_quantize`` (from ``torch.export``, say) is translated with
:func:`custom_translation_table`::

    torch.onnx.export(program, custom_translation_table=custom_translation_table())

The scale is ``amax / bound`` in float32 and 1 where the range is zero; the zero point is 0, int8 or uint8, or that of
an affine range, uint8; ``axis`` is written only for ranges per channel. Other types than float32 are cast before and
after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qzoo.errors import ExportError
from qzoo.quant.ops.affine import affine_parameters
from qzoo.quant.ops.numbers import FP8_LIMIT, TINY, bounds


def scale_of(amax: torch.Tensor, high: float) -> torch.Tensor:
    """Return ``amax / high`` in float32, 1 where that is zero."""
    scale = amax.to(torch.float32) / high
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def int8_pair(x: torch.Tensor, amax: torch.Tensor, unsigned: bool, axis: int | None) -> torch.Tensor:
    """Record Q and DQ for a float32 ``x``; ``axis`` None for one range, else where ``amax`` lies."""
    dtype = torch.uint8 if unsigned else torch.int8
    with _pause_recording():
        scale = scale_of(amax.reshape(()) if axis is None else amax.reshape(-1), bounds(8, unsigned)[1])
        zero = torch.zeros(scale.shape, dtype=dtype, device=scale.device)
    return _record(x, scale, zero, axis)


def affine_pair(x: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """Record Q and DQ with a zero point, uint8, for a float32 ``x`` with one range of two ends."""
    with _pause_recording():
        scale, zero = affine_parameters(limits)
        zero = zero.to(torch.uint8)
    return _record(x, scale, zero, None)


def _record(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, axis: int | None) -> torch.Tensor:
    if torch.jit.is_tracing():
        result: torch.Tensor = _Int8Pair.apply(x, scale, zero, axis)
        return result
    attrs: Any = {} if axis is None else {"axis": axis}
    q = torch.onnx.ops.symbolic("QuantizeLinear", (x, scale, zero), attrs, dtype=zero.dtype, shape=x.shape)
    return torch.onnx.ops.symbolic("DequantizeLinear", (q, scale, zero), attrs, dtype=x.dtype, shape=x.shape)


def fp8_pair(x: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """Record TensorRT's E4M3 pair for a float32 ``x`` with one range."""
    with _pause_recording():
        scale = scale_of(amax.reshape(()), FP8_LIMIT["e4m3"])
    if torch.jit.is_tracing():
        result: torch.Tensor = _Fp8Pair.apply(x, scale)
        return result
    symbolic = torch.onnx.ops.symbolic
    q = symbolic("trt::TRT_FP8QuantizeLinear", (x, scale), dtype=torch.uint8, shape=x.shape, version=1)
    return symbolic("trt::TRT_FP8DequantizeLinear", (q, scale), dtype=x.dtype, shape=x.shape, version=1)


@contextmanager
def _pause_recording() -> Iterator[None]:
    """Let the TorchScript exporter see a constant instead of the operations that lead to it."""
    state = torch._C._get_tracing_state() if torch.jit.is_tracing() else None
    if state is None:
        yield
        return
    set_state = torch._C._set_tracing_state  # type: ignore[attr-defined]
    set_state(None)
    try:
        yield
    finally:
        set_state(state)


class _Int8Pair(torch.autograd.Function):
    """The pair for the TorchScript exporter."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, axis: int | None
    ) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def symbolic(g: Any, x: Any, scale: Any, zero: Any, axis: int | None) -> Any:
        from torch.onnx._internal.torchscript_exporter._globals import GLOBALS

        attrs = {} if axis is None else {"axis_i": axis}
        if attrs and GLOBALS.export_onnx_opset_version < 13:
            raise ExportError(
                f"opset {GLOBALS.export_onnx_opset_version} has no QuantizeLinear per channel; use 13 or more"
            )
        q = g.op("QuantizeLinear", x, scale, zero, **attrs)
        return g.op("DequantizeLinear", q, scale, zero, **attrs).setType(x.type())


class _Fp8Pair(torch.autograd.Function):
    """TensorRT's pair for the TorchScript exporter."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def symbolic(g: Any, x: Any, scale: Any) -> Any:
        q = g.op("trt::TRT_FP8QuantizeLinear", x, scale).setType(x.type().with_dtype(torch.uint8))
        return g.op("trt::TRT_FP8DequantizeLinear", q, scale).setType(x.type())


def custom_translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translate what quantizers leave in a program, for ``torch.onnx.export(..., custom_translation_table=...)``.

    Integers of fewer than 8 bits are clipped to their range and written as int8; 9 to 16 bits need opset 21, 8-bit
    floating point opset 19. A narrow range of 8 bits is written as ONNX's full one: clamp weights to ``+-amax``
    before the export, or the lowest integer may appear. Needs onnxscript.
    """
    return {
        torch.ops.qzoo.fake_quantize.default: _translate_fake_quantize,
        torch.ops.qzoo.fake_quantize_affine.default: _translate_fake_quantize_affine,
        torch.ops.qzoo.fake_quantize_fp8.default: _translate_fake_quantize_fp8,
    }


def _translate_fake_quantize(
    x: Any, amax: Any, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
) -> Any:
    from onnxscript import ir, opset18

    op: Any = opset18
    if not 2 <= num_bits <= 16:
        raise ExportError(f"ONNX has integers of 2 to 16 bits, not {num_bits}")
    kind = ("U" if unsigned else "") + ("INT8" if num_bits <= 8 else "INT16")
    low, high = bounds(num_bits, unsigned, narrow_range)
    wide = _widen(op, x)
    if num_bits not in (8, 16):
        # The type has levels beyond the format's. A range per channel is no scalar, as Clip wants it.
        lowest = op.Mul(amax, op.Constant(value_float=low / high))
        if any(n != 1 for n in amax.shape):
            wide = op.Max(op.Min(wide, amax), lowest)
        else:
            wide = op.Clip(wide, op.Squeeze(lowest), op.Squeeze(amax))
    return _pair(op, x, wide, amax, float(high), ir.DataType[kind])


def _translate_fake_quantize_affine(x: Any, limits: Any, num_bits: int = 8) -> Any:
    from onnxscript import ir, opset18

    op: Any = opset18
    top = 2**num_bits - 1
    none = op.Constant(value_float=0.0)

    def end(index: int) -> Any:
        return op.Gather(limits, op.Constant(value_int=index), axis=0)

    # The arithmetic of qzoo.quant.ops.affine, in its order; the optimizer folds it into constants.
    low, high = op.Min(end(0), none), op.Max(end(1), none)
    span = op.Max(op.Sub(high, low), op.Constant(value_float=TINY))
    scale = op.Div(span, op.Constant(value_float=float(top)))
    zero = op.Clip(op.Round(op.Div(op.Neg(low), scale)), none, op.Constant(value_float=float(top)))
    wide = _widen(op, x)
    if num_bits not in (8, 16):  # the type has codes beyond the format's
        lowest, highest = op.Neg(zero), op.Sub(op.Constant(value_float=float(top)), zero)
        wide = op.Clip(wide, op.Mul(lowest, scale), op.Mul(highest, scale))
    point = op.Cast(zero, to=ir.DataType.UINT8 if num_bits <= 8 else ir.DataType.UINT16)
    y = op.DequantizeLinear(op.QuantizeLinear(wide, scale, point), scale, point)
    return op.Cast(y, to=x.dtype) if _is_narrow(x) else y


def _translate_fake_quantize_fp8(x: Any, amax: Any = None, e5m2: bool = False) -> Any:
    from onnxscript import ir, opset18

    op: Any = opset18
    limit = FP8_LIMIT["e5m2" if e5m2 else "e4m3"]
    if amax is None:
        amax = op.Constant(value_float=limit)
        amax.shape = ir.Shape([])
    kind = ir.DataType.FLOAT8E5M2 if e5m2 else ir.DataType.FLOAT8E4M3FN
    return _pair(op, x, _widen(op, x), amax, limit, kind)


def _widen(op: Any, x: Any) -> Any:
    from onnxscript import ir

    return op.Cast(x, to=ir.DataType.FLOAT) if _is_narrow(x) else x


def _pair(op: Any, x: Any, wide: Any, amax: Any, high: float, kind: Any) -> Any:
    """Q and DQ of ``wide``, which is ``x`` in float32; the result has the type of ``x``."""
    shape = [d if isinstance(d, int) else 0 for d in amax.shape]
    axes = [i for i, n in enumerate(shape) if n != 1]
    if len(axes) > 1:
        raise ExportError(f"a range of shape {shape} has several axes; ONNX has one axis per pair")
    # The range lines up with the last dimensions of x.
    attrs = {"axis": axes[0] + len(x.shape) - len(shape)} if axes else {}
    flat = op.Reshape(amax, op.Constant(value_ints=[-1])) if axes else op.Squeeze(amax) if shape else amax
    scale = op.Div(flat, op.Constant(value_float=high))
    one = op.Constant(value_float=1.0)
    scale = op.Where(op.Equal(scale, op.Constant(value_float=0.0)), one, scale)
    zero = op.Cast(op.Mul(scale, op.Constant(value_float=0.0)), to=kind)
    y = op.DequantizeLinear(op.QuantizeLinear(wide, scale, zero, **attrs), scale, zero, **attrs)
    return op.Cast(y, to=x.dtype) if _is_narrow(x) else y


def _is_narrow(x: Any) -> bool:
    from onnxscript import ir

    return x.dtype not in (None, ir.DataType.FLOAT)
