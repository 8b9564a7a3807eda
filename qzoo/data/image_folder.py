"""Any folder of folders of images: ``ROOT/CLASS/*.png``, the classes numbered as torchvision's ``ImageFolder`` does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from qzoo.data.imagenet import open_image
from qzoo.errors import DataError
from qzoo.preprocessing import Preprocessing


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """``torchvision.datasets.ImageFolder`` in an order that can be cut into parts.

    Images are in the order of the SHA-256 of their path relative to ``root``: as good as random, and the same on every
    machine, so that calibrating on the first and checking on the others is sound. torchvision's own is by class.

    Item ``i`` is ``(image, label)``: float32 [C, H, W], preprocessed, and the class index.

    Args:
        root: a folder a class.
        preprocessing: of the model.
        transform: in place of the preprocessing's, for training (:func:`qzoo.data.training_transform`).

    Attributes:
        classes: names of the folders, sorted; the position is the class index.
        files: one ``(path, label)`` an image, in that order.

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

        self.root = Path(root)
        self.mode = "L" if preprocessing.input_size[0] == 1 else "RGB"
        self.transform: Callable[[Any], Tensor] = transform or preprocessing.transform()
        try:
            found = datasets.ImageFolder(str(self.root))
        except FileNotFoundError as error:
            raise DataError(
                f"{self.root} is no folder with one folder of images a class in it ({error}); expected such as "
                f"{self.root}/cat/1.png"
            ) from error
        self.classes = tuple(found.classes)
        self.files = sorted(((Path(path), label) for path, label in found.samples), key=self._place)

    def _place(self, item: tuple[Path, int]) -> str:
        return hashlib.sha256(item[0].relative_to(self.root).as_posix().encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        return self.transform(open_image(path, self.mode)), label
