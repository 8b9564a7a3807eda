"""Ranges without data, for any architecture: from procedural images (:mod:`qzoo.data.dead_leaves`).

Papers: "Data-Free Quantization Through Weight Equalization and Bias Correction" (Nagel et al., 2019, arXiv:1906.04721)
takes ranges from BatchNorms, which many networks have not; "ZeroQ" (Cai et al., 2020, arXiv:2001.00281) takes them from
images that are optimized to have the BatchNorms' statistics. Images with sharp edges at many scales serve as well, and
need no BatchNorm.

They excite late layers less than photographs do: on EfficientNet-Lite1 the range with the least squared error is 0.7 to
1.0 times that of real images. So it gets a margin, but never ends above what the operation in front can give.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.accuracy import Fidelity
from qzoo.data.dead_leaves import dead_leaves
from qzoo.options import PROCEDURAL
from qzoo.preprocessing import Preprocessing
from qzoo.ptq.collect import collect, weight_ranges
from qzoo.ptq.ranges import Calibration
from qzoo.quant.fold import attach, evaluating
from qzoo.quant.nn import Range, TensorQuantizer
from qzoo.quantizers import device_of, quantizers_off, require_quantizers, shared_ranges
from qzoo.runtimes.pytorch import output_of

IMAGES = 128
COMPARED = 64
MARGIN = 1.3
LEAST = 0.7
"""Share of the largest value seen that a range has at least: outliers of transformers are part of what they compute."""


def procedural_batches(preprocessing: Preprocessing, images: int = IMAGES, seed: int = 0) -> list[Tensor]:
    """Procedural images in small batches."""
    return list(dead_leaves(preprocessing, images, seed).split(8))


def calibrate_procedural(
    model: nn.Module, batches: Iterable[Tensor], *, progress: bool = True
) -> Calibration:
    """Calibrate a model on procedural images: set the range of every quantizer, in place.

    Args:
        model: with quantizers and trained weights.
        batches: procedural images, where the model is.
        progress: show a progress bar.

    Returns:
        The record: method ``"procedural"``, no images of the model's data.

    Raises:
        CalibrationError, NonFiniteError: as :func:`qzoo.calibrate`.

    Example:
        >>> model = qzoo.create_model("resnet20.fmnist", pretrained="float", quantize="w8a8")
        >>> batches = procedural_batches(model.qzoo_config.preprocessing, images=16)
        >>> calibrate_procedural(model, batches, progress=False).method
        'procedural'
    """
    found, weights = require_quantizers(model), weight_ranges(model)
    watches = {name: _Watch() for name in found if name not in weights}
    with attach([found[name].register_forward_pre_hook(watch) for name, watch in watches.items()]):
        statistics = collect(model, batches, histograms=True, progress=progress)
    largest, best = (statistics.ranges(method, 100.0) for method in ("max", "mse"))
    bounds = {name: watch.bound() for name, watch in watches.items()}
    for names in shared_ranges(model):
        same = {bounds[name] for name in names}
        bounds |= dict.fromkeys(names, same.pop() if len(same) == 1 else None)
    for name, range_ in best.items():
        found[name].set_range(*_widen(range_, largest[name], bounds[name]))
    for name, amax in weights.items():
        found[name].set_range(amax)
    return Calibration(PROCEDURAL, 0)


def _widen(best: Range, largest: Range, bound: float | None) -> Range:
    """The range with its margin; where the values have a bound, it ends there."""
    if bound is not None and best.amax.numel() == 1:
        ends = None if largest.limits is None else largest.limits * (bound / largest.amax.clamp(min=1e-30))
        return Range(torch.full_like(best.amax, bound), ends)
    amax = torch.maximum(MARGIN * best.amax, LEAST * largest.amax)
    if best.limits is None or largest.limits is None:
        return Range(amax)
    wide, least = MARGIN * best.limits, LEAST * largest.limits  # [low, high]
    return Range(amax, torch.where(wide.abs() > least.abs(), wide, least))


class _Watch:
    """Finds out what bounds the input of a quantizer: a ReLU6, a sigmoid, a softmax, black and white."""

    def __init__(self) -> None:
        self._largest: list[float] = []
        self._softmax = True

    def __call__(self, _: TensorQuantizer, args: Any) -> None:
        x = args[0].detach()
        low, high = (value.item() for value in torch.aminmax(x))
        self._largest.append(max(-low, high))
        self._softmax = self._softmax and low >= 0 and high <= 1 and _sums_to_one(x)

    def bound(self) -> float | None:
        """The bound; None where there is none. It is one where several batches have the very same largest value."""
        if self._softmax:
            return 1.0
        same = len(self._largest) > 1 and len(set(self._largest)) == 1 and self._largest[0] > 0
        return self._largest[0] if same else None


def _sums_to_one(x: Tensor) -> bool:
    return x.dim() > 0 and bool(((x.sum(-1) - 1).abs() < 1e-3).all())


class Comparison:
    """A model before and after quantization, on procedural images that it is not calibrated on.

    Args:
        model: with quantizers and float weights.
        preprocessing: of its images.
        images: how many.
    """

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, images: int = COMPARED) -> None:
        self.batches = procedural_batches(preprocessing, images, seed=1)
        with quantizers_off(model):
            self._expected = self._outputs(model)

    def fidelity(self, model: nn.Module) -> Fidelity:
        """Agreement and SQNR of the quantized model."""
        pairs = zip(self._outputs(model), self._expected, strict=True)
        return Fidelity.total(Fidelity.of(output, expected) for output, expected in pairs)

    @torch.no_grad()
    def _outputs(self, model: nn.Module) -> list[Tensor]:
        with evaluating(model):
            return [output_of(model, batch.to(device_of(model))).cpu() for batch in self.batches]
