"""Ranges without data, for any architecture: from procedural images (:mod:`qzoo.data.dead_leaves`).

Papers: "Data-Free Quantization Through Weight Equalization and Bias Correction" (Nagel et al., 2019, arXiv:1906.04721)
takes ranges from BatchNorms, which many networks have not; "ZeroQ" (Cai et al., 2020, arXiv:2001.00281) takes them from
images that are optimized to have the BatchNorms' statistics. Images with sharp edges at many scales serve as well, and
need no BatchNorm.

They excite late layers less than photographs do: on EfficientNet-Lite1 the range with the least squared error is 0.7 to
1.0 times that of real images. So it gets a margin, but never ends above what the operation in front can give.

BatchNorms know how much the data excited each channel. Where the rounding of weights is learned, the images
pass once more with the channels so scaled (:class:`MatchedNorms`), as "Adaptive Batch Normalization for practical
domain adaptation" (Li et al., 2018, Pattern Recognition 80) does with images of another domain. Ranges then cover both
passes, with no margin, and weights of few bits are rounded on the second.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

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
    """Make procedural images, in small batches."""
    return list(dead_leaves(preprocessing, images, seed).split(8))


class MatchedNorms:
    """BatchNorms under which procedural images have, channel by channel, the mean and deviation of the data.

    Args:
        model: with trained BatchNorms; those without running statistics are left alone.

    Attributes:
        any: whether there are some.
    """

    def __init__(self, model: nn.Module) -> None:
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        self._trained: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        for norm in norms:
            mean, variance = _running(norm)
            self._trained[norm] = (mean.clone(), variance.clone())
        self._moments: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        self.any = bool(norms)

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Let each BatchNorm take every batch for the data that it was trained on, and note its moments."""
        self._moments = {}
        with attach([norm.register_forward_pre_hook(self._match) for norm in self._trained]):
            yield

    @torch.no_grad()
    def _match(self, norm: nn.Module, args: Any) -> tuple[Tensor]:
        x: Tensor = args[0]
        variance, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
        self._moments.setdefault(norm, []).append((mean, variance))
        trained_mean, trained_variance = _running(norm)
        gain = (trained_variance / self._floor(norm, variance)).sqrt()
        shape = [1, -1] + [1] * (x.dim() - 2)
        return (x * gain.reshape(shape) + (trained_mean - mean * gain).reshape(shape),)

    def _pool(self) -> dict[nn.Module, tuple[Tensor, Tensor]]:
        """Mean and variance over all batches, of those of each."""
        pooled = {}
        for norm, moments in self._moments.items():
            means, variances = (torch.stack(values) for values in zip(*moments, strict=True))
            variance = variances.mean(0) + means.var(0, correction=0)
            pooled[norm] = (means.mean(0), self._floor(norm, variance))
        return pooled

    def _floor(self, norm: nn.Module, variance: Tensor) -> Tensor:
        """No channel is scaled up more than tenfold: one that the images hardly reach is noise."""
        return torch.maximum(variance, 0.01 * self._trained[norm][1]).clamp(min=1e-30)

    @contextmanager
    def round_on(self, model: nn.Module, batches: list[Tensor]) -> Iterator[None]:
        """Let weights be rounded on the images as if they were the data; then the BatchNorms are measured anew.

        They hold the moments of the float model within. Afterwards they hold those of training, moved as rounding has
        moved the moments of the images: what is wrong in the mean and in the deviation of a channel is made up for. On
        data, "Hybrid 8-bit Floating Point (HFP8) Training and Inference for Deep Neural Networks" (Sun et al., 2019,
        NeurIPS) tunes BatchNorms of a quantized network in this way.
        """
        exact = self._pool()
        for norm, moments in exact.items():
            _set_running(norm, *moments)
        try:
            yield
        finally:
            for norm, moments in self._trained.items():
                _set_running(norm, *moments)
        with torch.no_grad(), evaluating(model), self.measure():
            for batch in _together(batches):
                model(batch)
        for norm, (mean, variance) in self._pool().items():
            trained_mean, trained_variance = self._trained[norm]
            old_mean, old_variance = exact[norm]
            change = (variance / old_variance).clamp(0.25, 4)  # of a channel that is hardly reached: noise
            _set_running(norm, trained_mean + mean - old_mean, trained_variance * change)


def _running(norm: nn.Module) -> tuple[Tensor, Tensor]:
    return norm.running_mean, norm.running_var  # type: ignore[return-value]


def _set_running(norm: nn.Module, mean: Tensor, variance: Tensor) -> None:
    for old, new in zip(_running(norm), (mean, variance), strict=True):
        old.copy_(new)


def calibrate_procedural(
    model: nn.Module, batches: Iterable[Tensor], *, norms: MatchedNorms | None = None, progress: bool = True
) -> Calibration:
    """Calibrate a model on procedural images: set the range of every quantizer, in place.

    Args:
        model: with quantizers and trained weights.
        batches: procedural images, where the model is.
        norms: the model's, for a second pass that has the statistics of its data; ranges cover both passes then.
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
    quantizers, weights, batches = require_quantizers(model), weight_ranges(model), list(batches)
    watches = {name: _Watch() for name in quantizers if name not in weights}
    with attach([quantizers[name].register_forward_pre_hook(watch) for name, watch in watches.items()]):
        passes = [collect(model, batches, histograms=True, progress=progress)]
    if norms is not None and norms.any:
        with norms.measure():
            passes.append(collect(model, _together(batches), histograms=True, progress=progress))
    searched = [(seen.ranges("mse", 100.0), seen.ranges("max", 100.0)) for seen in passes]
    bounds = {name: watch.bound() for name, watch in watches.items()}
    for names in shared_ranges(model):
        same = {bounds[name] for name in names}
        bounds |= dict.fromkeys(names, same.pop() if len(same) == 1 else None)
    for name in searched[0][0]:
        matched = len(passes) > 1 and quantizers[name].role != "output"  # no BatchNorm tells of the logits
        seen, margins = (searched, (1.0, 0.0)) if matched else (searched[:1], (MARGIN, LEAST))
        ranges = [_widen(best[name], largest[name], bounds[name], *margins) for best, largest in seen]
        quantizers[name].set_range(*_cover(ranges))
    for name, amax in weights.items():
        quantizers[name].set_range(amax)
    return Calibration(PROCEDURAL, 0)


def _together(batches: list[Tensor], count: int = 4) -> list[Tensor]:
    """Larger batches, whose moments are those of more images."""
    return [torch.cat(batches[i : i + count]) for i in range(0, len(batches), count)]


def _cover(ranges: list[Range]) -> Range:
    """What covers all of the ranges."""
    amax = torch.stack([range_.amax for range_ in ranges]).amax(0)
    limits = [range_.limits for range_ in ranges if range_.limits is not None]
    if not limits:
        return Range(amax)
    low, high = torch.stack(limits).unbind(1)
    return Range(amax, torch.stack([low.min(), high.max()]))


def _widen(best: Range, largest: Range, bound: float | None, margin: float, least: float) -> Range:
    """The range with its margin; where the values have a bound, it ends there."""
    if bound is not None and best.amax.numel() == 1:
        ends = None if largest.limits is None else largest.limits * (bound / largest.amax.clamp(min=1e-30))
        return Range(torch.full_like(best.amax, bound), ends)
    amax = torch.maximum(margin * best.amax, least * largest.amax)
    if best.limits is None or largest.limits is None:
        return Range(amax)
    wide, some = margin * best.limits, least * largest.limits  # [low, high]
    return Range(amax, torch.where(wide.abs() > some.abs(), wide, some))


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
        """Get the bound, the very same largest value of several batches; None where there is none."""
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
        """Compute agreement and SQNR of the quantized model."""
        pairs = zip(self._outputs(model), self._expected, strict=True)
        return Fidelity.total(Fidelity.of(output, expected) for output, expected in pairs)

    @torch.no_grad()
    def _outputs(self, model: nn.Module) -> list[Tensor]:
        with evaluating(model):
            return [output_of(model, batch.to(device_of(model))).cpu() for batch in self.batches]
