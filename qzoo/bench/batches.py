"""Load the labelled images that models are measured on: the same in each pass, decoded once if they fit into memory."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

from torch import Tensor

from qzoo.errors import DataError

Batches = Iterable[tuple[Tensor, Tensor]]
_CACHE_BYTES = 2**30  # a data set up to this size is decoded once, not once for every runtime


def repeatable(loader: Batches) -> Batches:
    """List the batches where they fit into memory, else watch the loader give the same in every pass.

    Raises:
        DataError: no images; or an iterator, which can be read once only, over more than are kept.
    """
    batches: list[tuple[Tensor, Tensor]] = []
    size = 0
    for images, labels in loader:
        batches.append((images, labels))
        size += images.numel() * images.element_size()
        if size <= _CACHE_BYTES:
            continue
        if iter(loader) is loader:
            raise DataError(
                f"the loader is a {type(loader).__name__}, which can be read once, and its images take more than "
                f"{_CACHE_BYTES / 2**30:.3g} GiB, too much to keep: pass a list or a DataLoader"
            )
        return _Repeatable(loader, [_mark(*batch) for batch in batches])
    if not batches:
        raise DataError("the loader gave no images; check the folder, the split and the subset")
    return batches


class _Repeatable:
    """A loader whose batches are compared in every pass with those of the passes before.

    The float model's logits are recorded in one pass and compared with other models' in another: of a loader that
    shuffles or augments they would be of other images.
    """

    def __init__(self, loader: Batches, marks: list[int]) -> None:
        self._loader, self._marks, self._complete = loader, marks, False

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = 0
        for images, labels in self._loader:
            mark = _mark(images, labels)
            if count == len(self._marks) and not self._complete:
                self._marks.append(mark)
            elif count >= len(self._marks) or mark != self._marks[count]:
                raise DataError(f"{_CHANGES}: batch {count} is another one than before")
            count += 1
            yield images, labels
        if count < len(self._marks):
            raise DataError(f"{_CHANGES}: it gave {len(self._marks)} batches or more, and now {count}")
        self._complete = True


_CHANGES = (
    "the loader does not give the same batches in every pass; the models would be compared on different images. Pass "
    "one with shuffle=False and without random transforms"
)


def _mark(images: Tensor, labels: Tensor) -> int:
    """A checksum of a batch."""
    return zlib.crc32(images.numpy().tobytes(), zlib.crc32(labels.numpy().tobytes()))
