"""Parts of data sets: what is calibrated on, trained on and measured on share no image."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from PIL import Image

from qzoo.config import Config
from qzoo.errors import DataError
from qzoo.pipeline.parts import Images, calibration_images, evaluation_images, training_images
from qzoo.zoo.create import new_config


def config(labels: str = "imagenet-1k") -> Config:
    return dataclasses.replace(new_config("resnet18.tv_in1k-w8a8"), labels=labels)


def fill(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    fill(tmp_path / "data" / "n01440764", 8)
    return tmp_path / "data"


def test_one_folder_is_cut_in_two(flat: Path) -> None:
    images = calibration_images(config(), flat, None)
    assert images == Images("ImageNet-1k, data (8 images)", "test", "0:2", 2)
    assert evaluation_images(config(), flat, None, images).subset == "2:8"
    assert training_images(config(), flat, None).subset == "0:6"
    chosen = calibration_images(config(), flat, "4:8")
    assert evaluation_images(config(), flat, ":4", chosen).count == 4
    for part in ("3:8", ":"):
        with pytest.raises(DataError, match="share images"):
            evaluation_images(config(), flat, part, calibration_images(config(), flat, "0:4"))
    with pytest.raises(DataError, match="no images are left"):
        evaluation_images(config(), flat, None, calibration_images(config(), flat, "4:8"))
    with pytest.raises(DataError, match="--data"):
        calibration_images(config(), None, None)


def test_folders_of_splits(tmp_path: Path) -> None:
    fill(tmp_path / "pets" / "train" / "cat", 5)
    fill(tmp_path / "pets" / "val" / "cat", 3)
    train = training_images(config("folders"), tmp_path / "pets", None)
    assert train == Images("pets train (5 images)", "train", "0:5", 5)
    test = evaluation_images(config("folders"), tmp_path / "pets", None, train)
    assert test == Images("pets val (3 images)", "test", "0:3", 3)


@pytest.mark.parametrize(("labels", "count"), [("fashion-mnist", 60_000), ("cifar-100", 50_000)])
def test_sets_with_a_training_split(labels: str, count: int) -> None:
    images = calibration_images(config(labels), None, None)
    assert (images.split, images.subset) == ("train", "0:512")
    assert training_images(config(labels), None, None).count == count
    assert evaluation_images(config(labels), None, None, images).subset == "0:10000"


def test_labels_without_images() -> None:
    with pytest.raises(DataError, match="no data set is known for the labels ''"):
        training_images(config(""), None, None)
