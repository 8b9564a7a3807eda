"""How near a quantized model is to its float model."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def sqnr(exact: nn.Module, model: nn.Module, images: Tensor) -> float:
    """Of the logits, in dB."""
    with torch.no_grad():
        expected, logits = exact(images).double(), model(images).double()
    return float(10 * torch.log10(expected.square().sum() / (logits - expected).square().sum()))
