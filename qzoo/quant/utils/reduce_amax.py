"""Largest magnitude over chosen axes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qzoo.errors import ArgumentError
from qzoo.quant import ops
from qzoo.quant.ops.schema import require_tensor


@torch.no_grad()
def reduce_amax(
    input: torch.Tensor, axis: int | Sequence[int] | None = None, keepdims: bool = True
) -> torch.Tensor:
    """Reduce a tensor to the maximum of its magnitude over some axes, without gradient.

    Args:
        input: any shape.
        axis: the axes to **reduce**; negative counts from the end. None reduces all of them.
        keepdims: keep reduced axes with length 1.

    Returns:
        0-d for ``axis=None``, and for a tuple or list when a single element is left; otherwise the shape of
        ``input`` without (or with length 1 in) the reduced axes. An empty sequence reduces nothing.

    Raises:
        ValueError: more axes than dimensions, or an axis out of range.

    Example:
        >>> reduce_amax(torch.tensor([[1.0, -3.0], [2.0, 0.0]]), axis=1, keepdims=False)
        tensor([3., 2.])
    """
    require_tensor(input, "input")
    if axis is None:
        return _amax(input, [])
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    if len(axes) > input.dim():
        raise ArgumentError(
            f"Cannot reduce {len(axes)} axes {axes} of a tensor with {input.dim()} dimensions"
        )
    reduced = normalize_axes(axes, input.dim())
    output = _amax(input, [d for d in range(input.dim()) if d not in reduced])
    output = output.reshape([1 if d in reduced else n for d, n in enumerate(input.shape)])
    if not isinstance(axis, int) and output.numel() == 1 and reduced:
        return output.reshape(())
    if not keepdims:
        output = output.reshape([n for d, n in enumerate(output.shape) if d not in reduced])
    return output


def _amax(input: torch.Tensor, keep: list[int]) -> torch.Tensor:
    # The fused op works in float32; what float32 can't hold exactly takes torch's own reduction.
    if input.is_floating_point() and input.dtype != torch.float64:
        return ops.reduce_amax_op(input, keep).to(input.dtype)
    magnitude = input.abs()
    reduced = [d for d in range(input.dim()) if d not in keep]
    if not keep:
        return magnitude.max() if magnitude.numel() else magnitude.new_zeros(())
    return magnitude.amax(dim=reduced, keepdim=True) if reduced else magnitude


def normalize_axes(axes: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """Normalize axes: non-negative, sorted, no repeats. Raises ValueError for an axis that the tensor doesn't have."""
    several = (axes,) if isinstance(axes, int) else tuple(axes)
    for a in several:
        if not -rank <= a < rank:
            raise ArgumentError(f"axis {a} is out of range for a tensor with {rank} dimensions")
    return tuple(sorted({a % rank for a in several}))
