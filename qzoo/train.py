"""``qzoo.train``: trains a module in place, float or quantized (QAT is the same loop on a calibrated model).

Every epoch ends with an atomic checkpoint in ``out``, and batches depend only on seed and epoch, so a run that was
killed and started again with the same options ends with the weights of an uninterrupted one (same machine, same
number of threads and processes).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from qzoo.distributed import Group
from qzoo.errors import QzooError
from qzoo.evaluate import evaluate
from qzoo.progress import track
from qzoo.qat import distillation_loss, freeze_ranges, learn_ranges, learned_parameters
from qzoo.train_state import load_state, save_state, write_log, write_tensorboard
from qzoo.training_options import TrainOptions

__all__ = ["EpochLoader", "TrainOptions", "train"]


class EpochLoader(Protocol):
    """What :func:`train` iterates over: a sized iterable of ``(images, labels)`` that knows the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Any: ...


def train(
    model: nn.Module,
    loader: EpochLoader,
    options: TrainOptions | None = None,
    *,
    out: str | Path,
    eval_loader: Iterable[tuple[Tensor, Tensor]] | None = None,
    teacher: nn.Module | None = None,
    tensorboard: bool = False,
    progress: bool = True,
    group: Group | None = None,
) -> list[dict[str, float]]:
    """Train ``model`` in place; go on where ``out`` holds an unfinished run of the same options.

    Args:
        model: float, or quantized and calibrated.
        loader: training batches; ``set_epoch`` is called before each epoch.
        options: :class:`TrainOptions`, the defaults if None.
        out: folder for ``state.pt`` (model, optimizer, epoch) and ``log.csv`` (one line an epoch).
        eval_loader: when given, top-1 is measured after every epoch.
        teacher: the float model of ``options.distill``; it is not changed.
        tensorboard: write the log for TensorBoard into ``out``, too.
        progress: show a progress bar.
        group: the processes that share each batch, equal parts of it; every process passes the same loaders.
            Gradients are those of the whole batch. BatchNorm normalizes each process's part by itself; its running
            statistics are averaged after each epoch. Rank 0 writes.

    Returns:
        One dictionary an epoch: epoch, lr, loss, seconds, and top1 (in percent) when ``eval_loader`` is given.

    Raises:
        QzooError: ``out`` holds a run with other options, or the loss is not finite.
        CalibrationError: ranges are to be trained, and a quantizer has none.
        ValueError: distillation without a teacher.
        DistributedError: another process has ended, or a batch that can't be shared out equally.
    """
    options, group = options or TrainOptions(), group or Group()
    if options.distill and teacher is None:
        raise ValueError(f"distill={options.distill} needs teacher=, the float model")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    model.to(group.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if options.method != "ste":
        learn_ranges(model, options.method)
    run = _Run(model, options, teacher.eval().to(group.device) if teacher is not None else None, group)
    log = run.resume(folder / "state.pt")
    for epoch in range(len(log), options.epochs):
        start = time.perf_counter()
        loader.set_epoch(epoch)
        row = {"epoch": epoch, "loss": run.epoch(loader, epoch, progress and group.first), "lr": run.lr}
        if eval_loader is not None:
            row["top1"] = evaluate(run.result(), eval_loader, progress=False, group=group).top1
        row["seconds"] = round(time.perf_counter() - start, 1)
        log.append(row)
        if not group.first:
            continue
        save_state(folder / "state.pt", {**run.state(), "log": log, "options": asdict(options)})
        write_log(folder / "log.csv", log)
        if tensorboard:
            write_tensorboard(folder, log)
    if run.average is not None:
        model.load_state_dict(run.average.module.state_dict())
    freeze_ranges(model)
    model.eval()
    return log


class _Run:
    """Model, optimizer and average between epochs."""

    def __init__(
        self, model: nn.Module, options: TrainOptions, teacher: nn.Module | None, group: Group
    ) -> None:
        self.model, self.options, self.teacher, self.group = model, options, teacher, group
        self.parallel = group.parallel(model)
        self.optimizer = _optimizer(model, options)
        self.average: AveragedModel | None = None
        if options.ema:
            # Buffers too: BatchNorm's statistics belong to the weights.
            self.average = AveragedModel(
                model, multi_avg_fn=get_ema_multi_avg_fn(options.ema), use_buffers=True
            )
        self.loss = nn.CrossEntropyLoss(label_smoothing=options.label_smoothing)
        self.lr = 0.0

    def result(self) -> nn.Module:
        """The model to evaluate."""
        return self.model if self.average is None else self.average.module

    def state(self) -> dict[str, Any]:
        average = None if self.average is None else self.average.state_dict()
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": average,
        }

    def resume(self, path: Path) -> list[dict[str, float]]:
        """Load the last epoch's state, if rank 0 finds one; returns its log."""
        state = self.group.broadcast(load_state(path, asdict(self.options)) if self.group.first else None)
        if state is None:
            return []
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        log: list[dict[str, float]] = state["log"]
        return log

    def epoch(self, loader: EpochLoader, epoch: int, progress: bool) -> float:
        """One pass; returns the mean loss."""
        options, total = self.options, 0.0
        self.model.train()
        if epoch >= options.epochs - round(options.freeze_bn * options.epochs):
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        batches = len(loader)
        steps = math.ceil(batches / options.accumulate)
        title = f"epoch {epoch + 1}/{options.epochs}"
        for i, (images, labels) in enumerate(track(loader, title, total=batches, show=progress)):
            step, part = divmod(i, options.accumulate)
            if part == 0:
                self._set_rate(options.rate(epoch * steps + step, options.epochs * steps))
                self.optimizer.zero_grad(set_to_none=True)
            last = min(batches, (step + 1) * options.accumulate)
            with self.group.talking():
                loss = self._loss(self.group.part(images), self.group.part(labels))
                (loss / (last - step * options.accumulate)).backward()
            if i + 1 == last:
                self.optimizer.step()
                if self.average is not None:
                    self.average.update_parameters(self.model)
            total += loss.item()
        self._average_statistics()
        mean = math.fsum(self.group.gather(total)) / (max(1, batches) * self.group.world)
        if not math.isfinite(mean):
            raise QzooError(f"the loss of epoch {epoch + 1} is {mean}; lower lr (now {options.lr})")
        return mean

    def _average_statistics(self) -> None:
        """BatchNorm's running statistics come from each process's own images: take their mean."""
        for name, module in self.model.named_modules():
            if not isinstance(module, _BatchNorm) or not module.training or module.running_mean is None:
                continue
            twin = [] if self.average is None else [self.average.module.get_submodule(name)]
            for norm in (module, *twin):
                for buffer in ("running_mean", "running_var"):
                    self.group.average_(norm.get_buffer(buffer))

    def _set_rate(self, rate: float) -> None:
        self.lr = rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["multiple"]

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        options = self.options
        device = self.group.device
        images = images.to(device).contiguous(memory_format=torch.channels_last)
        labels = labels.to(device)

        def logits(model: Callable[[Tensor], Tensor]) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16) if options.bf16 else nullcontext():
                return model(images).float()

        found = logits(self.parallel)
        loss = self.loss(found, labels)
        if self.teacher is None or options.distill == 0:
            return loss
        with torch.no_grad():
            wanted = logits(self.teacher)
        return (1 - options.distill) * loss + options.distill * distillation_loss(
            found, wanted, options.temperature
        )


def _optimizer(model: nn.Module, options: TrainOptions) -> torch.optim.SGD:
    ranges = learned_parameters(model)
    learned = {id(p) for p in ranges}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in learned]
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in others if p.ndim > 1],
            "weight_decay": options.weight_decay,
            "multiple": 1.0,
        },
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0, "multiple": 1.0},
    ]
    if ranges:
        groups.append({"params": ranges, "weight_decay": options.range_decay, "multiple": options.range_lr})
    return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, nesterov=True)
