"""Measure accuracy with its uncertainty, and fidelity to a reference model: ``qzoo.evaluate`` and what it stands on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.config import Config
from qzoo.data.files import broken_images
from qzoo.distributed import Group
from qzoo.errors import ArgumentError, DataError, DistributedError
from qzoo.fields import finite
from qzoo.progress import track
from qzoo.quant.fold import evaluating
from qzoo.runtimes.pytorch import logits_of


@dataclass(frozen=True)
class Fidelity:
    """Closeness of logits to a reference's on the same images: agreement and SQNR.

    Holds sums, so that batches, and the parts of several processes, add up; see :meth:`total`. NaN and infinity count
    as the worst: an image whose logits hold NaN never agrees, and logits that are not finite have an SQNR of -infinity.

    Attributes:
        images: number of images.
        agreeing: number of images with the same highest logit.
        signal: sum of squared logits of the reference.
        noise: sum of squared differences; infinite where a logit of either is not finite.

    Example:
        >>> reference = torch.tensor([[1.0, 3.0], [2.0, 0.0]])
        >>> Fidelity.of(reference, reference + torch.tensor([0.5, 0.0])).agreement
        100.0
    """

    images: int = 0
    agreeing: int = 0
    signal: float = 0.0
    noise: float = 0.0

    @classmethod
    def of(cls, logits: Tensor, expected: Tensor) -> Fidelity:
        """Compare the logits of a batch with the reference's.

        Args:
            logits: [B, classes].
            expected: the reference's, of the same shape.

        Raises:
            DataError: two shapes, or no classes in them.
        """
        if logits.shape != expected.shape or logits.dim() < 2:
            raise DataError(
                f"logits {list(logits.shape)} can't be compared with the reference's {list(expected.shape)}; both must "
                "be [B, classes]"
            )
        logits, expected = logits.detach().double(), expected.detach().to(logits.device).double()
        numbers = ~(logits.isnan() | expected.isnan()).flatten(1).any(1)
        same = logits.flatten(1).argmax(1) == expected.flatten(1).argmax(1)
        return cls(len(logits), int((same & numbers).sum()), *_energies(logits, expected))

    @classmethod
    def total(cls, parts: Iterable[Fidelity]) -> Fidelity:
        """Add up the parts of a pass. The sums are exact: their order does not matter."""
        parts = list(parts)
        return cls(
            sum(part.images for part in parts),
            sum(part.agreeing for part in parts),
            math.fsum(part.signal for part in parts),
            math.fsum(part.noise for part in parts),
        )

    @property
    def finite(self) -> bool:
        """Whether all logits were finite, the reference's too."""
        return math.isfinite(self.signal) and math.isfinite(self.noise)

    @property
    def agreement(self) -> float:
        """Share of images with the same highest logit, in percent."""
        return 100 * self.agreeing / self.images

    @property
    def sqnr_db(self) -> float:
        """``10 log10(signal / noise)``: infinite where all logits are equal, -infinite where one is not finite."""
        return decibel(self.signal, self.noise)


def sqnr(reference: Tensor, other: Tensor) -> float:
    """Compute the signal-to-quantization-noise ratio (SQNR) of two tensors of one shape, in dB.

    Args:
        reference, other: tensors of one shape.

    Returns:
        As :attr:`Fidelity.sqnr_db`: infinite where they are equal, -infinite where one is not finite.

    Example:
        >>> sqnr(torch.tensor([10.0, 0.0]), torch.tensor([9.0, 0.0]))
        20.0
    """
    return decibel(*_energies(other.double(), reference.double()))


def _energies(values: Tensor, expected: Tensor) -> tuple[float, float]:
    """Sums of squares of the reference and of the difference: infinite where a value is not finite."""
    signal, noise = expected.square().sum().item(), (values - expected).square().sum().item()
    sound = math.isfinite(signal) and math.isfinite(noise)
    return (signal, noise) if sound else (0.0, math.inf)


def decibel(signal: float, noise: float) -> float:
    """Convert a signal and its noise to decibels, ``10 log10(signal / noise)``.

    Args:
        signal, noise: sums of squares.

    Returns:
        Infinite without noise; -infinite without signal, or where one is not finite.

    Example:
        >>> decibel(100.0, 1.0)
        20.0
    """
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return -math.inf
    if noise == 0:
        return math.inf
    return -math.inf if signal == 0 else 10 * math.log10(signal / noise)


_Z = 1.959964  # quantile of the normal distribution for 95 %


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Compute the 95 % Wilson score interval of a share, in percent (Wilson, 1927, "Probable inference").

    Args:
        successes, trials: counts.

    Returns:
        Lower and upper bound, in percent.

    Raises:
        ValueError: no trials, or more successes than trials.

    Example:
        >>> low, high = wilson_interval(90, 100)
        >>> round(low, 1), round(high, 1)
        (82.6, 94.5)
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ArgumentError(f"{successes} successes of {trials} trials is no share")
    share = successes / trials
    spread = _Z * math.sqrt(share * (1 - share) / trials + _Z * _Z / (4 * trials * trials))
    centre, norm = share + _Z * _Z / (2 * trials), 1 + _Z * _Z / trials
    return 100 * max(0.0, (centre - spread) / norm), 100 * min(1.0, (centre + spread) / norm)


@dataclass(frozen=True)
class Evaluation:
    """Accuracy and fidelity from one pass over labelled images. Shares are in percent.

    Attributes:
        images: number of images.
        top1, top5: share of images whose label is the highest logit, among the five highest.
        top1_interval, top5_interval: 95 % Wilson score interval of these.
        loss: mean cross entropy, in nats.
        images_per_second: of the model alone, wall time.
        agreement: share of images with the same highest logit as the reference, None without one.
        sqnr_db: 10 log10(sum of squared reference logits / sum of squared differences), -infinite where a logit is
            not finite, None without one.
        reference: the reference's own evaluation on the same images, None without one.
        skipped: number of images that did not decode and were left out, where the loader was told to.

    Example:
        >>> result = qzoo.evaluate(model, loader, reference=model, progress=False)
        >>> result.agreement, result.sqnr_db
        (100.0, inf)
    """

    images: int
    top1: float
    top1_interval: tuple[float, float]
    top5: float
    top5_interval: tuple[float, float]
    loss: float
    images_per_second: float
    agreement: float | None = None
    sqnr_db: float | None = None
    reference: Evaluation | None = None
    skipped: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; an infinite SQNR becomes None."""
        values: dict[str, Any] = finite(asdict(self))
        return values


@dataclass(frozen=True)
class _Sums:
    """One model's logits of one batch."""

    images: int
    top1: int
    top5: int
    loss: float
    seconds: float

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, seconds: float) -> _Sums:
        classes = logits.shape[1]
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise DataError(
                f"labels from {int(labels.min())} to {int(labels.max())} for a model of {classes} classes (0 to "
                f"{classes - 1}); give it the data set that it was trained on, or a head of that many classes"
            )
        ranked = logits.topk(min(5, logits.shape[1])).indices == labels.unsqueeze(1)
        ranked &= ~logits.isnan().any(1, keepdim=True)  # topk takes NaN for the largest
        loss = nn.functional.cross_entropy(logits.double(), labels, reduction="sum").item()
        return cls(len(labels), int(ranked[:, 0].sum()), int(ranked.any(1).sum()), loss, seconds)


def _images_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    """Images and labels of a batch. Raises DataError for what is not a pair of these."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise DataError(f"the loader gave a {type(batch).__name__}; expected (images, labels)")
    images, labels = batch
    for name, part in (("images", images), ("labels", labels)):
        if not isinstance(part, Tensor):
            raise DataError(f"the loader gave {name} as a {type(part).__name__}; expected tensors")
    if labels.dim() != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise DataError(
            f"labels are {labels.dtype} {list(labels.shape)}; expected one class index an image, integers [B] (labels "
            "of pixels or of several classes can't be measured)"
        )
    if len(images) != len(labels):
        raise DataError(f"the loader gave {len(images)} images with {len(labels)} labels")
    return images, labels.cpu().long()


@dataclass(frozen=True)
class _Batch:
    """A model and, where there is one, its reference on one batch."""

    model: _Sums
    reference: _Sums | None = None
    fidelity: Fidelity | None = None


def _evaluation(parts: list[list[_Sums]], **fidelity: Any) -> Evaluation:
    """Add up the batches of every process; ``fsum`` is exact, so that their order does not matter."""
    batches = [sums for part in parts for sums in part]
    n, top1, top5 = (sum(getattr(b, field) for b in batches) for field in ("images", "top1", "top5"))
    return Evaluation(
        images=n,
        top1=100 * top1 / n,
        top1_interval=wilson_interval(top1, n),
        top5=100 * top5 / n,
        top5_interval=wilson_interval(top5, n),
        loss=math.fsum(b.loss for b in batches) / n,
        images_per_second=n / max(sum(b.seconds for b in part) for part in parts),
        **fidelity,
    )


class RecordedLogits:
    """Logits of an earlier pass over the same images, given out batch by batch in place of the model.

    Args:
        logits: [N, classes], in the order of the images.

    Example:
        >>> logits = torch.cat([model(images).detach() for images, _ in loader])
        >>> qzoo.evaluate(RecordedLogits(logits), loader, progress=False).top1
        93.75
    """

    def __init__(self, logits: Tensor) -> None:
        self._logits, self._given = logits, 0

    def __call__(self, images: Tensor) -> Tensor:
        start, self._given = self._given, self._given + len(images)
        if self._given > len(self._logits):
            self.finish()
        return self._logits[start : self._given]

    def finish(self) -> None:
        """Raise DataError where the images were more or fewer than the logits."""
        if self._given != len(self._logits):
            raise DataError(
                f"the recorded logits are of {len(self._logits)} images, and the loader gave {self._given}; record "
                "them on the images that they are compared on"
            )


def evaluate(
    model: Callable[[Tensor], Tensor],
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    reference: Callable[[Tensor], Tensor] | Tensor | None = None,
    progress: bool = True,
    group: Group | None = None,
) -> Evaluation:
    """Evaluate a model on labelled images: accuracy, and fidelity to ``reference`` when given.

    Args:
        model: a module (put into eval mode for the pass, and back) or any callable, images [B, C, H, W] -> logits
            [B, classes]. A module gets the images on its device, a callable as the loader gives them.
        loader: batches of images, already preprocessed, and int64 labels [B].
        reference: usually the float model; it is evaluated in the same pass, on the same images. Or its logits
            [N, classes], recorded on these images in the loader's order, where many models are compared with it.
        progress: show a progress bar.
        group: the processes that share the batches; each gets the figures of all images, the same to the bit as
            one process with as many threads. Every process passes a loader of all images.

    Returns:
        Top-1 and top-5 with their intervals, loss and speed; agreement and SQNR with a reference.

    Raises:
        DataError: the loader is empty; images, labels or outputs of another form; an image encoder.
        DistributedError: another process has ended, or a loader, or recorded logits, that can't be dealt out.

    Example:
        >>> result = qzoo.evaluate(model, loader, progress=False)
        >>> result.images, result.top1
        (16, 93.75)
    """
    group = group or Group()
    _refuse_encoder(model)
    _refuse_encoder(reference)
    if isinstance(reference, Tensor):
        if group.world > 1:
            raise DistributedError(
                f"recorded logits can't be dealt out to {group.world} processes: pass the model as reference"
            )
        reference = RecordedLogits(reference)
    own: list[_Batch] = []
    with ExitStack() as stack:
        for module in (model, reference):
            if isinstance(module, nn.Module):
                stack.enter_context(evaluating(module))
        stack.enter_context(torch.inference_mode())
        total = group.share(loader)
        for _, batch in track(group.deal(loader), "evaluate", total, progress and group.first):
            own.append(_batch(model, reference, *_images_and_labels(batch)))
    if isinstance(reference, RecordedLogits):
        reference.finish()
    parts = group.gather(own)
    batches = [batch for part in parts for batch in part]
    if not any(batch.model.images for batch in batches):
        raise DataError("the loader gave no images; check the folder, the split and the limit")
    sums = [[batch.model for batch in part] for part in parts]
    skipped = sum(group.gather(broken_images(loader)))
    if reference is None:
        return _evaluation(sums, skipped=skipped)
    fidelity = Fidelity.total(b.fidelity for b in batches if b.fidelity)
    return _evaluation(
        sums,
        agreement=fidelity.agreement,
        sqnr_db=fidelity.sqnr_db,
        skipped=skipped,
        reference=_evaluation([[b.reference for b in part if b.reference] for part in parts]),
    )


def _refuse_encoder(model: Any) -> None:
    config = getattr(model, "qzoo_config", None)
    if isinstance(config, Config) and config.is_encoder:
        raise DataError(
            f"{config.name} is an image encoder: it gives features, which have no accuracy; compare them with the "
            "float model's by qzoo.compare_features(model, loader, reference=float_model)"
        )


def _batch(
    model: Callable[[Tensor], Tensor],
    reference: Callable[[Tensor], Tensor] | None,
    images: Tensor,
    labels: Tensor,
) -> _Batch:
    logits, seconds = _run_timed(model, images)
    sums = _Sums.of(logits, labels, seconds)
    if reference is None:
        return _Batch(sums)
    expected, seconds = _run_timed(reference, images)
    return _Batch(sums, _Sums.of(expected, labels, seconds), Fidelity.of(logits, expected))


def _run_timed(model: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, float]:
    """Logits, float32 on the CPU, and seconds."""
    if isinstance(model, nn.Module):
        images = images.to(next((p.device for p in model.parameters()), torch.device("cpu")))
    start = time.perf_counter()
    logits = logits_of(model, images).float().cpu()
    return logits, time.perf_counter() - start


@dataclass(frozen=True)
class FeatureFidelity:
    """Closeness of an image encoder's features to a reference's on the same images.

    Features that are not finite count as the worst: a cosine of -1, and no neighbour in common.

    Attributes:
        images: number of images.
        cosine: mean cosine similarity of an image's features with the reference's.
        lowest_cosine: of the image where it is lowest.
        neighbours: how many nearest neighbours of an image were looked at.
        neighbour_agreement: share of an image's nearest neighbours among the other images, by the cosine of the
            reference's features, that are also its nearest by the model's; the mean, in percent.
        sqnr_db: of the features, as :attr:`Fidelity.sqnr_db`.

    Example:
        >>> qzoo.compare_features(model, loader, reference=model, progress=False).neighbour_agreement
        100.0
    """

    images: int
    cosine: float
    lowest_cosine: float
    neighbours: int
    neighbour_agreement: float
    sqnr_db: float


def compare_features(
    model: Callable[[Tensor], Tensor],
    loader: Iterable[Tensor | tuple[Tensor, Tensor]],
    *,
    reference: Callable[[Tensor], Tensor],
    neighbours: int = 5,
    progress: bool = True,
) -> FeatureFidelity:
    """Compare an image encoder's features with a reference's: cosine similarity and nearest neighbours.

    Nearest neighbours are what features are used for where nothing is trained on them, as in the evaluation of DINO
    (Caron et al., 2021, arXiv:2104.14294). They are looked for among the images themselves, without labels.

    Args:
        model: a module (put into eval mode for the pass, and back) or any callable, such as a deployed model: images
            [B, C, H, W] -> features [B, dim].
        loader: batches of preprocessed images, with or without labels, which are not looked at.
        reference: usually the float model; it runs in the same pass, on the same images.
        neighbours: how many of each image; fewer than there are images.
        progress: show a progress bar.

    Returns:
        Cosine similarity, agreement of the nearest neighbours, and SQNR.

    Raises:
        DataError: not more images than neighbours, or features of another form.
        ArgumentError: no neighbours.

    Example:
        >>> result = qzoo.compare_features(model, loader, reference=model, progress=False)
        >>> result.images, round(result.cosine, 6)
        (16, 1.0)
    """
    if neighbours < 1:
        raise ArgumentError(f"neighbours must be at least 1, not {neighbours}")
    pairs: list[tuple[Tensor, Tensor]] = []
    with ExitStack() as stack:
        for module in (model, reference):
            if isinstance(module, nn.Module):
                stack.enter_context(evaluating(module))
        stack.enter_context(torch.inference_mode())
        for batch in track(loader, "compare features", show=progress):
            images = batch if isinstance(batch, Tensor) else _images_and_labels(batch)[0]
            pairs.append((_run_timed(model, images)[0], _run_timed(reference, images)[0]))
    count = sum(len(features) for features, _ in pairs)
    if count <= neighbours:
        raise DataError(
            f"the loader gave {count} images, of which none has {neighbours} neighbours; give more images, or compare "
            "fewer neighbours"
        )
    features, expected = (torch.cat(parts).double() for parts in zip(*pairs, strict=True))
    if features.dim() != 2 or features.shape != expected.shape:
        raise DataError(
            f"features {list(features.shape)} can't be compared with the reference's {list(expected.shape)}; both must "
            "be [images, dim]"
        )
    cosines = nn.functional.cosine_similarity(features, expected)
    cosines = torch.where(cosines.isfinite(), cosines, -1.0)
    common = _nearest(features, neighbours) & _nearest(expected, neighbours)
    return FeatureFidelity(
        images=count,
        cosine=cosines.mean().item(),
        lowest_cosine=cosines.min().item(),
        neighbours=neighbours,
        neighbour_agreement=100 * common.sum().item() / (neighbours * count),
        sqnr_db=sqnr(expected, features),
    )


def _nearest(features: Tensor, count: int) -> Tensor:
    """Whether another image is among the nearest ones by cosine, [images, images]; of NaN nothing is."""
    units = nn.functional.normalize(features)
    similar = (units @ units.T).nan_to_num(-math.inf, -math.inf, -math.inf).fill_diagonal_(-math.inf)
    nearest = torch.zeros_like(similar, dtype=torch.bool).scatter_(1, similar.topk(count).indices, True)
    return nearest & similar.isfinite()
