"""``qzoo.train``: trains a module in place, float or quantized (QAT is the same loop on a calibrated model).

Every epoch ends with an atomic checkpoint in ``out``, and batches depend only on seed and epoch, so a run that was
killed and started again with the same options ends with the weights of an uninterrupted one (same machine, same
number of threads).
"""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qzoo.errors import QzooError
from qzoo.evaluate import evaluate
from qzoo.progress import track


class EpochLoader(Protocol):
    """What :func:`train` iterates over: a sized iterable of ``(images, labels)`` that knows the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Any: ...


@dataclass(frozen=True)
class TrainOptions:
    """SGD with Nesterov momentum, a linear warm-up and a cosine to zero.

    Attributes:
        epochs: passes over the data.
        lr: peak learning rate.
        momentum: of SGD.
        weight_decay: on weights of two or more dimensions; biases and BatchNorm have none.
        warmup: share of all steps in which the rate rises from 0.
        label_smoothing: of the cross entropy.
        seed: of torch's global generator at the start; the loader has its own.
        bf16: forward in bfloat16 autocast (about twice as fast on a CPU with AVX512-BF16).
    """

    epochs: int = 40
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.05
    label_smoothing: float = 0.0
    seed: int = 0
    bf16: bool = False

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of one of ``steps`` steps, counted from 0."""
        rise = max(1, round(self.warmup * steps))
        if step < rise:
            return self.lr * (step + 1) / rise
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def train(
    model: nn.Module,
    loader: EpochLoader,
    options: TrainOptions | None = None,
    *,
    out: str | Path,
    eval_loader: Iterable[tuple[Tensor, Tensor]] | None = None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train ``model`` in place; go on where ``out`` holds an unfinished run of the same options.

    Args:
        model: float, or quantized and calibrated.
        loader: training batches; ``set_epoch`` is called before each epoch.
        options: :class:`TrainOptions`, the defaults if None.
        out: folder for ``state.pt`` (model, optimizer, epoch) and ``log.csv`` (one line an epoch).
        eval_loader: when given, top-1 is measured after every epoch.
        progress: show a progress bar.

    Returns:
        One dictionary an epoch: epoch, lr, loss, seconds, and top1 (in percent) when ``eval_loader`` is given.

    Raises:
        QzooError: ``out`` holds a run with other options, or the loss is not finite.
    """
    options = options or TrainOptions()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = _optimizer(model, options)
    log = _resume(folder / "state.pt", model, optimizer, options)
    for epoch in range(len(log), options.epochs):
        start = time.perf_counter()
        loader.set_epoch(epoch)
        loss = _epoch(model, loader, optimizer, options, epoch, progress)
        row = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"], "loss": loss}
        if eval_loader is not None:
            row["top1"] = evaluate(model, eval_loader, progress=False).top1
        row["seconds"] = round(time.perf_counter() - start, 1)
        log.append(row)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "log": log}
        _save(folder / "state.pt", {**state, "options": asdict(options)})
        _write_log(folder / "log.csv", log)
    model.eval()
    return log


def _optimizer(model: nn.Module, options: TrainOptions) -> torch.optim.SGD:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, nesterov=True)


def _epoch(
    model: nn.Module,
    loader: EpochLoader,
    optimizer: torch.optim.Optimizer,
    options: TrainOptions,
    epoch: int,
    progress: bool,
) -> float:
    """One pass; returns the mean loss."""
    model.train()
    criterion = nn.CrossEntropyLoss(label_smoothing=options.label_smoothing)
    steps, total = len(loader), 0.0
    title = f"epoch {epoch + 1}/{options.epochs}"
    for i, (images, labels) in enumerate(track(loader, title, total=steps, show=progress)):
        for group in optimizer.param_groups:
            group["lr"] = options.rate(epoch * steps + i, options.epochs * steps)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16) if options.bf16 else nullcontext():
            logits = model(images)
        loss = criterion(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += loss.item()
    mean = total / max(1, steps)
    if not math.isfinite(mean):
        raise QzooError(f"the loss of epoch {epoch + 1} is {mean}; lower lr (now {options.lr})")
    return mean


def _resume(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, options: TrainOptions
) -> list[dict[str, float]]:
    """Load the last epoch's state, if there is one; returns its log."""
    if not path.exists():
        return []
    state = torch.load(path, weights_only=True)
    if state["options"] != asdict(options):
        raise QzooError(f"{path} belongs to a run with other options; choose another folder or remove it")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["log"]


def _save(path: Path, state: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def _write_log(path: Path, log: list[dict[str, float]]) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(log[-1]))
        writer.writeheader()
        writer.writerows(log)
    os.replace(temporary, path)
