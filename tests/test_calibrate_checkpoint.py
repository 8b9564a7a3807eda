"""``qzoo calibrate``: from a name to a checkpoint folder, by a given recipe or the best one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from test_build import build

import qzoo
from qzoo import calibrate_checkpoint as command
from qzoo import hub
from qzoo.cards import card
from qzoo.cli import main
from qzoo.config import read_config
from qzoo.data import load_data
from qzoo.errors import UnknownModelError

module = sys.modules["qzoo.build_plan"]
NAME = "resnet20.fmnist-w8a8"


@pytest.fixture(autouse=True)
def small_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with a float resnet20 of random weights, and test images in place of the training images."""
    store = tmp_path / "model_cards"
    store.mkdir()
    monkeypatch.setattr(hub, "EMBEDDED", store)
    monkeypatch.setattr(hub, "pins", dict)
    torch.manual_seed(0)
    qzoo.save_pretrained(qzoo.create_model("resnet20.fmnist"), store / "resnet20.fmnist")

    def load(*args, split: str = "test", **kwargs):
        return load_data(*args, **kwargs)

    monkeypatch.setattr(module, "load_data", load)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "load_data", load)
    return store


def test_command_equals_build_but_for_the_figures(small_world: Path, capsys: pytest.CaptureFixture) -> None:
    out = small_world / "here"
    flags = ["--method", "mse", "--rounding", "learned"]
    assert main(["calibrate", NAME, "--subset", "0:32", *flags, "--out", str(out), "-q"]) == 0
    assert f"mse + learned: {out}" in capsys.readouterr().out
    built = build(
        NAME,
        out=small_world / NAME,
        method="mse",
        rounding="learned",
        calibration_subset="0:32",
        evaluation_subset="100:110",
        progress=False,
    )
    assert (out / "model.safetensors").read_bytes() == (built / "model.safetensors").read_bytes()
    assert read_config(out).calibration == read_config(built).calibration
    assert not read_config(out).metrics


def test_best_recipe_is_recorded_and_repeated(
    small_world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from qzoo.ptq import Recipe, recipe

    few = (Recipe(method="max"), Recipe(method="max", bias_correction="analytic"))
    monkeypatch.setattr(
        recipe.best_recipe, "__kwdefaults__", {**recipe.best_recipe.__kwdefaults__, "recipes": few}
    )
    out = small_world / "here"
    assert main(["calibrate", NAME, "--subset", "0:32", "--recipe", "best", "--out", str(out), "-q"]) == 0
    text = capsys.readouterr().out
    assert "compared on 8 images that no recipe had seen; applied with 32" in text
    made = read_config(out).calibration
    assert made is not None
    assert (made.recipe, made.held_back, made.images) == ("best", 8, 32)
    assert {c.method for c in made.candidates} == {str(r) for r in few}
    values = {"calibration_subset": "0:32", "evaluation_subset": "100:110", "progress": False}
    built = build(NAME, out=small_world / NAME, recipe="best", **values)
    before = (built / "model.safetensors").read_bytes()
    assert before == (out / "model.safetensors").read_bytes()
    assert "--recipe best" in card(read_config(built))
    build(NAME, out=built, progress=False)
    assert read_config(built).calibration == made
    assert (built / "model.safetensors").read_bytes() == before


def test_without_data(small_world: Path) -> None:
    values = {"evaluation_subset": "100:110", "calibration_subset": "0:32", "progress": False}
    built = build(NAME, out=small_world / NAME, method="batchnorm", bias_correction="analytic", **values)
    made = read_config(built).calibration
    assert made is not None
    assert (made.method, made.images, made.data, made.bias_correction) == ("batchnorm", 0, "none", "analytic")
    text = card(read_config(built))
    assert "without data: from the statistics in the BatchNorm layers" in text
    assert "--method batchnorm --bias-correction analytic" in text


def test_contradictions_and_other_names(small_world: Path, capsys: pytest.CaptureFixture) -> None:
    argv = ["calibrate", NAME, "--recipe", "best", "--method", "max", "--out", str(small_world / "x")]
    assert main(argv) == 2
    assert "--recipe best chooses method itself" in capsys.readouterr().err
    with pytest.raises(ValueError, match="recipe='best' chooses rounding itself"):
        build(NAME, recipe="best", rounding="learned")
    with pytest.raises(UnknownModelError, match="give a scheme"):
        command.calibrate_checkpoint("resnet20.fmnist", out=small_world / "x")
    assert not (small_world / "x").exists()
