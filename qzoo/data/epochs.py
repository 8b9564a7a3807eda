"""Epochs of any loader: what a training needs to know of an iterable of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qzoo.errors import DataError


class Epochs:
    """Turn any iterable of ``(images, labels)`` into epochs that are drawn by seed and epoch alone.

    A loader of :func:`qzoo.data.load_training_data`, or another with ``set_epoch``, is used as it is. Of any other,
    such as a shuffling ``DataLoader``, the order is what torch's global generator draws after it was seeded from seed
    and epoch, the same in every process.

    Args:
        loader: goes through all batches each time; an iterator, which does so once, is kept in memory as a list, and
            one without a length is gone through once to count its batches.
        seed: of the order.

    Raises:
        TypeError: no iterable.
    """

    def __init__(self, loader: Iterable[Any], seed: int = 0) -> None:
        if not isinstance(loader, Iterable):
            raise TypeError(
                f"loader must be an iterable of (images, labels), such as a DataLoader, not {type(loader).__name__}"
            )
        self.loader: Any = list(loader) if isinstance(loader, Iterator) else loader
        self.seed, self.epoch = seed, 0
        self.can_start_within = callable(getattr(loader, "set_epoch", None))
        sized: Any = self.loader
        self._length = len(sized) if hasattr(sized, "__len__") else sum(1 for _ in sized)

    def take(self, rank: int, world: int) -> bool:
        """Have the loader decode only this process's images of each batch; False where it can't and gives all."""
        take = getattr(self.loader, "take", None)
        if world == 1 or not callable(take):
            return False
        take(rank, world)
        return True

    def give_back(self) -> None:
        """Leave the loader as it was before :meth:`take`."""
        if callable(take := getattr(self.loader, "take", None)):
            take(0, 1)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch of the next iteration, and how many of its batches to leave out."""
        self.epoch = epoch
        if self.can_start_within:
            self.loader.set_epoch(epoch, *((start,) if start else ()))

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.can_start_within:
            yield from map(_pair, self.loader)
            return
        with torch.random.fork_rng(devices=()):
            words = np.random.SeedSequence([self.seed % (1 << 63), self.epoch]).generate_state(1, np.uint64)
            torch.manual_seed(int(words[0]) >> 1)
            batches = iter(self.loader)
            first = next(batches, None)  # a DataLoader draws the order with its first batch
        if first is not None:
            yield _pair(first)
            yield from map(_pair, batches)


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    """A batch as images and labels."""
    if (
        not isinstance(batch, tuple | list)
        or len(batch) != 2
        or not all(isinstance(x, Tensor) for x in batch)
    ):
        kinds = ", ".join(type(x).__name__ for x in batch) if isinstance(batch, tuple | list) else ""
        raise DataError(
            f"the loader gave a {type(batch).__name__}{f' of ({kinds})' if kinds else ''}; expected two tensors, "
            "(images, labels)"
        )
    return batch[0], batch[1]
