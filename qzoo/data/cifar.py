"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009, "Learning Multiple Layers of Features from Tiny Images"), by torchvision.

60,000 colour images of 32x32 pixels in 10 or 100 classes, 50,000 of them for training. torchvision reads the authors'
files and checks their MD5 sums; :func:`cifar` only unpacks and downloads nothing.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qzoo.errors import DataError


def cifar(classes: int, split: str, root: str | Path | None) -> tuple[Tensor, Tensor]:
    """Load one split.

    Args:
        classes: 10 or 100.
        split: ``"train"`` (50,000 images) or ``"test"`` (10,000).
        root: the folder that torchvision's class was given: ``cifar-10-batches-py`` or ``cifar-100-python`` is in it.

    Returns:
        images, uint8 of shape [N, 3, 32, 32], and labels, int64 of shape [N].

    Raises:
        DataError: an unknown split; no folder, or files that are not the authors'.
    """
    from torchvision import datasets

    kind = {10: datasets.CIFAR10, 100: datasets.CIFAR100}[classes]
    if split not in ("train", "test"):
        raise DataError(f"split must be 'train' or 'test', not {split!r}")
    how = f"torchvision.datasets.{kind.__name__}(FOLDER, download=True) makes it"
    if root is None:
        raise DataError(f"cifar-{classes} is not embedded: pass data=FOLDER (--data FOLDER); {how}")
    try:
        data = kind(str(root), train=split == "train", download=False)
    except RuntimeError as error:
        raise DataError(f"{root} holds no sound cifar-{classes} ({error}); {how}") from error
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(data.targets, dtype=torch.int64)
