"""Whether a network stays nearly the same with a ReLU in place of every ReLU6, which equalization needs.

relu6(s x) is not s relu6(x), so channels before a ReLU6 can't be scaled. Nagel et al. (2019, arXiv:1906.04721) put a
plain ReLU in its place in MobileNetV2, which loses next to nothing by it. EfficientNet-Lite0 does not bear that: 57.8 %
top-1 of 89.1 %, 0.4 dB of the logits (float, 128 images of the ImageNet sample).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from qzoo.collect import images_of, quantizers_off
from qzoo.errors import CalibrationError
from qzoo.evaluate import decibel, evaluating
from qzoo.relu6 import replace_relu6

LEAST_DB = 20.0
"""SQNR of the logits that a network must keep when its ReLU6 become ReLU: 8-bit quantization leaves about 25 dB."""


@torch.no_grad()
def without_relu6(model: nn.Module, loader: Iterable[Any]) -> int:
    """Put a ReLU in place of every ReLU6, in place, if the float network stays nearly the same on these images.

    Returns:
        The number of ReLU6 that there were.

    Raises:
        CalibrationError: the logits keep less than :data:`LEAST_DB`; the model is as before then.
    """
    trial = copy.deepcopy(model)
    count = replace_relu6(trial)
    if count == 0:
        return 0
    signal = noise = 0.0
    with evaluating(model), evaluating(trial), quantizers_off(model), quantizers_off(trial):
        for batch in loader:
            expected = model(images_of(batch)).double()
            signal += expected.square().sum().item()
            noise += (trial(images_of(batch)).double() - expected).square().sum().item()
    left = decibel(signal, noise)
    if not left >= LEAST_DB:
        raise CalibrationError(
            f"equalization takes a ReLU in place of every ReLU6, but these clip too much here: the float network would "
            f"keep {left:.1f} dB of its logits, {LEAST_DB:g} are needed; leave equalization out"
        )
    return replace_relu6(model)
