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
from qzoo.quant.ops.numbers import TINY
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
    """Find the bin edge whose quantized distribution is closest to the original in relative entropy; its index.

    The candidates are the edges `start_bin, start_bin + stride, ...` (the last edge alone when there are
    fewer bins). Bin 0 counts as bin 1 does: a spike of zeros says nothing about the range. `counts` is not
    changed. The last of several equal candidates wins. A histogram without any count gives the last edge.

    Raises:
        QuantizationError: `counts` is not one-dimensional int64 with at least one bin, or `stride` or
            `start_bin` is below 1.
    """
    _check(counts, stride, start_bin, 1)
    counts = _search(counts).clone()
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
    """Find the bin centre that, taken as the range, gives the least squared error: its index, int64
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
    here: Tensor = _mse_op(_search(counts), _search(centers), num_bits, unsigned, start_bin, stride)
    return here.to(counts.device)


def _search(x: Tensor) -> Tensor:
    """Where the search runs. A histogram is a few thousand numbers: a GPU's goes to the CPU, which has the kernel,
    and the index comes back."""
    return x.detach().cpu() if x.is_cuda else x.detach()


def _check(counts: Tensor, stride: int, start_bin: int, rank: int) -> None:
    if counts.dtype != torch.int64 or counts.dim() != rank or rank < 1 or counts.shape[-1] == 0:
        raise QuantizationError(f"counts must be int64 [..., bins], not {counts.dtype} {tuple(counts.shape)}")
    if stride < 1 or start_bin < 1:
        raise QuantizationError(f"stride={stride} and start_bin={start_bin} must be at least 1")


# ---- both ends ----

_SIGNED_BINS = 4096
_GRID = 24
"""Candidates for each end in the first round of a search."""


def search_limits(signed: Tensor, width: float, ends: Tensor, num_bits: int, method: str) -> Tensor:
    """Return both ends of the affine range that loses least, float32 `[2]`, where `signed` lies.

    Candidates are shares of the two ends: first a grid of 24 for each. Around the best, squared errors are searched in
    finer grids; relative entropies bin by bin, one end after the other. The costs are those of :func:`mse_search` and
    :func:`entropy_search`, with the codes of :func:`qzoo.quant.ops.fake_quantize_affine`.

    Args:
        signed: int64 `[2 bins]`: counts from the lowest bin to the highest, zero in the middle.
        width: of a bin.
        ends: the lowest and the highest value, `[2]`, zero or beyond.
        num_bits: of the codes.
        method: `"mse"` or `"entropy"`.

    Raises:
        QuantizationError: `signed` has another shape or type.
    """
    if signed.dtype != torch.int64 or signed.dim() != 1 or len(signed) % 2 or not len(signed):
        raise QuantizationError(f"counts must be int64 [2 bins], not {signed.dtype} {tuple(signed.shape)}")
    counts, factor = _merge(_search(signed))
    search = _squares if method == "mse" else _divergence
    limits: Tensor = search(counts, width * factor, ends.detach().cpu().double(), num_bits)
    return limits.float().to(signed.device)


def _shares(low: Tensor, high: Tensor, ends: Tensor) -> Tensor:
    """All pairs of shares of the ends, the widest first, `[pairs, 2]`."""
    pairs = torch.cartesian_prod(low if ends[0] < 0 else low[:1], high if ends[1] > 0 else high[:1])
    return pairs * ends


def _squares(counts: Tensor, width: float, ends: Tensor, num_bits: int) -> Tensor:
    cost = _Squares(counts, width, num_bits)
    low = high = torch.arange(_GRID, 0, -1, dtype=torch.float64) / _GRID
    step = 1 / _GRID
    for _ in range(3):
        pairs = _shares(low, high, ends)
        best = pairs[cost(pairs).argmin()]
        step /= 4
        near = torch.arange(4, -5, -1, dtype=torch.float64) * step
        low, high = ((share + near).clamp(step, 1.0) for share in torch.where(ends == 0, 1.0, best / ends))
    return best


def _divergence(counts: Tensor, width: float, ends: Tensor, num_bits: int) -> Tensor:
    cost, bins = _Divergence(counts, num_bits), len(counts)
    grid = torch.arange(_GRID, 0, -1, dtype=torch.float64) / _GRID
    outer = torch.stack([(ends[0] / width).floor(), (ends[1] / width).ceil()]).long() + bins // 2
    outer = outer.clamp(0, bins)
    windows = (_shares(grid, grid, ends) / width).round().long() + bins // 2
    best = _least(cost, windows.clamp(0, bins))
    for _ in range(2):
        high = torch.arange(int(outer[1]), bins // 2 - 1, -1)
        best = _least(cost, torch.stack([best[0].expand(len(high)), high], 1))
        low = torch.arange(int(outer[0]), bins // 2 + 1)
        best = _least(cost, torch.stack([low, best[1].expand(len(low))], 1))
    return (best - bins // 2) * width


def _least(cost: _Divergence, windows: Tensor) -> Tensor:
    """The first, widest window whose cost is the least, up to rounding."""
    costs = cost(windows)
    return windows[int((costs <= costs.min() + _TIE).nonzero()[0])]


def _merge(signed: Tensor) -> tuple[Tensor, int]:
    """Bins few enough for a search: neighbours merged, and how many."""
    factor = -(-len(signed) // _SIGNED_BINS)
    lower, upper = signed[: len(signed) // 2], signed[len(signed) // 2 :]
    missing = -len(lower) % factor
    both = torch.cat(
        [torch.nn.functional.pad(lower, (missing, 0)), torch.nn.functional.pad(upper, (0, missing))]
    )
    return both.reshape(-1, factor).sum(1), factor


class _Squares:
    """Squared error of the bins' centres, for rows of candidates."""

    def __init__(self, counts: Tensor, width: float, num_bits: int) -> None:
        held = counts > 0
        centers = (torch.arange(len(counts), dtype=torch.float64) + 0.5 - len(counts) // 2) * width
        self.centers, self.weights = centers[held].float(), counts[held].float() / counts.sum()
        self.top = 2.0**num_bits - 1

    def __call__(self, limits: Tensor) -> Tensor:
        parts = limits.float().split(max(1, 2**20 // max(len(self.centers), 1)))
        return torch.cat([self._costs(part) for part in parts])

    def _costs(self, limits: Tensor) -> Tensor:
        low, high = limits[:, :1], limits[:, 1:]
        scale = (high - low).clamp(min=TINY) / self.top
        zero = (-low / scale).round().clamp(0, self.top)
        y = (self.centers / scale).round_().clamp_(-zero, self.top - zero).mul_(scale)
        return y.sub_(self.centers).square_() @ self.weights


class _Divergence:
    """Relative entropy of the counts and of their quantized form, as in :func:`entropy_search`, for rows of candidates.

    The window between two ends is cut into as many groups as there are codes; what lies beyond goes to its outermost
    bins. A window with fewer bins than codes costs infinitely much.
    """

    def __init__(self, counts: Tensor, num_bits: int) -> None:
        middle = len(counts) // 2
        counts = counts.clone()
        if middle > 1:
            counts[middle] = counts[middle + 1]  # a spike of zeros says nothing about the range
        self.counts, self.groups = counts, 2**num_bits
        zero = torch.zeros(1, dtype=torch.int64)
        self.mass = torch.cat([zero, counts.cumsum(0)])
        self.filled = torch.cat([zero, (counts > 0).cumsum(0)])
        self.plogp = torch.cat([zero.double(), _xlogx(counts.double()).cumsum(0)])

    def __call__(self, windows: Tensor) -> Tensor:
        return torch.cat([self._costs(*part.unbind(1)) for part in windows.split(2**21 // self.groups)])

    def _costs(self, a: Tensor, b: Tensor) -> Tensor:
        size, total = b - a, self.mass[-1].double()
        cuts = a[:, None] + (torch.arange(self.groups + 1) * size[:, None] + self.groups - 1) // self.groups
        mass, filled = self.mass[cuts].diff(dim=1).double(), self.filled[cuts].diff(dim=1).double()
        level = torch.where(filled > 0, mass / filled, 1.0).log()
        first, last = (self.counts[at.clamp(0, len(self.counts) - 1)].double() for at in (a, b - 1))
        below, above = self.mass[a].double(), total - self.mass[b]
        p_terms = self.plogp[b] - self.plogp[a] - _xlogx(first) - _xlogx(last)
        p_terms += _xlogx(first + below) + _xlogx(last + above)
        last_level = level.gather(1, ((size - 1) * self.groups // size.clamp(min=1))[:, None].clamp(min=0))[
            :, 0
        ]
        q_terms = (mass * level).sum(1) + below * level[:, 0] + above * last_level
        inside = (self.mass[b] - self.mass[a]).double()
        cost = (p_terms - q_terms) / total - total.log() + inside.log()
        impossible = ((first == 0) & (below > 0)) | ((last == 0) & (above > 0)) | (inside == 0)
        return torch.where(impossible | (size < self.groups), torch.inf, cost)
