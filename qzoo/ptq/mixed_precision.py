"""Mixed precision: more bits for the weights of the layers that need them, until the model is good enough.

Papers: the ranking by each layer's own effect on the output follows "Mixed Precision Post Training Quantization of
Neural Networks with Sensitivity Guided Search" (Schaefer et al., 2023, arXiv:2302.01382); the error of several layers
is taken as the sum of theirs, as in "HAWQ-V2" (Dong et al., 2019, arXiv:1911.03852), and the layers with the largest
error for their size come first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.collect import images_of, quantizers_off
from qzoo.errors import CalibrationError
from qzoo.evaluate import evaluating
from qzoo.progress import track
from qzoo.ptq.layers import Layer, layers_of
from qzoo.quant.nn import TensorQuantizer


@dataclass(frozen=True)
class Raised:
    """What mixed precision came to.

    Attributes:
        bits: of each layer's weight, by its name, in running order.
        order: the layers whose bits were raised, the most sensitive for its size first.
        average_bits: a weight's.
        agreement: share of images with the float model's highest logit, in percent.
        sqnr_db: of the logits.
        met: whether the target was met.
    """

    bits: dict[str, int]
    order: tuple[str, ...]
    average_bits: float
    agreement: float
    sqnr_db: float
    met: bool


@torch.no_grad()
def raise_bits(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    bits: int = 8,
    agreement: float = 99.0,
    sqnr_db: float = 0.0,
    progress: bool = True,
) -> Raised:
    """Raise the bits of the most sensitive layers' weights, in place, until both targets are met.

    Ranges stay: more bits divide the same range more finely. Learned rounding comes after it, so targets may be set
    for what rounding to nearest reaches.

    Args:
        model: calibrated at low bits, with float weights.
        loader: batches of images that decide; never the test images.
        bits: that a raised layer gets.
        agreement: of the highest logit with the float model, in percent, that is enough.
        sqnr_db: of the logits, that is enough.

    Returns:
        What was done; ``met`` is False when even all layers raised don't reach the targets.

    Raises:
        CalibrationError: no quantized layers, ranges or images.
        ValueError: bits outside 2 to 8.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, not {bits}")
    batches = [images_of(batch) for batch in loader]
    layers = layers_of(model, batches[0][:1] if batches else None)
    with evaluating(model):
        with quantizers_off(model):
            expected = _logits(model, batches)
        noise = _noise(model, layers, batches, expected, progress)
        candidates = [layer for layer in layers if layer.bits < bits]
        candidates.sort(key=lambda layer: noise[layer.name] / layer.module.weight.numel(), reverse=True)
        # Fewest layers that do: with every layer raised the error is least, so halving finds the number.
        low, high = 0, len(candidates)
        while low < high:
            middle = (low + high) // 2
            found = _fidelity(_with(model, candidates, middle, bits, batches), expected)
            low, high = (low, middle) if _enough(found, agreement, sqnr_db) else (middle + 1, high)
        found = _fidelity(_with(model, candidates, low, bits, batches), expected)
        for layer in candidates[:low]:
            layer.module._weight_quantizer._num_bits = bits
    sizes = {layer.name: layer.module.weight.numel() for layer in layers}
    chosen = {layer.name: layer.bits for layer in layers}
    average = sum(chosen[name] * size for name, size in sizes.items()) / sum(sizes.values())
    order = tuple(layer.name for layer in candidates[:low])
    return Raised(chosen, order, average, *found, _enough(found, agreement, sqnr_db))


def _enough(found: tuple[float, float], agreement: float, sqnr_db: float) -> bool:
    return found[0] >= agreement and found[1] >= sqnr_db


def _noise(
    model: nn.Module, layers: list[Layer], batches: list[Tensor], expected: Tensor, progress: bool
) -> dict[str, float]:
    """Squared error of the logits with the weight of one layer quantized alone, by name."""
    noise = {}
    with quantizers_off(model):
        for layer in track(layers, "sensitivity", show=progress):
            quantizer = layer.module._weight_quantizer
            quantizer.enable_quant()
            noise[layer.name] = (_logits(model, batches) - expected).square().sum().item()
            quantizer.disable_quant()
    return noise


def _with(model: nn.Module, layers: list[Layer], count: int, bits: int, batches: list[Tensor]) -> Tensor:
    """The logits with the first layers' bits raised; they are as before afterwards."""
    raised: list[tuple[TensorQuantizer, Any]] = []
    try:
        for layer in layers[:count]:
            quantizer = layer.module._weight_quantizer
            raised.append((quantizer, quantizer._num_bits))
            quantizer._num_bits = bits
        return _logits(model, batches)
    finally:
        for quantizer, before in raised:
            quantizer._num_bits = before


def _logits(model: nn.Module, batches: list[Tensor]) -> Tensor:
    if not batches:
        raise CalibrationError("the loader gave no images; pass calibration images")
    return torch.cat([model(batch) for batch in batches]).double()


def _fidelity(logits: Tensor, expected: Tensor) -> tuple[float, float]:
    """Agreement in percent, SQNR in dB."""
    noise, signal = (logits - expected).square().sum().item(), expected.square().sum().item()
    agreement = 100 * (logits.argmax(1) == expected.argmax(1)).double().mean().item()
    return agreement, math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)
