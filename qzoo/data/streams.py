"""Batches and epochs of a source (:mod:`qzoo.data.sources`): one process reads, the workers decode."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor

from qzoo.data.files import Batches, decode_image, eight_bit_image
from qzoo.data.folders import SharedEpochs, share_of
from qzoo.data.sets import data_set
from qzoo.data.sources import UNKNOWN, WNID, Part, Sample, Source
from qzoo.errors import DataError
from qzoo.preprocessing import Preprocessing

BUFFER = 2048
"""Images, as they are stored, that a training draws the next one from: 230 MB of ImageNet's."""


def stream_batches(
    source: Source,
    reader: Reader,
    start: int,
    stop: int,
    batch_size: int,
    workers: int = 0,
    *,
    skip_broken: bool = False,
) -> Batches:
    """Give the images ``start`` to ``stop`` of a source in batches, in its order; none has images of two files.

    So the batches are the same however many processes share them: where each can have files of its own, it reads no
    others.

    Args:
        reader: makes inputs of samples.
        skip_broken: leave out images that do not decode.
    """
    pieces = _pieces(source.parts, start, stop)
    to_the_end = stop >= source.count

    def batches(rank: int, world: int, first: int) -> Iterator[list[Sample]]:
        alone = world > 1 and not first
        if pieces is not None:
            if alone and len(pieces) >= world:
                return _counted(pieces[rank::world], batch_size)
            return islice(_counted(pieces, batch_size), first + rank, None, world)
        if alone and len(source.parts) >= world and to_the_end:
            return _uncounted(source.parts, batch_size, start, stop, lambda i: i % world == rank)
        return islice(_uncounted(source.parts, batch_size, start, stop), first + rank, None, world)

    length = None if pieces is None else sum(-(-(end - begin) // batch_size) for _, begin, end in pieces)
    return Batches(reader, batches, length, workers, skip_broken)


def _pieces(parts: Iterable[Part], start: int, stop: int) -> list[tuple[Part, int, int]] | None:
    """Which of its images each part has to give, from one position to another; None where a count is not known."""
    pieces, place = [], 0
    for part in parts:
        if part.count == UNKNOWN:
            return None
        pieces.append((part, max(0, start - place), min(part.count, stop - place)))
        place += part.count
    return [piece for piece in pieces if piece[1] < piece[2]]


def _counted(pieces: Iterable[tuple[Part, int, int]], batch_size: int) -> Iterator[list[Sample]]:
    """The batches of some pieces.

    Raises:
        DataError: a part has fewer images than it said.
    """
    for part, start, stop in pieces:
        place = start
        for batch in _chunks(islice(part.samples(start), stop - start), batch_size):
            place += len(batch)
            yield batch
        if place < stop:
            raise DataError(f"a file of {part.count} images ends after {place}; was it written meanwhile?")


def _uncounted(
    parts: Sequence[Part],
    batch_size: int,
    start: int,
    stop: int,
    is_own: Callable[[int], bool] | None = None,
) -> Iterator[list[Sample]]:
    """The batches of parts whose images are counted by reading them.

    Args:
        is_own: which parts to give the batches of, where ``stop`` is the end; the others are read up to ``start`` only.

    Raises:
        DataError: the data end before ``stop``.
    """
    place = 0
    for i, part in enumerate(parts):
        if place >= stop:
            return
        if place >= start and is_own is not None and not is_own(i):
            continue
        samples = part.samples(0)
        place += sum(1 for _ in islice(samples, max(0, start - place)))
        if place < start or (is_own is not None and not is_own(i)):
            continue
        for batch in _chunks(islice(samples, stop - place), batch_size):
            place += len(batch)
            yield batch
    if place < stop < UNKNOWN and is_own is None:
        raise DataError(
            f"subset {start}:{stop}: the data end after {place} images; choose less (--subset, or --calibration-subset "
            "of a build)"
        )


def _chunks(samples: Iterable[Any], size: int) -> Iterator[list[Any]]:
    samples = iter(samples)
    while batch := list(islice(samples, size)):
        yield batch


class Reader:
    """Makes a model's input and class index of a sample.

    Args:
        preprocessing: of the model.
        label_map: to the model's classes.
        transform: in place of the preprocessing's, for training.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        label_map: LabelMap,
        transform: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.mode = "L" if preprocessing.input_size[0] == 1 else "RGB"
        self.transform, self.label_map = transform or preprocessing.transform(), label_map

    def __getitem__(self, sample: Sample) -> tuple[Any, int]:
        label = self.label_map.index(sample)
        decode: Any = decode_image if isinstance(sample.image, bytes) else eight_bit_image
        return self.transform(decode(sample.image, sample.name, self.mode)), label


class StreamLoader(SharedEpochs):
    """Epochs of a source: float32 [B, C, H, W] and int64 [B], the same for the same seed and epoch.

    Each epoch takes the files in another order (where it can: all of them are used, or their images are counted) and
    draws each image out of :data:`BUFFER` that were read, as WebDataset and tf.data do. What is drawn depends on seed,
    epoch and place alone, as of :class:`qzoo.data.folders.FolderLoader`; what is before a start within the epoch is
    read, and not decoded. An incomplete last batch is left out.

    Args:
        source: the images.
        reader: makes inputs of samples; its transform may draw from the global generators.
        start, stop: positions in the source's order.
        batch_size: images a batch.
        seed: of order and augmentation.
        workers, skip_broken: see :class:`qzoo.data.folders.SharedEpochs`.
    """

    def __init__(
        self,
        source: Source,
        reader: Reader,
        start: int,
        stop: int,
        batch_size: int,
        seed: int = 0,
        workers: int = 0,
        skip_broken: bool = False,
    ) -> None:
        super().__init__(batch_size, seed, workers, skip_broken)
        self.source, self.reader = source, reader
        self.first, self.stop = start, stop

    def __len__(self) -> int:
        return (self.stop - self.first) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        part = share_of(self.batch_size, *self.share)
        batches = ([batch[i] for i in part] for batch in self._batches())
        yield from self._decode(_KeyReader(self.reader), batches, _place)

    def _batches(self) -> Iterator[list[_Key]]:
        draws = np.random.Generator(np.random.PCG64([self.seed % (1 << 63), self.epoch]))
        drawn = _chunks(_shuffle(self._keys(draws), BUFFER, draws), self.batch_size)
        full = 0
        for full, batch in enumerate(islice((b for b in drawn if len(b) == self.batch_size), len(self)), 1):
            if full > self.start:
                yield batch
        if full < len(self):
            raise DataError(f"the data end before {self.stop} images; choose less (--subset)")

    def _keys(self, draws: np.random.Generator) -> Iterator[_Key]:
        """The samples with their places, file by file."""
        parts = self.source.parts
        pieces = _pieces(parts, self.first, self.stop)
        if pieces is not None:
            for i in draws.permutation(len(pieces)).tolist():
                part, start, stop = pieces[i]
                for j, sample in enumerate(islice(part.samples(start), stop - start), start):
                    yield i, j, sample
            return
        whole = self.first == 0 and self.stop >= self.source.count
        order = draws.permutation(len(parts)).tolist() if whole else range(len(parts))
        places = ((i, j, sample) for i in order for j, sample in enumerate(parts[i].samples(0)))
        yield from islice(places, self.first, self.stop)


_Key = tuple[int, int, Sample]  # number of the file, place in it


class _KeyReader:
    """A reader of samples that come with their places."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __getitem__(self, key: _Key) -> tuple[Any, int]:
        return self.reader[key[2]]


def _place(key: _Key) -> tuple[int, int]:
    return key[:2]


def _shuffle(items: Iterable[_Key], size: int, draws: np.random.Generator) -> Iterator[_Key]:
    """Each item out of ``size`` that were read."""
    buffer: list[_Key] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        i = int(draws.integers(size))
        yield buffer[i]
        buffer[i] = item
    yield from (buffer[i] for i in draws.permutation(len(buffer)).tolist())


class LabelMap:
    """Class indices of a model from the labels of data: indices, WordNet ids of ImageNet, or names of classes.

    Args:
        labels: the model's label set.
        names: of the data's classes, by index; () where the data don't say them.
        classes: of the model: their number or their names, where these are known.

    Raises:
        DataError: the names are of other classes than the model's, or of another number.
    """

    def __init__(
        self, labels: str, names: tuple[str, ...] = (), classes: int | Sequence[str] | None = None
    ) -> None:
        known = data_set(labels)
        listed = () if classes is None or isinstance(classes, int) else tuple(classes)
        own = tuple(known.class_names()) if known.class_names is not None else listed or names
        number = classes if isinstance(classes, int) else len(listed)
        self.labels, self.classes = labels, known.classes or number or len(names) or UNKNOWN
        if names and own is names and len(names) != self.classes:
            raise DataError(
                f"the data have {len(names)} classes, such as {names[0]!r}, which are not the model's "
                f"{self.classes}; give data of these classes"
            )
        synsets = known.folder_names() if known.folder_names is not None else ()
        self.places = {name: i for keys in (own, synsets) for i, name in enumerate(keys)}
        self.order = self._order(names, own, synsets) if names else None

    def _order(self, names: tuple[str, ...], own: tuple[str, ...], synsets: tuple[str, ...]) -> list[int]:
        """The model's index of each of the data's classes."""
        if synsets and all(name in self.places and WNID.fullmatch(name) for name in names):
            return [self.places[name] for name in names]
        if len(names) == self.classes and _in_order(names, own):
            return list(range(len(names)))
        places: dict[str, set[int]] = {}
        for i, name in enumerate(own):
            places.setdefault(_plain(name), set()).add(i)
        matches = [places.get(_plain(name), set()) for name in names]
        wrong = [name for name, at in zip(names, matches, strict=True) if len(at) != 1]
        if wrong:
            raise DataError(
                f"the data have {len(names)} classes, such as {wrong[0]!r}, which is no class of {self.labels} "
                f"({self.classes} classes, such as {own[0] if own else '?'!r}); give data of these classes"
            )
        return [at.pop() for at in matches]

    def index(self, sample: Sample) -> int:
        """Look up the class index of a sample.

        Raises:
            DataError: a label outside the classes.
        """
        label: int | str = sample.label
        if isinstance(label, str) and label not in self.places and re.fullmatch(r"-?\d{1,9}", label):
            label = int(label)
        if isinstance(label, str):
            if label in self.places:
                return self.places[label]
        elif 0 <= label < (len(self.order) if self.order is not None else self.classes):
            return self.order[label] if self.order is not None else label
        raise DataError(
            f"{sample.name} has the label {sample.label!r}, and {self.labels} the classes 0 to {self.classes - 1}; "
            "give a split with labels of these classes"
        )


def _in_order(names: tuple[str, ...], own: tuple[str, ...]) -> bool:
    """Whether names of as many classes stand in the model's order: at least half of them are known, however they are
    spelled, and none of these has another place. Names that are numbers say nothing else than their place."""
    if names == tuple(str(i) for i in range(len(names))):
        return True
    places: dict[str, set[int]] = {}
    for i, name in enumerate(own):
        places.setdefault(_plain(name), set()).add(i)
    at = [places.get(_plain(name)) for name in names]
    known = [(i, place) for i, place in enumerate(at) if place is not None]
    return 2 * len(known) >= len(names) and all(i in place for i, place in known)


def _plain(name: str) -> str:
    """A name without case, spaces and punctuation."""
    return re.sub(r"[\W_]", "", name).casefold()
