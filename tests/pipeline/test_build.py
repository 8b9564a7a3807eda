"""One call from a name to a checkpoint, on real images with small numbers."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import small_data
import torch

import qzoo
import qzoo.pipeline.tune
from qzoo.__main__ import main
from qzoo.cards.card import card
from qzoo.config import CalibrationRecord, config_of, read_config
from qzoo.data import load_data
from qzoo.distributed import Group
from qzoo.errors import CheckpointError, DataError, UnknownModelError
from qzoo.pipeline import steps
from qzoo.pipeline.build import build as build_checkpoint
from qzoo.pipeline.plan import BuildJob, BuildOptions, plan_of
from qzoo.pipeline.train_job import TrainJob
from qzoo.training.loop import TrainOptions
from qzoo.zoo.request import new_config

build_module = import_module("qzoo.pipeline.build")  # qzoo.build is the function
NAME = "resnet20.fmnist-w8a8"
SMALL = {"calibration_subset": "0:32", "evaluation_subset": "100:164", "progress": False}


@pytest.fixture(autouse=True)
def same_code(small_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is edited meanwhile."""
    monkeypatch.setattr(steps, "code_digest", lambda: "code")


def build(name: str, report: Callable[[str], None] | None = None, **given: Any) -> Path:
    """``qzoo.build`` with the fields of its options and its job by name."""
    names = BuildOptions.__annotations__
    options = BuildOptions(**{key: value for key, value in given.items() if key in names})  # type: ignore[typeddict-item]
    job = BuildJob(**{key: value for key, value in given.items() if key not in names})
    return build_checkpoint(name, options, job, report=report)


def test_build_makes_a_checkpoint_with_measured_figures(small_world: Path) -> None:
    folder = build(NAME, out=small_world / NAME, method="max", **SMALL)
    config = read_config(folder)
    assert config.calibration is not None
    assert (config.calibration.method, config.calibration.images) == ("max", 32)
    assert config.calibration.subset == "0:32"
    assert config.float_source is not None
    assert config.float_source.source == "qzoo:resnet20.fmnist"
    rows = {(row.runtime, row.precision, row.target): row for row in config.metrics}
    expected = [("torch", "float", None), ("torch", "w8a8", "onnxruntime"), ("torch", "w8a8", "tensorrt")]
    assert list(rows)[:3] == expected
    assert ("onnxruntime", "w8a8", "onnxruntime") in rows  # the test extra brings ONNX Runtime
    assert all(row.images == 64 and row.subset == "100:164" for row in config.metrics)
    # Every figure is what an evaluation of the loaded checkpoint gives.
    loader = load_data(config.preprocessing, config.labels, subset="100:164")
    reference = qzoo.resnet20(pretrained=True)
    for target in ("onnxruntime", "tensorrt"):
        model = qzoo.create_model(NAME, pretrained=True, target=target)
        again = qzoo.evaluate(model, loader, reference=reference, progress=False)
        row = rows["torch", "w8a8", target]
        assert (again.top1, again.top5, again.agreement) == (row.top1, row.top5, row.agreement)
        assert again.loss == pytest.approx(row.loss, rel=1e-5)
        assert again.sqnr_db == pytest.approx(row.sqnr_db, rel=1e-4)
    assert rows["onnxruntime", "w8a8", "onnxruntime"].agreement >= 90
    assert (folder / "README.md").read_text() == card(config)


def test_the_same_call_makes_the_same_files(small_world: Path) -> None:
    first = build(NAME, out=small_world / NAME, method="auto", **SMALL)
    before = contents(first)
    assert before.keys() == {"config.json", "model.safetensors", "README.md", "onnx/model_int8.onnx"}
    config = read_config(first)
    assert config.calibration is not None
    assert {c.method for c in config.calibration.candidates} == {"max", "percentile", "mse", "entropy"}
    # The folder's own config says how it is made.
    said: list[str] = []
    build(NAME, out=first, again=True, report=said.append, progress=False)
    assert not any("done before" in line for line in said)
    assert contents(first) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_names_that_are_not_built_by_calibration() -> None:
    with pytest.raises(UnknownModelError, match="give a scheme"):
        build("resnet20.fmnist")
    with pytest.raises(UnknownModelError, match="no weights with tag 'fm' "):  # and not: no data set is known
        build("resnet20.fm-w8a8", data="nowhere")


def test_a_folder_with_another_checkpoint_is_not_overwritten(small_world: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds resnet20.fmnist;"):
        build(NAME, out=small_world / "resnet20.fmnist", **SMALL)


def test_edge_bits_are_kept_and_repeated(small_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What counts here is not measured.
    monkeypatch.setattr(build_module, "measure", lambda *args, **options: ())
    name = "resnet20.fmnist-w4a8"
    layers = (("layer1.0.conv1", 6),)
    made = {"edge_bits": 8, "layer_bits": layers, "onnx": (), **SMALL}
    folder = build(name, out=small_world / name, method="max", **made)
    config = read_config(folder)
    assert config.scheme is not None
    assert config.scheme.edge_bits == 8
    model = qzoo.create_model(name, pretrained=True)
    bits = {
        n: m.weight_quantizer.num_bits for n, m in model.named_modules() if hasattr(m, "weight_quantizer")
    }
    assert (bits.pop("conv1"), bits.pop("fc"), bits.pop("layer1.0.conv1")) == (8, 8, 6)
    assert set(bits.values()) == {4}
    assert "The first and the last layer have 8." in card(config)
    assert "Mixed precision: 6 bits have `layer1.0.conv1`." in card(config)
    assert "--edge-bits 8 --layer-bits layer1.0.conv1=6`" in card(config)
    before = (folder / "model.safetensors").read_bytes()
    build(name, out=folder, calibration_subset="0:32", onnx=(), again=True, progress=False)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_second_call_repeats_nothing_and_a_changed_argument_only_what_depends_on_it(
    small_world: Path,
) -> None:
    said: list[str] = []
    arguments = {**SMALL, "method": "max", "out": small_world / NAME, "report": said.append}
    folder = build(NAME, **arguments)
    before = contents(folder)
    done = list(said)
    assert [line.partition(" ")[0] for line in done] == ["calibrate", "export"] + ["evaluate"] * 4
    said.clear()
    build(NAME, **arguments)
    assert said == [f"{step}: done before" for step in done]
    assert contents(folder) == before
    said.clear()
    build(NAME, **{**arguments, "evaluation_subset": "100:132"})
    assert said == [f"{step}: done before" for step in done[:2]] + done[2:]
    assert read_config(folder).metrics[0].images == 32
    said.clear()
    (Path("runs") / NAME / "checkpoint" / "model.safetensors").write_bytes(b"altered")
    build(NAME, **{**arguments, "evaluation_subset": "100:132"})
    assert said == [done[0]] + [f"{step}: done before" for step in done[1:]]  # the same weights came out


def test_onnx_files_are_those_asked_for(small_world: Path) -> None:
    arguments = {**SMALL, "method": "max", "out": small_world / NAME}
    folder = build(NAME, onnx=("tensorrt", "openvino"), **arguments)
    assert {p.name for p in (folder / "onnx").iterdir()} == {
        "model_int8_tensorrt.onnx",
        "model_int8_openvino.onnx",
    }
    assert read_config(folder).files.keys() > {"onnx/model_int8_tensorrt.onnx"}
    values = json.loads((folder / "config.json").read_text())
    (folder / "notes.txt").write_text("mine")
    (small_world / "outside").mkdir()
    (small_world / "outside" / "model_int8_tensorrt.onnx").write_text("somebody's")
    (folder / "onnx").rename(folder / "other")
    (folder / "onnx").symlink_to(small_world / "outside")
    values["files"]["notes.txt"] = "0" * 64
    (folder / "config.json").write_text(json.dumps(values))
    build(NAME, onnx=(), **arguments)  # what an old config.json lists is removed only where it is build's own
    assert (small_world / "outside" / "model_int8_tensorrt.onnx").read_text() == "somebody's"
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(CheckpointError, match="is a link out of the folder"):
        build(NAME, onnx=("tensorrt",), **arguments)
    assert (small_world / "outside" / "model_int8_tensorrt.onnx").read_text() == "somebody's"
    (folder / "onnx").unlink()
    (folder / "other").rename(folder / "onnx")
    (folder / "notes.txt").unlink()
    (folder / "config.json").write_text(json.dumps(values))
    build(NAME, onnx=(), **arguments)
    assert contents(folder).keys() == {"config.json", "model.safetensors", "README.md"}
    with pytest.raises(ValueError, match="target"):
        build(NAME, onnx=("cpu",), **arguments)


KILLED = """
import os, pathlib, signal, sys
import qzoo
from small_data import shallow_resnet20
from qzoo.pipeline import parts, steps
from qzoo.zoo import hub
from qzoo.pipeline.build import build
from qzoo.pipeline.plan import BuildJob, BuildOptions, plan_of
from qzoo.data import load_data

hub.EMBEDDED = pathlib.Path(sys.argv[1])
steps.code_digest = lambda: "code"
qzoo.registry._entries["resnet20"] = shallow_resnet20()
parts.load_data = lambda *args, split="test", **rest: load_data(*args, **rest)
lines = 0

def report(line):
    global lines
    lines += 1
    if lines == 4:
        os.kill(os.getpid(), signal.SIGKILL)  # at the start of the fourth step
    print(line, flush=True)

options = BuildOptions(method="max", calibration_subset="0:32", evaluation_subset="100:164")
build("resnet20.fmnist-w8a8", options, BuildJob(out="card", progress=False), report=report)
"""


def test_killed_and_called_again_it_ends_as_if_it_had_not_been(
    small_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = str(Path(small_data.__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])}
    argv = [sys.executable, "-c", KILLED, small_world]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    before = done.stdout.splitlines()
    assert before == ["calibrate", "export for onnxruntime", "evaluate float"]
    assert not Path("card").exists()
    left = Path("runs") / NAME / ".checkpoint.left.tmp"
    left.mkdir()
    said: list[str] = []
    arguments = {**SMALL, "method": "max", "report": said.append}
    folder = build(NAME, out="card", **arguments)
    assert not left.exists()
    assert said[:3] == [f"{line}: done before" for line in before]
    assert len(said) == 6
    assert not any("done before" in line for line in said[3:])
    assert contents(folder) == contents(build(NAME, out="other", again=True, **arguments))


def test_the_recipe_of_the_name_is_the_default_and_arguments_override_it(
    small_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_module, "measure", lambda *args, **options: ())
    config = new_config(NAME)
    calibration = CalibrationRecord(
        "percentile", "Fashion-MNIST train", "0:16", 16, bias_correction="analytic"
    )
    for folder in ("one", "two"):  # what a folder's config says is its recipe, also before there are weights
        Path(folder).mkdir()
        Path(folder, "config.json").write_text(dataclasses.replace(config, calibration=calibration).to_json())
    made = read_config(build(NAME, out="one", onnx=(), progress=False)).calibration
    assert made is not None
    assert (made.method, made.bias_correction, made.subset) == ("percentile", "analytic", "0:16")
    made = read_config(build(NAME, out="two", method="max", onnx=(), progress=False)).calibration
    assert made is not None
    assert (made.method, made.bias_correction, made.subset) == ("max", "analytic", "0:16")


def test_a_trained_checkpoint_is_built_by_its_recipe(
    small_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "resnet20.fmnist-w4a4_qat"
    with pytest.raises(CheckpointError, match=r"the name alone does not say how to train.*qzoo train"):
        build(name, progress=False)
    training = {
        "epochs": 2,
        "lr": 0.25,
        "method": "lsq",
        "target": "onnxruntime",
        "batch_size": 7,
        "threads": 1,
    }
    Path("tuned").mkdir()
    Path("tuned", "config.json").write_text(
        dataclasses.replace(new_config(name), training=training).to_json()
    )
    with pytest.raises(ValueError, match="method does not apply"):
        build(name, out="tuned", method="max", progress=False)
    asked: list[object] = []

    def tune(
        name: str, options: TrainOptions, job: TrainJob, float_weights: Path | None, group: Group
    ) -> None:
        asked.append((options, job.batch_size, job.workers, group.device.type))
        model = qzoo.create_model(name)
        qzoo.calibrate(model, [torch.randn(4, 1, 28, 28)], progress=False)
        assert job.out is not None
        qzoo.save_pretrained(model, job.out, config=dataclasses.replace(model.qzoo_config, training=training))

    # The training itself has tests of its own.
    monkeypatch.setattr(build_module, "tune_checkpoint", tune)
    for _ in range(2):
        folder = build(name, out="tuned", workers=3, progress=False)
    assert asked == [(TrainOptions(epochs=2, lr=0.25, method="lsq"), 7, 3, "cpu")]
    assert contents(folder).keys() == {
        "config.json",
        "model.safetensors",
        "README.md",
        "onnx/model_int8.onnx",
    }


def test_the_command_gives_what_its_options_say(
    small_world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = ["--calibration-subset", "0:32", "--evaluation-subset", "100:164"]
    flags = ["--method", "max", "--no-onnx", "--layer-bits", "fc=6", "--device", "auto", "--workers", "0"]
    assert main(["build", NAME, *images, *flags, "--out", "here", "-q"]) == 0
    assert Path(capsys.readouterr().out.strip()) == Path("here").absolute()
    one = contents(Path("here"))
    assert one == contents(build(NAME, out="there", method="max", onnx=(), layer_bits=(("fc", 6),), **SMALL))
    made = read_config("here")
    assert made.scheme is not None
    assert made.scheme.layers == (("fc", 6),)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give a NAME or --all"),
        ([NAME, "--all"], "give a NAME or --all"),
        ([NAME, "--qat"], "--qat is for --all"),
        (["--all", "--method", "max", "--float", "x"], "leave out method, float_weights"),
        ([NAME, "--layer-bits", "fc"], "LAYER=BITS"),
        ([NAME, "--recipe", "best", "--method", "max"], "recipe='best' chooses method itself"),
    ],
)
def test_arguments_that_contradict_each_other(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", *argv]) == 2
    assert message in capsys.readouterr().err


def test_build_without_data_calibrates_on_procedural_images_and_measures_nothing(small_world: Path) -> None:
    name = "resnet20.pets-w8a8"  # whose images would be in a folder
    model = qzoo.create_model("resnet20.fmnist")
    config = dataclasses.replace(config_of(model), name="resnet20.pets", labels="folders")
    exact = qzoo.save_pretrained(model, small_world / "resnet20.pets", config=config)
    folder = build(name, out=small_world.parent / name, progress=False)
    made = read_config(folder)
    record = made.calibration
    assert record is not None
    assert (record.method, record.bias_correction, record.images) == ("procedural", "analytic", 0)
    assert record.agreement is not None
    assert made.metrics == ()
    assert {"model.safetensors", "onnx/model_int8.onnx"} <= set(made.files)
    text = (folder / "README.md").read_text()
    assert "Calibrated without data, accuracy not measured." in text
    command = f"qzoo build {name} --dataset folders --float resnet20.pets"
    assert f"`{command} --method procedural --bias-correction analytic`" in text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cached = qzoo.create_model(name, pretrained=True)  # the same, by the same recipe
    loaded = qzoo.load_pretrained(folder)
    x = torch.linspace(-1, 2, 28 * 28).reshape(1, 1, 28, 28)
    assert torch.equal(cached(x), loaded(x))
    assert plan_of(name, folder).recipe.method == "auto"  # with images they are looked at
    with pytest.raises(DataError, match="needs images"):
        build(name, out=small_world.parent / name, method="mse", float_weights=exact, progress=False)
