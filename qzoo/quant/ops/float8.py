"""Fake quantization to the 8-bit floating-point formats E4M3 and E5M2 (OCP FP8:
https://arxiv.org/abs/2209.05433).

    scale = limit / amax            limit = 448 (E4M3) or 57344 (E5M2); scale = 1 without a range
    y     = fp8(x * scale) / scale  round to nearest, ties to even, saturating

All arithmetic is in float32, whatever the type of `x`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qzoo.errors import QuantizationError
from qzoo.quant.ops.integer import check_broadcast, fake_quantize_backward, transformed, trimmed
from qzoo.quant.ops.numbers import FP8_LIMIT, TINY
from qzoo.quant.ops.schema import REAL, declare, divide, is_plain, require_real, require_tensor

_STORAGE = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_SIGNATURE = "(Tensor x, Tensor? amax, bool e5m2) -> Tensor"


def _fake_quantize_fp8(x: Tensor, amax: Tensor | None, e5m2: bool) -> Tensor:
    fmt = "e5m2" if e5m2 else "e4m3"
    limit = FP8_LIMIT[fmt]
    scale = torch.ones((), device=x.device)
    usable = torch.ones((), dtype=torch.bool, device=x.device)
    if amax is not None:
        amax = trimmed(x, amax).to(torch.float32)
        usable = ~(amax <= TINY)
        scale = torch.where(usable, divide(limit, amax), 1.0)
    wide = x.to(torch.float32)
    top = usable * limit
    # torch's own conversion turns what is too large into NaN or infinity; the formats saturate here
    y = torch.mul(wide, scale).clamp_(-top, top).to(_STORAGE[fmt]).to(torch.float32).div_(scale)
    return torch.empty_like(x).copy_(y.masked_fill_(wide.abs() < TINY, 0.0))


def _fake(x: Tensor, amax: Tensor | None, e5m2: bool) -> Tensor:
    return torch.empty_like(x)


_fp8_op = declare("fake_quantize_fp8", _SIGNATURE, _fake_quantize_fp8, _fake)
_fp8_forward_op = declare("fake_quantize_fp8_forward", _SIGNATURE, _fake_quantize_fp8, _fake)


def _gradient_range(x: Tensor, amax: Tensor | None, e5m2: bool) -> Tensor:
    if amax is not None:
        return amax
    return torch.full((), FP8_LIMIT["e5m2" if e5m2 else "e4m3"], dtype=torch.float32, device=x.device)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, amax, e5m2 = inputs
    ctx.save_for_backward(x, _gradient_range(x, amax, e5m2))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return fake_quantize_backward(grad, *ctx.saved_tensors), None, None


torch.library.register_autograd("qzoo::fake_quantize_fp8", _backward, setup_context=_save_for_backward)


class StraightThroughFp8(torch.autograd.Function):
    """The eager-mode gradient: passes where `|x|` is at most the range (the format's limit without one)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, amax: Tensor | None, e5m2: bool) -> Tensor:
        ctx.save_for_backward(x, _gradient_range(x, amax, e5m2))
        y: Tensor = _fp8_forward_op(x, amax, e5m2)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return fake_quantize_backward(grads[0], *ctx.saved_tensors), None, None


class TransformedStraightThroughFp8(torch.autograd.Function):
    """The same under ``torch.func`` and for forward-mode differentiation, see
    :class:`qzoo.quant.ops.integer.TransformedStraightThrough`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, amax: Tensor | None, e5m2: bool) -> Tensor:
        y: Tensor = _fp8_forward_op(x, amax, e5m2)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, amax, e5m2 = inputs
        kept = x, _gradient_range(x, amax, e5m2)
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return fake_quantize_backward(grads[0], *ctx.saved_tensors), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return fake_quantize_backward(tangents[0], *ctx.saved_tensors)


def fake_quantize_fp8(x: Tensor, amax: Tensor | None = None, fmt: str = "e4m3") -> Tensor:
    """Round `x` to an 8-bit floating-point format and return it in its own type and memory format.

    Args:
        x: floating-point tensor.
        amax: the value that maps to the format's largest; broadcasts to `x`. None: no scaling.
        fmt: "e4m3" or "e5m2".

    Magnitudes below `2**-24`, and everything in a range at or below it, become 0. NaN stays NaN. The gradient
    passes where `|x| <= amax`, or within the format's limit without a range.

    Raises:
        QuantizationError: unknown format, or `amax` does not broadcast to `x`.
    """
    if fmt not in FP8_LIMIT:
        raise QuantizationError(
            f"fmt={fmt!r} is not an 8-bit floating-point format: use one of {list(FP8_LIMIT)}"
        )
    e5m2 = fmt == "e5m2"
    if not is_plain(x):
        require_tensor(x, "the input")
        traced: Tensor = _fp8_op(x, amax, e5m2)
        return traced
    if x.dtype not in REAL:
        require_real(x, "the input")
    if amax is not None:
        if not isinstance(amax, Tensor):
            require_tensor(amax, "amax")
        check_broadcast(x, amax)
        amax = amax.detach()
    if transformed():
        result: Tensor = TransformedStraightThroughFp8.apply(x, amax, e5m2)
    elif x.requires_grad and torch.is_grad_enabled():
        result = StraightThroughFp8.apply(x, amax, e5m2)
    else:
        result = _fp8_forward_op(x, amax, e5m2)
    return result
