"""``qzoo.train``: train a module in place, float or quantized (QAT is the same loop on a calibrated model).

Every epoch ends with an atomic checkpoint in ``out`` (and, with ``save_every``, so do parts of it), batches depend
only on seed and epoch, and torch's generator starts anew from seed, epoch and batch after each checkpoint. So a run
that was killed and started again with the same options ends with the weights of an uninterrupted one (same machine,
same number of threads and processes).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from qzoo.accuracy import evaluate
from qzoo.data.epochs import Epochs
from qzoo.data.files import broken_images
from qzoo.distributed import Group
from qzoo.errors import ArgumentError, CheckpointError, DataError, QzooError
from qzoo.files import locked
from qzoo.options import TrainOptions
from qzoo.progress import track
from qzoo.qat import distillation_loss, freeze_ranges, learn_ranges, learned_parameters
from qzoo.runtimes.pytorch import run
from qzoo.training.state import load_state, require_tools, save_state, write_log, write_tensorboard

__all__ = ["EpochLoader", "TrainOptions", "train"]


class EpochLoader(Protocol):
    """A sized iterable of ``(images, labels)`` that knows the epoch: :func:`train` can resume it within one."""

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch of the next iteration, and how many of its batches to leave out.

        ``len()`` stays that of the whole epoch.
        """

    def __len__(self) -> int: ...

    def __iter__(self) -> Any: ...


def train(
    model: nn.Module,
    loader: EpochLoader | Iterable[tuple[Tensor, Tensor]],
    options: TrainOptions | None = None,
    *,
    out: str | Path | None = None,
    eval_loader: Iterable[tuple[Tensor, Tensor]] | None = None,
    teacher: nn.Module | None = None,
    tensorboard: bool = False,
    progress: bool = True,
    group: Group | None = None,
    save_every: int = 0,
    origin: Mapping[str, str] | None = None,
) -> list[dict[str, float]]:
    """Train or fine-tune a model, in place; an unfinished run in ``out`` with the same options is resumed.

    Args:
        model: float, or quantized and calibrated.
        loader: training batches, any iterable of ``(images, labels)`` such as a ``DataLoader``; see
            :class:`qzoo.data.epochs.Epochs`. Its ``set_epoch``, where it has one, is called before each epoch.
        options: :class:`TrainOptions`, the defaults if None.
        out: folder for ``state.pt`` (model, optimizer, scaler, place in the run) and ``log.csv`` (one line an epoch);
            one training at a time. None writes nothing, and there is nothing to go on from.
        eval_loader: when given, top-1 is measured after every epoch.
        teacher: the float model of ``options.distill``; it is not changed.
        tensorboard: write the log for TensorBoard into ``out``, too.
        progress: show a progress bar.
        group: the processes that share each batch, equal parts of it; every process passes the same loaders.
            Gradients are those of the whole batch. BatchNorm normalizes each process's part by itself; its running
            statistics are averaged after each epoch. Rank 0 writes.
        save_every: steps after which the state is saved within an epoch, too; 0 saves after each epoch only. With
            several processes, BatchNorm's statistics are averaged then, too. Needs a loader with ``set_epoch``.
        origin: what the run starts from and is trained on, in words, such as ``{"start": "resnet20.fmnist"}``; kept
            in the state, which a run of another origin does not go on from.

    Returns:
        One dictionary an epoch: epoch, lr, loss, seconds; top1 (in percent) when ``eval_loader`` is given; skipped,
        where the loader left out images that do not decode, their number.

    Raises:
        QzooError: ``out`` holds a run with other options or another origin, another training runs there, or it can't
            be written; or the loss is not finite.
        CheckpointError: the state in ``out`` is damaged, or of another model.
        DataError: the loader gives something else than ``(images, labels)``, or more or fewer than its length.
        CalibrationError: ranges are to be trained, and a quantizer has none.
        ValueError: distillation without a teacher, or float16 on a CPU.
        MissingDependencyError: ``tensorboard`` is not installed.
        DistributedError: another process has ended, or a batch that can't be shared out equally.

    Example:
        >>> from qzoo.options import TrainOptions
        >>> log = qzoo.train(model, loader, TrainOptions(epochs=2, lr=0.001), out="runs/mine", progress=False)
        >>> [row["epoch"] for row in log]
        [0, 1]
    """
    options, group = options or TrainOptions(), group or Group()
    require_tools(tensorboard=tensorboard)
    epochs = _epochs(loader, options, teacher, group, save_every)
    folder = None if out is None else Path(out)
    with _held(folder, group):
        torch.manual_seed(options.seed)
        model.to(group.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if options.method != "ste":
            learn_ranges(model, options.method)
        training = _Run(model, options, None if teacher is None else teacher.eval().to(group.device), group)
        training.taken = epochs.take(group.rank, group.world)
        training.resume(None if folder is None else folder / "state.pt", len(epochs), dict(origin or {}))
        if training.log:  # a run may have been killed between its state and its log
            _write_logs(folder, training.log, tensorboard, group)
        for epoch in range(len(training.log), options.epochs):
            training.log.append(training.row(epochs, epoch, eval_loader, progress, save_every))
            training.save(0)
            _write_logs(folder, training.log, tensorboard, group)
    epochs.give_back()
    training.finish()
    return training.log


def _epochs(
    loader: Iterable[Any], options: TrainOptions, teacher: nn.Module | None, group: Group, save_every: int
) -> Epochs:
    """The batches, where they and the options fit each other; what is refused is refused here."""
    if options.distill and teacher is None:
        raise ArgumentError(f"distill={options.distill} needs teacher=, the float model")
    if options.fp16 and group.device.type != "cuda":
        raise ArgumentError("fp16 needs a GPU (--device cuda); use bf16 on a CPU")
    epochs = Epochs(loader, options.seed)
    if not len(epochs):
        raise DataError(
            "the loader gives no batches; check its images, and batch_size where drop_last is set"
        )
    if save_every and not epochs.can_start_within:
        raise ArgumentError(
            f"save_every={save_every} needs a loader with set_epoch(epoch, start), as qzoo.data.load_training_data "
            f"gives; of a {type(loader).__name__} the state is saved after each epoch: leave save_every out"
        )
    return epochs


@contextmanager
def _held(folder: Path | None, group: Group) -> Iterator[None]:
    """The folder, made if need be, for this training alone."""
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "another training") if group.first else nullcontext():
        yield


def _write_logs(folder: Path | None, log: list[dict[str, float]], tensorboard: bool, group: Group) -> None:
    if not group.first or folder is None:
        return
    write_log(folder / "log.csv", log)
    if tensorboard:
        write_tensorboard(folder, log)


class _Run:
    """Model, optimizer and average, and how far they are."""

    def __init__(
        self, model: nn.Module, options: TrainOptions, teacher: nn.Module | None, group: Group
    ) -> None:
        self.model, self.options, self.teacher, self.group = model, options, teacher, group
        self.parallel = group.parallel(model)
        self.optimizer = _optimizer(model, options)
        self.scaler = torch.amp.GradScaler(group.device.type, enabled=options.fp16)
        self.average: AveragedModel | None = None
        if options.ema:
            # Buffers too: BatchNorm's statistics belong to the weights.
            self.average = AveragedModel(
                model, multi_avg_fn=get_ema_multi_avg_fn(options.ema), use_buffers=True
            )
        self.loss = nn.CrossEntropyLoss(label_smoothing=options.label_smoothing)
        self.lr, self.total, self.skipped = 0.0, 0.0, 0
        self.path: Path | None = None
        self.batches, self.start = 0, 0
        self.taken = False  # the loader gives this process's part of each batch
        self.origin: dict[str, str] = {}
        self.log: list[dict[str, float]] = []
        self._began, self._before = time.perf_counter(), 0.0

    def row(
        self,
        loader: Epochs,
        epoch: int,
        eval_loader: Iterable[tuple[Tensor, Tensor]] | None,
        progress: bool,
        save_every: int,
    ) -> dict[str, float]:
        """Write an epoch as a line of the log."""
        row: dict[str, float] = {"epoch": epoch, "loss": self.epoch(loader, epoch, progress, save_every)}
        row["lr"] = self.lr
        if skipped := sum(self.group.gather(self.skipped)):
            row["skipped"] = skipped
        if eval_loader is not None:
            row["top1"] = evaluate(self.result(), eval_loader, progress=False, group=self.group).top1
        row["seconds"] = round(self.seconds(), 1)
        return row

    def finish(self) -> None:
        """Leave the result in the model, ready to be used: the average, where there is one."""
        if self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())
        freeze_ranges(self.model)
        self.model.eval()

    def result(self) -> nn.Module:
        """Get the model to evaluate."""
        return self.model if self.average is None else self.average.module

    def seconds(self) -> float:
        """Time spent on this epoch, also before the run was stopped."""
        return self._before + time.perf_counter() - self._began

    def save(self, done: int) -> None:
        """Rank 0 writes the state after ``done`` batches of the epoch whose row the log does not have yet."""
        totals, skipped = self.group.gather(self.total), self.group.gather(self.skipped)
        if not self.group.first or self.path is None:
            return
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "scaler": self.scaler.state_dict(),
            "log": self.log,
            "options": asdict(self.options),
            "origin": self.origin,
            "batches": self.batches,
            "done": done,
            "totals": totals if done else [],
            "skipped": skipped if done else [],
            "seconds": self.seconds() if done else 0.0,
        }
        save_state(self.path, state)

    def resume(self, path: Path | None, batches: int, origin: dict[str, str]) -> None:
        """Load the last saved state, if rank 0 finds one."""
        self.path, self.batches, self.origin = path, batches, origin
        if path is None:
            return
        own = load_state(path, asdict(self.options), batches, origin) if self.group.first else None
        state = self.group.broadcast(own)
        if state is None:
            return
        try:
            self._restore(state)
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            reason = str(error).partition("\n")[0].rstrip(":")
            raise CheckpointError(
                f"{path} is of another model, or damaged ({type(error).__name__}: {reason}); choose another folder or "
                "remove it"
            ) from error

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.options.fp16:
            self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.log, self.start = state["log"], state.get("done", 0)
        if self.start:
            self.total, self._before = state["totals"][self.group.rank], state["seconds"]
            self.skipped = state["skipped"][self.group.rank] if state.get("skipped") else 0

    def epoch(self, loader: Epochs, epoch: int, progress: bool, save_every: int) -> float:
        """Train for one pass, or what is left of it. Returns the mean loss of all of it."""
        options, batches, start = self.options, self.batches, self.start
        if not start:
            self.total, self._before, self.skipped = 0.0, 0.0, 0
        self._began, self.start = time.perf_counter(), 0
        self._prepare(epoch, start)
        loader.set_epoch(epoch, start)
        steps = math.ceil(batches / options.accumulate)
        title = f"epoch {epoch + 1}/{options.epochs}"
        shown = track(loader, title, total=batches - start, show=progress and self.group.first)
        i, skipped = start - 1, self.skipped
        for i, (images, labels) in enumerate(shown, start):
            if i == batches:
                raise DataError(f"the loader gave more batches than the {batches} that its length says")
            step, part = divmod(i, options.accumulate)
            if part == 0:
                self._set_rate(options.rate(epoch * steps + step, options.epochs * steps))
                self.optimizer.zero_grad(set_to_none=True)
            last = min(batches, (step + 1) * options.accumulate)
            with self.group.talking():
                if not self.taken:
                    images, labels = self.group.part(images), self.group.part(labels)
                loss = self._loss(images, labels)
                self.scaler.scale(loss / (last - step * options.accumulate)).backward()
            self.total += loss.item()
            self.skipped = skipped + broken_images(loader.loader)
            if i + 1 == last:
                self._step()
                if save_every and (step + 1) % save_every == 0 and last < batches:
                    self._average_statistics()
                    self.save(last)
                    self._prepare(epoch, last)
        if i + 1 != batches:
            raise DataError(
                f"the loader gave {i + 1} batches in epoch {epoch + 1}, and its length says {batches}"
            )
        self._average_statistics()
        mean = math.fsum(self.group.gather(self.total)) / (max(1, batches) * self.group.world)
        if not math.isfinite(mean):
            raise QzooError(f"the loss of epoch {epoch + 1} is {mean}; lower lr (now {options.lr})")
        return mean

    def _prepare(self, epoch: int, batch: int) -> None:
        """Training mode, with BatchNorm fixed near the end, and generators that start from the place in the run."""
        place = [self.options.seed % (1 << 63), epoch, batch, self.group.rank]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]) >> 1)
        self.model.train()
        if epoch >= self.options.epochs - round(self.options.freeze_bn * self.options.epochs):
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def _step(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.model)

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
        device, low = self.group.device, torch.float16 if options.fp16 else torch.bfloat16
        images = images.to(device).contiguous(memory_format=torch.channels_last)
        labels = labels.to(device)

        def logits(model: Callable[[Tensor], Tensor]) -> Tensor:
            with torch.autocast(device.type, low) if options.bf16 or options.fp16 else nullcontext():
                return run(model, images).float()

        outputs = logits(self.parallel)
        try:
            loss = self.loss(outputs, labels)
        except (IndexError, RuntimeError) as error:
            if device.type != "cpu":  # there it may be any error of an earlier kernel
                raise
            raise DataError(
                f"{labels.dtype} labels {list(labels.shape)} do not fit logits {list(outputs.shape)} ({error}); "
                f"expected one class index an image, 0 to {outputs.shape[1] - 1}"
            ) from error
        if self.teacher is None or options.distill == 0:
            return loss
        with torch.no_grad():
            goal = logits(self.teacher)
        return (1 - options.distill) * loss + options.distill * distillation_loss(
            outputs, goal, options.temperature
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
    return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, nesterov=options.momentum > 0)
