"""``TrainOptions``: everything that :func:`qzoo.train` can be told, as it is recorded in a checkpoint's config."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from qzoo.errors import ArgumentError

METHODS = ("ste", "lsq", "pact")


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

    epochs: int = 40
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.05
    label_smoothing: float = 0.0
    seed: int = 0
    bf16: bool = False
    method: str = "ste"
    range_lr: float = 1.0
    range_decay: float = 0.0
    distill: float = 0.0
    temperature: float = 4.0
    freeze_bn: float = 0.0
    ema: float = 0.0
    accumulate: int = 1
    fp16: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ArgumentError(
                f"TrainOptions.method must be one of {', '.join(METHODS)}, not {self.method!r}"
            )
        for name in ("distill", "freeze_bn", "ema", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ArgumentError(f"TrainOptions.{name} must be 0 to 1, not {getattr(self, name)}")
        for name in ("epochs", "accumulate"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"TrainOptions.{name} must be 1 or more, not {getattr(self, name)}")
        if self.bf16 and self.fp16:
            raise ArgumentError("TrainOptions.bf16 and fp16 exclude each other; choose one")

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of one of ``steps`` steps, counted from 0."""
        rise = max(1, round(self.warmup * steps))
        if step < rise:
            return self.lr * (step + 1) / rise
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


_TUNING = (
    "warmup",
    "method",
    "range_lr",
    "range_decay",
    "distill",
    "temperature",
    "freeze_bn",
    "ema",
    "accumulate",
)
TUNING = {field.name: field.default for field in fields(TrainOptions) if field.name in _TUNING}
"""Options beside those of a plain training, with their defaults: the command names them where they differ."""
