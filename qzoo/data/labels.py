"""Names of the classes of a label set."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import cache

from qzoo.data import cifar, fashion_mnist
from qzoo.errors import DataError


def label_names(labels: str) -> list[str]:
    """The names, by class index.

    Args:
        labels: a label set: ``"imagenet-1k"``, ``"fashion-mnist"``, ``"cifar-10"`` or ``"cifar-100"``.

    Raises:
        DataError: an unknown label set.
    """
    if labels not in _NAMES:
        near = difflib.get_close_matches(labels, _NAMES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"no label set {labels!r}; expected one of {', '.join(_NAMES)}{hint}")
    return list(_NAMES[labels]())


@cache
def imagenet_synsets() -> tuple[str, ...]:
    """The 1,000 WordNet ids of ImageNet-1k (``"n01440764"``, ...); the position is the class index."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names())


@cache
def _imagenet_names() -> tuple[str, ...]:
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    return tuple(info.index_to_description(i) for i in range(info.num_classes()))


_NAMES: dict[str, Callable[[], tuple[str, ...]]] = {
    "imagenet-1k": _imagenet_names,
    "fashion-mnist": lambda: fashion_mnist.LABELS,
    "cifar-10": lambda: cifar.CIFAR10,
    "cifar-100": lambda: cifar.CIFAR100,
}
