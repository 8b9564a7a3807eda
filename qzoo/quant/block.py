"""Ranges per block: groups of neighbours along one axis that share a range.

A tensor ``[.., n, ..]`` is looked at as ``[.., n / size, size, ..]``; a range that keeps the axis of groups
and reduces the one of members is then an ordinary range per several axes. Stored ranges leave the member axis
out: a weight ``[O, I, 3, 3]`` with ``axis=0, block=(1, 32)`` has ranges ``[O, I / 32, 1, 1]``.
"""

from __future__ import annotations

import torch

from qzoo.errors import QuantizationError
from qzoo.quant.descriptor import Axis
from qzoo.quant.utils.reduce_amax import normalize_axes

Block = tuple[int, int]


def split(x: torch.Tensor, block: Block) -> torch.Tensor:
    """Reshape ``[.., n, ..]`` to ``[.., n / size, size, ..]``.

    Raises:
        QuantizationError: the axis doesn't divide into blocks.
    """
    (axis,) = normalize_axes(block[0], x.dim())
    size, length = block[1], x.shape[axis]
    if length % size:
        raise QuantizationError(
            f"axis {axis} of a tensor of shape {tuple(x.shape)} doesn't divide into blocks of {size}"
        )
    return x.reshape(*x.shape[:axis], length // size, size, *x.shape[axis + 1 :])


def spread(amax: torch.Tensor, block: Block, rank: int) -> torch.Tensor:
    """Return a stored range with the member axis as length 1: it broadcasts to what :func:`split` returns."""
    (axis,) = normalize_axes(block[0], rank)
    return amax.unsqueeze(axis + 1) if amax.dim() == rank else amax


def squeeze(amax: torch.Tensor, block: Block, rank: int) -> torch.Tensor:
    """Undo :func:`spread`."""
    (axis,) = normalize_axes(block[0], rank)
    return amax.squeeze(axis + 1) if amax.dim() == rank + 1 else amax


def kept_axes(axis: Axis, block: Block, rank: int) -> list[int]:
    """Return the axes with a range of their own, counted in the split tensor."""
    (group,) = normalize_axes(block[0], rank)
    axes = set(normalize_axes(axis, rank)) if axis is not None else set()
    return sorted({a if a <= group else a + 1 for a in axes} | {group})
