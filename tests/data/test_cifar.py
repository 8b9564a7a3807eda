"""CIFAR by torchvision: generated files in the authors' format, read back against NumPy."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from qzoo.data import label_names, load_data
from qzoo.errors import DataError
from qzoo.preprocessing import Preprocessing

PREPROCESSING = Preprocessing((3, 32, 32), 1.0, "bilinear", (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def write(folder: Path, name: str, values: dict) -> list[str]:
    folder.mkdir(exist_ok=True)
    content = pickle.dumps(values, protocol=2)
    (folder / name).write_bytes(content)
    return [name, hashlib.md5(content).hexdigest()]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both data sets with a few random images, and torchvision's sums of them in place of the authors'."""
    rng = np.random.default_rng(0)
    for cls, folder, key, files, names in (
        (
            datasets.CIFAR10,
            "cifar-10-batches-py",
            "labels",
            ("data_batch_1", "test_batch"),
            label_names("cifar-10"),
        ),
        (datasets.CIFAR100, "cifar-100-python", "fine_labels", ("train", "test"), label_names("cifar-100")),
    ):
        sums = []
        for count, file in zip((7, 5), files, strict=True):
            images = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
            sums.append(
                write(tmp_path / folder, file, {"data": images, key: rng.integers(0, 10, count).tolist()})
            )
        meta = {"label_names" if cls is datasets.CIFAR10 else "fine_label_names": names}
        name, md5 = write(tmp_path / folder, "batches.meta" if cls is datasets.CIFAR10 else "meta", meta)
        monkeypatch.setattr(cls, "train_list", sums[:1])
        monkeypatch.setattr(cls, "test_list", sums[1:])
        monkeypatch.setattr(cls, "meta", {"filename": name, "key": next(iter(meta)), "md5": md5})
    return tmp_path


@pytest.mark.parametrize(
    ("labels", "split", "file", "key"),
    [
        ("cifar-10", "train", "cifar-10-batches-py/data_batch_1", "labels"),
        ("cifar-10", "test", "cifar-10-batches-py/test_batch", "labels"),
        ("cifar-100", "test", "cifar-100-python/test", "fine_labels"),
    ],
)
def test_batches_are_the_files(root: Path, labels: str, split: str, file: str, key: str) -> None:
    raw = pickle.loads((root / file).read_bytes())
    expected = raw["data"].reshape(-1, 3, 32, 32).astype(np.float32) / 255
    expected = (expected - np.reshape(PREPROCESSING.mean, (1, 3, 1, 1))) / np.reshape(
        PREPROCESSING.std, (1, 3, 1, 1)
    )
    batches = list(load_data(PREPROCESSING, labels, root, split=split, batch_size=3))
    np.testing.assert_allclose(torch.cat([x for x, _ in batches]).numpy(), expected, rtol=1e-5, atol=1e-5)
    assert torch.cat([y for _, y in batches]).tolist() == raw[key]
    part = list(load_data(PREPROCESSING, labels, root, split=split, subset="1:4"))
    torch.testing.assert_close(part[0][0], torch.cat([x for x, _ in batches])[1:4])


def test_names_are_torchvisions(root: Path) -> None:
    assert datasets.CIFAR100(root).classes == label_names("cifar-100")
    assert len(set(label_names("cifar-100"))) == 100
    assert label_names("cifar-100") == sorted(label_names("cifar-100"))  # as the authors' file has them
    assert len(label_names("cifar-10")) == 10


def test_what_is_not_there_or_not_sound(root: Path) -> None:
    with pytest.raises(DataError, match=r"not embedded.*CIFAR10\(FOLDER, download=True\)"):
        load_data(PREPROCESSING, "cifar-10")
    with pytest.raises(DataError, match="holds no sound cifar-100"):
        load_data(PREPROCESSING, "cifar-100", root / "nowhere")
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(b"other")
    with pytest.raises(DataError, match="holds no sound cifar-10"):
        load_data(PREPROCESSING, "cifar-10", root)
    with pytest.raises(DataError, match="split must be 'train' or 'test'"):
        load_data(PREPROCESSING, "cifar-10", root, split="val")
