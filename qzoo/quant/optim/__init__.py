"""Helpers for optimizers."""

from qzoo.quant.optim import helper

__all__ = ["helper"]
