"""The gradients of fake quantization when its range is a parameter: to the input and to the range, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qzoo.quant.ops.affine import fake_quantize_affine, fake_quantize_affine_backward
from qzoo.quant.ops.integer import check_broadcast, fake_quantize, fake_quantize_backward
from qzoo.quant.ops.numbers import TINY
from qzoo.quant.ops.schema import compute_dtype, declare, require_real


def _reference(
    grad: Tensor,
    x: Tensor,
    amax: Tensor,
    num_bits: int,
    unsigned: bool,
    narrow_range: bool,
    rounding: bool,
) -> tuple[Tensor, Tensor]:
    check_broadcast(x, amax)
    passed = fake_quantize_backward(grad, x, amax)
    wide, g = x.to(compute_dtype(x)), grad.to(compute_dtype(x))
    y, inside = fake_quantize(wide, amax, num_bits, unsigned, narrow_range), passed.to(wide.dtype)
    terms = (g - inside) * y
    if rounding:
        terms += inside * (y - wide)
    moved = terms.to(torch.float32).sum_to_size(amax.shape) / amax.to(torch.float32)
    return passed, moved


def _shapes(grad: Tensor, x: Tensor, ranges: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(ranges, dtype=torch.float32)


_op = declare(
    "fake_quantize_learned_backward",
    "(Tensor grad, Tensor x, Tensor amax, int num_bits, bool unsigned, bool narrow_range, bool rounding)"
    " -> (Tensor, Tensor)",
    _reference,
    _shapes,
)


def fake_quantize_learned_backward(
    grad: Tensor,
    x: Tensor,
    amax: Tensor,
    num_bits: int = 8,
    unsigned: bool = False,
    narrow_range: bool = True,
    rounding: bool = True,
) -> tuple[Tensor, Tensor]:
    """Give the gradients of :func:`fake_quantize` to ``x`` and to ``amax``.

    Inside the range the derivative to ``amax`` is (y - x) / amax with ``rounding`` (LSQ, Esser et al. 2020,
    arXiv:1902.08153, equation 3, in terms of the range) and 0 without (PACT, Choi et al. 2018, arXiv:1805.06085,
    equation 3); outside it is y / amax.

    Args:
        grad: the gradient to y, in the shape of ``x``.
        x: the input, floating point.
        amax: the range, positive; several ranges broadcast to ``x``.
        num_bits, unsigned, narrow_range: the format.
        rounding: whether the rounding error inside counts.

    Returns:
        The gradient to ``x``, in its type and memory format, and the one to ``amax``, float32 in its shape.

    Raises:
        QuantizationError: ``amax`` does not broadcast to ``x``.
    """
    require_real(x, "the input")
    if amax.numel() != 1:
        return _reference(grad, x, amax, num_bits, unsigned, narrow_range, rounding)
    check_broadcast(x, amax)
    passed, moved = _op(grad, x, amax, num_bits, unsigned, narrow_range, rounding)
    return passed, moved


def _affine_reference(
    grad: Tensor, x: Tensor, limits: Tensor, num_bits: int, rounding: bool
) -> tuple[Tensor, Tensor]:
    passed = fake_quantize_affine_backward(grad, x, limits)
    wide, g = x.to(compute_dtype(x)), grad.to(compute_dtype(x))
    low, high = limits.to(torch.float32).unbind()
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    moved = torch.stack([(g * (wide < low)).sum(), (g * (wide > high)).sum()])
    if rounding:
        inside = (wide >= low) & (wide <= high)
        error = (g * inside * (fake_quantize_affine(wide, limits, num_bits) - wide)).sum()
        moved += torch.stack([-error, error]) / (high - low).clamp(min=TINY)
    return passed, moved.to(torch.float32)


_affine_op = declare(
    "fake_quantize_affine_learned_backward",
    "(Tensor grad, Tensor x, Tensor limits, int num_bits, bool rounding) -> (Tensor, Tensor)",
    _affine_reference,
    _shapes,
)


def fake_quantize_affine_learned_backward(
    grad: Tensor, x: Tensor, limits: Tensor, num_bits: int = 8, rounding: bool = True
) -> tuple[Tensor, Tensor]:
    """Give the gradients of :func:`fake_quantize_affine` to ``x`` and to its two ends.

    Inside the range the derivative to the high end is (y - x) / (high - low), and to the low end the opposite, with
    ``rounding``, 0 without; above the range it is 1 to the high end, below it 1 to the low end. That is LSQ+ (Bhalgat
    et al. 2020, arXiv:2004.09576, equations 4 to 6) in terms of the ends, with low = beta and high = beta + s p.

    Args:
        grad: the gradient to y, in the shape of ``x``.
        x: the input, floating point.
        limits: the ends, ``[2]``.
        num_bits: of the codes.
        rounding: whether the rounding error inside counts.

    Returns:
        The gradient to ``x``, in its type and memory format, and the one to ``limits``, float32 ``[2]``.

    Raises:
        QuantizationError: ``x`` is no floating-point tensor.
    """
    require_real(x, "the input")
    passed, moved = _affine_op(grad, x, limits, num_bits, rounding)
    return passed, moved
