"""Searches over a histogram for the range that loses least: relative entropy and mean squared error.

Papers: entropy, "8-bit Inference with TensorRT" (Migacz, GTC 2017); squared error, "Low-bit Quantization of Neural
Networks for Efficient Inference" (Choukroun et al., 2019, arXiv:1902.06822).

Both are written for whole rows of candidates at once. With prefix sums a candidate of the entropy search
costs one logarithm per group, not one per bin. They run on the CPU wherever the histogram lies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qzoo.errors import QuantizationError
from qzoo.quant.ops.float8 import fake_quantize_fp8
from qzoo.quant.ops.integer import fake_quantize
from qzoo.quant.ops.schema import declare

_FLOATS = {(4, 3): -1, (5, 2): -2}  # how the operator is told of floating-point formats
_TIE = 1e-12  # relative entropies closer than this differ only by rounding


def _candidates(counts: Tensor, start: int, stride: int, first_beyond: int) -> Tensor:
    bins = counts.shape[-1]
    return torch.arange(min(start, bins), bins + first_beyond, stride, device=counts.device)


# ---- entropy ----


def _xlogx(x: Tensor) -> Tensor:
    return torch.special.xlogy(x, x)


def _entropy_costs(counts: Tensor, groups: int, start: int, stride: int) -> Tensor:
    """KL(P || Q) per candidate edge i = start, start + stride, ... up to the number of bins."""
    i = _candidates(counts, start, stride, 1)
    zero = torch.zeros(1, dtype=torch.int64, device=counts.device)
    mass = torch.cat([zero, counts.cumsum(0)])  # exact: mass[j] = what lies in the first j bins
    filled = torch.cat([zero, (counts > 0).cumsum(0)])
    plogp = torch.cat([zero.double(), _xlogx(counts.double()).cumsum(0)])
    total, inside = mass[-1], mass[i]
    # group g of candidate i holds the bins ceil(g * i / groups) ... ceil((g + 1) * i / groups) - 1
    edges = (torch.arange(groups + 1, device=i.device)[None, :] * i[:, None] + groups - 1) // groups
    group_mass = mass[edges].diff(dim=1).double()
    group_filled = filled[edges].diff(dim=1).double()
    # sum over bins of P log P, where the last bin also carries everything beyond the candidate
    last = counts[i - 1]
    beyond = total - inside
    p_terms = plogp[i] - _xlogx(last.double()) + _xlogx((last + beyond).double())
    # sum of P log Q: within a group Q is constant over the bins that hold anything
    level = torch.where(group_filled > 0, group_mass / group_filled, 1.0).log()
    last_level = level.gather(1, ((i - 1) * groups // i)[:, None])[:, 0]
    q_terms = (group_mass * level).sum(1) + beyond * last_level
    t, s = total.double(), inside.double()
    cost = (p_terms - q_terms) / t - t.log() + s.log()
    impossible = ((last == 0) & (beyond > 0)) | (inside == 0)  # P has mass where Q has none
    return torch.where(impossible, torch.inf, cost)


_entropy_op = declare(
    "entropy_costs",
    "(Tensor counts, int groups, int start, int stride) -> Tensor",
    _entropy_costs,
    lambda counts, groups, start, stride: counts.new_empty(
        len(range(min(start, counts.numel()), counts.numel() + 1, stride)), dtype=torch.float64
    ),
)


def entropy_search(
    counts: Tensor, num_bits: int = 8, unsigned: bool = False, *, stride: int = 1, start_bin: int = 128
) -> int:
    """Index of the bin edge whose quantized distribution is closest to the original in relative entropy.

    The candidates are the edges `start_bin, start_bin + stride, ...` (the last edge alone when there are
    fewer bins). Bin 0 counts as bin 1 does: a spike of zeros says nothing about the range. `counts` is not
    changed. The last of several equal candidates wins. A histogram without any count gives the last edge.

    Raises:
        QuantizationError: `counts` is not one-dimensional int64 with at least one bin, or `stride` or
            `start_bin` is below 1.
    """
    _check(counts, stride, start_bin, 1)
    counts = _searched(counts).clone()
    if counts.numel() > 1:
        counts[0] = counts[1]
    groups = 2 ** (num_bits - 1 + unsigned)
    costs = _entropy_op(counts, groups, start_bin, stride)
    best = costs.min()
    if not torch.isfinite(best):
        return counts.numel()
    last = int((costs <= best + _TIE).nonzero()[-1])
    return min(start_bin, counts.numel()) + last * stride


# ---- mean squared error ----


def _mse_search(
    counts: Tensor, centers: Tensor, num_bits: int, unsigned: bool, start: int, stride: int
) -> Tensor:
    bins = counts.shape[-1]
    candidates = _candidates(counts, min(start, bins - 1), stride, 0)
    chunk = max(1, 2**20 // bins)  # bounds the temporaries
    best = []
    for row_counts, row_centers in zip(counts.reshape(-1, bins), centers.reshape(-1, bins), strict=True):
        held = row_counts > 0
        weight, value = row_counts[held].double(), row_centers[held]
        costs = []
        for part in candidates.split(chunk):
            amax = row_centers[part][:, None]
            x = value.expand(len(part), -1).contiguous()
            if num_bits < 0:
                y = fake_quantize_fp8(x, amax, "e4m3" if num_bits == _FLOATS[4, 3] else "e5m2")
            else:
                y = fake_quantize(x, amax, num_bits, unsigned)
            costs.append((y - x).double().square_().mul_(weight).sum(1))
        best.append(candidates[torch.cat(costs).argmin()])
    return torch.stack(best).reshape(counts.shape[:-1])


_mse_op = declare(
    "mse_search",
    "(Tensor counts, Tensor centers, int num_bits, bool unsigned, int start, int stride) -> Tensor",
    _mse_search,
    lambda counts, centers, num_bits, unsigned, start, stride: counts.new_empty(counts.shape[:-1]),
)


def mse_search(
    counts: Tensor,
    centers: Tensor,
    num_bits: int | tuple[int, int] = 8,
    unsigned: bool = False,
    *,
    stride: int = 1,
    start_bin: int = 128,
) -> Tensor:
    """Index of the bin centre that, taken as the range, gives the least squared error; int64
    `counts.shape[:-1]`.

    Args:
        counts: int64 `[..., bins]`: one histogram, or one per channel.
        centers: float32, the shape of `counts`.
        num_bits: bits of the integer format (narrow range), or `(4, 3)` for E4M3, `(5, 2)` for E5M2.

    The candidates are the centres `start_bin, start_bin + stride, ...` (the last one alone when there are
    fewer bins); the first of several equal ones wins.

    Raises:
        QuantizationError: shapes or types that do not fit, or `stride` or `start_bin` out of range.
    """
    _check(counts, stride, start_bin, counts.dim())
    if centers.shape != counts.shape or centers.dtype != torch.float32:
        raise QuantizationError(
            f"centers must be float32 of shape {tuple(counts.shape)}, "
            f"not {centers.dtype} {tuple(centers.shape)}"
        )
    if isinstance(num_bits, tuple):
        if num_bits not in _FLOATS:
            raise QuantizationError(
                f"num_bits={num_bits} is not a known format: use an int, (4, 3) or (5, 2)"
            )
        num_bits = _FLOATS[num_bits]
    here: Tensor = _mse_op(_searched(counts), _searched(centers), num_bits, unsigned, start_bin, stride)
    return here.to(counts.device)


def _searched(x: Tensor) -> Tensor:
    """Where the search runs. A histogram is a few thousand numbers: a GPU's goes to the CPU, which has the kernel,
    and the index comes back."""
    return x.detach().cpu() if x.is_cuda else x.detach()


def _check(counts: Tensor, stride: int, start_bin: int, rank: int) -> None:
    if counts.dtype != torch.int64 or counts.dim() != rank or rank < 1 or counts.shape[-1] == 0:
        raise QuantizationError(f"counts must be int64 [..., bins], not {counts.dtype} {tuple(counts.shape)}")
    if stride < 1 or start_bin < 1:
        raise QuantizationError(f"stride={stride} and start_bin={start_bin} must be at least 1")
