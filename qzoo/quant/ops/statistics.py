"""Statistics of `|x|` for calibration: the largest magnitude and a histogram, each in one pass over the
data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qzoo.errors import QuantizationError
from qzoo.quant.ops.schema import declare

# ---- largest magnitude ----


def _kept_shape(x: Tensor, keep_axes: Sequence[int]) -> list[int]:
    axes = {axis % x.dim() for axis in keep_axes}
    return [n if axis in axes else 1 for axis, n in enumerate(x.shape)] if axes else []


def _reduce_amax(x: Tensor, keep_axes: Sequence[int]) -> Tensor:
    shape = _kept_shape(x, keep_axes)
    if x.numel() == 0:
        return torch.zeros(shape, dtype=torch.float32, device=x.device)
    if not x.dtype.is_floating_point:
        x = x.to(torch.float32)  # the most negative integer has no absolute value of its own type
    reduced = [axis for axis, n in enumerate(shape) if n == 1] if shape else list(range(x.dim()))
    if not reduced:
        return x.abs().to(torch.float32)
    # two reductions instead of abs().amax(): no temporary of the size of x
    largest = torch.maximum(x.amax(reduced, keepdim=True), x.amin(reduced, keepdim=True).neg())
    return largest.to(torch.float32).abs().reshape(shape)


_amax_op = declare(
    "reduce_amax",
    "(Tensor x, int[] keep_axes) -> Tensor",
    _reduce_amax,
    lambda x, keep_axes: x.new_empty(_kept_shape(x, keep_axes), dtype=torch.float32),
)


def reduce_amax_op(x: Tensor, keep_axes: Sequence[int] = ()) -> Tensor:
    """Reduce to the largest `|x|` over all axes but `keep_axes`, which keep their place; the others have length 1.

    Returns float32, 0-d when no axis is kept. NaN propagates; a range over no elements is 0. Not
    differentiable.

    Raises:
        QuantizationError: an axis that `x` does not have.
    """
    axes = list(keep_axes)
    if any(not -x.dim() <= axis < x.dim() for axis in axes):
        raise QuantizationError(
            f"keep_axes={axes} names an axis that an input of shape {tuple(x.shape)} lacks"
        )
    result: Tensor = _amax_op(x.detach(), axes)
    return result


# ---- histogram ----


def _histogram(
    counts: Tensor, x: Tensor, width: float, limit: float, above: float, skip_zeros: bool
) -> Tensor:
    magnitude = x.detach().to(torch.float32).abs().flatten()
    stats = torch.zeros(2, dtype=torch.float64, device=x.device)
    if magnitude.numel() == 0:
        return stats
    stats[0] = magnitude.amax()
    # a tensor with NaN or infinity counts nothing, so that the caller can refuse it and keep what it has
    binned = (magnitude <= limit) & (magnitude > above) & torch.isfinite(stats[0])
    if skip_zeros:
        binned &= magnitude != 0
    stats[1] = (magnitude > limit).sum()
    index = torch.floor(magnitude / torch.tensor(width, dtype=torch.float32, device=x.device))
    index = index.clamp_(max=counts.numel() - 1).masked_fill_(~binned, 0).to(torch.int64)
    counts.scatter_add_(0, index, binned.to(torch.int64))
    return stats


_histogram_op = declare(
    "histogram_",
    "(Tensor(a!) counts, Tensor x, float width, float limit, float above, bool skip_zeros) -> Tensor",
    _histogram,
    lambda counts, x, width, limit, above, skip_zeros: x.new_empty(2, dtype=torch.float64),
)


def histogram_(
    counts: Tensor,
    x: Tensor,
    width: float,
    *,
    limit: float | None = None,
    above: float = -1.0,
    skip_zeros: bool = False,
) -> tuple[float, int]:
    """Add a histogram of `|x|` to `counts`, and report the maximum and what did not fit, in one pass.

    Args:
        counts: int64 `[bins]`, changed in place; exact at any size.
        x: any real type and shape; `|x|` is taken in float32.
        width: width of each bin (rounded to float32). The bin of a value is `floor(|x| / width)` in float32.
        limit: the last edge, `width * bins` unless given; a value beyond the last bin but at most `limit`
            belongs to the last bin. Give the exact maximum where `width` was derived from it.
        above: count only `|x| > above`. After growing the bins, a second pass with the old limit adds exactly
            the values that overflowed.
        skip_zeros: leave exact zeros out.

    Returns:
        `(largest |x|, number of values beyond limit)`. A NaN or an infinity shows in the maximum, and then
        nothing has been counted.

    Raises:
        QuantizationError: `counts` is not a one-dimensional int64 tensor with at least one bin, or `width` is
            not a positive finite float32.
    """
    if counts.dtype != torch.int64 or counts.dim() != 1 or counts.numel() == 0:
        raise QuantizationError(
            f"counts must be int64 of shape [bins], not {counts.dtype} {tuple(counts.shape)}"
        )
    if not 1.2e-38 < width < 3.4e38:
        raise QuantizationError(
            f"width={width} is not a positive normal float32: scale the data or use fewer bins"
        )
    limit = width * counts.numel() if limit is None else limit
    largest, overflow = _histogram_op(counts, x.detach(), width, limit, above, skip_zeros).tolist()
    return largest, int(overflow)


def histogram_rows(x: Tensor, num_bins: int) -> tuple[Tensor, Tensor]:
    """Return one histogram of `|x|` per row of `x` `[rows, ...]`, each over `[0, its own maximum]`.

    Returns:
        `(counts int64 [rows, num_bins], maximum float32 [rows])`. The row of a channel of zeros, or of a
        maximum too small to divide into bins, has all its values in bin 0. Rows are equal, count for count,
        to `histogram_` on each row alone.
    """
    rows = x.detach().reshape(x.shape[0], -1)
    maximum = reduce_amax_op(rows, [0]).reshape(-1)
    counts = torch.zeros(rows.shape[0], num_bins, dtype=torch.int64, device=x.device)
    for row, bins, largest in zip(rows, counts, maximum.tolist(), strict=True):
        width = largest / num_bins
        if width > 1.2e-38:
            histogram_(bins, row, width, limit=largest)
        else:
            bins[0] = row.numel()
    return counts, maximum
