"""The embedded Fashion-MNIST against a reader of idx files that shares nothing with it."""

from __future__ import annotations

import gzip
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from qzoo.data import load_data
from qzoo.data.fashion_mnist import fashion_mnist
from qzoo.errors import DataError
from qzoo.preprocessing import Preprocessing

FILES = Path(__file__).parents[2] / "qzoo" / "data" / "files"
PREPROCESSING = Preprocessing((1, 28, 28), 1.0, "bilinear", (0.2860,), (0.3530,))


def read_idx(path: Path) -> np.ndarray:
    """idx as its format states it: 2 zero bytes, a type code (8 = uint8), rank, big-endian sizes, data."""
    with gzip.open(path) as file:
        zero, kind, rank = struct.unpack(">HBB", file.read(4))
        assert (zero, kind) == (0, 8)
        shape = struct.unpack(f">{rank}I", file.read(4 * rank))
        return np.frombuffer(file.read(), np.uint8).reshape(shape)


def test_embedded_test_set() -> None:
    images, labels = fashion_mnist("test")
    assert images.dtype == torch.uint8
    assert images.shape == (10_000, 1, 28, 28)
    np.testing.assert_array_equal(images[:, 0].numpy(), read_idx(FILES / "t10k-images-idx3-ubyte.gz"))
    np.testing.assert_array_equal(labels.numpy(), read_idx(FILES / "t10k-labels-idx1-ubyte.gz"))
    assert labels.bincount().tolist() == [1000] * 10


def test_loader_normalizes_in_file_order() -> None:
    loader = load_data(PREPROCESSING, "fashion-mnist", subset="30:100", batch_size=32)
    batches = list(loader)
    assert [len(images) for images, _ in batches] == [32, 32, 6]
    assert len(loader) == 3
    raw = read_idx(FILES / "t10k-images-idx3-ubyte.gz")[30:100].astype(np.float64)
    images = torch.cat([images for images, _ in batches]).double().numpy()[:, 0]
    np.testing.assert_allclose(images, (raw / 255 - 0.2860) / 0.3530, atol=1e-6)
    labels = torch.cat([labels for _, labels in batches]).numpy()
    np.testing.assert_array_equal(labels, read_idx(FILES / "t10k-labels-idx1-ubyte.gz")[30:100])


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t10k-images.*is not there"):
        fashion_mnist("test", tmp_path)
    for file in FILES.glob("*.gz"):
        shutil.copy(file, tmp_path)
    assert torch.equal(fashion_mnist("test", tmp_path)[1], fashion_mnist("test")[1])
    target = tmp_path / "t10k-labels-idx1-ubyte.gz"
    content = bytearray(gzip.decompress(target.read_bytes()))
    content[100] ^= 1
    target.write_bytes(gzip.compress(bytes(content), 1))
    with pytest.raises(DataError, match=r"SHA-256 differs"):
        fashion_mnist("test", tmp_path)
    target.write_bytes(target.read_bytes()[:2000])
    with pytest.raises(DataError, match="can't be unpacked"):
        fashion_mnist("test", tmp_path)
    with pytest.raises(DataError, match="'train' or 'test', not 'val'"):
        fashion_mnist("val")
