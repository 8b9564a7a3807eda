"""Any folder of folders of images: ``ROOT/CLASS/*.png``, the classes numbered as torchvision's ``ImageFolder`` does."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from qzoo.data.files import ImageFiles
from qzoo.errors import DataError
from qzoo.preprocessing import Preprocessing


class ImageFolder(ImageFiles):
    """Data set of a folder a class, in the order of :class:`ImageFiles`; torchvision's own is class by class.

    Args:
        root: a folder with a folder of images a class.
        preprocessing: of the model.
        transform: in place of the model's own, for training.

    Attributes:
        classes: names of the folders, sorted; the position is the class index.

    Raises:
        DataError: no folder, no classes in it, a class without images, or a link to a folder that is already in.

    Example:
        >>> from pathlib import Path
        >>> Path("pets/cat").mkdir(parents=True)
        >>> Path("photo.jpg").rename("pets/cat/photo.jpg").name
        'photo.jpg'
        >>> qzoo.data.ImageFolder("pets", model.qzoo_config.preprocessing).classes
        ('cat',)
    """

    def __init__(
        self,
        root: str | Path,
        preprocessing: Preprocessing,
        transform: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.classes, files = _scan(Path(root))
        super().__init__(Path(root), files, preprocessing, transform)


def _scan(root: Path) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
    """Classes and images as torchvision finds them, except that a loop of links is an error, not an endless walk."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    try:
        folders = sorted(entry for entry in root.iterdir() if entry.is_dir())
        images = [sorted(_images(folder, root, IMG_EXTENSIONS)) for folder in folders]
        if not folders:
            raise FileNotFoundError("no folders in it")
    except OSError as error:
        raise DataError(
            f"{root} is no folder with one folder of images a class in it ({error}); expected such as "
            f"{root}/cat/1.png"
        ) from error
    empty = [folder.name for folder, paths in zip(folders, images, strict=True) if not paths]
    if empty:
        raise DataError(
            f"{root} holds folders without images ({', '.join(IMG_EXTENSIONS)}): {', '.join(empty[:5])}"
            f"{' ...' if len(empty) > 5 else ''}; fill or remove them"
        )
    files = [(path, label) for label, paths in enumerate(images) for path in paths]
    return tuple(folder.name for folder in folders), files


def _images(folder: Path, root: Path, suffixes: Collection[str]) -> Iterator[Path]:
    """Image files below a folder, links followed; a folder is entered once, so that the walk ends."""
    entered = {_identity(root): root}
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        here = Path(place)
        first = entered.setdefault(_identity(here), here)
        if first != here:
            raise DataError(f"{here} leads to {first} again, through a link; remove the link")
        folders.sort()
        yield from (here / name for name in files if Path(name).suffix.lower() in suffixes)


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _raise(error: OSError) -> None:
    raise error
