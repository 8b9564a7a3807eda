"""Quantization of tensors: descriptors and functions with the names of the old toolkit.

One number scheme throughout, symmetric and given by the largest magnitude ``amax``::

    scale = bound / amax                     # float32; bound = 2**(bits - 1 + unsigned) - 1
    q     = clamp(round_half_even(x * scale), lo, bound)
    y     = q / scale

``lo`` is 0 for unsigned, ``-bound`` with ``narrow_range`` and ``-bound - 1`` without. A range of at most
``2**-24`` quantizes everything to zero. The gradient is straight through where ``|x| <= amax`` and zero
elsewhere; no gradient reaches ``amax``. Arithmetic is in float32 (float64 for float64 input), the result has
the dtype of the input.

The arguments are checked in eager mode only: a check needs the values, which a compiled or exported graph has
not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function

from qzoo.errors import ArgumentError
from qzoo.quant import ops
from qzoo.quant.descriptor import (
    QUANT_DESC_8BIT_CONV1D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_CONV3D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_CONVTRANSPOSE1D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_CONVTRANSPOSE2D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_CONVTRANSPOSE3D_WEIGHT_PER_CHANNEL,
    QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW,
    QUANT_DESC_8BIT_PER_TENSOR,
    QUANT_DESC_UNSIGNED_8BIT_PER_TENSOR,
    QuantDescriptor,
    ScaledQuantDescriptor,
)
from qzoo.quant.ops.schema import compute_dtype, levels, require_tensor

__all__ = [
    "QUANT_DESC_8BIT_PER_TENSOR",
    "QUANT_DESC_UNSIGNED_8BIT_PER_TENSOR",
    "QUANT_DESC_8BIT_CONV1D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_CONV3D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW",
    "QUANT_DESC_8BIT_CONVTRANSPOSE1D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_CONVTRANSPOSE2D_WEIGHT_PER_CHANNEL",
    "QUANT_DESC_8BIT_CONVTRANSPOSE3D_WEIGHT_PER_CHANNEL",
    "QuantDescriptor",
    "ScaledQuantDescriptor",
    "TensorQuantFunction",
    "FakeTensorQuantFunction",
    "LegacyFakeTensorQuantFunction",
    "FakeAffineTensorQuantFunction",
    "ScaledE4M3Function",
    "tensor_quant",
    "fake_tensor_quant",
    "legacy_fake_tensor_quant",
    "fake_affine_tensor_quant",
    "scaled_e4m3",
]

FP16_MAX = 65504.0


def is_traced() -> bool:
    """Check whether a graph is recorded (compile, export, TorchScript): values may not be looked at then."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def check_values(inputs: torch.Tensor, amax: torch.Tensor, unsigned: bool) -> None:
    """Refuse values that the scheme can't represent. Costs a pass over the input when unsigned.

    Raises:
        ValueError: a negative entry in ``amax``.
        TypeError: a negative entry in ``inputs`` with ``unsigned``.
    """
    if not isinstance(inputs, torch.Tensor):
        require_tensor(inputs, "the input")
    check_amax(amax)
    if unsigned:
        check_nonnegative(inputs)


def check_amax(amax: torch.Tensor) -> None:
    """Raise ValueError for a negative range (unless there are no values, on the meta device)."""
    if not isinstance(amax, torch.Tensor):
        require_tensor(amax, "amax")
    if amax.is_meta:
        return
    lowest = amax if amax.dim() == 0 else amax.amin() if amax.numel() else None
    if lowest is not None and lowest.item() < 0:
        raise ArgumentError(
            f"Negative values in amax (lowest {lowest.item():.6g}); a range is a largest magnitude"
        )


def check_nonnegative(inputs: torch.Tensor) -> None:
    """Raise TypeError for a negative input (unless there are no values)."""
    if inputs.is_meta or not inputs.numel():
        return
    # aminmax is the one reduction that torch vectorizes over the whole tensor.
    lowest = torch.aminmax(inputs.detach())[0].item()
    if lowest < 0:
        raise TypeError(
            f"Negative values encountered in unsigned quantization (lowest {lowest:.6g}); "
            "use a signed quantizer, or place it after the ReLU"
        )


class TensorQuantFunction(Function):
    """Autograd function of :func:`tensor_quant`: quantize to integer values.

    ``q`` holds integer values stored in the dtype of ``inputs`` (any shape); ``scale`` is ``bound / amax`` in
    the shape of ``amax`` and the dtype of ``inputs``, and 1 where the range is at most ``2**-24``.

    Args:
        inputs: any shape, floating point; never modified.
        amax: largest magnitude, a tensor that broadcasts to ``inputs``.
        num_bits, unsigned, narrow_range: as of :func:`tensor_quant`.

    Returns:
        ``(q, scale)``.

    Raises:
        ValueError: negative values in ``amax``; a scale that float16 can't hold.
        TypeError: negative inputs with ``unsigned``.

    Example:
        >>> values, scale = TensorQuantFunction.apply(torch.tensor([0.5, 2.0]), torch.tensor(1.0))
        >>> values
        tensor([ 64., 127.])
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        amax: torch.Tensor,
        num_bits: int = 8,
        unsigned: bool = False,
        narrow_range: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(inputs, amax)
        eager = not is_traced()
        if eager:
            check_values(inputs, amax, unsigned)
        scale, low, high = levels(amax, num_bits, unsigned, narrow_range)
        if eager and inputs.dtype == torch.float16 and not amax.is_meta and (scale > FP16_MAX).any():
            raise ArgumentError(
                f"scale is too large for FP16: {scale.max().item():.6g} > {FP16_MAX}; "
                f"the range {amax.min().item():.6g} is too small, quantize in float32"
            )
        q = (inputs.to(compute_dtype(inputs)) * scale).round_().clamp_(low, high)
        scale = scale.to(inputs.dtype)
        ctx.mark_non_differentiable(scale)
        return q.to(inputs.dtype), scale

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        inputs, amax = ctx.saved_tensors
        return ops.fake_quantize_backward(grads[0], inputs, amax), None, None, None, None


class FakeTensorQuantFunction(Function):
    """Autograd function of :func:`fake_tensor_quant`: quantize and dequantize.

    Args:
        inputs: any shape, floating point; never modified.
        amax: largest magnitude, a tensor that broadcasts to ``inputs``: 0-d, or ``[C, 1, 1, 1]``.
        num_bits, unsigned, narrow_range: as of :func:`tensor_quant`.

    Raises:
        ValueError: negative values in ``amax``.
        TypeError: negative inputs with ``unsigned``.

    Example:
        >>> FakeTensorQuantFunction.apply(torch.tensor([0.5, 2.0]), torch.tensor(1.0))
        tensor([0.5039, 1.0000])
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        amax: torch.Tensor,
        num_bits: int = 8,
        unsigned: bool = False,
        narrow_range: bool = True,
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs, amax)
        if not is_traced():
            check_values(inputs, amax, unsigned)
        return ops.fake_quantize(inputs, amax, num_bits, unsigned, narrow_range)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        inputs, amax = ctx.saved_tensors
        return ops.fake_quantize_backward(grads[0], inputs, amax), None, None, None, None


class LegacyFakeTensorQuantFunction(FakeTensorQuantFunction):
    """Autograd function of :func:`legacy_fake_tensor_quant`, the same as :class:`FakeTensorQuantFunction`.

    Args:
        inputs, amax, num_bits, unsigned, narrow_range: as of :class:`FakeTensorQuantFunction`.

    Example:
        >>> LegacyFakeTensorQuantFunction.apply(torch.tensor([0.5, 2.0]), torch.tensor(1.0))
        tensor([0.5039, 1.0000])
    """


class FakeAffineTensorQuantFunction(Function):
    """Autograd function of :func:`fake_affine_tensor_quant`: asymmetric, per tensor, with a zero point.

    ``step = (max - min) / (2**b - 1)``; ``zero = round(min / step) + 2**(b - 1)``;
    ``q = clamp(round(x / step) - zero, -2**(b - 1), 2**(b - 1) - 1)``; ``y = (q + zero) * step``.
    The ranges are 0-d tensors; the gradient passes where ``min <= x <= max``.

    Args:
        inputs: any shape, floating point; never modified.
        min_range, max_range: smallest and largest value, 0-d tensors.
        num_bits: of the integers.

    Example:
        >>> FakeAffineTensorQuantFunction.apply(torch.tensor([0.0, 9.0]), torch.tensor(0.0), torch.tensor(5.1))
        tensor([0.0000, 5.1000])
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, min_range: torch.Tensor, max_range: torch.Tensor, num_bits: int = 8
    ) -> torch.Tensor:
        for what, value in (("the input", inputs), ("min_range", min_range), ("max_range", max_range)):
            require_tensor(value, what)
        ctx.save_for_backward(inputs, min_range, max_range)
        compute = torch.float64 if inputs.dtype == torch.float64 else torch.float32
        half = 2 ** (num_bits - 1)
        step = (max_range - min_range).to(compute) / (2.0**num_bits - 1)
        zero = (min_range.to(compute) / step).round() + half
        q = ((inputs.to(compute) / step).round() - zero).clamp(-half, half - 1)
        return ((q + zero) * step).to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        inputs, min_range, max_range = ctx.saved_tensors
        inside = (inputs >= min_range) & (inputs <= max_range)
        return torch.where(inside, grads[0], 0.0), None, None, None


class ScaledE4M3Function(Function):
    """Autograd function of :func:`scaled_e4m3`: round to E4M3 values, scaled so that amax becomes 448.

    Ties go to even, magnitudes beyond 448 saturate, the smallest step is ``2**-9``. The gradient passes where
    ``|x| <= amax`` (448 without amax).

    Args:
        inputs: any shape, floating point; never modified.
        amax: magnitude that becomes 448; None leaves values unscaled.
        E, M: bits of exponent and mantissa; only 4 and 3.

    Raises:
        NotImplementedError: another E or M.
        ValueError: negative values in ``amax``.

    Example:
        >>> ScaledE4M3Function.apply(torch.tensor([1.03, 500.0]))
        tensor([  1., 448.])
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, amax: torch.Tensor | None = None, E: int = 4, M: int = 3
    ) -> torch.Tensor:
        if (E, M) != (4, 3):
            raise NotImplementedError(
                f"only E=4, M=3 is supported here, not E={E}, M={M}; see ops.fake_quantize_fp8"
            )
        if amax is not None and not is_traced():
            check_amax(amax)
        ctx.save_for_backward(inputs, amax)
        return ops.fake_quantize_fp8(inputs, amax, "e4m3")

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        inputs, amax = ctx.saved_tensors
        limit = amax if amax is not None else inputs.new_tensor(448.0, dtype=torch.float32)
        return ops.fake_quantize_backward(grads[0], inputs, limit), None, None, None


def tensor_quant(
    inputs: torch.Tensor,
    amax: torch.Tensor,
    num_bits: int = 8,
    unsigned: bool = False,
    narrow_range: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to integer values, with the gradient straight through: :class:`TensorQuantFunction`.

    Args:
        inputs: any shape, floating point; never modified.
        amax: largest magnitude, a tensor that broadcasts to ``inputs``: 0-d, or ``[C, 1, 1, 1]``.
        num_bits: of the integers.
        unsigned: from 0; refuses negative inputs.
        narrow_range: leave out the lowest integer, so that the range is symmetric.

    Returns:
        ``(q, scale)``: integer values in the dtype of ``inputs``, and ``bound / amax``; ``q / scale`` comes back.

    Raises:
        ValueError: negative values in ``amax``; a scale that float16 can't hold.
        TypeError: negative inputs with ``unsigned``.

    Example:
        >>> values, scale = tensor_quant(torch.tensor([0.5, 2.0]), torch.tensor(1.0), num_bits=8)
        >>> values, scale
        (tensor([ 64., 127.]), tensor(127.))
    """
    result: tuple[torch.Tensor, torch.Tensor] = TensorQuantFunction.apply(
        inputs, amax, num_bits, unsigned, narrow_range
    )
    return result


def fake_tensor_quant(
    inputs: torch.Tensor,
    amax: torch.Tensor,
    num_bits: int = 8,
    unsigned: bool = False,
    narrow_range: bool = True,
) -> torch.Tensor:
    """Quantize and dequantize a tensor, with the gradient of :class:`FakeTensorQuantFunction`: straight through.

    Args:
        inputs: any shape, floating point; never modified.
        amax, num_bits, unsigned, narrow_range: as of :func:`tensor_quant`.

    Returns:
        Values on the integer grid, in the dtype of ``inputs``.

    Raises:
        ValueError: negative values in ``amax``.
        TypeError: negative inputs with ``unsigned``.

    Example:
        >>> fake_tensor_quant(torch.tensor([0.5, 2.0]), torch.tensor(1.0))
        tensor([0.5039, 1.0000])
    """
    if not is_traced():
        check_values(inputs, amax, unsigned)
    return ops.fake_quantize(inputs, amax, num_bits, unsigned, narrow_range)


legacy_fake_tensor_quant = fake_tensor_quant
"""The same, under the name of the old toolkit's pure Python implementation."""


def fake_affine_tensor_quant(
    inputs: torch.Tensor, min_range: torch.Tensor, max_range: torch.Tensor, num_bits: int = 8
) -> torch.Tensor:
    """Quantize and dequantize a tensor with a zero point, per tensor: :class:`FakeAffineTensorQuantFunction`.

    Args:
        inputs: any shape, floating point; never modified.
        min_range, max_range: smallest and largest value, 0-d tensors.
        num_bits: of the integers.

    Returns:
        Values on the integer grid, in the dtype of ``inputs``.

    Example:
        >>> fake_affine_tensor_quant(torch.tensor([0.0, 9.0]), torch.tensor(0.0), torch.tensor(5.1))
        tensor([0.0000, 5.1000])
    """
    return FakeAffineTensorQuantFunction.apply(inputs, min_range, max_range, num_bits)


def scaled_e4m3(
    inputs: torch.Tensor, amax: torch.Tensor | None = None, E: int = 4, M: int = 3
) -> torch.Tensor:
    """Round a tensor to 8-bit floats (E4M3), scaled by a range: :class:`ScaledE4M3Function`.

    Args:
        inputs: any shape, floating point; never modified.
        amax: magnitude that becomes 448, the largest E4M3 value; None leaves values unscaled.
        E, M: bits of exponent and mantissa; no others than 4 and 3.

    Returns:
        The rounded values, in the dtype of ``inputs``.

    Example:
        >>> scaled_e4m3(torch.tensor([1.03, 500.0]))
        tensor([  1., 448.])
    """
    return ScaledE4M3Function.apply(inputs, amax, E, M)
