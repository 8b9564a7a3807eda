"""A stream in place of a folder, from calibration to evaluation."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import qzoo
from qzoo.__main__ import main
from qzoo.config import config_of, read_config
from qzoo.data.fashion_mnist import fashion_mnist
from qzoo.data.sets import data_set
from qzoo.pipeline.calibrate import calibrate_checkpoint
from qzoo.pipeline.parts import evaluation_images, measured_images, training_images
from qzoo.pipeline.plan import Job, Plan


def first_images(folder: Path, count: int) -> str:
    """The name of a stream of so many of Fashion-MNIST's test images."""
    images, labels = fashion_mnist("test")
    np.savez(folder / "some.npz", images=images[:count].numpy()[:, 0], labels=labels[:count].numpy())
    return f"npz:{folder / 'some.npz'}"


def test_evaluation_leaves_out_what_a_stream_was_calibrated_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = first_images(tmp_path, 96), tmp_path / "out"
    job = Job(data=data, out=out, progress=False)
    calibrate_checkpoint("resnet20.fmnist-w8a8", Plan(calibration_subset=":24"), job)
    model = qzoo.load_pretrained(out)
    record = config_of(model).calibration
    assert record is not None
    assert (record.subset, record.images, record.skipped) == ("0:24", 24, 0)
    chosen, said = measured_images(config_of(model), data, None)
    assert (chosen.subset, said) == ("24:96", "24 images that it was made on are left out")
    assert main(["evaluate", str(out), "--data", data]) == 0
    assert "72 images (24 images that it was made on are left out)" in capsys.readouterr().out
    part = measured_images(config_of(model), data, "24:96")[0].load(config_of(model), data)
    expected = qzoo.data.load_data(config_of(model).preprocessing, "fashion-mnist", subset="24:96")
    torch.testing.assert_close(
        torch.cat([x for x, _ in part]), torch.cat([x for x, _ in expected]), rtol=0, atol=1e-6
    )
    with pytest.raises(qzoo.errors.DataError, match="share images"):
        evaluation_images(config_of(model), data, "0:30", chosen)


def test_training_on_a_stream_is_kept_apart_from_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One split: four fifths to train on, as of a folder; and what is made of the result keeps to the same cut."""
    data, out = first_images(tmp_path, 80), tmp_path / "out"
    command = ["train", "resnet20.fmnist", "--data", data, "--epochs", "1", "--batch-size", "32", "-q"]
    assert main([*command, "--runs", str(tmp_path / "runs"), "--out", str(out)]) == 0
    config = qzoo.load_pretrained(out).qzoo_config
    assert (config.training["subset"], config.training["images"]) == ("0:64", 64)
    assert config.metrics[0].subset == "64:80"
    assert f"--data {data}" not in (out / "README.md").read_text()  # a place on this machine
    assert training_images(config, data, None).subset == "0:64"
    chosen, said = measured_images(config, data, None)
    assert (chosen.subset, said) == ("64:80", "64 images that it was made on are left out")
    capsys.readouterr()
    assert main(["evaluate", str(out), "--data", data, "-q"]) == 0
    assert "16 images (64 images that it was made on are left out)" in capsys.readouterr().out
    assert main(["train", "resnet20.fmnist", "--data", "wds:http://localhost/{0..1}.tar", "-q"]) == 2
    assert "--subset" in capsys.readouterr().err


@pytest.fixture
def broken_rows(tmp_path: Path) -> str:
    """48 images, of which the 4th and the 41st do not decode."""
    images, labels = fashion_mnist("test")
    names = data_set("fashion-mnist").class_names
    assert names is not None
    datasets = pytest.importorskip("datasets", reason="needs the extra 'data'")
    stored = []
    for i in range(48):
        file = io.BytesIO()
        Image.fromarray(images[i, 0].numpy()).save(file, "PNG")
        stored.append({"bytes": file.getvalue()[: 60 if i in (3, 40) else None], "path": f"{i}.png"})
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names()))}
    )
    rows = datasets.Dataset.from_dict({"image": stored, "label": labels[:48].tolist()}, features)
    rows.to_parquet(tmp_path / "some.parquet")
    return f"parquet:{tmp_path / 'some.parquet'}"


def test_training_on_broken_images_takes_others_of_the_batch(
    broken_rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a data set that does not say how many images it has: what is measured on is told when it was read."""
    out, data = tmp_path / "out", f"hfds:{tmp_path}"
    command = ["train", "resnet20.fmnist", "--data", data, "--epochs", "2", "--batch-size", "19"]
    command += ["--subset", ":38", "--runs", str(tmp_path / "runs"), "--out", str(out), "-q"]
    assert main(command) == 2
    assert "image 3 (3.png) can't be read as an image" in capsys.readouterr().err
    assert main([*command, "--skip-broken"]) == 0
    config = read_config(out)
    assert config.training is not None
    assert (config.training["subset"], config.training["images"], config.training["skipped"]) == (
        "0:38",
        38,
        1,
    )
    assert [(row.subset, row.images, row.skipped) for row in config.metrics] == [("38:48", 9, 1)]
    assert "--batch-size 19" in (card := (out / "README.md").read_text())
    assert "--skip-broken" in card


def test_the_commands_leave_broken_images_out_and_count_them(
    broken_rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = broken_rows, tmp_path / "out"
    command = ["build", "resnet20.fmnist-w8a8", "--data", data, "--calibration-subset", ":12"]
    command += ["--method", "max", "--no-onnx", "-q"]
    places = ["--runs", str(tmp_path / "runs"), "--out", str(out)]
    assert main([*command, *places]) == 2
    assert "image 3 (3.png) can't be read as an image" in capsys.readouterr().err
    assert main([*command, "--skip-broken", *places]) == 0
    config = read_config(out)
    assert config.calibration is not None
    assert (config.calibration.subset, config.calibration.images, config.calibration.skipped) == (
        "0:12",
        11,
        1,
    )
    assert [(row.images, row.skipped) for row in config.metrics] == [(35, 1)] * len(config.metrics)
    card = (out / "README.md").read_text()
    assert "images 0:12, without 1 that does not decode" in card
    assert "images 12:48, without 1 that does not decode" in card
    assert "--data DIR --skip-broken" in card
    capsys.readouterr()
    for name, broken, count in (("evaluate", 40, 1), ("sensitivity", 40, 1), ("inspect", 3, 2)):
        command = [name, str(out), "--data", data, "-q"]
        assert main(command) == 2
        assert f"image {broken} ({broken}.png)" in capsys.readouterr().err
        assert main([*command, "--skip-broken"]) == 0
        assert f"{count} images that do not decode" in capsys.readouterr().out
