"""Folders of images: their splits, and epochs of shuffled and augmented images."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qzoo.data.files import ItemsOrErrors, collated, left_out
from qzoo.errors import BrokenImageError, DistributedError

_TEST = ("val", "test", "valid")


def split_folder(root: str | Path, split: str) -> Path:
    """Find ``root/train`` or ``root/val`` (``test``, ``valid``), where both hold folders of classes; else ``root``."""
    folder = Path(root)
    train, tests = folder / "train", [folder / name for name in _TEST]
    test = next((path for path in tests if _has_folders(path)), None)
    if test is None or not _has_folders(train):
        return folder
    return train if split == "train" else test


def _has_folders(path: Path) -> bool:
    return path.is_dir() and any(entry.is_dir() for entry in path.iterdir())


class SharedEpochs:
    """Base of loaders whose order and augmentation depend on seed and epoch alone, and that processes share out.

    Args:
        batch_size: images a batch.
        seed: of order and augmentation.
        workers: processes that decode; 0 decodes in this one.
        skip_broken: put another image of its batch in the place of one that does not decode, so that each process has
            its share of every batch.

    Attributes:
        broken: why images of this epoch were left out, each with its name.
    """

    def __init__(self, batch_size: int, seed: int, workers: int, skip_broken: bool = False) -> None:
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.skip_broken = skip_broken
        self.broken: list[str] = []
        self.epoch, self.start, self.share = 0, 0, (0, 1)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch of the next iteration, and how many of its batches to leave out."""
        self.epoch, self.start = epoch, start

    def take(self, rank: int, world: int) -> None:
        """Decode only this process's images of each batch."""
        share_of(self.batch_size, rank, world)
        self.share = (rank, world)

    def _decode(
        self, items: Any, batches: Any, key: Callable[[Any], tuple[int, ...]] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the items with these keys, each drawn as :class:`Drawn` does."""
        self.broken = []
        loader: DataLoader[Any] = DataLoader(
            ItemsOrErrors(Drawn(items, self.seed * 1_000_003 + self.epoch, key)),
            batch_sampler=batches,
            num_workers=self.workers,
            collate_fn=collated,
            generator=torch.Generator(),  # else every pass would move the global generator
        )
        for images, labels, errors in loader:
            self.broken += left_out(errors, self.skip_broken)
            if not len(labels):
                raise BrokenImageError(f"no image of a batch decodes, such as this one: {self.broken[-1]}")
            places = torch.arange(len(labels) + len(errors)) % len(labels)
            yield (images[places], labels[places]) if errors else (images, labels)


class FolderLoader(SharedEpochs):
    """Epochs of a folder of images: float32 [B, C, H, W] and int64 [B], the same for the same seed and epoch.

    Order and augmentation depend on seed, epoch and image alone, not on workers or on what was drawn before, so a
    training goes on from any batch. An incomplete last batch is left out.

    Args:
        dataset: ``(image, label)`` by index; its transform may draw from Python's, NumPy's and torch's global
            generators.
        batch_size: images a batch.
        seed: of order and augmentation.
        workers, skip_broken: see :class:`SharedEpochs`.
    """

    def __init__(
        self,
        dataset: Dataset[tuple[Tensor, int]],
        batch_size: int,
        seed: int = 0,
        workers: int = 0,
        skip_broken: bool = False,
    ) -> None:
        super().__init__(batch_size, seed, workers, skip_broken)
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset) // self.batch_size  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.dataset), generator=generator)  # type: ignore[arg-type]
        part, size = share_of(self.batch_size, *self.share), self.batch_size
        batches = [order[i * size + part.start : i * size + part.stop].tolist() for i in range(len(self))]
        yield from self._decode(self.dataset, batches[self.start :])


class Drawn(Dataset[tuple[Tensor, int]]):
    """Items of which each is always drawn in the same way.

    Args:
        items: by key; making one may draw from Python's, NumPy's and torch's global generators.
        seed: of the draws.
        key: makes the numbers that tell an item from the others of its key; None: the key is such a number.
    """

    def __init__(self, items: Any, seed: int, key: Callable[[Any], tuple[int, ...]] | None = None) -> None:
        self.items, self.seed, self.key = items, seed, key

    def __getitem__(self, key: Any) -> tuple[Tensor, int]:
        numbers = (key,) if self.key is None else self.key(key)
        with _seed(np.random.SeedSequence([self.seed % (1 << 63), *numbers])):
            return self.items[key]  # type: ignore[no-any-return]


def share_of(batch_size: int, rank: int, world: int) -> range:
    """Divide a batch among the processes: which images one of them decodes, the same number for each.

    Raises:
        DistributedError: they can't be shared out equally.
    """
    if batch_size % world:
        raise DistributedError(
            f"{batch_size} images can't be shared out equally to {world} processes: choose a batch size that is a "
            f"multiple of {world}, and leave out an incomplete last batch"
        )
    size = batch_size // world
    return range(rank * size, (rank + 1) * size)


@contextmanager
def _seed(seeds: np.random.SeedSequence) -> Iterator[None]:
    """Python's, NumPy's and torch's CPU generators start from ``seeds`` within, and are as before afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - what transforms draw from
    first, second, third = (int(word) for word in seeds.generate_state(3))
    random.seed(first)
    np.random.seed(second)  # noqa: NPY002 - what transforms draw from
    torch.default_generator.manual_seed(third)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002 - what transforms draw from
        torch.set_rng_state(before[2])
