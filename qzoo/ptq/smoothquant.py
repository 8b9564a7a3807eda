"""SmoothQuant: outlier channels of an activation move into the weights that read them.

Paper: "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models" (Xiao et al., 2022,
arXiv:2211.10438). Behind a LayerNorm a few channels are far larger than the others, and one range for all leaves the
others few levels. Dividing channel j by s_j and multiplying column j of the readers' weights by it changes nothing
in float; s_j = max|x_j|^alpha / max|w_j|^(1 - alpha) shares the difficulty between both (equation 4). The division
goes into the LayerNorm's weight and bias, so it costs nothing at run time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.errors import ArgumentError, CalibrationError
from qzoo.placement.scope import unseen
from qzoo.progress import track
from qzoo.ptq.calls import calls_of
from qzoo.ptq.collect import images_of
from qzoo.ptq.layers import rescaling
from qzoo.quant.fold import attach
from qzoo.quant.nn import QuantLinear, TensorQuantizer

ALPHA = 0.5
ALPHAS = (0.15, 0.5, 0.85)  # what is tried where it is searched


@dataclass(frozen=True)
class Smoothing:
    """The factors [channels] by which a LayerNorm's output was divided, and the layers that read it."""

    norm: str
    readers: tuple[str, ...]
    factors: Tensor


@torch.no_grad()
def smooth(
    model: nn.Module, loader: Iterable[Any], *, alpha: float = ALPHA, progress: bool = True
) -> list[Smoothing]:
    """Smooth the activations between LayerNorms and the linear layers that read them (SmoothQuant), in place.

    Call it on float weights, before ``calibrate``: ranges change, the float function does not.

    Args:
        model: quantized linear layers behind LayerNorms; ranges are not needed.
        loader: batches of images, as for ``calibrate``.
        alpha: share of the difficulty that the weights take over, 0 to 1.
        progress: show a progress bar.

    Returns:
        What was done, in running order; empty where the model has no such pair.

    Raises:
        CalibrationError: no quantizers or images.
        QuantizationError: the function would change, because something else reads a LayerNorm's output; the model is as
            before then.
        ValueError: alpha outside 0 to 1.

    Example:
        >>> from qzoo.models.layers import linear
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(28), linear(28, 10, quantize=qzoo.Scheme()))
        >>> smoothed = smooth(model, loader, alpha=0.5, progress=False)
        >>> record = qzoo.calibrate(model, loader, progress=False)
    """
    if not 0 <= alpha <= 1:
        raise ArgumentError(f"alpha must be between 0 and 1, not {alpha}")
    batches = [images_of(batch) for batch in loader]
    if not batches:
        raise CalibrationError("the loader gave no images; pass calibration images")
    cause = "the output of a LayerNorm is read by something that is no quantized linear layer"
    with rescaling(model, batches[0], "smoothing", cause):
        readers = _readers(model, batches[0][:1])
        largest = _largest(model, list(readers), batches, progress)
        return [_smooth(model, name, layers, largest[name], alpha) for name, layers in readers.items()]


def _readers(model: nn.Module, example: Tensor) -> dict[str, list[str]]:
    """The quantized linear layers that read the output of each LayerNorm as it is, by its name."""
    names = {module: name for name, module in model.named_modules()}
    inner = {m.input_quantizer for m in names if isinstance(m, QuantLinear)}
    kinds = (nn.LayerNorm, QuantLinear, TensorQuantizer)
    norms: dict[int, str] = {}
    readers: dict[str, list[str]] = {}
    others: set[str] = set()
    for call in calls_of(model, example, [m for m in names if isinstance(m, kinds) and m not in inner]):
        if isinstance(call.module, nn.LayerNorm):
            if call.module.weight is not None:
                norms[call.gives] = names[call.module]
        elif call.reads in norms and isinstance(call.module, QuantLinear):
            readers.setdefault(norms[call.reads], []).append(names[call.module])
        elif call.reads in norms:
            others.add(norms[call.reads])
    return {name: layers for name, layers in readers.items() if name not in others}


def _largest(model: nn.Module, names: list[str], batches: list[Tensor], progress: bool) -> dict[str, Tensor]:
    """Largest magnitude of each channel of each LayerNorm's output, [channels]."""
    largest: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        @unseen
        def hook(_: nn.Module, args: Any, output: Tensor) -> None:
            now = output.abs().flatten(0, -2).amax(0)
            largest[name] = torch.maximum(largest[name], now) if name in largest else now

        return hook

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    with attach(handles):
        for batch in track(batches, "channel ranges", show=progress):
            model(batch)
    return largest


def _smooth(model: nn.Module, name: str, readers: list[str], largest: Tensor, alpha: float) -> Smoothing:
    norm: Any = model.get_submodule(name)
    weights: list[Any] = [model.get_submodule(reader).weight for reader in readers]
    column = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    usable = (largest > 0) & (column > 0)
    factors = largest.clamp(min=1e-5).pow(alpha) / column.clamp(min=1e-5).pow(1 - alpha)
    factors = torch.where(usable, factors, torch.ones_like(factors))
    norm.weight /= factors
    if norm.bias is not None:
        norm.bias /= factors
    for weight in weights:
        weight *= factors
    return Smoothing(name, tuple(readers), factors)
