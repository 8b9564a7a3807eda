"""Load images: a data set and a folder become batches of preprocessed images and class indices."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.utils.data import Subset

from qzoo.data.files import ImageFiles, image_batches
from qzoo.data.folders import FolderLoader, split_folder
from qzoo.data.image_folder import ImageFolder
from qzoo.data.imagenet import ImageNetFolder
from qzoo.data.sets import data_set, is_stream
from qzoo.data.sources import UNKNOWN, open_source
from qzoo.data.streams import LabelMap, Reader, StreamLoader, stream_batches
from qzoo.data.tensors import TensorLoader, crop_flip, crop_flip_erase
from qzoo.data.transforms import Augmentation, training_transform
from qzoo.errors import ArgumentError, DataError
from qzoo.preprocessing import Preprocessing

_SUBSET = re.compile(r"(\d*):(\d*)")


class Loader(Protocol):
    """Sized iterable of float32 images [B, C, H, W] and int64 labels [B]; each pass is the same.

    Example:
        >>> images, labels = next(iter(qzoo.data.load_data(model.qzoo_config.preprocessing, "fashion-mnist")))
        >>> images.shape, labels.dtype
        (torch.Size([64, 1, 28, 28]), torch.int64)
    """

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
    classes: int | Sequence[str] | None = None,
    skip_broken: bool = False,
) -> Loader:
    """Load a data set as batches that are prepared for a model.

    Args:
        preprocessing: the model's.
        labels: the model's label set: ``"imagenet-1k"``, ``"fashion-mnist"``, ``"cifar-10"``, ``"cifar-100"``, or
            ``"folders"``: the classes are the folders in ``data``, in alphabetical order.
        data: ImageNet: a folder of folders named by WordNet id. Fashion-MNIST: a folder of idx files; the
            embedded test set (or the training set where it is found) without. CIFAR: the folder that torchvision
            was given. Others: a folder with a folder of images a class. In place of a folder: ``"hfds:NAME[:SPLIT]"``,
            ``"wds:PATTERN"``, ``"parquet:PATH"`` or ``"npz:FILE"``, see :mod:`qzoo.data.sources`.
        split: ``"train"`` or ``"test"``; a folder of images that has no ``train`` and ``val`` in it is one split.
        subset: ``"start:stop"``, images counted from 0 in an order that is always the same: the file's for
            Fashion-MNIST and CIFAR, by the SHA-256 of the relative path for folders, their own for streams.
            ``":128"`` and ``"128:"`` are disjoint.
        batch_size: images a batch; the last one may be smaller.
        workers: processes that decode images; 0 decodes in this one.
        classes: of the model, their number or their names, which the labels of a stream are checked against.
        skip_broken: leave out images that do not decode; the loader's ``broken`` names those of the last pass.

    Returns:
        Batches of images and labels, the same in each pass.

    Raises:
        DataError: an unknown label set, a folder that is missing or not laid out as expected, a subset that
            the data does not have.

    Example:
        >>> preprocessing = model.qzoo_config.preprocessing
        >>> loader = qzoo.data.load_data(preprocessing, "fashion-mnist", subset=":100", batch_size=50)
        >>> len(loader)
        2
    """
    if batch_size < 1 or workers < 0:
        raise ArgumentError(
            f"batch_size must be at least 1 and workers at least 0, not {batch_size} and {workers}"
        )
    known = data_set(labels)
    if is_stream(data):
        source = open_source(str(data), split, known.classes or _number(classes))
        reader = Reader(preprocessing, LabelMap(labels, source.names, classes))
        start, stop = parse_subset(subset, source.count)
        return stream_batches(source, reader, start, stop, batch_size, workers, skip_broken=skip_broken)
    if known.read is not None:
        images, indices = known.read(split, data)
        start, stop = parse_subset(subset, len(images))
        return TensorLoader(images[start:stop], indices[start:stop], preprocessing, batch_size)
    root = split_folder(_folder(labels, data), split)
    dataset = image_files(labels, root, preprocessing)
    start, stop = parse_subset(subset, len(dataset))
    return image_batches(dataset, start, stop, batch_size, workers, skip_broken)


def batch_for(preprocessing: Preprocessing) -> int:
    """Choose how many images a batch has where nothing else decides it: 4 of 224 x 224 pixels, 256 at most.

    Larger batches do not make a processor faster, and slow down where a network's activations pass the 32 MiB up to
    which the allocator keeps memory: of EfficientNet-Lite0 with simulated quantization, batch 64 spent 70 % of its
    time in page faults, batch 4 15 %.

    Args:
        preprocessing: of the model.

    Returns:
        The number of images.

    Example:
        >>> from qzoo.preprocessing import Preprocessing
        >>> batch_for(Preprocessing((3, 224, 224)))
        4
    """
    _, height, width = preprocessing.input_size
    return max(1, min(256, 4 * 224 * 224 // (height * width)))


def load_training_data(
    preprocessing: Preprocessing,
    labels: str,
    data: str | Path | None = None,
    *,
    subset: str | None = None,
    batch_size: int = 128,
    seed: int = 0,
    workers: int = 0,
    augmentation: Augmentation | None = None,
    classes: int | Sequence[str] | None = None,
    skip_broken: bool = False,
) -> TensorLoader | FolderLoader | StreamLoader:
    """Load a data set for training: epochs of shuffled, augmented batches; ``set_epoch`` chooses one.

    Args:
        preprocessing, labels, data, batch_size, workers, classes: as of :func:`load_data`.
        subset: part of the training split, or of a folder or a stream that is one split, in the order of
            :func:`load_data`. A stream whose number of images is not known needs one with an end.
        seed: of order and augmentation.
        augmentation: of folders and streams; crop and flip if None. The data sets in memory have their own.
        skip_broken: put another image of its batch in the place of one that does not decode; the loader's ``broken``
            names those of the epoch.

    Returns:
        A loader for :func:`qzoo.train`.

    Raises:
        DataError: as :func:`load_data`; or fewer images than a batch.

    Example:
        >>> from pathlib import Path
        >>> Path("pets/cat").mkdir(parents=True)
        >>> Path("photo.jpg").rename("pets/cat/photo.jpg").name
        'photo.jpg'
        >>> loader = qzoo.data.load_training_data(model.qzoo_config.preprocessing, "folders", "pets", batch_size=1)
        >>> len(loader)
        1
    """
    loader: TensorLoader | FolderLoader | StreamLoader
    known = data_set(labels)
    if is_stream(data):
        source = open_source(str(data), "train", known.classes or _number(classes))
        start, stop = parse_subset(subset, source.count)
        _require_length(data, stop)
        transform = training_transform(preprocessing, augmentation)
        reader = Reader(preprocessing, LabelMap(labels, source.names, classes), transform)
        loader = StreamLoader(source, reader, start, stop, batch_size, seed, workers, skip_broken)
    elif known.read is not None:
        images, indices = known.read("train", data)
        start, stop = parse_subset(subset, len(images))
        augment = crop_flip_erase if known.erasing else crop_flip
        chosen = images[start:stop], indices[start:stop]
        loader = TensorLoader(*chosen, preprocessing, batch_size, shuffle=True, augment=augment, seed=seed)
    else:
        root = split_folder(_folder(labels, data), "train")
        dataset = image_files(labels, root, preprocessing, training_transform(preprocessing, augmentation))
        start, stop = parse_subset(subset, len(dataset))
        part: Any = Subset(dataset, range(start, stop))
        loader = FolderLoader(part, batch_size, seed, workers, skip_broken)
    if not len(loader):
        raise DataError(
            f"{stop - start} training images don't fill one batch of {batch_size}; lower batch_size (--batch-size)"
        )
    return loader


def _require_length(data: object, stop: int) -> None:
    if stop == UNKNOWN:
        raise DataError(
            f"{data}: how many images there are is not known before the end, and an epoch has a length; say how many "
            "to train on, such as :1281167 (--subset)"
        )


def _number(classes: int | Sequence[str] | None) -> int | None:
    return classes if classes is None or isinstance(classes, int) else len(classes) or None


def image_files(
    labels: str,
    root: str | Path,
    preprocessing: Preprocessing,
    transform: Callable[[Any], Tensor] | None = None,
) -> ImageFiles:
    """Find the images of a folder, of ImageNet or of classes of your own.

    Args:
        labels: ``"imagenet-1k"`` (folders named by WordNet id) or ``"folders"``.
        root: the folder.
        preprocessing: of the model.
        transform: in place of the model's own, for training.

    Returns:
        A data set of pairs: image and label.

    Raises:
        DataError: a folder that is missing or not laid out as expected.

    Example:
        >>> from pathlib import Path
        >>> Path("pets/cat").mkdir(parents=True)
        >>> Path("photo.jpg").rename("pets/cat/photo.jpg").name
        'photo.jpg'
        >>> len(image_files("folders", "pets", model.qzoo_config.preprocessing))
        1
    """
    kind = ImageFolder if data_set(labels).folder_names is None else ImageNetFolder
    return kind(root, preprocessing, transform)


def _folder(labels: str, data: str | Path | None) -> str | Path:
    """The folder of images of a data set that is in folders."""
    if data is None:
        known = data_set(labels)
        example = " (n01440764)" if known.folder_names is not None else ""
        raise DataError(
            f"{known.title} is not embedded: pass data=FOLDER (--data FOLDER), with one folder of images a "
            f"class{example}"
        )
    return data


def parse_subset(subset: str | None, count: int) -> tuple[int, int]:
    """Parse a subset, ``"start:stop"``, of ``count`` images; either end may be missing.

    Args:
        subset: the text; None is all images.
        count: number of images.

    Returns:
        Two positions, from 0 to ``count``.

    Raises:
        DataError: another form, or positions that the data does not have.

    Example:
        >>> parse_subset("128:", 1000)
        (128, 1000)
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
