"""Any folder of images against torchvision's ImageFolder, and timm's transforms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from torchvision import datasets

from qzoo.data import Augmentation, ImageFolder, load_data, training_transform
from qzoo.errors import DataError
from qzoo.preprocessing import Preprocessing

PREPROCESSING = Preprocessing((3, 24, 24), 0.8, "bicubic")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("pets"), np.random.default_rng(0)
    for name, count in (("dog", 4), ("cat", 3), ("newt", 2)):
        (folder / name).mkdir()
        for i in range(count):
            pixels = rng.integers(0, 256, (40 + i, 33, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def test_the_same_images_and_classes_as_torchvisions(root: Path) -> None:
    ours, theirs = ImageFolder(root, PREPROCESSING), datasets.ImageFolder(root, PREPROCESSING.transform())
    assert ours.classes == tuple(theirs.classes) == ("cat", "dog", "newt")
    place = {path: i for i, (path, _) in enumerate(theirs.samples)}
    assert len(ours) == len(theirs) == 9
    for i, (path, _) in enumerate(ours.files):
        (image, label), (expected, expected_label) = ours[i], theirs[place[str(path)]]
        assert torch.equal(image, expected)
        assert label == expected_label
    assert [label for _, label in ours.files] != sorted(
        label for _, label in ours.files
    )  # mixed, not by class


def test_parts_share_nothing_and_make_the_whole(root: Path) -> None:
    whole = torch.cat([x for x, _ in load_data(PREPROCESSING, "folders", root)])
    parts = [load_data(PREPROCESSING, "folders", root, subset=part, batch_size=2) for part in (":4", "4:")]
    assert torch.equal(torch.cat([x for part in parts for x, _ in part]), whole)


def test_what_is_no_folder_of_classes(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder with one folder of images a class"):
        ImageFolder(tmp_path / "nowhere", PREPROCESSING)
    with pytest.raises(DataError, match="no folder with one folder of images a class"):
        ImageFolder(root / "cat", PREPROCESSING)
    with pytest.raises(DataError, match="pass data=FOLDER"):
        load_data(PREPROCESSING, "folders")


def test_links_are_followed_once(root: Path, tmp_path: Path) -> None:
    """A walk along loops of links, or along links to links, would not end."""
    (tmp_path / "cat").symlink_to(root / "cat")
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "more").symlink_to(root / "dog")
    ours, theirs = ImageFolder(tmp_path, PREPROCESSING), datasets.ImageFolder(tmp_path)
    assert sorted((str(path), label) for path, label in ours.files) == sorted(theirs.samples)
    for place in (tmp_path, tmp_path / "dog"):
        (tmp_path / "dog" / "loop").symlink_to(place)
        with pytest.raises(DataError, match=f"dog/loop leads to {place} again"):
            ImageFolder(tmp_path, PREPROCESSING)
        (tmp_path / "dog" / "loop").unlink()
    (tmp_path / "dog" / "once more").symlink_to(root / "dog")
    with pytest.raises(DataError, match=r"leads to .*dog/more again"):
        ImageFolder(tmp_path, PREPROCESSING)


def test_a_class_without_images_is_named(root: Path, tmp_path: Path) -> None:
    (tmp_path / "cat").symlink_to(root / "cat")
    (tmp_path / "eel").mkdir()
    (tmp_path / "eel" / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"folders without images \(.*\): eel; fill"):
        ImageFolder(tmp_path, PREPROCESSING)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_transform_is_timms(root: Path, interpolation: str) -> None:
    preprocessing = Preprocessing((3, 24, 24), 0.8, interpolation)
    theirs = timm.data.create_transform(
        (3, 24, 24),
        interpolation=interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        crop_pct=0.8,
    )
    for path in sorted(root.rglob("*.png")):
        image = Image.open(path).convert("RGB")
        assert torch.equal(preprocessing.transform()(image), theirs(image))


def test_training_transform_varies_and_normalizes(root: Path) -> None:
    image = Image.open(next(root.rglob("*.png"))).convert("RGB")
    transform = training_transform(PREPROCESSING, Augmentation(scale=(0.3, 1.0), erase=0.5))
    draws = [transform(image) for _ in range(4)]
    assert all(draw.shape == (3, 24, 24) and draw.dtype == torch.float32 for draw in draws)
    assert not torch.equal(draws[0], draws[1])
    white = Image.new("RGB", (40, 40), (255, 255, 255))
    expected = (1 - torch.tensor(PREPROCESSING.mean)) / torch.tensor(PREPROCESSING.std)
    found = training_transform(PREPROCESSING)(white)
    torch.testing.assert_close(found, expected.view(3, 1, 1).expand(3, 24, 24), rtol=1e-4, atol=1e-4)
    dataset = ImageFolder(
        root, PREPROCESSING, training_transform(PREPROCESSING, Augmentation(policy="rand-m9"))
    )
    assert dataset[0][0].shape == (3, 24, 24)
