"""``TrainOptions``: everything that :func:`qzoo.train` can be told, as it is recorded in a checkpoint's config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from qzoo.errors import ArgumentError

METHODS = ("ste", "lsq", "pact")


def _flag(default: Any, text: str, *, choices: tuple[str, ...] = (), always: bool = False) -> Any:
    """A field that is a flag of ``qzoo train`` too, see :func:`flags_of`.

    Args:
        text: for ``--help``.
        always: a card's command names it even where it has its default.
    """
    return field(default=default, metadata={"help": text, "choices": choices, "always": always})


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
        fp16: forward in float16 autocast with a scaled loss, on a GPU; a CPU refuses it.
        method: of the ranges of a quantized model: "ste" keeps them as calibrated (straight-through estimator,
            Bengio et al. 2013, arXiv:1308.3432); "lsq" and "pact" train them, see :mod:`qzoo.qat`.
        range_lr: learning rate of trained ranges, as a multiple of ``lr``.
        range_decay: weight decay of trained ranges: PACT's regularization.
        distill: weight of the distillation loss, that of the labels is 1 - distill; needs a teacher.
        temperature: of the distillation.
        freeze_bn: share of the epochs, at the end, in which BatchNorm uses and keeps its running statistics
            (Krishnamoorthi 2018, arXiv:1806.08342, section 5.2).
        ema: decay of an exponential moving average of weights and statistics, which is the result; 0 is none.
        accumulate: batches a step; their gradients are averaged.
    """

    epochs: int = _flag(40, "passes over the data", always=True)
    lr: float = _flag(0.1, "peak learning rate", always=True)
    momentum: float = _flag(0.9, "of SGD")
    weight_decay: float = _flag(5e-4, "on weights", always=True)
    warmup: float = _flag(0.05, "share of rising rate")
    label_smoothing: float = _flag(0.0, "of the cross entropy", always=True)
    seed: int = _flag(0, "of shuffling and augmentation", always=True)
    bf16: bool = _flag(False, "bfloat16 autocast")
    method: str = _flag("ste", "ranges", choices=METHODS)
    range_lr: float = _flag(1.0, "of learned ranges, times lr")
    range_decay: float = _flag(0.0, "weight decay of learned ranges")
    distill: float = _flag(0.0, "weight of the float model's probabilities")
    temperature: float = _flag(4.0, "of the distillation")
    freeze_bn: float = _flag(0.0, "last share of epochs with fixed BatchNorm")
    ema: float = _flag(0.0, "decay of averaged weights; 0: none")
    accumulate: int = _flag(1, "batches a step")
    fp16: bool = _flag(False, "float16 autocast and a scaled loss, on a GPU")

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ArgumentError(
                f"TrainOptions.method must be one of {', '.join(METHODS)}, not {self.method!r}"
            )
        for name in ("momentum", "warmup", "label_smoothing", "distill", "freeze_bn", "ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise ArgumentError(f"TrainOptions.{name} must be 0 to 1, not {getattr(self, name)}")
        for name in ("lr", "weight_decay", "range_lr", "range_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ArgumentError(f"TrainOptions.{name} must be 0 or more, not {getattr(self, name)}")
        for name in ("epochs", "accumulate"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"TrainOptions.{name} must be 1 or more, not {getattr(self, name)}")
        if not 0 < self.temperature < math.inf:
            raise ArgumentError(f"TrainOptions.temperature must be above 0, not {self.temperature}")
        if not -(2**63) <= self.seed < 2**63:
            raise ArgumentError(f"TrainOptions.seed must fit in 64 bits, not be {self.seed}")
        if self.bf16 and self.fp16:
            raise ArgumentError("TrainOptions.bf16 and fp16 exclude each other; choose one")

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of one of ``steps`` steps, counted from 0."""
        rise = max(1, round(self.warmup * steps))
        if step < rise:
            return self.lr * (step + 1) / rise
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def flag(name: str) -> str:
    """``--weight-decay`` of ``weight_decay``."""
    return "--" + name.replace("_", "-")


def flags_of(recorded: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Write the flags of ``qzoo train`` that give the recorded options: those with a value, and the switches.

    Example:
        >>> flags_of({"epochs": 2, "lr": 0.010, "method": "lsq", "ema": 0.0, "bf16": True})
        (['--epochs 2', '--lr 0.01', '--method lsq'], ['--bf16'])
    """
    known = {f.name: f for f in fields(TrainOptions)}
    always = [n for n, f in known.items() if f.metadata["always"] and n in recorded]
    others = [
        n for n, f in known.items() if not f.metadata["always"] and recorded.get(n, f.default) != f.default
    ]
    switches = [n for n in others if isinstance(known[n].default, bool)]
    values = [n for n in [*always, *others] if n not in switches]
    return [f"{flag(n)} {plain(recorded[n])}" for n in values], [flag(n) for n in switches]


def plain(value: object) -> str:
    """0.01 as such, without the digits that float adds."""
    return f"{value:g}" if isinstance(value, float) else str(value)
