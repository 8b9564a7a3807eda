"""Data: a label set and a folder become batches of preprocessed images and class indices."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from torch import Tensor

from qzoo.data import fashion_mnist
from qzoo.data.cifar import cifar as _cifar
from qzoo.data.image_folder import ImageFolder
from qzoo.data.imagenet import ImageNetFolder, image_batches
from qzoo.data.labels import label_names
from qzoo.data.tensors import TensorLoader
from qzoo.data.transforms import Augmentation, training_transform
from qzoo.errors import DataError
from qzoo.preprocessing import Preprocessing

__all__ = [
    "Augmentation",
    "ImageFolder",
    "Loader",
    "label_names",
    "load_data",
    "parse_subset",
    "training_transform",
]

_SUBSET = re.compile(r"(\d*):(\d*)")


class Loader(Protocol):
    """A sized iterable of float32 images [B, C, H, W] and int64 labels [B]; each pass is the same."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


def load_data(
    preprocessing: Preprocessing,
    labels: str,
    data: str | Path | None = None,
    *,
    split: str = "test",
    subset: str | None = None,
    batch_size: int = 64,
    workers: int = 0,
) -> Loader:
    """Batches of a data set, prepared for a model.

    Args:
        preprocessing: the model's.
        labels: the model's label set: ``"imagenet-1k"``, ``"fashion-mnist"``, ``"cifar-10"``, ``"cifar-100"``, or
            ``"folders"``: the classes are the folders in ``data``, in alphabetical order.
        data: ImageNet: a folder of folders named by WordNet id. Fashion-MNIST: a folder of idx files; the
            embedded test set (or the training set where it is found) without. CIFAR: the folder that torchvision
            was given. Others: a folder with a folder of images a class.
        split: ``"train"`` or ``"test"`` of Fashion-MNIST and CIFAR; a folder of images is one split already.
        subset: ``"start:stop"``, images counted from 0 in an order that is always the same: the file's for
            Fashion-MNIST and CIFAR, by the SHA-256 of the relative path for folders. ``":128"`` and ``"128:"`` are
            disjoint.
        batch_size: images a batch; the last one may be smaller.
        workers: processes that decode images; 0 decodes in this one.

    Raises:
        DataError: an unknown label set, a folder that is missing or not laid out as expected, a subset that
            the data does not have.
    """
    if batch_size < 1 or workers < 0:
        raise ValueError(
            f"batch_size must be at least 1 and workers at least 0, not {batch_size} and {workers}"
        )
    if labels == "fashion-mnist":
        images, classes = fashion_mnist.fashion_mnist(split, data)
        start, stop = parse_subset(subset, len(images))
        return TensorLoader(images[start:stop], classes[start:stop], preprocessing, batch_size)
    if labels in ("cifar-10", "cifar-100"):
        images, classes = _cifar(labels, split, data)
        start, stop = parse_subset(subset, len(images))
        return TensorLoader(images[start:stop], classes[start:stop], preprocessing, batch_size)
    if labels == "folders":
        if data is None:
            raise DataError("pass data=FOLDER, with one folder of images a class")
        folder = ImageFolder(data, preprocessing)
        start, stop = parse_subset(subset, len(folder))
        return image_batches(folder, start, stop, batch_size, workers)
    if labels != "imagenet-1k":
        label_names(labels)  # refuses what it does not know
        raise DataError(f"no loader for the label set {labels!r}")
    if data is None:
        raise DataError(
            "ImageNet is not embedded: pass data=FOLDER, with one folder of images a class (n01440764)"
        )
    dataset = ImageNetFolder(data, preprocessing)
    start, stop = parse_subset(subset, len(dataset))
    return image_batches(dataset, start, stop, batch_size, workers)


def parse_subset(subset: str | None, count: int) -> tuple[int, int]:
    """``"start:stop"`` (either may be missing) as two positions among ``count`` images; None is all of them.

    Raises:
        DataError: another form, or positions that the data does not have.
    """
    match = _SUBSET.fullmatch(subset if subset is not None else ":")
    if match is None:
        raise DataError(f"subset {subset!r} is not of the form 'start:stop', such as '0:128'")
    start, stop = int(match[1] or 0), int(match[2] or count)
    if not 0 <= start < stop <= count:
        raise DataError(
            f"subset {subset!r} does not fit {count} images; expected 0 <= start < stop <= {count}"
        )
    return start, stop
