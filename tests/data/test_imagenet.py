"""ImageNet folders: labels by synset, order by hash, pixels against a NumPy reading."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qzoo.data import load_data
from qzoo.data.imagenet import ImageNetFolder
from qzoo.errors import DataError
from qzoo.preprocessing import Preprocessing

# Places in the sorted list of the 1,000 synsets, known from the data set's own publication.
KNOWN = {"n01440764": 0, "n01443537": 1, "n01484850": 2, "n02123045": 281, "n07753592": 954, "n15075141": 999}
SMALL = Preprocessing((3, 16, 16), 1.0, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def build(root: Path, classes: list[str], images: int = 2, side: int = 16) -> dict[str, np.ndarray]:
    """Random PNG images; returns the pixels by relative path."""
    rng, pixels = np.random.default_rng(0), {}
    for wnid in classes:
        (root / wnid).mkdir(parents=True)
        for i in range(images):
            array = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(array).save(root / wnid / f"{wnid}_{i}.png")
            pixels[f"{wnid}/{wnid}_{i}.png"] = array
    return pixels


def test_labels_come_from_all_synsets_though_few_are_there(tmp_path: Path) -> None:
    build(tmp_path, list(KNOWN))
    files = ImageNetFolder(tmp_path, SMALL).files
    assert len(files) == 2 * len(KNOWN)
    assert {path.parent.name: label for path, label in files} == KNOWN


def test_order_and_pixels(tmp_path: Path) -> None:
    pixels = build(tmp_path, list(KNOWN), images=3)
    order = sorted(pixels, key=lambda path: hashlib.sha256(path.encode()).hexdigest())
    loader = load_data(SMALL, "imagenet-1k", tmp_path, batch_size=4)
    batches = list(loader)
    assert len(loader) == len(batches) == 5
    images = torch.cat([images for images, _ in batches]).numpy()
    labels = torch.cat([labels for _, labels in batches])
    assert labels.dtype == torch.int64
    assert labels.tolist() == [KNOWN[path.split("/")[0]] for path in order]
    expected = np.stack([pixels[path].transpose(2, 0, 1) for path in order]) / 255.0
    np.testing.assert_allclose(images, (expected - 0.5) / 0.25, atol=1e-5)
    assert order != sorted(order)


def test_subsets_part_the_data(tmp_path: Path) -> None:
    build(tmp_path, list(KNOWN), images=3)

    def take(subset: str | None, workers: int = 0) -> torch.Tensor:
        loader = load_data(SMALL, "imagenet-1k", tmp_path, subset=subset, batch_size=4, workers=workers)
        return torch.cat([images for images, _ in loader])

    whole = take(None)
    assert torch.equal(torch.cat([take("0:7"), take("7:18")]), whole)
    assert torch.equal(torch.cat([take(":7"), take("7:")]), whole)
    assert torch.equal(take(None, workers=2), whole)


def test_a_pass_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    build(tmp_path, ["n01440764"])
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    list(load_data(SMALL, "imagenet-1k", tmp_path))
    assert torch.equal(torch.rand(4), expected)


def test_resize_crop_and_grey_images(tmp_path: Path) -> None:
    (tmp_path / "n01440764").mkdir()
    grey = Image.fromarray(np.full((40, 60), 128, np.uint8))
    grey.save(tmp_path / "n01440764" / "grey.JPEG")
    ((image, label),) = ImageNetFolder(tmp_path, Preprocessing((3, 24, 24), 0.875))
    assert (tuple(image.shape), label) == ((3, 24, 24), 0)
    expected = (128 / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(
        image.numpy(), np.broadcast_to(expected[:, None, None], (3, 24, 24)), atol=1e-5
    )


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder"):
        load_data(SMALL, "imagenet-1k", tmp_path / "missing")
    with pytest.raises(DataError, match="pass data=FOLDER"):
        load_data(SMALL, "imagenet-1k")
    (tmp_path / "n01440764").mkdir()
    with pytest.raises(DataError, match="no images"):
        load_data(SMALL, "imagenet-1k", tmp_path)
    build(tmp_path, ["n01443537"])
    (tmp_path / "labels.csv").write_text("a file beside the folders is no class")
    assert len(ImageNetFolder(tmp_path, SMALL)) == 2
    (tmp_path / "tench").mkdir()
    with pytest.raises(DataError, match="no ImageNet-1k synset: tench;"):
        load_data(SMALL, "imagenet-1k", tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_image_is_named(tmp_path: Path, workers: int) -> None:
    build(tmp_path, ["n01440764"])
    (tmp_path / "n01440764" / "bad.jpg").write_bytes(b"no image")
    loader = load_data(SMALL, "imagenet-1k", tmp_path, workers=workers)
    with pytest.raises(DataError, match=r"bad\.jpg can't be read"):
        list(loader)
