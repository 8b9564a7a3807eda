"""Folders of ImageNet images: ``ROOT/WNID/*.JPEG``, all 1,000 classes or some of them.

The class of an image is the place of its folder's WordNet id in the list of all 1,000 synsets, so that a
folder with half of the classes still has the right labels (``torchvision.datasets.ImageFolder`` numbers the
folders it finds).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qzoo.data.labels import imagenet_synsets
from qzoo.errors import DataError
from qzoo.preprocessing import Preprocessing

SUFFIXES = frozenset({".jpeg", ".jpg", ".png", ".bmp", ".webp"})


class ImageNetFolder(Dataset[tuple[Tensor, int]]):
    """Images of ``root/WNID/``, in an order fixed by the SHA-256 of each path relative to ``root``.

    That order is as good as random, the same on every machine, and keeps its place when it is cut into parts:
    calibrate on the first images, check on the others.

    Item ``i`` is ``(image, label)``: float32 [C, H, W], preprocessed, and the class index.

    Args:
        root: a folder a class, named by WordNet id.
        preprocessing: of the model.
        transform: in place of the preprocessing's, for training (:func:`qzoo.data.training_transform`).

    Attributes:
        files: one ``(path, label)`` an image, in that order.

    Raises:
        DataError: no folder, no images, or a folder whose name is no ImageNet synset.
    """

    def __init__(
        self,
        root: str | Path,
        preprocessing: Preprocessing,
        transform: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.root = Path(root)
        self.mode = "L" if preprocessing.input_size[0] == 1 else "RGB"
        self.transform: Callable[[Any], Tensor] = transform or preprocessing.transform()
        self.files = _scan(self.root)

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


def _scan(root: Path) -> list[tuple[Path, int]]:
    if not root.is_dir():
        raise DataError(f"{root} is no folder; expected one folder a class in it, such as {root}/n01440764")
    classes = {wnid: i for i, wnid in enumerate(imagenet_synsets())}
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    unknown = [folder.name for folder in folders if folder.name not in classes]
    if unknown:
        raise DataError(
            f"{root} holds folders that are no ImageNet-1k synset: {', '.join(unknown[:5])}"
            f"{' ...' if len(unknown) > 5 else ''}; expected names such as 'n01440764'. Give the folder "
            "of the classes itself (val, say), and move others out of it"
        )
    files = [
        (path, classes[folder.name])
        for folder in folders
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    ]
    if not files:
        raise DataError(f"{root} holds no images ({', '.join(sorted(SUFFIXES))}) in folders named by synset")

    def place(item: tuple[Path, int]) -> str:
        return hashlib.sha256(item[0].relative_to(root).as_posix().encode()).hexdigest()

    return sorted(files, key=place)


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
