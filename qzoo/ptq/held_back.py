"""Calibration images, parted: most to work with, the last ones to judge by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from qzoo.errors import ArgumentError, CalibrationError
from qzoo.ptq.collect import images_of

SHARE = 0.25


def hold_back(loader: Iterable[Any], share: float = SHARE) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Batches to work with, and batches to judge by: the last images, at least one.

    Raises:
        CalibrationError: fewer than two images.
        ValueError: a share outside 0 to 1.
    """
    if not 0 < share < 1:
        raise ArgumentError(f"the share to hold back must be between 0 and 1, not {share}")
    batches = [images_of(batch) for batch in loader]
    images = torch.cat(batches) if batches else torch.zeros(0)
    if len(images) < 2:
        raise CalibrationError("part of the images is held back to judge by; pass at least two images")
    count = max(1, round(len(images) * share))
    size = len(batches[0])
    return images[:-count].split(size), images[-count:].split(size)
