"""Quantization-aware training: ranges that are learned, and the float model as a teacher.

:func:`qzoo.train` uses both by its options. By hand: calibrate, :func:`learn_ranges`, train with any loop,
:func:`freeze_ranges`; what remains is an ordinary calibrated model.
"""

from qzoo.qat.distill import distillation_loss
from qzoo.qat.learned import LearnedLimits, LearnedRange, freeze_ranges, learn_ranges, learned_parameters

__all__ = [
    "LearnedLimits",
    "LearnedRange",
    "distillation_loss",
    "freeze_ranges",
    "learn_ranges",
    "learned_parameters",
]
