"""``qzoo calibrate``: from a name to a checkpoint folder, by a given recipe or the best one."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from pathlib import Path

import pytest
import torch
from test_build import build
from torch import nn

import qzoo
from qzoo.__main__ import main
from qzoo.cards.card import card
from qzoo.config import Config, read_config
from qzoo.errors import UnknownModelError
from qzoo.models.vit import VisionTransformer
from qzoo.pipeline import calibrate as command
from qzoo.pipeline.parts import Images
from qzoo.pipeline.plan import Job, Plan, plan_of
from qzoo.ptq import Recipe
from qzoo.ptq.ranges import Calibration
from qzoo.quantizers import quantizers, quantizers_off
from qzoo.zoo.request import new_config

parts = import_module("qzoo.pipeline.parts")
NAME = "resnet20.fmnist-w8a8"


pytestmark = pytest.mark.usefixtures("small_world")


def test_command_equals_build_but_for_the_figures(small_world: Path, capsys: pytest.CaptureFixture) -> None:
    out = small_world / "here"
    flags = ["--method", "mse", "--rounding", "learned"]
    assert main(["calibrate", NAME, "--subset", "0:32", *flags, "--out", str(out), "-q"]) == 0
    assert "recipe  mse + learned, on 32 images" in capsys.readouterr().out
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
    from qzoo.ptq import Recipe
    from qzoo.ptq import apply as recipe

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
    assert "recipe='best' chooses method itself" in capsys.readouterr().err
    with pytest.raises(ValueError, match="recipe='best' chooses rounding itself"):
        build(NAME, recipe="best", rounding="learned")
    with pytest.raises(UnknownModelError, match="give a scheme"):
        command.calibrate_checkpoint("resnet20.fmnist", job=Job(out=small_world / "x"))
    assert not (small_world / "x").exists()


def test_numbers_of_the_methods_and_bits_of_layers_are_recorded_and_repeated(
    small_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("qzoo.pipeline.build"), "measure", lambda *args, **options: ())
    name, out = "resnet20.fmnist-w4a8", small_world / "here"
    values = "--method percentile --percentile 99.5 --edge-bits 8"
    bits = "--layer-bits layer1.0.conv1=6 --target openvino"
    flags = [*values.split(), *bits.split()]
    assert main(["calibrate", name, "--subset", "0:32", *flags, "--out", str(out), "-q"]) == 0
    config = read_config(out)
    assert config.calibration is not None
    assert config.scheme is not None
    assert config.calibration.percentile == 99.5
    assert (config.scheme.edge_bits, config.scheme.layers) == (8, (("layer1.0.conv1", 6),))
    assert f"{values} {bits} --rounding nearest`" in card(config)
    assert config.target == "openvino"
    loaded = qzoo.load_pretrained(out)  # with the placement that it was calibrated for
    off = {q.role for q in quantizers(loaded).values() if q._disabled}
    assert off == {"branch", "output"}
    weights = (out / "model.safetensors").read_bytes()
    built = build(name, out=out, evaluation_subset="100:110", progress=False)  # by the folder's own config
    assert (built / "model.safetensors").read_bytes() == weights
    assert read_config(built).calibration == config.calibration
    flags = ["--mixed-precision", "1", "--layer-bits", "fc=8"]
    assert main(["calibrate", name, *flags, "--out", str(small_world / "x")]) == 2


def test_the_percentile_that_auto_tried_is_recorded(small_world: Path) -> None:
    out = small_world / "here"
    argv = ["calibrate", NAME, "--subset", "0:32", "--percentile", "60", "--out", str(out), "-q"]
    assert main(argv) == 0
    made = read_config(out).calibration
    assert made is not None
    assert made.method != "percentile"  # which cuts far too much
    assert made.percentile == 60
    assert f"method *{made.method}*," in card(read_config(out))
    assert " --percentile 60`" in card(read_config(out))
    again = plan_of(NAME, out).recipe
    assert (again.method, again.percentile) == ("auto", 60)


def test_alpha_is_recorded_and_repeated(tmp_path: Path) -> None:
    recipe = Recipe(method="max", smooth=True, alpha=0.7)
    made = command.record(Calibration("max", 32), Images("some", "val", "0:32", 32), recipe, None)
    config = dataclasses.replace(new_config("deit_tiny_patch16_224.fb_in1k-w8a8"), calibration=made)
    assert Config.from_json(config.to_json()) == config
    (tmp_path / "config.json").write_text(config.to_json())
    assert plan_of(config.name, tmp_path).recipe == recipe
    assert "--method max --smooth --alpha 0.7`" in card(config)
    assert "SmoothQuant (alpha 0.7)" in card(config)


def test_a_searched_alpha_is_recorded_and_searched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VisionTransformer.__init__.__kwdefaults__, "depth", 1)  # type: ignore[arg-type]
    name, image = "deit_tiny_patch16_224.fb_in1k-w8a8", torch.rand(3, 3, 224, 224)
    model = qzoo.create_model("deit_tiny_patch16_224", quantize="w8a8", num_classes=10)
    images = Images("some", "val", "0:3", 3)
    plan = Plan().changed({"smooth": True, "alpha": "auto", "method": "max"})
    assert plan.flags() == {"--method": ["max"], "--smooth": [], "--alpha": ["auto"]}
    done = command.quantize_to(tmp_path, model, [image], images, plan, progress=False)
    made = read_config(tmp_path).calibration
    assert made is not None
    assert (made.recipe, made.held_back, len(made.candidates)) == ("alpha", 1, 4)
    assert (made.smooth, made.alpha) == (done.recipe.smooth, done.recipe.alpha)
    assert made.candidates[0].method == str(done.recipe) == str(made.applied())
    assert read_config(tmp_path).plan.recipe == plan.recipe
    assert not read_config(tmp_path).plan.best
    assert "--smooth --alpha auto" in card(dataclasses.replace(read_config(tmp_path), name=name))


def test_a_relu_in_place_of_relu6_is_recorded_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = qzoo.create_model("mobilenet_v2.tv_in1k-w8a8", target="onnxruntime")
    image, recipe = torch.rand(2, 3, 64, 64), Recipe(equalize=True, method="max")
    with torch.no_grad(), quantizers_off(model):
        for _ in range(3):
            model.train()(image)  # settles the BatchNorms: hardly a value is above 6
    model.eval()
    done = command.quantize_to(
        tmp_path, model, [image], Images("some", "val", "0:1", 1), Plan(recipe), progress=False
    )
    assert done.recipe == recipe
    config = read_config(tmp_path)
    assert config.plain_relu
    assert Config.from_json(config.to_json()) == config
    assert "cross-layer equalization with a ReLU in place of every ReLU6" in card(config)
    loaded = qzoo.load_pretrained(tmp_path)
    assert not any(isinstance(m, nn.ReLU6) for m in loaded.modules())
    with torch.no_grad():
        torch.testing.assert_close(loaded(image), model(image))
