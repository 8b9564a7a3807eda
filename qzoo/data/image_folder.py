"""Any folder of folders of images: ``ROOT/CLASS/*.png``, the classes numbered as torchvision's ``ImageFolder`` does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from qzoo.data.files import ImageFiles
from qzoo.errors import DataError
from qzoo.preprocessing import Preprocessing


class ImageFolder(ImageFiles):
    """``torchvision.datasets.ImageFolder`` in the order of :class:`ImageFiles`; torchvision's own is by class.

    Args:
        root: a folder a class.

    Attributes:
        classes: names of the folders, sorted; the position is the class index.

    Raises:
        DataError: no folder, no classes in it, or a class without images.
    """

    def __init__(
        self,
        root: str | Path,
        preprocessing: Preprocessing,
        transform: Callable[[Any], Tensor] | None = None,
    ) -> None:
        from torchvision import datasets

        try:
            found = datasets.ImageFolder(str(root))
        except FileNotFoundError as error:
            raise DataError(
                f"{root} is no folder with one folder of images a class in it ({error}); expected such as "
                f"{root}/cat/1.png"
            ) from error
        self.classes = tuple(found.classes)
        files = [(Path(path), label) for path, label in found.samples]
        super().__init__(Path(root), files, preprocessing, transform)
