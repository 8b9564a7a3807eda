"""Fashion-MNIST (Xiao et al., 2017, arXiv:1708.07747): 60,000 + 10,000 images, 28x28, 10 classes.

The test set is embedded in the package (MIT licence, see ``files/LICENSE``). The training set is read from
a folder with the original idx files: ``root``, else Debian's package ``dataset-fashion-mnist``, else
torchvision downloads it.
"""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import torch
from torch import Tensor

from qzoo.errors import DataError

_EMBEDDED = Path(__file__).parent / "files"
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
# SHA-256 of the unpacked files: the same data is distributed under differently compressed archives.
_FILES = {
    "train": (
        ("train-images-idx3-ubyte.gz", "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
        ("train-labels-idx1-ubyte.gz", "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    ),
    "test": (
        ("t10k-images-idx3-ubyte.gz", "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
        ("t10k-labels-idx1-ubyte.gz", "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
    ),
}


def fashion_mnist(split: str, root: str | Path | None = None) -> tuple[Tensor, Tensor]:
    """Load one split of Fashion-MNIST.

    Args:
        split: ``"train"`` (60,000 images) or ``"test"`` (10,000).
        root: folder with the four idx files (``*-ubyte.gz``); by default the embedded test set, or the first
            of Debian's folder and torchvision's download for the training set.

    Returns:
        images, uint8 of shape [N, 1, 28, 28], and labels, int64 of shape [N].

    Raises:
        DataError: the files are not there, or not those that the authors published.
    """
    if split not in _FILES:
        raise DataError(f"split must be 'train' or 'test', not {split!r}")
    folder = Path(root) if root is not None else _default_folder(split)
    (images_name, images_hash), (labels_name, labels_hash) = _FILES[split]
    images = _read(folder / images_name, images_hash, header=16).view(-1, 1, 28, 28)
    labels = _read(folder / labels_name, labels_hash, header=8).long()
    return images, labels


def _default_folder(split: str) -> Path:
    if split == "test":
        return _EMBEDDED
    if (_DEBIAN / _FILES[split][0][0]).is_file():
        return _DEBIAN
    from torchvision.datasets import FashionMNIST

    cache = Path(torch.hub.get_dir()) / "qzoo"
    try:
        FashionMNIST(str(cache), train=True, download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"the Fashion-MNIST training set can't be downloaded ({error}); pass its folder of idx files, "
            "or install Debian's dataset-fashion-mnist"
        ) from error
    return cache / "FashionMNIST" / "raw"


def _read(path: Path, sha256: str, header: int) -> Tensor:
    if not path.is_file():
        raise DataError(
            f"{path} is not there; pass the folder of the Fashion-MNIST idx files, or install Debian's "
            f"dataset-fashion-mnist"
        )
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise DataError(f"{path} can't be unpacked ({error}); download it again") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{path} is not the published data (SHA-256 differs); download it again")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[header:]
