"""Read folders of ImageNet images: ``ROOT/WNID/*.JPEG``, all 1,000 classes or some of them.

The class of an image is the place of its folder's WordNet id in the list of all 1,000 synsets, so that a
folder with half of the classes still has the right labels (``torchvision.datasets.ImageFolder`` numbers the
folders it finds).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from qzoo.data.files import ImageFiles
from qzoo.data.sets import imagenet_synsets
from qzoo.errors import DataError
from qzoo.preprocessing import Preprocessing

SUFFIXES = frozenset({".jpeg", ".jpg", ".png", ".bmp", ".webp"})


class ImageNetFolder(ImageFiles):
    """Images of ``root/WNID/``, see :class:`ImageFiles`.

    Args:
        root: a folder a class, named by WordNet id.

    Raises:
        DataError: no folder, no images, or a folder whose name is no ImageNet synset.
    """

    def __init__(
        self,
        root: str | Path,
        preprocessing: Preprocessing,
        transform: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__(Path(root), _scan(Path(root)), preprocessing, transform)


def _scan(root: Path) -> list[tuple[Path, int]]:
    if not root.is_dir():
        raise DataError(f"{root} is no folder; expected one folder a class in it, such as {root}/n01440764")
    classes = {wnid: i for i, wnid in enumerate(imagenet_synsets())}
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    unknown = [folder.name for folder in folders if folder.name not in classes]
    if unknown:
        raise DataError(
            f"{root} holds folders that are no ImageNet-1k synset: {', '.join(unknown[:5])}"
            f"{' ...' if len(unknown) > 5 else ''}; expected names such as 'n01440764'. Give the folder "
            "of the classes itself (val, say), and move others out of it"
        )
    files = [
        (path, classes[folder.name])
        for folder in folders
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    ]
    if not files:
        raise DataError(f"{root} holds no images ({', '.join(sorted(SUFFIXES))}) in folders named by synset")
    return files
