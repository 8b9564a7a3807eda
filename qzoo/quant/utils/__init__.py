"""Helpers: :func:`reduce_amax` and :mod:`quant_logging`."""

from qzoo.quant.utils import quant_logging
from qzoo.quant.utils.reduce_amax import reduce_amax

__all__ = ["quant_logging", "reduce_amax"]
