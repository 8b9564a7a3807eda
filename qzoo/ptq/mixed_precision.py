"""Mixed precision: more bits for the layers that need them, until the model is good enough.

Papers: the ranking by each layer's own effect on the output follows "Mixed Precision Post Training Quantization of
Neural Networks with Sensitivity Guided Search" (Schaefer et al., 2023, arXiv:2302.01382); the error of several layers
is taken as the sum of theirs, as in "HAWQ-V2" (Dong et al., 2019, arXiv:1911.03852), and the layers with the largest
error for their size come first.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.accuracy import Fidelity
from qzoo.config import config_of
from qzoo.errors import ArgumentError, CalibrationError
from qzoo.progress import track
from qzoo.ptq.collect import SHARE, hold_back, images_of
from qzoo.ptq.layers import Layer, layers_of
from qzoo.ptq.ranges import calibrate
from qzoo.quant.fold import evaluating
from qzoo.quant.nn import Range
from qzoo.quantizers import quantizers_off, set_layer_bits
from qzoo.runtimes.pytorch import output_of
from qzoo.scheme import FLOAT


@dataclass(frozen=True)
class MixedPrecision:
    """Result of mixed precision: the bits of each layer, and what the model reaches with them.

    Attributes:
        bits: bits of each layer's weight, by the layer's name, in running order.
        order: the layers whose bits were raised, the most sensitive for its size first.
        average_bits: mean number of bits of a weight.
        agreement: share of images with the float model's highest logit, in percent.
        sqnr_db: SQNR of the logits.
        met: whether the target was met.

    Example:
        >>> model = qzoo.create_model("resnet20.fmnist", pretrained="float", quantize="w4a8")
        >>> qzoo.calibrate(model, loader, progress=False).method
        'max'
        >>> raise_bits(model, loader, agreement=50.0, progress=False).met
        True
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
    inputs: Mapping[str, Range] | None = None,
    progress: bool = True,
) -> MixedPrecision:
    """Raise the bits of the most sensitive layers, in place, until both targets are met.

    Ranges of weights stay: more bits divide the same range more finely. Learned rounding comes after it, so targets
    may be set for what rounding to nearest reaches.

    Args:
        model: calibrated at low bits, with float weights.
        loader: batches of images that decide; never the test images.
        bits: the bits of a raised layer.
        agreement: share of images with the float model's highest logit that is enough, in percent.
        sqnr_db: SQNR of the logits that is enough.
        inputs: by layer name, the range of its input for ``bits`` bits: the inputs of raised layers get them, where
            they have fewer bits. None raises weights only.
        progress: show a progress bar.

    Returns:
        What was done; ``met`` is False when even all layers raised don't reach the targets.

    Raises:
        CalibrationError: no quantized layers, ranges or images.
        ValueError: bits outside 2 to 8.

    Example:
        >>> model = qzoo.create_model("resnet20.fmnist", pretrained="float", quantize="w4a8")
        >>> record = qzoo.calibrate(model, loader, method="mse", progress=False)
        >>> raised = raise_bits(model, loader, agreement=90.0, progress=False)
        >>> raised.met, 4 <= raised.average_bits <= 8
        (True, True)
    """
    if not 2 <= bits <= 8:
        raise ArgumentError(f"bits must be 2 to 8, not {bits}")
    batches = [images_of(batch) for batch in loader]
    layers = layers_of(model, batches[0][:1] if batches else None)
    with evaluating(model):
        with quantizers_off(model):
            expected = _logits(model, batches)
        noise = _noise(model, layers, batches, expected, inputs is not None, progress)
        candidates = [layer for layer in layers if _lowest(layer, inputs is not None) < bits]
        candidates.sort(key=lambda layer: noise[layer.name] / layer.module.weight.numel(), reverse=True)

        def fidelity_of(count: int) -> Fidelity:
            with _raised(candidates[:count], bits, inputs):
                return Fidelity.of(_logits(model, batches), expected)

        # Fewest layers that do: more layers, less error, so halving finds the number. Agreement on few images does
        # not fall in step with the error, so none at all is tried first.
        low, high = 0, 0 if _enough(fidelity_of(0), agreement, sqnr_db) else len(candidates)
        while low < high:
            middle = (low + high) // 2
            low, high = (
                (low, middle) if _enough(fidelity_of(middle), agreement, sqnr_db) else (middle + 1, high)
            )
        reached = fidelity_of(low)
    _raise(candidates[:low], bits, inputs)
    sizes = {layer.name: layer.module.weight.numel() for layer in layers}
    chosen = {layer.name: layer.bits for layer in layers}
    average = sum(chosen[name] * size for name, size in sizes.items()) / sum(sizes.values())
    order = tuple(layer.name for layer in candidates[:low])
    met = _enough(reached, agreement, sqnr_db)
    return MixedPrecision(chosen, order, average, reached.agreement, reached.sqnr_db, met)


def mix_precision(
    model: nn.Module,
    loader: Iterable[Any],
    drop: float,
    *,
    bits: int = 8,
    held_back: float = SHARE,
    progress: bool = True,
) -> MixedPrecision:
    """Choose the layers that get more bits in weights and inputs, and set these, in place (mixed precision).

    Ranges come from most of the images, the choice from those held back, as :func:`qzoo.ptq.best_recipe` does. The
    model's config says which layers they are (``Scheme.layers``), so the checkpoint does. Ranges are still to be
    found: calibrate it, or apply a recipe.

    Args:
        model: of the zoo, with quantizers and float weights, at the target that counts.
        loader: batches of calibration images.
        drop: share of the held-back images, in percent, whose top-1 may differ from the float model's; accuracy
            on them drops by no more. With ranges by mean squared error and rounding to nearest.
        bits: that a raised layer gets.
        held_back: share of the images that the choice is made on, the last ones.
        progress: show a progress bar.

    Returns:
        The bits of each layer, and what the model reaches with them.

    Raises:
        CalibrationError: fewer than two images, or all layers raised are not good enough.
        ValueError: a drop outside 0 to 100.

    Example:
        >>> model = qzoo.create_model("resnet20.fmnist", pretrained="float", quantize="w4a8")
        >>> mixed = mix_precision(model, loader, drop=50.0, progress=False)
        >>> record = qzoo.calibrate(model, loader, method="mse", progress=False)
    """
    if not 0 < drop < 100:
        raise ArgumentError(f"the drop must be between 0 and 100 percent, not {drop}")
    own = getattr(model, "qzoo_scheme", None)
    config = None if own is not None and not hasattr(model, "qzoo_config") else config_of(model)
    current = config.scheme if config is not None else own
    if current is None:
        raise CalibrationError(f"{type(model).__name__} has no quantizers; give it a scheme, such as w4a4")
    fit, check = hold_back(loader, held_back)
    low, high = copy.deepcopy(model), copy.deepcopy(model)
    names = [layer.name for layer in layers_of(high, fit[0][:1], calibrated=False)]
    every = replace(current, layers=tuple((name, bits) for name in names))
    for candidate in (low, set_layer_bits(high, every)):
        calibrate(candidate, fit, method="mse", progress=progress)
    ranges = {layer.name: _input(layer).range for layer in layers_of(high, fit[0][:1])}
    inputs = {name: ends for name, ends in ranges.items() if ends is not None}
    result = raise_bits(low, check, bits=bits, agreement=100 - drop, inputs=inputs, progress=progress)
    if not result.met:
        raise CalibrationError(
            f"with all layers at {bits} bits {100 - result.agreement:.2f} % of the held-back images change their "
            f"top-1, not {drop:g} %; allow more, or calibrate on more images"
        )
    order = [name for name in result.bits if name in result.order]
    kept = tuple((name, FLOAT) for name in current.float_layers)
    scheme = replace(current, layers=(*kept, *((name, bits) for name in order)))
    set_layer_bits(model, scheme)
    if config is not None:
        model.qzoo_config = replace(config, scheme=scheme)  # type: ignore[assignment]
    if own is not None:
        model.qzoo_scheme = scheme  # type: ignore[assignment]
    return result


def _enough(fidelity: Fidelity, agreement: float, sqnr_db: float) -> bool:
    return fidelity.agreement >= agreement and fidelity.sqnr_db >= sqnr_db


def _input(layer: Layer) -> Any:
    return layer.module.input_quantizer


def _lowest(layer: Layer, with_input: bool) -> int:
    """The bits of the weight or, where they count and are fewer, of the input."""
    bits = _input(layer).num_bits
    return min(layer.bits, bits) if with_input and isinstance(bits, int) else layer.bits


def _noise(
    model: nn.Module,
    layers: list[Layer],
    batches: list[Tensor],
    expected: Tensor,
    with_input: bool,
    progress: bool,
) -> dict[str, float]:
    """Squared error of the logits with one layer quantized alone, by name."""
    noise = {}
    with quantizers_off(model):
        for layer in track(layers, "sensitivity", show=progress):
            own = [layer.module.weight_quantizer, *([_input(layer)] if with_input else [])]
            for quantizer in own:
                quantizer.enable_quant()
            noise[layer.name] = Fidelity.of(_logits(model, batches), expected).noise
            for quantizer in own:
                quantizer.disable_quant()
    return noise


def _raise(layers: list[Layer], bits: int, inputs: Mapping[str, Range] | None) -> None:
    for layer in layers:
        weight, before = layer.module.weight_quantizer, _input(layer)
        weight.num_bits = max(bits, layer.bits)
        if inputs is not None and layer.name in inputs and before.num_bits < bits:
            before.num_bits = bits
            before.set_range(*inputs[layer.name])


@contextmanager
def _raised(layers: list[Layer], bits: int, inputs: Mapping[str, Range] | None) -> Iterator[None]:
    """The layers' bits are raised within, and as before afterwards."""
    quantizers = [q for layer in layers for q in (layer.module.weight_quantizer, _input(layer))]
    before = [(q, q.num_bits, _copy(q.range)) for q in quantizers]
    try:
        _raise(layers, bits, inputs)
        yield
    finally:
        for quantizer, own, known in before:
            quantizer.num_bits = own
            if known is not None:
                quantizer.set_range(*known)


def _copy(known: Range | None) -> Range | None:
    if known is None:
        return None
    return Range(known.amax.clone(), None if known.limits is None else known.limits.clone())


def _logits(model: nn.Module, batches: list[Tensor]) -> Tensor:
    if not batches:
        raise CalibrationError("the loader gave no images; pass calibration images")
    return torch.cat([output_of(model, batch) for batch in batches])
