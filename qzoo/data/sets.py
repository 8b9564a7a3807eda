"""Data sets as values: all that is known of one without looking at an image. Imports no torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from qzoo.errors import ArgumentError, DataError
from qzoo.fields import like, one_of
from qzoo.preprocessing import Preprocessing

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DataSet:
    """A set of labelled images, and what the zoo says and does with it.

    Attributes:
        name: as ``--dataset`` and ``labels`` of a config have it.
        title: as people write it; of folders of your own, what a card calls them.
        classes: their number; None where a folder says it.
        sizes: number of training and of test images; None where a folder says it.
        class_names: gives the names of the classes, by index; None where a folder says it.
        folder_names: gives the names of the folders, by index, where the data set says them.
        read: reads the images of a split, uint8 [N, channels, H, W], and their labels, int64 [N], from a folder or
            where they are found; None where they are files in a folder a class, which ``--data`` names.
        channels: of an image.
        preprocessing: of a network trained on it from random weights; None: the architecture's own.
        embedded: the test images come with the package.
        at_hand: the training images are found, or downloaded, without ``--data``.
        hub: its repository on the Hub; "" where it has none.
        augmentation: of the training images, in words.
        erasing: a part of it is random erasing.
        calibration: number of training images that ``qzoo build`` calibrates on; None: as many as a folder allows.
        tuning_calibration: number of training images, at most, that the ranges of a tuned model start from.
        batch: images a batch, to measure.
        citation: BibTeX of its paper.
        limits: what a card says that its models know.
    """

    name: str
    title: str
    classes: int | None = None
    sizes: tuple[int, int] | None = None
    class_names: Callable[[], tuple[str, ...]] | None = None
    folder_names: Callable[[], tuple[str, ...]] | None = None
    read: Callable[[str, str | Path | None], tuple[Tensor, Tensor]] | None = None
    channels: int = 3
    preprocessing: Preprocessing | None = None
    embedded: bool = False
    at_hand: bool = False
    hub: str = ""
    augmentation: str = "random crop of 8 to 100 % of the area, mirror"
    erasing: bool = False
    calibration: int | None = None
    tuning_calibration: int = 512
    batch: int = 64
    citation: str = ""
    limits: str = ""

    @property
    def in_folders(self) -> bool:
        """Whether the images are files in a folder a class."""
        return self.read is None


STREAMS = ("hfds", "wds", "parquet", "npz")


def is_stream(data: object) -> bool:
    """Check whether ``data`` names images in another form than a folder, see :mod:`qzoo.data.sources`."""
    return str(data).partition(":")[0] in STREAMS and ":" in str(data)


USES = ("training", "calibration")
SAMPLES = 16
_DIGITS = re.compile(r"[0-9a-f]{16}")
_KEY = like(_DIGITS.pattern, "16 hex digits")

_FASHION_MNIST = """@article{xiao2017fashion,
  title = {Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms},
  author = {Xiao, Han and Rasul, Kashif and Vollgraf, Roland},
  journal = {arXiv:1708.07747},
  year = {2017}
}
"""
_IMAGENET = """@article{russakovsky2014imagenet,
  title = {ImageNet Large Scale Visual Recognition Challenge},
  author = {Russakovsky, Olga and Deng, Jia and Su, Hao and others},
  journal = {arXiv:1409.0575},
  year = {2014}
}
"""

_FASHION_MNIST_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR100_NAMES = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish",
    "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion",
    "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange",
    "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine",
    "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk",
    "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
    "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale",
    "willow_tree", "wolf", "woman", "worm",
)  # fmt: skip


@cache
def imagenet_synsets() -> tuple[str, ...]:
    """List the 1,000 WordNet ids of ImageNet-1k (``"n01440764"``, ...); the position is the class index."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names())


@cache
def imagenet_names() -> tuple[str, ...]:
    """List the names of ImageNet's 1,000 classes, in words."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return tuple(info.index_to_description(i) for i in range(info.num_classes()))


def _fashion_mnist(split: str, folder: str | Path | None) -> tuple[Tensor, Tensor]:
    from qzoo.data.fashion_mnist import fashion_mnist  # late: with it comes torch

    return fashion_mnist(split, folder)


def _cifar(classes: int, split: str, folder: str | Path | None) -> tuple[Tensor, Tensor]:
    from qzoo.data.cifar import cifar

    return cifar(classes, split, folder)


_CIFAR10 = DataSet(
    name="cifar-10",
    title="CIFAR-10",
    classes=10,
    sizes=(50_000, 10_000),
    class_names=lambda: _CIFAR10_NAMES,
    read=partial(_cifar, 10),
    preprocessing=Preprocessing(
        (3, 32, 32), 1.0, "bilinear", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    ),
    augmentation="shift by up to 4 pixels, mirror",
    calibration=512,
    tuning_calibration=2048,
    batch=500,
)
DATA_SETS = {
    known.name: known
    for known in (
        DataSet(
            name="fashion-mnist",
            title="Fashion-MNIST",
            classes=10,
            sizes=(60_000, 10_000),
            class_names=lambda: _FASHION_MNIST_NAMES,
            read=_fashion_mnist,
            channels=1,
            embedded=True,
            at_hand=True,
            hub="zalando-datasets/fashion_mnist",
            augmentation="shift by up to 2 pixels, mirror, random erasing with probability 0.5",
            erasing=True,
            calibration=512,
            tuning_calibration=2048,
            batch=500,
            citation=_FASHION_MNIST,
            limits="It knows 10 kinds of clothes, one garment in an image of 28 x 28 pixels, light on black. Of other "
            "photos it says something that means little.",
        ),
        _CIFAR10,
        replace(
            _CIFAR10,
            name="cifar-100",
            title="CIFAR-100",
            classes=100,
            class_names=lambda: _CIFAR100_NAMES,
            read=partial(_cifar, 100),
        ),
        DataSet(
            name="imagenet-1k",
            title="ImageNet-1k",
            classes=1000,
            class_names=imagenet_names,
            folder_names=imagenet_synsets,
            hub="ILSVRC/imagenet-1k",
            citation=_IMAGENET,
            limits="It knows the 1000 ImageNet classes and inherits the biases of that data set.",
        ),
        DataSet(name="folders", title="your own data"),
    )
}


def data_set(name: str) -> DataSet:
    """Look up a data set by its name.

    Raises:
        DataError: an unknown one; suggests.
    """
    if name not in DATA_SETS:
        near = difflib.get_close_matches(name, DATA_SETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"no label set {name!r}; expected one of {', '.join(DATA_SETS)}{hint}")
    return DATA_SETS[name]


def label_set(classes: int | None) -> str:
    """Guess the label set of a network from its number of classes: ImageNet's, or classes of your own."""
    return "imagenet-1k" if classes == DATA_SETS["imagenet-1k"].classes else "folders"


def is_embedded(name: str) -> bool:
    """Check whether the test images of a config's ``labels`` come with the package; also for unknown names."""
    return name in DATA_SETS and DATA_SETS[name].embedded


@dataclass(frozen=True)
class SeenImages:
    """Images of a folder that a model was trained or calibrated on, so that no later figure is measured on them.

    The images of a folder have a fixed order, by the SHA-256 of their path in it. These are those from ``first`` to
    ``last``: wherever the folder lies, and whatever images are added or removed.

    Attributes:
        use: "training" or "calibration".
        first, last: first 16 hex digits of the SHA-256 of a path.
        images: their number.
        samples: some of them, by which the folder is recognized: digits of the path's SHA-256 and of the content's.
    """

    use: str = field(metadata=one_of(*USES))
    first: str = field(metadata=_KEY)
    last: str = field(metadata=_KEY)
    images: int
    samples: dict[str, str]

    def __post_init__(self) -> None:
        wrong = [text for pair in self.samples.items() for text in pair if not _DIGITS.fullmatch(text)]
        if wrong or not 0 < len(self.samples) <= SAMPLES or self.images < 1:
            raise ArgumentError(
                f"seen images must be 1 or more, with samples of 1 to {SAMPLES} pairs of 16 hex digits, not "
                f"{self.images} and {wrong[:1] or len(self.samples)}"
            )


def label_names(labels: str) -> list[str]:
    """List the names of a data set's classes, by index.

    Args:
        labels: a data set with classes of its own: ``"imagenet-1k"``, ``"fashion-mnist"``, ``"cifar-10"`` or
            ``"cifar-100"``.

    Returns:
        The names.

    Raises:
        DataError: an unknown one, or folders, whose names are the classes'.

    Example:
        >>> label_names("fashion-mnist")[:3]
        ['T-shirt/top', 'Trouser', 'Pullover']
    """
    names = data_set(labels).class_names
    if names is None:
        raise DataError(f"the classes of {labels!r} are named by the folders that the images are in")
    return list(names())
