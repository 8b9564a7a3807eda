"""Ranges and bias correction without data, from the statistics that BatchNorm layers hold.

Paper: "Data-Free Quantization Through Weight Equalization and Bias Correction" (Nagel et al., 2019,
arXiv:1906.04721): the range of an activation is the largest of mean + n sigma over its channels, cut at what the
activation function lets through (6 for ReLU6); the images themselves have the range that the preprocessing leaves
them. Section 4.2: the mean of each layer's error, (W_q - W) E[x], goes out of its bias.

For a model whose data can't be had; :mod:`qzoo.ptq.procedural` serves those without BatchNorm too. With images,
:func:`qzoo.calibrate` is better.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qzoo.errors import ArgumentError
from qzoo.options import BATCHNORM
from qzoo.preprocessing import Preprocessing
from qzoo.ptq.collect import weight_ranges
from qzoo.ptq.equalize import equalize, some
from qzoo.ptq.layers import layers_of
from qzoo.ptq.ranges import Calibration
from qzoo.ptq.relu6 import without_relu6_unseen
from qzoo.ptq.statistics import Channels, batchnorm_statistics
from qzoo.quant.nn import Range
from qzoo.quantizers import require_quantizers, shared_ranges


def calibrate_data_free(
    model: nn.Module,
    preprocessing: Preprocessing,
    *,
    sigmas: float = 6.0,
    correct: bool = True,
    equalized: bool = False,
) -> Calibration:
    """Calibrate a model without data: set the range of every quantizer, in place, from weights and BatchNorms.

    Args:
        model: with quantizers and trained weights; a BatchNorm stands behind its convolutions.
        preprocessing: of its images.
        sigmas: the paper's n.
        correct: take the mean error of each layer's rounded weights out of its bias (or the BatchNorm behind it).
        equalized: cross-layer equalization first, see :func:`qzoo.ptq.equalize`, with a ReLU in place of every ReLU6
            (:func:`qzoo.ptq.relu6.without_relu6_unseen`).

    Returns:
        The record: method ``"batchnorm"``, no images.

    Raises:
        CalibrationError: no quantizers, an activation whose statistics don't follow from BatchNorms, or nothing to
            equalize.
        NonFiniteError: NaN or infinity in a weight.
        ValueError: sigmas is not positive.

    Example:
        >>> model = qzoo.create_model("resnet20.fmnist", pretrained="float", quantize="w8a8")
        >>> calibrate_data_free(model, model.qzoo_config.preprocessing).method
        'batchnorm'
    """
    if not sigmas > 0:
        raise ArgumentError(f"sigmas must be above 0, not {sigmas}")
    quantizers, device = require_quantizers(model), next(model.parameters()).device
    inputs = of_images(preprocessing, device)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, *preprocessing.input_size, generator=generator, device="cpu").to(device)
    if equalized:
        without_relu6_unseen(model, image)
    known = batchnorm_statistics(model, inputs, image, sigmas)
    if equalized:
        some(equalize(model, [image], statistics=known, progress=False))
        known = batchnorm_statistics(model, inputs, image, sigmas)
    weights = weight_ranges(model)
    ranges = {name: _range([channels]) for name, channels in known.items() if name in quantizers}
    for names in shared_ranges(model):
        ranges |= dict.fromkeys(names, _range([known[name] for name in names]))
    for name, range_ in ranges.items():
        quantizers[name].set_range(*range_)
    for name, amax in weights.items():
        quantizers[name].set_range(amax)
    if correct:
        for layer in layers_of(model, image):
            layer.shift(_mean_error(layer.module, layer.groups, known[layer.name]))
    return Calibration(BATCHNORM, 0)


def of_images(preprocessing: Preprocessing, device: torch.device | None = None) -> Channels:
    """Assume of preprocessed images that black and white are the limits, and values are even between."""
    mean, std = (
        torch.tensor(v, dtype=torch.float64, device=device) for v in (preprocessing.mean, preprocessing.std)
    )
    low, high = -mean / std, (1 - mean) / std
    return Channels((low + high) / 2, (high - low).square() / 12, low, high)


def _range(parts: Iterable[Channels]) -> Range:
    """The range that holds all of these."""
    ends = torch.stack([part.limits() for part in parts])
    return Range(ends.abs().amax(), torch.stack([ends[:, 0].amin(), ends[:, 1].amax()]))


@torch.no_grad()
def _mean_error(module: nn.Module, groups: int, inputs: Channels) -> Tensor:
    """``(W_q - W) E[x]`` of each output channel, [out]."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    error = (module.weight_quantizer(weight) - weight).double()  # type: ignore[operator]
    rows = error.reshape(groups, -1, weight.shape[1], max(weight[0, 0].numel(), 1)).sum(3)
    return torch.einsum("grn,gn->gr", rows, inputs.mean.reshape(groups, -1)).flatten()
