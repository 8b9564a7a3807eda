"""List image files with their labels, in an order that can be cut into parts; all folders of images share this."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qzoo.errors import BrokenImageError, DataError
from qzoo.preprocessing import Preprocessing, check_size


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Images in the order of the SHA-256 of their path relative to ``root``.

    That order is as good as random, the same on every machine, and keeps its place when it is cut into parts:
    calibrate on the first images, check on the others.

    Item ``i`` is ``(image, label)``: float32 [C, H, W], preprocessed, and the class index.

    Args:
        root: the folder.
        items: one ``(path, label)`` an image, in any order.
        preprocessing: of the model.
        transform: in place of the preprocessing's, for training (:func:`qzoo.data.training_transform`).

    Attributes:
        files: one ``(path, label)`` an image, in order.
    """

    def __init__(
        self,
        root: Path,
        items: Iterable[tuple[Path, int]],
        preprocessing: Preprocessing,
        transform: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.root = root
        self.mode = "L" if preprocessing.input_size[0] == 1 else "RGB"
        self.transform: Callable[[Any], Tensor] = transform or preprocessing.transform()
        self.files = sorted(items, key=self.place)

    def place(self, item: tuple[Path, int]) -> str:
        """Compute the SHA-256 of an image's path relative to the folder, which says its place in the order."""
        return hashlib.sha256(item[0].relative_to(self.root).as_posix().encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        return self.transform(open_image(path, self.mode)), label


# What is decoded, by extension: no other decoder of Pillow's dozens sees a file. ImageNet has a PNG that is named
# .JPEG (n02105855_2933), and Pillow's JPEG includes the MPO of phones.
_JPEG = ("JPEG", "PNG")
FORMATS: dict[str, tuple[str, ...]] = {
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".png": ("PNG",),
    ".webp": ("WEBP",),
    ".bmp": ("BMP",),
    ".gif": ("GIF",),
    ".tif": ("TIFF",),
    ".tiff": ("TIFF",),
    ".ppm": ("PPM",),
    ".pgm": ("PPM",),
}


def open_image(path: str | os.PathLike[str], mode: str = "RGB") -> Any:
    """Decode one image file into a PIL image of 8 bits a channel; 16-bit images keep their high bytes.

    Args:
        path: a file whose extension names its format, see :data:`FORMATS`.
        mode: ``"RGB"``, or ``"L"`` for greyscale.

    Raises:
        DataError: the file is missing, no image of that format, damaged, too large or too elongated
            (:func:`qzoo.preprocessing.check_size`), or of 32-bit integers or floats, whose range nothing tells.
    """
    formats = FORMATS.get(Path(path).suffix.lower())
    with _named(path, formats or ()):
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would wait for ever
            raise DataError("it is no regular file")
        if formats is None:
            raise DataError(f"its name must end in one of {', '.join(FORMATS)}")
        return _decode(path, formats, mode)


_ANY = tuple(dict.fromkeys(kind for kinds in FORMATS.values() for kind in kinds))


def decode_image(content: bytes, name: str, mode: str = "RGB") -> Any:
    """Decode the bytes of an image file, as :func:`open_image` does; the format is told by the content.

    Args:
        content: the file.
        name: for errors.
        mode: ``"RGB"``, or ``"L"`` for greyscale.

    Raises:
        DataError: as :func:`open_image`.
    """
    with _named(name, _ANY):
        return _decode(io.BytesIO(content), _ANY, mode)


def eight_bit_image(pixels: np.ndarray, name: str, mode: str = "RGB") -> Any:
    """Make a PIL image of uint8 pixels, [H, W], [H, W, 1] or [H, W, 3]. Raises DataError for other shapes."""
    from PIL import Image

    with _named(name, ("uint8 pixels",)):
        grey = pixels.ndim == 3 and pixels.shape[2] == 1
        return Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if grey else pixels)).convert(mode)


def _decode(file: Any, formats: tuple[str, ...], mode: str) -> Any:
    from PIL import Image

    with Image.open(file, formats=formats) as image:
        check_size(*image.size)
        if image.mode == mode:
            image.load()
            return image  # which Pillow would copy to convert it
        return _eight_bits(image).convert(mode)


@contextmanager
def _named(name: str | os.PathLike[str], formats: tuple[str, ...]) -> Iterator[None]:
    """Say of which image an error is."""
    from PIL import UnidentifiedImageError

    try:
        yield
    except UnidentifiedImageError as error:
        raise _unreadable(name, f"its content is not {' or '.join(formats)}") from error
    except Exception as error:  # damaged files make decoders raise nearly every type
        raise _unreadable(name, str(error) or type(error).__name__) from error


def _unreadable(path: str | os.PathLike[str], reason: str) -> BrokenImageError:
    return BrokenImageError(f"{path} can't be read as an image ({reason}); replace or remove it")


def _eight_bits(image: Any) -> Any:
    """The high bytes of a 16-bit image, as Pillow reads 16-bit colour; others as they are.

    Pillow's own conversions saturate: nearly all of a 16-bit image would be white.
    """
    from PIL import Image

    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise DataError(f"it holds {kind}, whose black and white are not known; save it with 8 or 16 bits")
    if image.mode[0] != "I":
        return image
    bits = image.tag_v2.get(258, (16,)) if image.format == "TIFF" else (16,)  # BitsPerSample
    if tuple(bits) != (16,):
        raise DataError(f"it holds {bits[0]}-bit integers; save it with 8 or 16 bits")
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def image_batches(
    dataset: Dataset[tuple[Tensor, int]],
    start: int,
    stop: int,
    batch_size: int,
    workers: int,
    skip_broken: bool = False,
) -> DataLoader[tuple[Tensor, Tensor]] | Batches:
    """Give the images ``start`` to ``stop`` in batches, in the data set's order; nothing is drawn at random.

    Args:
        workers: processes that decode; 0 decodes in this one.
        skip_broken: leave out images that do not decode.
    """
    if skip_broken:
        numbers = [list(range(i, min(i + batch_size, stop))) for i in range(start, stop, batch_size)]

        def batches(rank: int, world: int, first: int) -> list[list[int]]:
            return numbers[first + rank :: world]

        return Batches(dataset, batches, len(numbers), workers, skip_broken)
    part: Any = torch.utils.data.Subset(dataset, range(start, stop))  # collating makes tensors of the labels
    return DataLoader(
        part,
        batch_size=batch_size,
        num_workers=workers,
        generator=torch.Generator(),  # else every pass would move the global generator
    )


class Batches:
    """Batches of images that are read one after the other in this process, and decoded in the workers.

    Args:
        items: gives ``(image, label)`` of what is read: of a position, or of a sample with its bytes.
        batches: starts a pass over what is read, in batches: the share of a rank of so many processes, without the
            first batches of all.
        length: number of batches, None where it is not known before the end.
        workers: processes that decode; 0 decodes in this one.
        skip_broken: leave out images that do not decode, in place of an error.

    Attributes:
        broken: why images of this pass were left out, each with its name.
    """

    def __init__(
        self,
        items: Any,
        batches: Callable[[int, int, int], Iterable[list[Any]]],
        length: int | None,
        workers: int = 0,
        skip_broken: bool = False,
    ) -> None:
        self._items, self._batches, self._length = ItemsOrErrors(items), batches, length
        self._workers, self._skip = workers, skip_broken
        self.broken: list[str] = []

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("the number of batches is not known before the end of the data")
        return self._length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.dealt(0, 1)

    def dealt(self, rank: int, world: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Deal out the batches of one of ``world`` processes, without the ``first`` ones of all; others are only read
        where they have to be, and not decoded."""
        self.broken = []
        loader: DataLoader[Any] = DataLoader(
            self._items,
            batch_sampler=self._batches(rank, world, first),  # type: ignore[arg-type]
            num_workers=self._workers,
            collate_fn=collated,
            generator=torch.Generator(),  # else every pass would move the global generator
        )
        for images, labels, errors in loader:
            self.broken += left_out(errors, self._skip)
            if len(labels):
                yield images, labels


@dataclass(frozen=True)
class ItemError:
    """An error on its way from a worker, which would add its traceback to the text of an exception."""

    text: str
    broken: bool


class ItemsOrErrors(Dataset[Any]):
    """Items, or why there is none."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __getitem__(self, index: Any) -> tuple[Tensor, int] | ItemError:
        try:
            return self.items[index]  # type: ignore[no-any-return]
        except DataError as error:
            return ItemError(str(error), isinstance(error, BrokenImageError))


def collated(items: list[Any]) -> tuple[Tensor, Tensor, list[ItemError]]:
    """Stack the items of a batch, and list the errors among them."""
    errors = [item for item in items if isinstance(item, ItemError)]
    pairs = [item for item in items if not isinstance(item, ItemError)]
    images = torch.stack([image for image, _ in pairs]) if pairs else torch.empty(0)
    return images, torch.tensor([label for _, label in pairs], dtype=torch.int64), errors


def left_out(errors: list[ItemError], skip_broken: bool) -> list[str]:
    """Say why images of a batch are left out.

    Raises:
        DataError: the first of the errors, where it is another than an image that does not decode, or these are not to
            be left out.
    """
    for error in errors:
        if not (skip_broken and error.broken):
            raise (BrokenImageError if error.broken else DataError)(error.text)
    return [error.text for error in errors]


def broken_images(loader: object) -> int:
    """Count the images that a loader left out of its last pass, because they do not decode.

    Args:
        loader: of :func:`qzoo.data.load_data`; any other left out none.

    Returns:
        Their number.

    Example:
        >>> broken_images(loader)
        0
    """
    return len(getattr(loader, "broken", ()))
