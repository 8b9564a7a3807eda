"""``qzoo.calibrate``: find the range of every quantizer of a model in one pass over a few images.

Paper: "Integer Quantization for Deep Learning Inference: Principles and Empirical Evaluation" (Wu et al., 2020,
arXiv:2004.09602) compares per-channel maxima of weights, and maximum, percentile and entropy of activations. The
searches are in :mod:`qzoo.quant.ops.search`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from qzoo.accuracy import Fidelity
from qzoo.distributed import Group
from qzoo.errors import ArgumentError, CalibrationError, NonFiniteError
from qzoo.options import PERCENTILE, RANGES
from qzoo.progress import track
from qzoo.ptq.collect import collect, images_of, weight_ranges
from qzoo.quant.fold import evaluating
from qzoo.quant.nn import Range
from qzoo.quantizers import device_of, quantizers_off, require_quantizers
from qzoo.runtimes.pytorch import output_of


@dataclass(frozen=True)
class Candidate:
    """One method of choosing the ranges, tried on images.

    Attributes:
        method: its name.
        sqnr_db: of the logits, quantized against the same model with its quantizers off.
        agreement: share of images with the same highest logit, in percent.
    """

    method: str
    sqnr_db: float
    agreement: float

    @classmethod
    def of(cls, method: str, fidelity: Fidelity) -> Candidate:
        """Return the method with what it reached."""
        return cls(method, fidelity.sqnr_db, fidelity.agreement)

    @property
    def rank(self) -> tuple[float, float]:
        """What candidates are compared by; higher is better."""
        return self.sqnr_db, self.agreement


@dataclass(frozen=True)
class Calibration:
    """How the ranges were found.

    Attributes:
        method: the one whose ranges the model has now.
        images: number of images that the statistics come from.
        percentile: of the percentile method, None for the others.
        select_images: number of images that the candidates were compared on; 0 when there was nothing to
            choose.
        candidates: what was tried, best first; empty when the method was given.
    """

    method: str
    images: int
    percentile: float | None = None
    select_images: int = 0
    candidates: tuple[Candidate, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return asdict(self)


def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    method: str = "max",
    percentile: float = PERCENTILE,
    select_loader: Iterable[Any] | None = None,
    progress: bool = True,
    group: Group | None = None,
) -> Calibration:
    """Calibrate a model: set the range (amax, and both ends of an affine one) of every quantizer, in place.

    One pass of the float model serves all methods. Weights have the exact maximum of each channel whatever
    the method; the method is for activations. Quantizers of every role get a range whatever the target, so
    that ``set_target`` needs no new calibration; those that read the same tensor get the same range.
    Nothing is changed when an error is raised; modes and switches are as before in any case.

    Args:
        model: with quantizers and trained weights.
        loader: batches of preprocessed images [B, C, H, W], alone or first in a tuple. ``"auto"`` without a
            ``select_loader`` goes through it more than once.
        method: ``"max"``, ``"percentile"``, ``"mse"``, ``"entropy"``, or ``"auto"``: try all four, keep the
            one with the highest SQNR of the logits against the same model with its quantizers off.
        percentile: share of magnitudes below the range, in percent, of the percentile method.
        select_loader: images to compare the methods on, ``loader`` without. Never the test images.
        progress: show a progress bar.
        group: the processes that share the batches; each ends with the ranges that one process with as many
            threads finds in all of them, bit for bit. Every process passes loaders of all images.

    Returns:
        How the ranges were found; with "auto", also what each method reached.

    Raises:
        CalibrationError: no quantizers, no images, quantizers that saw none (each is named), or one that is
            ``nonnegative`` and saw negative values.
        DataError: images that the model can't take; with "auto", an output that is no tensor.
        NonFiniteError: NaN or infinity in a weight or an activation; the message names where. With "auto", also in
            the output.
        ValueError: an unknown method, a percentile outside 0 to 100.
        DistributedError: another process has ended, or a loader that can't be dealt out.

    Example:
        >>> model = qzoo.create_model("resnet20.fmnist", pretrained="float", quantize="w8a8")
        >>> qzoo.calibrate(model, loader, method="mse", progress=False).images
        16
    """
    group = group or Group()
    if method not in (*RANGES, "auto"):
        raise ArgumentError(f"method must be one of {', '.join(RANGES)} or auto, not {method!r}")
    if not 0 < percentile <= 100:
        raise ArgumentError(f"percentile must be above 0 and at most 100, not {percentile}")
    require_quantizers(model)
    weights = weight_ranges(model)
    statistics = collect(model, loader, histograms=method != "max", progress=progress, group=group)
    methods = RANGES if method == "auto" else (method,)
    of_weights = {name: Range(amax) for name, amax in weights.items()}
    ranges = {m: {**statistics.ranges(m, percentile), **of_weights} for m in methods}
    candidates: tuple[Candidate, ...] = ()
    compared = 0
    if method == "auto":
        judged = loader if select_loader is None else select_loader
        with _ranges_before_error(model):
            compared, candidates = _compare(model, ranges, judged, progress, group)
        method = candidates[0].method
    _apply(model, ranges[method])
    used = percentile if method == "percentile" else None
    return Calibration(method, statistics.images, used, compared, candidates)


@contextmanager
def _ranges_before_error(model: nn.Module) -> Iterator[None]:
    """Where a ``with`` block raises, all quantizers have their ranges of before again."""
    quantizers = require_quantizers(model)
    before = {name: quantizer.range for name, quantizer in quantizers.items()}
    try:
        yield
    except BaseException:
        _apply(model, {name: known for name, known in before.items() if known is not None})
        for name, known in before.items():
            if known is None:
                quantizers[name].reset_amax()
        raise


def _apply(model: nn.Module, ranges: dict[str, Range]) -> None:
    quantizers = require_quantizers(model)
    for name, limits in ranges.items():
        quantizers[name].set_range(*limits)


@torch.no_grad()
def _compare(
    model: nn.Module,
    ranges: dict[str, dict[str, Range]],
    loader: Iterable[Any],
    progress: bool,
    group: Group,
) -> tuple[int, tuple[Candidate, ...]]:
    """Number of images, and the methods with their fidelity on them, best first."""
    device = device_of(model)
    own: list[dict[str, Fidelity]] = []
    with evaluating(model):
        bar = track(group.deal(loader), "compare methods", group.share(loader), progress and group.first)
        for _, batch in bar:
            x = images_of(batch).to(device)
            with quantizers_off(model):
                expected = output_of(model, x)
            fidelities = {}
            for name, chosen in ranges.items():
                _apply(model, chosen)
                fidelities[name] = Fidelity.of(output_of(model, x), expected)
            own.append(fidelities)
    batches = [batch for part in group.gather(own) for batch in part]
    total = {method: Fidelity.total(fidelities[method] for fidelities in batches) for method in ranges}
    images = next(iter(total.values())).images
    if images == 0:
        raise CalibrationError(
            "no images to compare the methods on: the loader gives them only once. Pass a list, or images of "
            "their own as select_loader"
        )
    if not any(fidelity.finite for fidelity in total.values()):
        raise NonFiniteError(
            f"the output of {type(model).__name__} holds NaN or infinity, whatever the method; load sound weights, and "
            "look for what divides by zero or overflows behind the last quantizer"
        )
    candidates = [Candidate.of(method, fidelity) for method, fidelity in total.items()]
    return images, tuple(sorted(candidates, key=lambda candidate: candidate.rank, reverse=True))
