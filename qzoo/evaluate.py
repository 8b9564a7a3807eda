"""``qzoo.evaluate``: accuracy with its uncertainty, and fidelity to a reference model, in one pass."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.errors import DataError
from qzoo.progress import track


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
        sqnr_db: 10 log10(sum of squared reference logits / sum of squared differences), None without one.
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


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a share, in percent (Wilson, 1927, "Probable inference").

    Args:
        z: quantile of the normal distribution; the default gives 95 %.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} successes of {trials} trials is no share")
    share = successes / trials
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    centre, norm = share + z * z / (2 * trials), 1 + z * z / trials
    return 100 * max(0.0, (centre - spread) / norm), 100 * min(1.0, (centre + spread) / norm)


class _Tally:
    """Running counts of one model's logits."""

    def __init__(self) -> None:
        self.images = self.top1 = self.top5 = 0
        self.loss = self.seconds = 0.0

    def add(self, logits: Tensor, labels: Tensor, seconds: float) -> None:
        ranked = logits.topk(min(5, logits.shape[1])).indices == labels.unsqueeze(1)
        self.images += len(labels)
        self.top1 += int(ranked[:, 0].sum())
        self.top5 += int(ranked.any(1).sum())
        self.loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        self.seconds += seconds

    def result(self, **fidelity: Any) -> Evaluation:
        n = self.images
        return Evaluation(
            images=n,
            top1=100 * self.top1 / n,
            top1_interval=wilson_interval(self.top1, n),
            top5=100 * self.top5 / n,
            top5_interval=wilson_interval(self.top5, n),
            loss=self.loss / n,
            images_per_second=n / self.seconds,
            **fidelity,
        )


def evaluate(
    model: Callable[[Tensor], Tensor],
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    reference: Callable[[Tensor], Tensor] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measure accuracy on labelled images, and fidelity to ``reference`` when given.

    Args:
        model: a module (put into eval mode for the pass, and back) or any callable, images [B, C, H, W] -> logits
            [B, classes].
        loader: batches of images, already preprocessed, and int64 labels [B].
        reference: usually the float model; it is evaluated in the same pass, on the same images.
        progress: show a progress bar.

    Raises:
        DataError: the loader is empty.
    """
    tally, other = _Tally(), _Tally()
    agree, signal, noise = 0, 0.0, 0.0
    with ExitStack() as stack:
        for module in (model, reference):
            if isinstance(module, nn.Module):
                stack.enter_context(evaluating(module))
        with torch.inference_mode():
            for images, labels in track(loader, "evaluate", show=progress):
                logits, seconds = _timed(model, images)
                tally.add(logits, labels, seconds)
                if reference is not None:
                    expected, seconds = _timed(reference, images)
                    other.add(expected, labels, seconds)
                    agree += int((logits.argmax(1) == expected.argmax(1)).sum())
                    signal += expected.double().square().sum().item()
                    noise += (expected.double() - logits.double()).square().sum().item()
    if tally.images == 0:
        raise DataError("the loader gave no images; check the folder, the split and the limit")
    if reference is None:
        return tally.result()
    return tally.result(
        agreement=100 * agree / tally.images,
        sqnr_db=math.inf if noise == 0 else 10 * math.log10(signal / noise),
        reference=other.result(),
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode within, each module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _timed(model: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, float]:
    start = time.perf_counter()
    logits = model(images)
    return logits.float(), time.perf_counter() - start
