"""List image files with their labels, in an order that can be cut into parts; all folders of images share this."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qzoo.errors import DataError
from qzoo.preprocessing import Preprocessing, check_size


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Images in the order of the SHA-256 of their path relative to ``root``.

    That order is as good as random, the same on every machine, and keeps its place when it is cut into parts:
    calibrate on the first images, check on the others.

    Item ``i`` is ``(image, label)``: float32 [C, H, W], preprocessed, and the class index.

    Args:
        root: the folder.
        found: one ``(path, label)`` an image, in any order.
        preprocessing: of the model.
        transform: in place of the preprocessing's, for training (:func:`qzoo.data.training_transform`).

    Attributes:
        files: one ``(path, label)`` an image, in order.
    """

    def __init__(
        self,
        root: Path,
        found: Iterable[tuple[Path, int]],
        preprocessing: Preprocessing,
        transform: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.root = root
        self.mode = "L" if preprocessing.input_size[0] == 1 else "RGB"
        self.transform: Callable[[Any], Tensor] = transform or preprocessing.transform()
        self.files = sorted(found, key=self.place)

    def place(self, item: tuple[Path, int]) -> str:
        """SHA-256 of an image's path relative to the folder, which says its place in the order."""
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
    from PIL import Image, UnidentifiedImageError

    formats = FORMATS.get(Path(path).suffix.lower())
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would wait for ever
            raise DataError("it is no regular file")
        if formats is None:
            raise DataError(f"its name must end in one of {', '.join(FORMATS)}")
        with Image.open(path, formats=formats) as image:
            check_size(*image.size)
            return _eight_bits(image).convert(mode)
    except UnidentifiedImageError as error:
        raise _unreadable(path, f"its content is not {' or '.join(formats or ())}") from error
    except Exception as error:  # damaged files make decoders raise nearly every type
        raise _unreadable(path, str(error) or type(error).__name__) from error


def _unreadable(path: str | os.PathLike[str], reason: str) -> DataError:
    return DataError(f"{path} can't be read as an image ({reason}); replace or remove it")


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
