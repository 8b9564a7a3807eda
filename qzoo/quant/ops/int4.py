"""Integers of up to 4 bits as they are stored: two values to a byte, the first one in the low half.

The values are taken in row-major order whatever the strides; an odd number of them leaves the last high half 0.
Ranges per block work as everywhere: look at a weight ``[O, I]`` as ``[O, I / 32, 32]`` and give ranges
``[O, I / 32, 1]`` (see :mod:`qzoo.quant.block`).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from qzoo.errors import QuantizationError
from qzoo.quant.ops.integer import check_broadcast, dequantize_reference, quantize_reference
from qzoo.quant.ops.schema import declare, require_real, require_tensor


def _pack(q: Tensor) -> Tensor:
    if q.dtype not in (torch.int8, torch.uint8):
        raise QuantizationError(f"pack_int4 takes int8 or uint8, not {q.dtype}")
    flat = q.reshape(-1).view(torch.uint8) & 0x0F
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    pairs = flat.reshape(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)


def _unpack(packed: Tensor, unsigned: bool) -> Tensor:
    _check_packed(packed, 2 * packed.numel(), (2 * packed.numel(),))
    # A shift up and down again sign-extends. Each half is written in place: loading a large model would keep
    # every intermediate tensor's memory.
    halves = packed if unsigned else packed.view(torch.int8)
    values = halves.new_empty(2 * halves.numel())
    values[0::2] = halves & 0x0F if unsigned else (halves << 4).bitwise_right_shift_(4)
    values[1::2] = halves >> 4
    return values


def _quantize(x: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool) -> Tensor:
    _check_bits(num_bits)
    return _pack(quantize_reference(x, amax, num_bits, unsigned, narrow_range))


def _dequantize(
    packed: Tensor, amax: Tensor, shape: Sequence[int], num_bits: int, unsigned: bool, dtype: torch.dtype
) -> Tensor:
    _check_bits(num_bits)
    count = prod(shape)
    _check_packed(packed, count, shape)
    q = _unpack(packed, unsigned)[:count].reshape(tuple(shape))
    return dequantize_reference(q, amax, num_bits, unsigned, dtype)


def _check_bits(num_bits: int) -> None:
    if not 1 <= num_bits <= 4:
        raise QuantizationError(f"num_bits={num_bits} does not fit into 4 bits: use 1 to 4")


def _check_packed(packed: Tensor, count: int, shape: Sequence[int]) -> None:
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != (count + 1) // 2:
        raise QuantizationError(
            f"4-bit values of shape {tuple(shape)} need uint8 [{(count + 1) // 2}], "
            f"not {packed.dtype} {tuple(packed.shape)}"
        )


_pack_op = declare(
    "pack_int4",
    "(Tensor q) -> Tensor",
    _pack,
    lambda q: q.new_empty((q.numel() + 1) // 2, dtype=torch.uint8),
)
_unpack_op = declare(
    "unpack_int4",
    "(Tensor packed, bool unsigned) -> Tensor",
    _unpack,
    lambda packed, unsigned: packed.new_empty(
        2 * packed.numel(), dtype=torch.uint8 if unsigned else torch.int8
    ),
)
_quantize_op = declare(
    "quantize_int4",
    "(Tensor x, Tensor amax, int num_bits, bool unsigned, bool narrow_range) -> Tensor",
    _quantize,
    lambda x, amax, num_bits, unsigned, narrow_range: x.new_empty((x.numel() + 1) // 2, dtype=torch.uint8),
)
_dequantize_op = declare(
    "dequantize_int4",
    "(Tensor packed, Tensor amax, int[] shape, int num_bits, bool unsigned, ScalarType dtype) -> Tensor",
    _dequantize,
    lambda packed, amax, shape, num_bits, unsigned, dtype: packed.new_empty(shape, dtype=dtype),
)


def pack_int4(q: Tensor) -> Tensor:
    """Pack int8 values in -8 ... 7 (or uint8 in 0 ... 15) into uint8 `[(numel + 1) // 2]`.

    Raises:
        QuantizationError: another type, or a value that does not fit in 4 bits.
    """
    if q.dtype not in (torch.int8, torch.uint8):
        raise QuantizationError(f"pack_int4 takes int8 or uint8, not {q.dtype}")
    low, high = (0, 15) if q.dtype == torch.uint8 else (-8, 7)
    if q.numel() and not q.is_meta:
        least, most = torch.aminmax(q)
        if int(least) < low or int(most) > high:
            raise QuantizationError(
                f"pack_int4 got values outside {low} ... {high}, the range of 4-bit {q.dtype}"
            )
    packed: Tensor = _pack_op(q)
    return packed


def unpack_int4(packed: Tensor, shape: Sequence[int], unsigned: bool = False) -> Tensor:
    """Undo `pack_int4`: int8 (uint8 with `unsigned`) of the given shape, contiguous.

    Raises:
        QuantizationError: not uint8, or a number of bytes that the shape does not need.
    """
    count = prod(shape)
    _check_packed(packed, count, shape)
    values: Tensor = _unpack_op(packed, unsigned)
    return values[:count].reshape(tuple(shape))


def quantize_int4(
    x: Tensor, amax: Tensor, num_bits: int = 4, unsigned: bool = False, narrow_range: bool = True
) -> Tensor:
    """Quantize to integers of 1 to 4 bits and pack them, in one pass: uint8 `[(numel + 1) // 2]`.

    Equal to `pack_int4(quantize(x, amax, num_bits, unsigned, narrow_range))`; NaN becomes 0.

    Args:
        x: floating-point tensor of any shape and strides.
        amax: the range: 0-d, or a shape that broadcasts to `x`.

    Raises:
        QuantizationError: more than 4 bits, `amax` does not broadcast to `x`, or `x` is no floating-point tensor.
    """
    _check_bits(num_bits)
    require_real(x, "the input")
    require_tensor(amax, "amax")
    check_broadcast(x, amax)
    packed: Tensor = _quantize_op(x.detach(), amax.detach(), num_bits, unsigned, narrow_range)
    return packed


def dequantize_int4(
    packed: Tensor,
    amax: Tensor,
    shape: Sequence[int],
    num_bits: int = 4,
    unsigned: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Undo `quantize_int4` in one pass: `dtype` of the given shape, contiguous.

    Args:
        packed: uint8 `[(prod(shape) + 1) // 2]`.
        amax: the range it was quantized with; broadcasts to `shape`.

    Raises:
        QuantizationError: more than 4 bits, or bytes that the shape does not need.
    """
    _check_bits(num_bits)
    _check_packed(packed, prod(shape), shape)
    values: Tensor = _dequantize_op(packed.detach(), amax.detach(), list(shape), num_bits, unsigned, dtype)
    return values
