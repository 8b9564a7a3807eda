"""Affine quantization: a range of two ends and a zero point, as ONNX QuantizeLinear and DequantizeLinear compute it.

    low, high = min(limits[0], 0), max(limits[1], 0)
    scale     = (high - low) / (2**bits - 1)
    zero      = clamp(round_half_even(-low / scale), 0, 2**bits - 1)
    q         = clamp(round_half_even(x / scale) + zero, 0, 2**bits - 1)
    y         = (q - zero) * scale

Zero is a code always (0.0 comes back as 0.0), so that padding with zeros is exact. One range for a tensor. The scale
is a float32; float64 input is divided and multiplied in float64, every other type in float32. A span below ``2**-24``
counts as ``2**-24``.

Paper: "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference" (Jacob et al.,
2018, arXiv:1712.05877), section 2.1 and 3.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qzoo.errors import QuantizationError
from qzoo.quant.ops.numbers import TINY
from qzoo.quant.ops.schema import compute_dtype, is_plain, require_real, require_tensor
from qzoo.quant.ops.straight_through import declare_fake_quantization, declare_gradient

_MOST_BITS = 16


def affine_parameters(limits: Tensor, num_bits: int = 8) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a range of two ends, both 0-d float32; the zero point is a whole number.

    Args:
        limits: lowest and highest value, ``[2]``; zero belongs to the range whatever they are.
        num_bits: of the codes, 1 to 16.

    Raises:
        QuantizationError: limits of another shape, or other bits.
    """
    _check(limits, num_bits)
    return _parameters(limits, num_bits)


def _parameters(limits: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    low, high = limits.to(torch.float32).unbind()
    low = low.clamp(max=0.0)
    top = 2.0**num_bits - 1
    scale = (high.clamp(min=0.0) - low).clamp(min=TINY) / torch.full_like(low, top)
    return scale, (-low / scale).round().clamp(0.0, top)


def _fake_quantize_affine(x: Tensor, limits: Tensor, num_bits: int) -> Tensor:
    scale, zero = _parameters(limits, num_bits)
    wide = compute_dtype(x)
    y = (x.to(wide) / scale.to(wide)).round_().clamp_(-zero, 2.0**num_bits - 1 - zero).mul_(scale)
    return torch.empty_like(x).copy_(y)


def _inside(x: Tensor, limits: Tensor) -> Tensor:
    low, high = limits.to(torch.float32).unbind()
    wide = x.to(compute_dtype(x))
    return (wide >= low.clamp(max=0.0)) & (wide <= high.clamp(min=0.0))


_gradient = declare_gradient(
    "fake_quantize_affine_backward", "(Tensor grad, Tensor x, Tensor limits) -> Tensor", _inside
)


def fake_quantize_affine_backward(grad: Tensor, x: Tensor, limits: Tensor) -> Tensor:
    """Give the gradient of `fake_quantize_affine`: `grad` within the limits, 0 elsewhere; memory format of `x`."""
    return _gradient(grad, x, limits)


_affine_op, _eager = declare_fake_quantization(
    "fake_quantize_affine",
    "(Tensor x, Tensor limits, int num_bits) -> Tensor",
    _fake_quantize_affine,
    fake_quantize_affine_backward,
    lambda x, limits, num_bits: (x, limits),
)


def fake_quantize_affine(x: Tensor, limits: Tensor, num_bits: int = 8) -> Tensor:
    """Round `x` to the levels of an affine integer format and return it in its own type, shape and memory format.

    Args:
        x: floating-point tensor of any shape and strides.
        limits: lowest and highest value of the range, `[2]`; zero belongs to the range whatever they are.
        num_bits: of the codes, 1 to 16.

    The gradient of `x` passes within the limits, ends included; none reaches `limits`. NaN in `x` or `limits` gives
    NaN. Values are not checked, so that traced programs stay free of branches.

    Raises:
        QuantizationError: `x` is no floating-point tensor, limits of another shape, or other bits.
    """
    if not is_plain(x):
        require_tensor(x, "the input")
        return _affine_op(x, limits, num_bits)
    require_real(x, "the input")
    _check(limits, num_bits)
    return _eager(x, limits.detach() if limits.requires_grad else limits, num_bits)


def _check(limits: Any, num_bits: Any) -> None:
    require_tensor(limits, "the limits")
    if limits.shape != (2,) or not limits.dtype.is_floating_point:
        raise QuantizationError(
            f"the limits must be a floating-point tensor [low, high], not {limits.dtype} {tuple(limits.shape)}"
        )
    if not isinstance(num_bits, int) or not 1 <= num_bits <= _MOST_BITS:
        raise QuantizationError(f"num_bits must be a whole number from 1 to {_MOST_BITS}, not {num_bits!r}")
