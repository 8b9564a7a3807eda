"""``qzoo.evaluate``: accuracy with its uncertainty, and fidelity to a reference model, in one pass."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.accuracy import Fidelity, logits_of
from qzoo.accuracy import wilson_interval as wilson_interval
from qzoo.distributed import Group
from qzoo.errors import DataError
from qzoo.progress import track
from qzoo.quant.fold import evaluating as evaluating


@dataclass(frozen=True)
class Evaluation:
    """What one pass over labelled images measured. Shares are in percent.

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

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)


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


def _labelled(batch: Any) -> tuple[Tensor, Tensor]:
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
    """From the batches of every process; ``fsum`` is exact, so that their order does not matter."""
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


def evaluate(
    model: Callable[[Tensor], Tensor],
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    reference: Callable[[Tensor], Tensor] | None = None,
    progress: bool = True,
    group: Group | None = None,
) -> Evaluation:
    """Measure accuracy on labelled images, and fidelity to ``reference`` when given.

    Args:
        model: a module (put into eval mode for the pass, and back) or any callable, images [B, C, H, W] -> logits
            [B, classes]. A module gets the images on its device, a callable as the loader gives them.
        loader: batches of images, already preprocessed, and int64 labels [B].
        reference: usually the float model; it is evaluated in the same pass, on the same images.
        progress: show a progress bar.
        group: the processes that share the batches; each gets the figures of all images, the same to the bit as
            one process with as many threads. Every process passes a loader of all images.

    Raises:
        DataError: the loader is empty; images, labels or outputs of another form.
        DistributedError: another process has ended, or a loader that can't be dealt out.
    """
    group = group or Group()
    mine: list[_Batch] = []
    with ExitStack() as stack:
        for module in (model, reference):
            if isinstance(module, nn.Module):
                stack.enter_context(evaluating(module))
        stack.enter_context(torch.inference_mode())
        total = group.share(loader)
        for _, batch in track(group.deal(loader), "evaluate", total, progress and group.first):
            mine.append(_batch(model, reference, *_labelled(batch)))
    parts = group.gather(mine)
    batches = [batch for part in parts for batch in part]
    if not any(batch.model.images for batch in batches):
        raise DataError("the loader gave no images; check the folder, the split and the limit")
    sums = [[batch.model for batch in part] for part in parts]
    if reference is None:
        return _evaluation(sums)
    fidelity = Fidelity.total(b.fidelity for b in batches if b.fidelity)
    return _evaluation(
        sums,
        agreement=fidelity.agreement,
        sqnr_db=fidelity.sqnr_db,
        reference=_evaluation([[b.reference for b in part if b.reference] for part in parts]),
    )


def _batch(
    model: Callable[[Tensor], Tensor],
    reference: Callable[[Tensor], Tensor] | None,
    images: Tensor,
    labels: Tensor,
) -> _Batch:
    logits, seconds = _timed(model, images)
    found = _Sums.of(logits, labels, seconds)
    if reference is None:
        return _Batch(found)
    expected, seconds = _timed(reference, images)
    return _Batch(found, _Sums.of(expected, labels, seconds), Fidelity.of(logits, expected))


def _timed(model: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, float]:
    """Logits, float32 on the CPU, and seconds."""
    if isinstance(model, nn.Module):
        images = images.to(next((p.device for p in model.parameters()), torch.device("cpu")))
    start = time.perf_counter()
    logits = logits_of(model, images).float().cpu()
    return logits, time.perf_counter() - start
