"""Parts of data sets: what is calibrated on, trained on and measured on share no image."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from qzoo.config import Arguments, Config
from qzoo.data.image_folder import ImageFolder
from qzoo.errors import CheckpointError, DataError
from qzoo.pipeline.parts import (
    Images,
    calibration_images,
    evaluation_images,
    made_on,
    measured_images,
    training_images,
)
from qzoo.zoo.request import new_config


def config(labels: str = "imagenet-1k", classes: int = 1) -> Config:
    return dataclasses.replace(
        new_config("resnet18.tv_in1k-w8a8"), labels=labels, arguments=Arguments(classes, 3)
    )


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
    assert evaluation_images(config(), flat, None, calibration_images(config(), flat, "5:8")).subset == "0:5"
    with pytest.raises(DataError, match=r"no images are left to measure on: of .*0:8 by calibration"):
        evaluation_images(config(), flat, None, calibration_images(config(), flat, ":"))
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


# ---- what a model was made on ----


def write(folder: Path, first: int, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        Image.new("RGB", (8, 8), (i, first, 0)).save(folder / f"{i}.png")


def trained_on(folder: Path) -> tuple[Config, set[str]]:
    """A model that was trained on a folder by default, and the contents of the images."""
    before = config("folders")
    images = training_images(before, folder, None)
    trained = made_on(before, folder, images, "training")
    assert Config.from_json(trained.to_json()) == trained
    return trained, contents(folder, images)


def contents(folder: Path, images: Images) -> set[str]:
    files = ImageFolder(folder, config().preprocessing).files
    start, stop = map(int, images.subset.split(":"))
    assert images.count == stop - start
    return {path.read_bytes().hex() for path, _ in files[start:stop]}


def test_what_is_made_of_a_model_keeps_to_its_split(tmp_path: Path) -> None:
    write(tmp_path / "data" / "cat", 0, 100)
    trained, used = trained_on(tmp_path / "data")
    assert len(used) == 80
    images = calibration_images(trained, tmp_path / "data", None)
    assert contents(tmp_path / "data", images) < used
    assert training_images(trained, tmp_path / "data", None).subset == "0:80"
    assert evaluation_images(trained, tmp_path / "data", None, images).subset == "80:100"
    with pytest.raises(DataError, match="0:80 for training and 70:90 for evaluation share images"):
        evaluation_images(trained, tmp_path / "data", "70:90", images)
    chosen, said = measured_images(trained, tmp_path / "data", None)
    assert (chosen.subset, said) == ("80:100", "80 images that it was made on are left out")
    chosen, said = measured_images(trained, tmp_path / "data", "60:100")
    assert (chosen.count, said) == (40, "20 of these 40 images were used in its training")
    assert measured_images(trained, tmp_path / "data", None, first=10)[0].subset == "80:100"
    calibrated = made_on(trained, tmp_path / "data", images, "calibration")
    assert (
        measured_images(calibrated, tmp_path / "data", None)[0]
        == measured_images(trained, tmp_path / "data", None)[0]
    )


def test_the_folder_is_recognized_when_it_is_moved_and_has_grown(tmp_path: Path) -> None:
    write(tmp_path / "data" / "cat", 0, 60)
    trained, used = trained_on(tmp_path / "data")
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    write(tmp_path / "elsewhere" / "cat", 60, 60)
    (tmp_path / "elsewhere" / "cat" / "0.png").unlink()
    (tmp_path / "elsewhere" / "cat" / "1.png").unlink()
    chosen, _ = measured_images(trained, tmp_path / "elsewhere", None)
    assert chosen.count >= 12
    assert not contents(tmp_path / "elsewhere", chosen) & used


def test_another_folder_with_the_same_names_is_measured_whole(tmp_path: Path) -> None:
    write(tmp_path / "data" / "cat", 0, 20)
    trained, _ = trained_on(tmp_path / "data")
    other = tmp_path / "other" / "cat"
    other.mkdir(parents=True)
    for i in range(20):
        Image.new("RGB", (8, 8), (i, 0, 77)).save(other / f"{i}.png")
    assert measured_images(trained, tmp_path / "other", None) == (
        Images("other (20 images)", "test", "0:20", 20),
        "",
    )


def test_folders_of_other_classes_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "data" / "cat", 0, 20)
    trained, _ = trained_on(tmp_path / "data")
    assert trained.classes == ("cat",)
    (tmp_path / "data" / "cat").rename(tmp_path / "data" / "dog")
    with pytest.raises(DataError, match=r"other classes than resnet18.*\(cat, dog in one only\)"):
        measured_images(trained, tmp_path / "data", None)


def test_splits_of_a_folder_and_of_a_set_need_no_cut(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train" / "cat", 0, 20)
    write(tmp_path / "data" / "val" / "cat", 30, 10)
    before = config("folders")
    images = training_images(before, tmp_path / "data", None)
    trained = made_on(before, tmp_path / "data", images, "training")
    assert measured_images(trained, tmp_path / "data", None)[0].subset == "0:10"
    assert measured_images(trained, tmp_path / "data" / "val", None)[0].subset == "0:10"
    with pytest.raises(DataError, match="no images are left"):
        measured_images(trained, tmp_path / "data" / "train", None)
    assert measured_images(trained, tmp_path / "data" / "train", ":")[1].startswith("20 of these 20")
    fashion = config("fashion-mnist")
    assert made_on(fashion, None, training_images(fashion, None, None), "training") == fashion
    assert measured_images(fashion, None, None) == (Images("Fashion-MNIST test", "test", "0:", 10_000), "")


@pytest.mark.parametrize(
    "change",
    [
        {"use": "testing"},
        {"first": "0"},
        {"last": "F" * 16},
        {"images": 0},
        {"samples": {}},
        {"samples": {"x": "0" * 16}},
        {"samples": {f"{i:016x}": "0" * 16 for i in range(17)}},
    ],
)
def test_a_config_with_a_wrong_record_is_refused(tmp_path: Path, change: dict) -> None:
    write(tmp_path / "data" / "cat", 0, 20)
    values = json.loads(trained_on(tmp_path / "data")[0].to_json())
    values["seen"][0] |= change
    with pytest.raises(CheckpointError, match=r"config\.json: seen\[0\]"):
        Config.from_json(json.dumps(values))
