"""Replace every ReLU6 by a ReLU, which equalization needs, where the network stays nearly the same.

relu6(s x) is not s relu6(x), so channels before a ReLU6 can't be scaled. Nagel et al. (2019, arXiv:1906.04721) put a
plain ReLU in its place in MobileNetV2, which loses next to nothing by it. EfficientNet-Lite0 does not bear that: 57.8 %
top-1 of 89.1 %, 0.4 dB of the logits (float, 128 images of the ImageNet sample).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qzoo.accuracy import Fidelity, decibel
from qzoo.errors import CalibrationError
from qzoo.ptq.calls import calls_of
from qzoo.ptq.collect import images_of
from qzoo.ptq.statistics import clipped_normal
from qzoo.quant.fold import evaluating
from qzoo.quantizers import quantizers_off
from qzoo.zoo.checkpoint import replace_relu6

LEAST_DB = 20.0
"""SQNR that must be kept when ReLU6 become ReLU: 8-bit quantization leaves about 25 dB."""


@torch.no_grad()
def without_relu6(model: nn.Module, loader: Iterable[Any]) -> int:
    """Replace every ReLU6 by a ReLU, in place, if the float network stays nearly the same on these images.

    Args:
        model: any module.
        loader: batches of images, as for :func:`qzoo.calibrate`.

    Returns:
        The number of ReLU6 that there were.

    Raises:
        CalibrationError: the logits keep less than :data:`LEAST_DB`; the model is as before then.

    Example:
        >>> without_relu6(model, loader)  # ResNets have none
        0
    """
    trial = copy.deepcopy(model)
    count = replace_relu6(trial)
    if count == 0:
        return 0
    fidelities: list[Fidelity] = []
    with evaluating(model), evaluating(trial), quantizers_off(model), quantizers_off(trial):
        for batch in loader:
            fidelities.append(Fidelity.of(trial(images_of(batch)), model(images_of(batch))))
    _require("the float network", "its logits", Fidelity.total(fidelities).sqnr_db)
    return replace_relu6(model)


@torch.no_grad()
def without_relu6_unseen(model: nn.Module, image: Tensor) -> int:
    """Replace every ReLU6 by a ReLU without data: the statistics in the BatchNorms decide at each by itself.

    Args:
        image: any image [1, C, H, W]; its shape counts, not its values.

    Raises:
        CalibrationError: what a ReLU6 lets through keeps less than :data:`LEAST_DB`, or it follows no BatchNorm; the
            model is as before then.
    """
    names = {module: name for name, module in model.named_modules()}
    normed: dict[int, Any] = {}
    with evaluating(model), quantizers_off(model):
        calls = calls_of(model, image, [m for m in names if isinstance(m, (_BatchNorm, nn.ReLU6))])
    for call in calls:
        if isinstance(call.module, _BatchNorm):
            normed[call.gives] = call.module
            continue
        norm = normed.pop(call.reads, None)
        if norm is None or norm.weight is None:
            raise CalibrationError(
                f"equalization takes a ReLU in place of every ReLU6, but {names[call.module]!r} follows no BatchNorm "
                "that tells how much it clips; leave equalization out, or calibrate on images"
            )
        mean, deviation = norm.bias.double(), norm.weight.double().abs()
        passed = clipped_normal(mean, deviation, 0.0, 6.0)
        beyond = clipped_normal(mean - 6, deviation, 0.0, math.inf)
        signal, noise = ((first.square() + variance).sum().item() for first, variance in (passed, beyond))
        _require(f"the ReLU6 behind {names[norm]!r}", "what it lets through", decibel(signal, noise))
    return replace_relu6(model)


def _require(what: str, of: str, left: float) -> None:
    if not left >= LEAST_DB:
        raise CalibrationError(
            f"equalization takes a ReLU in place of every ReLU6, but here these clip too much: {what} would keep "
            f"{left:.1f} dB of {of}, {LEAST_DB:g} are needed; leave equalization out"
        )
