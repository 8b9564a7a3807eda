"""Integers packed for storage: two 4-bit values to a byte."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from qzoo.errors import QuantizationError


def pack_int4(q: Tensor) -> Tensor:
    """Pack int8 values in -8 ... 7 (or uint8 in 0 ... 15) into uint8 `[(numel + 1) // 2]`, first value in the
    low half.

    The values are taken in row-major order whatever the strides; an odd number of them leaves the last high
    half 0.

    Raises:
        QuantizationError: another type, or a value that does not fit in 4 bits.
    """
    if q.dtype not in (torch.int8, torch.uint8):
        raise QuantizationError(f"pack_int4 takes int8 or uint8, not {q.dtype}")
    low, high = (0, 15) if q.dtype == torch.uint8 else (-8, 7)
    if q.numel() and not q.is_meta and bool(((q < low) | (q > high)).any()):
        raise QuantizationError(
            f"pack_int4 got values outside {low} ... {high}, the range of 4-bit {q.dtype}"
        )
    flat = q.reshape(-1).view(torch.uint8) & 0x0F
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    pairs = flat.reshape(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)


def unpack_int4(packed: Tensor, shape: Sequence[int], unsigned: bool = False) -> Tensor:
    """Undo `pack_int4`: int8 (uint8 with `unsigned`) of the given shape, contiguous.

    Raises:
        QuantizationError: not uint8, or a number of bytes that the shape does not need.
    """
    count = prod(shape)
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != (count + 1) // 2:
        raise QuantizationError(
            f"unpack_int4 to shape {tuple(shape)} needs uint8 [{(count + 1) // 2}], "
            f"not {packed.dtype} {tuple(packed.shape)}"
        )
    # A shift up and down again sign-extends. Each half is written in place: loading a large model would keep
    # every intermediate tensor's memory.
    halves = packed if unsigned else packed.view(torch.int8)
    values = halves.new_empty(2 * halves.numel())
    low = halves & 0x0F if unsigned else (halves << 4).bitwise_right_shift_(4)
    values[0::2] = low
    values[1::2] = halves >> 4
    return values[:count].reshape(tuple(shape))
