"""Integer quantization: fake quantization with a straight-through gradient, and real quantization.

    scale = bound / amax
    q     = clamp(round_half_even(x * scale), lowest, bound)
    y     = q / scale

The order matters: multiplying by `bound / amax` and dividing by it again is not, to the last bit, the same as
dividing by `amax / bound`. The scale is a float32; float64 input is multiplied and divided in float64, every
other type in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qzoo.errors import QuantizationError
from qzoo.quant.ops.numbers import TINY, bounds
from qzoo.quant.ops.schema import (
    REAL,
    compute_dtype,
    declare,
    is_plain,
    levels,
    require_bits,
    require_real,
    require_tensor,
)
from qzoo.quant.ops.straight_through import declare_fake_quantization, declare_gradient

_STORED = frozenset((torch.int8, torch.uint8, torch.int16, torch.uint16))
_RANGE = "int num_bits, bool unsigned, bool narrow_range"


def check_broadcast(x: Tensor, amax: Tensor) -> None:
    """Raise unless `amax` broadcasts to the shape of `x` without enlarging it."""
    shape, extra = amax.shape, amax.dim() - x.dim()
    fits = all(n == 1 for n in shape[: max(extra, 0)]) and all(
        a in (1, n) for a, n in zip(reversed(shape), reversed(x.shape), strict=False)
    )
    if not fits:
        raise QuantizationError(
            f"amax of shape {tuple(shape)} does not broadcast to the input of shape {tuple(x.shape)}: "
            "give one range (0-d), or one dimension per input dimension with 1 in the reduced ones"
        )


def trim(x: Tensor, amax: Tensor) -> Tensor:
    """Return `amax` without leading dimensions that `x` does not have (they are of length 1), after checking it."""
    check_broadcast(x, amax)
    return amax.reshape(amax.shape[amax.dim() - x.dim() :]) if amax.dim() > x.dim() else amax


# ---- fake quantization ----


def _fake_quantize(x: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool) -> Tensor:
    out = torch.empty_like(x)
    _fake_quantize_out(x, amax, num_bits, unsigned, narrow_range, out)
    return out


def _fake_quantize_out(
    x: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool, out: Tensor
) -> None:
    scale, low, high = levels(trim(x, amax), num_bits, unsigned, narrow_range)
    y = torch.mul(x.to(compute_dtype(x)), scale.to(compute_dtype(x)))
    out.copy_(y.round_().clamp_(low, high).div_(scale))


def _inside(x: Tensor, amax: Tensor) -> Tensor:
    return x.to(compute_dtype(x)).abs() <= trim(x, amax).to(torch.float32)


_gradient = declare_gradient(
    "fake_quantize_backward", "(Tensor grad, Tensor x, Tensor amax) -> Tensor", _inside
)


def fake_quantize_backward(grad: Tensor, x: Tensor, amax: Tensor) -> Tensor:
    """Give the gradient of `fake_quantize`: `grad` where `|x| <= amax`, 0 elsewhere; shape and memory format of `x`."""
    return _gradient(grad, x, amax)


_fake_op, _eager = declare_fake_quantization(
    "fake_quantize",
    f"(Tensor x, Tensor amax, {_RANGE}) -> Tensor",
    _fake_quantize,
    fake_quantize_backward,
    lambda x, amax, *format: (x, amax),
)
_out_op = declare(
    "fake_quantize_out",
    f"(Tensor x, Tensor amax, {_RANGE}, Tensor(a!) out) -> ()",
    _fake_quantize_out,
    lambda x, amax, num_bits, unsigned, narrow_range, out: None,
)


def fake_quantize(
    x: Tensor, amax: Tensor, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
) -> Tensor:
    """Round `x` to the levels of an integer format and return it in its own type, shape and memory format.

    Args:
        x: floating-point tensor of any shape and strides.
        amax: largest magnitude of the range: 0-d, or a shape that broadcasts to `x`, such as `[C, 1, 1, 1]`.
        num_bits: bits of the integer format.
        unsigned: levels `0 ... 2**bits - 1` instead of the symmetric signed ones.
        narrow_range: leave out the lowest signed level (-128 of 8 bits).

    The gradient of `x` passes where `|x| <= amax`; none reaches `amax`. Ranges at or below `2**-24` give
    zeros, NaN in `x` or `amax` gives NaN. Values are not checked, so that traced programs stay free of
    branches.

    Raises:
        QuantizationError: `amax` does not broadcast to `x`; `x` is no floating-point tensor, `amax` no tensor;
            bits that no format has.
    """
    if is_plain(x):
        # One test here, for what is nearly always so: a call for each check would cost a tenth of a small tensor's.
        if not (
            x.dtype in REAL and isinstance(amax, Tensor) and type(num_bits) is int and 0 <= num_bits <= 16
        ):
            require_real(x, "the input")
            require_tensor(amax, "amax")
            require_bits(num_bits, unsigned)
        if amax.dim():
            check_broadcast(x, amax)
        if amax.requires_grad:
            amax = amax.detach()
        return _eager(x, amax, num_bits, unsigned, narrow_range)
    require_tensor(x, "the input")
    return _fake_op(x, amax, num_bits, unsigned, narrow_range)


def fake_quantize_out(
    x: Tensor,
    amax: Tensor,
    num_bits: int = 8,
    unsigned: bool = False,
    narrow_range: bool = True,
    *,
    out: Tensor,
) -> Tensor:
    """Run `fake_quantize` into memory that exists already; `out` may be `x`. Not differentiable.

    Raises:
        QuantizationError: `out` differs from `x` in shape or type, or `amax` does not broadcast to `x`.
    """
    require_real(x, "the input")
    require_bits(num_bits, unsigned)
    if out.shape != x.shape or out.dtype != x.dtype:
        raise QuantizationError(
            f"out is {tuple(out.shape)} {out.dtype} but the input is {tuple(x.shape)} {x.dtype}: "
            "both must agree"
        )
    check_broadcast(x, amax)
    _out_op(x.detach(), amax.detach(), num_bits, unsigned, narrow_range, out.detach())
    if not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)  # so that a backward that needs the old values notices
    return out


# ---- real quantization ----


def integer_dtype(num_bits: int, unsigned: bool = False) -> torch.dtype:
    """Return the smallest integer type that holds the format.

    Raises:
        QuantizationError: more than 16 bits, or fewer than 1.
    """
    if not 1 <= num_bits <= 16:
        raise QuantizationError(f"num_bits={num_bits} cannot be stored: use 1 to 16 bits")
    if num_bits <= 8:
        return torch.uint8 if unsigned else torch.int8
    return torch.uint16 if unsigned else torch.int16


def quantize_reference(x: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool) -> Tensor:
    """Run `quantize` in plain torch, on any device."""
    scale, low, high = levels(trim(x, amax), num_bits, unsigned, narrow_range)
    q = torch.mul(x.to(compute_dtype(x)), scale.to(compute_dtype(x))).round_().clamp_(low, high)
    return torch.empty_like(x, dtype=integer_dtype(num_bits, unsigned)).copy_(q.nan_to_num_(0.0))


def dequantize_reference(
    q: Tensor, amax: Tensor, num_bits: int, unsigned: bool, dtype: torch.dtype
) -> Tensor:
    """Run `dequantize` in plain torch, on any device."""
    scale, _, high = levels(trim(q, amax), num_bits, unsigned, True)
    out = torch.empty_like(q, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return out.copy_(q.to(wide).div_(scale).mul_(high != 0))


_quantize_op = declare(
    "quantize",
    f"(Tensor x, Tensor amax, {_RANGE}) -> Tensor",
    quantize_reference,
    lambda x, amax, num_bits, unsigned, narrow_range: torch.empty_like(
        x, dtype=integer_dtype(num_bits, unsigned)
    ),
)
_dequantize_op = declare(
    "dequantize",
    "(Tensor q, Tensor amax, int num_bits, bool unsigned, ScalarType dtype) -> Tensor",
    dequantize_reference,
    lambda q, amax, num_bits, unsigned, dtype: torch.empty_like(q, dtype=dtype),
)


def quantize(
    x: Tensor, amax: Tensor, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
) -> Tensor:
    """Quantize to the integers: int8 or uint8 up to 8 bits, int16 or uint16 up to 16; NaN becomes 0.

    Raises:
        QuantizationError: more than 16 bits, or `amax` does not broadcast to `x`.
    """
    integer_dtype(num_bits, unsigned)
    require_real(x, "the input")
    require_tensor(amax, "amax")
    check_broadcast(x, amax)
    q: Tensor = _quantize_op(x.detach(), amax.detach(), num_bits, unsigned, narrow_range)
    return q


def dequantize(
    q: Tensor,
    amax: Tensor,
    num_bits: int = 8,
    unsigned: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Turn integers into real numbers; `dequantize(quantize(x))` equals `fake_quantize(x)` for every finite
    `x`.

    Raises:
        QuantizationError: `q` is of another type than :func:`quantize` gives, or `amax` does not broadcast to it.
    """
    require_tensor(q, "the integers")
    require_tensor(amax, "amax")
    if q.dtype not in _STORED:
        raise QuantizationError(f"the integers must be int8, uint8, int16 or uint16, not {q.dtype}")
    check_broadcast(q, amax)
    y: Tensor = _dequantize_op(q, amax.detach(), num_bits, unsigned, dtype)
    return y


__all__ = [
    "TINY",
    "bounds",
    "dequantize",
    "fake_quantize",
    "fake_quantize_backward",
    "fake_quantize_out",
    "integer_dtype",
    "quantize",
]
