"""``HistogramCalibrator``: the range from a histogram of magnitudes."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch

from qzoo.errors import ArgumentError, NonFiniteError
from qzoo.quant import ops
from qzoo.quant.calib.calibrator import _Calibrator
from qzoo.quant.descriptor import Axis, Bits
from qzoo.quant.ops.schema import require_tensor

__all__ = ["HistogramCalibrator"]

logger = logging.getLogger(__name__)

MAX_BINS = 1 << 16
"""Where growing stops and neighbouring bins are merged instead."""

SMALLEST_RANGE = 2.0**-100
"""A maximum below this can't be divided into float32 bins; it counts as zero."""


class HistogramCalibrator(_Calibrator):
    """Calibrator that counts a histogram of ``|x|`` over all batches, with exact integer counts.

    The first batch makes ``num_bins`` equal bins over ``[0, max]``; a later, larger batch appends bins of the
    same width. Beyond :data:`MAX_BINS` neighbouring bins are merged, two at a time. Value ``v`` is counted in
    bin ``floor(v / width)``, the last edge in the last bin, whichever of torch and numpy holds the counts.

    Batches of zeros before the first other value are remembered as zeros. Empty batches change nothing.

    What lay on the last edge when bins are appended stays in the bin it was counted in; with ``any_order`` it
    moves into the bin that starts there. Then the width alone depends on the first batch; the counts depend
    neither on the order of the batches nor on which of several calibrators of one width counted them before a
    :meth:`merge` (exactly so where ``num_bins`` is a power of two).

    Args:
        num_bits, unsigned: see :class:`_Calibrator`.
        axis: must be None.
        num_bins: bins of the first batch.
        grow_method: accepted and ignored (with a warning).
        skip_zeros: leave exact zeros out.
        torch_hist: keep tensors, where the data is; False keeps numpy arrays.
        any_order: see above.
        two_ended: count what lies below zero on its own as well, for :meth:`compute_limits`.

    Raises:
        NotImplementedError: an axis.

    Example:
        >>> calibrator = HistogramCalibrator(num_bits=8, axis=None, unsigned=False)
        >>> calibrator.collect(torch.linspace(-1, 1, 101))
        >>> calibrator.compute_amax("percentile", percentile=99.0)
        tensor(0.9995)
    """

    def __init__(
        self,
        num_bits: Bits,
        axis: Axis | list[int],
        unsigned: bool,
        num_bins: int = 2048,
        grow_method: str | None = None,
        skip_zeros: bool = False,
        torch_hist: bool = True,
        any_order: bool = False,
        two_ended: bool = False,
    ) -> None:
        super().__init__(num_bits, axis, unsigned, two_ended)
        if axis is not None:
            raise NotImplementedError(
                f"Calibrator histogram collection only supports per tensor scaling, not axis={axis}; "
                "use calib_method='max', or calibrate_weights for weights"
            )
        if num_bins < 1:
            raise ArgumentError(f"num_bins must be at least 1, not {num_bins}")
        if grow_method is not None:
            logger.warning("grow_method is deprecated and ignored; the bins always grow by appending")
        self._num_bins = num_bins
        self._skip_zeros = skip_zeros
        self._torch_hist = torch_hist
        self._any_order = any_order
        self.reset()

    def reset(self) -> None:
        """Forget everything collected."""
        # [rows, bins + 1]: the bins, and as one more what lies on the last edge; first of all values, then, where both
        # ends are wanted, of the negative ones alone.
        self._raw: torch.Tensor | None = None
        self._width = 0.0
        self._limit = 0.0
        self._largest = 0.0
        self._lowest, self._highest = math.inf, -math.inf

    @property
    def has_bins(self) -> bool:
        """Whether the width of the bins is fixed: a value above zero was seen."""
        return self._width > 0

    def to(self, device: torch.device) -> None:
        """Move the counts to a device."""
        if self._raw is not None:
            self._store(self._raw.to(device), self._width, self._limit)

    @property
    def _calib_hist(self) -> Any:
        """The counts, int64 [bins], a copy: a tensor, or a numpy array as asked for; None before data."""
        if self._raw is None:
            return None
        counts = _whole_bins(self._raw)[0]
        return counts if self._torch_hist else counts.numpy()

    @property
    def _calib_bin_edges(self) -> Any:
        """The edges of the bins, float32 [bins + 1], as the counts are; None before data."""
        if self._raw is None:
            return None
        edges = torch.arange(self._raw.shape[1], dtype=torch.float64, device="cpu") * self._width
        edges = edges.to(torch.float32)
        edges[-1] = self._limit
        return edges.to(self._raw.device) if self._torch_hist else edges.numpy()

    @torch.no_grad()
    def collect(self, x: torch.Tensor) -> None:
        """Count one batch.

        Raises:
            NonFiniteError: NaN or infinity in ``x``; nothing of the batch is counted then.
        """
        require_tensor(x, "the calibration data")
        x = x.detach()
        if not self._torch_hist:
            x = x.cpu()
        if not x.numel():
            return
        if self._raw is None or self._width == 0.0:
            self._first(x)
            return
        raw = self._raw
        x = x.to(raw.device)
        largest, overflow = ops.histogram_(
            raw[0], x, self._width, limit=self._limit, skip_zeros=self._skip_zeros
        )
        self._require_finite(largest, x)
        self._largest = max(self._largest, largest)
        if overflow:
            before = self._limit
            raw = self._grow(raw, largest)
            ops.histogram_(raw[0], x, self._width, limit=self._limit, above=before)
        if self._two_ended:
            self._count_negative(raw, x)

    def _count_negative(self, raw: torch.Tensor, x: torch.Tensor) -> None:
        low, high = (end.item() for end in x.aminmax())
        self._lowest, self._highest = min(self._lowest, low), max(self._highest, high)
        if low < 0:
            negative = (x if x.dtype.is_floating_point else x.float()).neg().clamp_(min=0)
            ops.histogram_(raw[1], negative, self._width, limit=self._limit, skip_zeros=True)

    def compute_amax(
        self,
        method: str,
        *,
        stride: int = 1,
        start_bin: int = 128,
        percentile: float = 99.99,
    ) -> torch.Tensor | None:
        """Return the range, a 0-d float32 tensor, or None before data. The histogram stays as it is.

        Args:
            method: ``"percentile"``: the left edge of the bin where the cumulative share reaches
                ``percentile``; ``"mse"``: the bin centre with the least squared quantization error;
                ``"entropy"``: the edge with the least relative entropy; ``"max"``: the exact largest
                magnitude.
            stride, start_bin: candidates of the two searches; with fewer than ``start_bin`` bins the last is
            taken.

        Raises:
            TypeError: "Unknown calibration method"; entropy for a floating point format.
            ValueError: a percentile out of the range 0 to 100.
        """
        if method not in ("percentile", "mse", "entropy", "max"):
            raise TypeError(f"Unknown calibration method {method!r}; use percentile, mse, entropy or max")
        if method == "percentile" and not 0 <= percentile <= 100:
            raise ArgumentError(f"percentile must be in the range 0 to 100, not {percentile}")
        if method == "entropy" and isinstance(self._num_bits, tuple):
            raise TypeError("entropy counts equal integer steps and has none for floating point; use mse")
        if self._raw is None:
            return None
        if method == "max" or self._width == 0.0:
            return torch.tensor(self._largest, dtype=torch.float32, device=self._raw.device)
        counts = _whole_bins(self._raw)[0]
        edges = torch.as_tensor(self._calib_bin_edges, device=counts.device)
        if method == "percentile":
            return edges[percentile_bin(counts[None], percentile)[0]].clone()
        if method == "mse":
            centers = (edges[1:] + edges[:-1]) / 2
            return centers[
                ops.mse_search(
                    counts, centers, self._num_bits, self._unsigned, stride=stride, start_bin=start_bin
                )
            ].clone()
        bits = int(self._num_bits)  # type: ignore[arg-type]
        return edges[
            ops.entropy_search(counts, bits, self._unsigned, stride=stride, start_bin=start_bin)
        ].clone()

    def compute_limits(self, method: str, *, percentile: float = 99.99) -> torch.Tensor | None:
        """Return both ends of the range, float32 ``[2]``, or None before data (or without ``two_ended``).

        Args:
            method: ``"max"``: the lowest and the highest value; ``"percentile"``: the ends within which that share of
                the values lies, with as much beyond each; ``"mse"`` and ``"entropy"``: see
                :func:`qzoo.quant.ops.search_limits`.
            percentile: as in :meth:`compute_amax`.

        Raises:
            TypeError: "Unknown calibration method".
            ValueError: a percentile out of the range 0 to 100.
        """
        if method not in ("percentile", "mse", "entropy", "max"):
            raise TypeError(f"Unknown calibration method {method!r}; use percentile, mse, entropy or max")
        if method == "percentile" and not 0 <= percentile <= 100:
            raise ArgumentError(f"percentile must be in the range 0 to 100, not {percentile}")
        if self._raw is None or not self._two_ended:
            return None
        ends = torch.tensor([min(self._lowest, 0.0), max(self._highest, 0.0)], device=self._raw.device)
        if method == "max" or self._width == 0.0:
            return ends
        counts, below = _whole_bins(self._raw)
        signed = torch.cat([below.flip(0), counts - below])  # from the lowest to the highest
        if method == "percentile":
            limits = percentile_ends(signed, percentile) * self._width
        else:
            limits = ops.search_limits(signed, self._width, ends, int(self._num_bits), method)  # type: ignore[arg-type]
        limits = torch.stack([torch.maximum(limits[0], ends[0]), torch.minimum(limits[1], ends[1])])
        return limits if limits.any() else ends  # a percentile of nearly all zeros would erase what is left

    @torch.no_grad()
    def merge(self, other: HistogramCalibrator) -> None:
        """Merge another calibrator's counts, such as those of another process.

        Exact where one width is the other times a power of two; otherwise the finer histogram is counted into
        the coarser one by its bin centres. The maximum is exact always.
        """
        if other._raw is None:
            return
        if self._raw is None or (self._width == 0.0 and other._width > 0.0):
            raw = other._raw.clone() if self._raw is None else other._raw.to(self._raw.device, copy=True)
            raw[:, 0] += 0 if self._raw is None else self._raw[:, 0]
            self._store(raw, other._width, other._limit)
            self._take_ends(other)
            return
        ours, theirs = self._raw, other._raw.to(self._raw.device)
        self._take_ends(other)
        if other._width == 0.0:
            ours[:, 0] += theirs[:, 0]
            return
        width = max(self._width, other._width)
        limit = max(self._limit, other._limit)
        bins = max(math.ceil(limit / width), 1)
        total = torch.zeros(len(ours), bins + 1, dtype=torch.int64, device=ours.device)
        for counts, w in ((self._settled(ours), self._width), (self._settled(theirs), other._width)):
            index = torch.arange(counts.shape[1], device=ours.device)
            if w != width:
                index = ((index + 0.5) * (w / width)).long()
            total.index_add_(1, index.clamp_(max=bins), counts)
        self._store(total, width, limit)

    def _take_ends(self, other: HistogramCalibrator) -> None:
        self._largest = max(self._largest, other._largest)
        self._lowest, self._highest = min(self._lowest, other._lowest), max(self._highest, other._highest)

    def empty_like_this(self) -> HistogramCalibrator:
        """Make a calibrator with the same bins, empty: what it counts merges exactly into this one."""
        empty = HistogramCalibrator(
            self._num_bits,
            None,
            self._unsigned,
            num_bins=self._num_bins,
            skip_zeros=self._skip_zeros,
            torch_hist=self._torch_hist,
            any_order=self._any_order,
            two_ended=self._two_ended,
        )
        if self._raw is not None and self._width > 0.0:
            empty._store(torch.zeros_like(self._raw), self._width, self._limit)
        return empty

    def _first(self, x: torch.Tensor) -> None:
        """The first batch with a magnitude above zero fixes the width of the bins."""
        largest = ops.reduce_amax_op(x).item()
        self._require_finite(largest, x)
        zeros = int(self._raw[0, 0]) if self._raw is not None else 0
        self._largest = max(self._largest, largest)
        raw = torch.zeros(1 + self._two_ended, self._num_bins + 1, dtype=torch.int64, device=x.device)
        if largest < SMALLEST_RANGE:
            if not (self._skip_zeros and largest == 0.0):
                raw[0, 0] = zeros + x.numel()
                self._store(raw, 0.0, 0.0)
            return
        raw[0, 0] = zeros
        self._store(raw, largest / self._num_bins, largest)
        ops.histogram_(raw[0], x, self._width, limit=largest, skip_zeros=self._skip_zeros)
        if self._two_ended:
            self._count_negative(raw, x)

    def _grow(self, raw: torch.Tensor, largest: float) -> torch.Tensor:
        """Append bins of the same width until ``largest`` is covered; merge neighbours if too many."""
        raw, width = self._settled(raw), self._width
        bins = math.ceil(largest / width)
        ceiling = max(MAX_BINS, 2 * self._num_bins)
        factor = 1
        while math.ceil(bins / factor) > ceiling:
            factor *= 2
        if factor > 1:
            raw = torch.nn.functional.pad(raw, (0, -raw.shape[1] % factor))
            raw = raw.reshape(len(raw), -1, factor).sum(2)
            width *= factor
            bins = math.ceil(largest / width)
        bins = max(bins, raw.shape[1] - 1)
        raw = torch.nn.functional.pad(raw, (0, bins + 1 - raw.shape[1]))
        self._store(raw, width, max(width * bins, largest))
        return raw

    def _store(self, raw: torch.Tensor, width: float, limit: float) -> None:
        self._width, self._limit, self._raw = width, limit, raw

    def _settled(self, raw: torch.Tensor) -> torch.Tensor:
        """The bins that stay when others are appended: what lies on the last edge has the place of the bin that
        starts there, or goes into the last bin for good."""
        if self._any_order:
            return raw
        raw = raw.clone()
        raw[:, -2] += raw[:, -1]
        raw[:, -1] = 0
        return raw

    @staticmethod
    def _require_finite(largest: float, x: torch.Tensor) -> None:
        if not math.isfinite(largest):
            raise NonFiniteError(f"NaN or infinity in the calibration data, shape {tuple(x.shape)}")

    def __str__(self) -> str:
        return f"HistogramCalibrator(calib_bin_edges={self._edges_text()})"

    def _body(self) -> str:
        return f"{super()._body()} calib_bin_edges={self._edges_text()} calib_hist={self._calib_hist}"

    def _edges_text(self) -> str:
        edges = self._calib_bin_edges
        return "None" if edges is None else f"[{edges[0]:.3f}, ..., {edges[-1]:.3f}]({len(edges)})"


def _whole_bins(raw: torch.Tensor) -> torch.Tensor:
    """The counts ``[rows, bins]``, with those of the last edge in the last bin."""
    counts = raw[:, :-1].clone()
    counts[:, -1] += raw[:, -1]
    return counts


def percentile_bin(counts: torch.Tensor, percentile: float) -> torch.Tensor:
    """Find the first bin of each row of ``[rows, bins]`` at which the cumulative share reaches ``percentile``."""
    cumulative = counts.cumsum(1).double()
    share = cumulative / cumulative[:, -1:].clamp(min=1)
    goal = torch.full((len(counts), 1), percentile / 100, dtype=torch.float64, device=counts.device)
    return torch.searchsorted(share, goal).squeeze(1).clamp_(max=counts.shape[1] - 1)


def percentile_ends(signed: torch.Tensor, percentile: float) -> torch.Tensor:
    """Find the ends, in bins from zero, of a share of ``signed``: counts ``[2 bins]``, zero amidst.

    Either end is the inner edge of its bin, as in :func:`percentile_bin`.
    """
    bins, inner = len(signed) // 2, 100 - (100 - percentile) / 2
    high = percentile_bin(signed[None], inner)[0] - bins
    low = bins - percentile_bin(signed.flip(0)[None], inner)[0]
    return torch.stack([low.clamp(max=0), high.clamp(min=0)]).float()
