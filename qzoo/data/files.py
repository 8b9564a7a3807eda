"""Image files with labels, in an order that can be cut into parts: what all folders of images share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qzoo.errors import DataError
from qzoo.preprocessing import Preprocessing


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Images in the order of the SHA-256 of their path relative to ``root``.

    That order is as good as random, the same on every machine, and keeps its place when it is cut into parts:
    calibrate on the first images, check on the others.

    Item ``i`` is ``(image, label)``: float32 [C, H, W], preprocessed, and the class index.

    Args:
        root: the folder.
        found: one ``(path, label)`` an image, in any order.
        preprocessing: of the model.
        transform: in place of the preprocessing's, for training (:func:`qzoo.data.training_transform`).

    Attributes:
        files: one ``(path, label)`` an image, in order.
    """

    def __init__(
        self,
        root: Path,
        found: Iterable[tuple[Path, int]],
        preprocessing: Preprocessing,
        transform: Callable[[Any], Tensor] | None = None,
    ) -> None:
        def place(item: tuple[Path, int]) -> str:
            return hashlib.sha256(item[0].relative_to(root).as_posix().encode()).hexdigest()

        self.root = root
        self.mode = "L" if preprocessing.input_size[0] == 1 else "RGB"
        self.transform: Callable[[Any], Tensor] = transform or preprocessing.transform()
        self.files = sorted(found, key=place)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        return self.transform(open_image(path, self.mode)), label


def open_image(path: str | os.PathLike[str], mode: str = "RGB") -> Any:
    """Decode one image file into a PIL image.

    Raises:
        DataError: the file is missing or not an image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} can't be read as an image ({error}); replace or remove it") from error


def image_batches(
    dataset: Dataset[tuple[Tensor, int]], start: int, stop: int, batch_size: int, workers: int
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches of the images ``start`` to ``stop``, in the data set's order; nothing is drawn at random.

    Args:
        workers: processes that decode; 0 decodes in this one.
    """
    part: Any = torch.utils.data.Subset(dataset, range(start, stop))  # collating makes tensors of the labels
    return DataLoader(
        part,
        batch_size=batch_size,
        num_workers=workers,
        generator=torch.Generator(),  # else every pass would move the global generator
    )
