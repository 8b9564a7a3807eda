"""Gather the statistics of every quantizer of a model in one pass over data, whichever of them are switched on."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.distributed import Group
from qzoo.errors import ArgumentError, CalibrationError, NonFiniteError
from qzoo.progress import track
from qzoo.quant.calib import HistogramCalibrator, MaxCalibrator
from qzoo.quant.fold import evaluating
from qzoo.quant.nn import Range, TensorQuantizer
from qzoo.quantizers import (
    device_of,
    name_quantizers,
    require_quantizers,
    restore_switches,
    weight_quantizers,
)
from qzoo.runtimes.pytorch import run

SHARE = 0.25
"""Share of the calibration images that a choice is judged by."""


class Statistics:
    """What one pass gathered: a calibrator a quantizer, shared by those that read the same tensors or are of a group.

    Attributes:
        images: number of images seen.
    """

    def __init__(self, histograms: bool) -> None:
        self.images = 0
        self._histograms = histograms
        self._calibrators: dict[str, Any] = {}
        self._groups: dict[tuple[str, Any], Any] = {}
        self._recent: dict[int, tuple[Any, int, Any]] = {}

    @property
    def settled(self) -> bool:
        """Whether the bins of every histogram are fixed: each has seen a value above zero."""
        return all(c.has_bins for c in self._calibrators.values() if isinstance(c, HistogramCalibrator))

    def emptied(self) -> Statistics:
        """Make empty histograms of the same bins, shared by the same quantizers."""
        other = Statistics(self._histograms)
        copies: dict[int, Any] = {}
        for name, calibrator in self._calibrators.items():
            if isinstance(calibrator, HistogramCalibrator):
                key = id(calibrator)
                copies[key] = copies[key] if key in copies else calibrator.empty_like_this()
                other._calibrators[name] = copies[key]
        return other

    def to(self, device: torch.device) -> None:
        """Count on that device."""
        for calibrator in self._calibrators.values():
            if isinstance(calibrator, HistogramCalibrator):
                calibrator.to(device)

    def merge(self, other: Statistics) -> None:
        """Merge the counts of another process."""
        self.images += other.images
        done: set[tuple[int, int]] = set()
        for name, theirs in other._calibrators.items():
            own = self._calibrators.setdefault(name, theirs)
            if own is not theirs and (id(own), id(theirs)) not in done:
                done.add((id(own), id(theirs)))
                own.unsigned = own.unsigned and theirs.unsigned
                own.merge(theirs)

    def next_batch(self, images: int) -> None:
        """Note that a batch went through; the tensors of different batches are never the same."""
        self.images += images
        self._recent.clear()

    def see(self, name: str, quantizer: TensorQuantizer, x: Tensor) -> None:
        """Count ``x`` for the quantizer, once for all the quantizers that get this very tensor.

        A block's input and its skip, say, thereby share one calibrator and end with one range.
        """
        own = self._calibrators.get(name) or self._of_group(name, quantizer)
        reference, version, shared = self._recent.get(id(x), (lambda: None, -1, None))
        if reference() is x and version == x._version and _alike(shared, quantizer):
            own = self._calibrators.setdefault(name, shared)
            shared.unsigned = shared.unsigned and quantizer.unsigned
            if own is shared:
                return
        if own is None:
            own = self._calibrators[name] = _calibrator(quantizer, self._histograms)
        if quantizer.group:
            self._groups.setdefault((quantizer.group, quantizer.num_bits), own)
        own.collect(x)
        self._recent[id(x)] = (weakref.ref(x), x._version, own)

    def _of_group(self, name: str, quantizer: TensorQuantizer) -> Any:
        """The calibrator of the quantizer's group, which is its own from now on; None where there is none yet."""
        common = self._groups.get((quantizer.group, quantizer.num_bits)) if quantizer.group else None
        if common is not None:
            self._calibrators[name] = common
            common.unsigned = common.unsigned and quantizer.unsigned
        return common

    def ranges(self, method: str, percentile: float) -> dict[str, Range]:
        """Compute the range of each quantizer that saw data, by name; per channel it is always the maximum."""
        computed: dict[int, Range] = {}
        for calibrator in self._calibrators.values():
            if id(calibrator) in computed:
                continue
            if isinstance(calibrator, MaxCalibrator):
                amax = calibrator.compute_amax()
            else:
                largest = calibrator.compute_amax("max")
                amax = calibrator.compute_amax(method, percentile=percentile)
                # A percentile of nearly all zeros is zero and would erase what is left.
                amax = largest if amax is not None and amax.item() == 0 else amax
            if amax is not None:
                computed[id(calibrator)] = Range(
                    amax, calibrator.compute_limits(method, percentile=percentile)
                )
        return {name: computed[id(c)] for name, c in self._calibrators.items() if id(c) in computed}


def _calibrator(quantizer: TensorQuantizer, histograms: bool) -> Any:
    if histograms and quantizer.axis is None and quantizer.block is None:
        return HistogramCalibrator(
            quantizer.num_bits, None, quantizer.unsigned, any_order=True, two_ended=quantizer.two_ended
        )
    return MaxCalibrator(
        quantizer.num_bits, quantizer.axis, quantizer.unsigned, two_ended=quantizer.two_ended
    )


def _alike(calibrator: Any, quantizer: TensorQuantizer) -> bool:
    kind = (quantizer.num_bits, quantizer.axis, quantizer.two_ended)
    return bool((calibrator.num_bits, calibrator.axis, calibrator.two_ended) == kind)


class _Tap:
    """Stands where a quantizer keeps its calibrator and hands the tensors on to the statistics."""

    _axis: Any = None  # set by quantizers with blocks

    def __init__(self, statistics: Statistics, name: str, quantizer: TensorQuantizer) -> None:
        self.statistics, self.name, self.quantizer = statistics, name, quantizer

    def collect(self, x: Tensor) -> None:
        if self.quantizer.nonnegative or self.quantizer.unsigned:
            self._require_nonnegative(x)
        self.statistics.see(self.name, self.quantizer, x)

    def _require_nonnegative(self, x: Tensor) -> None:
        lowest = torch.aminmax(x)[0].item() if x.numel() else 0.0
        if lowest < 0:
            option = "nonnegative" if self.quantizer.nonnegative else "unsigned"
            both = "nonnegative = quantizer.unsigned" if self.quantizer.nonnegative else "unsigned"
            raise CalibrationError(
                f"quantizer {self.name!r} is {option}, but its input goes down to {lowest:.4g}, and all below 0 would "
                f"become 0; build it with {option}=False, or set quantizer.{both} = False"
            )


def weight_ranges(model: nn.Module) -> dict[str, Tensor]:
    """Compute the exact range of every weight, by the name of its quantizer: per channel where the quantizer has an
    axis.

    A channel of zeros has the range 0.

    Raises:
        NonFiniteError: a weight with NaN or infinity.
    """
    ranges = {}
    for key, (weight, quantizer) in weight_quantizers(model).items():
        scale = quantizer.pre_quant_scale
        with torch.no_grad():
            amax = quantizer.range_of(weight if scale is None else weight * scale)
        if not torch.isfinite(amax).all():
            name = key.rpartition(".")[0]
            raise NonFiniteError(f"the weight of {name!r} holds NaN or infinity; load sound weights first")
        ranges[f"{key.rpartition('.')[0]}._weight_quantizer".lstrip(".")] = amax
    return ranges


def images_of(batch: Any) -> Tensor:
    """Get the images of a batch: the first of a tuple or list, or the batch itself.

    Raises:
        CalibrationError: something else.
    """
    images = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(images, Tensor):
        raise CalibrationError(
            f"the loader gave a {type(images).__name__}; expected batches of images, or (images, labels), as tensors"
        )
    return images


def hold_back(loader: Iterable[Any], share: float = SHARE) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Split the batches: those to work with, and the last images, at least one, to judge by.

    Raises:
        CalibrationError: fewer than two images.
        ValueError: a share outside 0 to 1.
    """
    if not 0 < share < 1:
        raise ArgumentError(f"the share to hold back must be between 0 and 1, not {share}")
    batches = [images_of(batch) for batch in loader]
    images = torch.cat(batches) if batches else torch.zeros(0)
    if len(images) < 2:
        raise CalibrationError("part of the images is held back to judge by; pass at least two images")
    count = max(1, round(len(images) * share))
    size = len(batches[0])
    return images[:-count].split(size), images[-count:].split(size)


@torch.no_grad()
def collect(
    model: nn.Module,
    loader: Iterable[Any],
    histograms: bool,
    progress: bool = True,
    group: Group | None = None,
) -> Statistics:
    """Run the float model over the data while its activation quantizers watch, whatever the target.

    Weights with a quantizer of their own are left out, see :func:`weight_ranges`; so is a quantizer without
    a role that is disabled. The model's mode and its quantizers' switches are as before afterwards, also
    after an error.

    The processes of a ``group`` share the batches, and all get the statistics of all of them, count for count
    those of one process. As the first batch fixes the bins of the histograms, rank 0 starts alone: with one
    batch, or as many as it takes until every tensor had a value above zero. (A quantizer that these batches do
    not reach, where the path through a model depends on the data, is merged by the centres of its bins.)

    Raises:
        CalibrationError: no quantizers, no data, quantizers that saw none, or negative values in a tensor that is
            declared never to have any.
        NonFiniteError: NaN or infinity; the message names the quantizer and the batch.
    """
    group = group or Group()
    require_quantizers(model)
    statistics, quantizers = Statistics(histograms), name_quantizers(model)
    weights = weight_ranges(model)
    watched = {
        n: q for n, q in quantizers.items() if n not in weights and (q.role or not q.switches.disabled)
    }
    device = device_of(model)
    # Tensors of inference mode have no version, which tells one from the same one changed in place.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        evaluating(model),
        restore_switches(quantizers.values()),
    ):
        for quantizer in quantizers.values():
            quantizer.switches = quantizer.switches._replace(quant=False, clip=False)
        taps = [_Tap(statistics, name, quantizer) for name, quantizer in watched.items()]
        for tap in taps:
            tap.quantizer.calibrator = tap
            tap.quantizer.enable()
            tap.quantizer.enable_calib()

        def watch(number: int, batch: Any) -> None:
            images = images_of(batch).to(device)
            images = images.clone() if images.is_inference() else images
            try:
                run(model, images)
            except NonFiniteError as error:
                raise NonFiniteError(f"{error} (batch {number}, counted from 0)") from error
            statistics.next_batch(len(images))

        start = 0
        if group.world > 1 and histograms:
            start, statistics = _start(group, loader, statistics, watch)
            statistics.to(device)
            for tap in taps:
                tap.statistics = statistics
        total = group.share(loader, start)
        for i, batch in track(group.deal(loader, start), "calibrate", total, progress and group.first):
            watch(i, batch)
    parts = group.gather(statistics) if group.world > 1 else [statistics]
    statistics = parts[0]
    for part in parts[1:]:
        statistics.merge(part)
    _check_seen(statistics, watched)
    return statistics


def _check_seen(statistics: Statistics, watched: Iterable[str]) -> None:
    if statistics.images == 0:
        raise CalibrationError("the loader gave no images; check the folder, the split and the subset")
    seen = statistics.ranges("max", 100.0)
    unseen = [name for name in watched if name not in seen]
    if unseen:
        modules = _unreached(unseen, seen)
        raise CalibrationError(
            f"{len(unseen)} quantizers saw no data: {', '.join(unseen)}; in eval mode the model's forward does not "
            f"reach {', '.join(modules)}. If only training uses that, as an auxiliary head, set it to None before you "
            f"calibrate, or leave it in float: quantize_(model, exclude={[f'{m}*' for m in modules[:4]]}); else "
            "disable() these quantizers"
        )


def _unreached(unseen: Iterable[str], seen: Iterable[str]) -> list[str]:
    """The outermost modules of which no quantizer saw data."""
    reached = {name[:i] for name in seen for i, letter in enumerate(name) if letter == "."} | set(seen)
    names: dict[str, None] = {}
    for name in unseen:
        parts = name.split(".")
        paths = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
        names[next(path for path in paths if path not in reached)] = None
    return list(names)


def _start(
    group: Group, loader: Iterable[Any], statistics: Statistics, watch: Callable[[int, Any], None]
) -> tuple[int, Statistics]:
    """Rank 0 goes through batches until the bins of all histograms are fixed; the others take them over.

    Returns:
        the number of batches that are done, and the statistics that this process goes on with.
    """
    done = 0
    if group.first:
        for done, batch in enumerate(loader, start=1):
            watch(done - 1, batch)
            if statistics.settled:
                break
    done, emptied = group.broadcast((done, statistics.emptied()))
    return done, statistics if group.first else emptied
