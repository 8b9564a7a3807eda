"""Recipes: one for every architecture with public weights, none of them pretrained; building goes on."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import qzoo
from qzoo.config import WEIGHTS, Config, read_config
from qzoo.errors import CheckpointError, HubError
from qzoo.pipeline.build_all import build_all, is_complete
from qzoo.pipeline.plan import BuildJob, how_made, plan_of
from qzoo.pipeline.recipes import recipes
from qzoo.registry import (
    CONVOLUTIONAL,
    DEPTHWISE,
    HYBRID,
    SWISH,
    TRANSFORMER,
    Defaults,
    architecture,
    list_architectures,
    parse_name,
)

ROOT = Path(qzoo.__file__).parent.parent


def test_every_architecture_with_public_weights_has_one() -> None:
    public = {
        arch
        for arch in list_architectures()
        if any(not s.startswith("qzoo:") for w in architecture(arch).weights.values() for s in w.sources)
        if "dinov2" not in arch  # an encoder, whose checkpoint can't be measured by labels
    }
    assert {config.architecture for config in recipes()} == public
    for config in recipes():
        assert Config.from_json(config.to_json()) == config
        assert config.metrics == ()
        assert config.files == {}
        assert config.float_source is not None
        tag = parse_name(config.name).tag or ""
        assert config.float_source.sha256 == architecture(config.architecture).weights[tag].sha256[0]


def test_a_recipe_has_its_familys_settings_and_these_have_a_source() -> None:
    for config in recipes():
        defaults = architecture(config.architecture).family.defaults
        assert config.scheme is not None
        assert config.scheme.affine == defaults.affine
        if config.training is None:
            assert config.plan.recipe == defaults.recipe
    for defaults in (CONVOLUTIONAL, DEPTHWISE, SWISH, TRANSFORMER, HYBRID):
        assert "arXiv:" in defaults.source
        assert "above" not in defaults.source  # each stands by itself: the page orders them by their families
    known = {paper for defaults in (DEPTHWISE, SWISH, TRANSFORMER) for paper in papers(defaults)}
    assert papers(HYBRID) <= known
    assert papers(DEPTHWISE) <= papers(HYBRID)


def papers(defaults: Defaults) -> set[str]:
    return set(re.findall(r"arXiv:[0-9.]+[0-9]", defaults.source))


def test_other_bits_without_a_recipe_are_planned_by_the_family(tmp_path: Path) -> None:
    for name, recipe in (
        ("mobilenet_v3_small.tv_in1k-w4a8", "mse + sequential"),
        ("mobilenet_v3_small.tv_in1k-w4g32a8", "mse + empirical bias correction"),  # groups can't be learned
        ("vit_base_patch16_224.tv_in1k-w4a8", "smooth auto + mse + sequential"),
        ("resnet18.tv_in1k-w4a8", "auto + learned"),
        ("resnet18.tv_in1k-w4g32a8", "auto"),
    ):
        plan = plan_of(name, tmp_path / name)
        assert str(plan.recipe) == recipe
        assert plan.affine is None


def test_settings_are_those_of_the_modules_of_each_network() -> None:
    """Zero points behind SiLU and hard-swish, a search of alpha behind LayerNorms, learned rounding of depthwise."""
    first = {architecture(arch).build.__module__: arch for arch in reversed(list_architectures())}
    assert len(first) > 25
    for arch in first.values():
        with torch.device("meta"):
            modules = list(architecture(arch).build().modules())
        defaults = architecture(arch).family.defaults
        assert defaults.affine == any(isinstance(m, nn.SiLU | nn.Hardswish) for m in modules), arch
        norms = any(isinstance(m, nn.LayerNorm) for m in modules)
        assert (defaults.recipe.smooth, defaults.recipe.alpha) == (
            (True, "auto") if norms else (False, None)
        ), arch
        depthwise = any(isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 3 for m in modules)
        rounding = "nearest"
        if defaults.affine and not norms:
            rounding = "sequential"
        elif depthwise and (defaults.affine or not norms):
            rounding = "learned"
        assert defaults.recipe.rounding == rounding, arch


def test_recipes_come_with_the_package_whatever_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for config in recipes():
        found, _ = how_made(config.name, tmp_path / config.name)
        assert found is not None
        assert found.training == config.training
    assert plan_of("deit_tiny_patch16_224.fb_in1k-w8a8", tmp_path / "x").recipe.smooth


def stored(name: str, folder: Path) -> Path:
    """A recipe as a folder, which a build that was interrupted leaves."""
    (config,) = (config for config in recipes() if config.name == name)
    (folder / name).mkdir()
    (folder / name / "config.json").write_text(config.to_json())
    return folder / name


def test_a_recipe_is_no_checkpoint(tmp_path: Path) -> None:
    name = "resnet50.tv_in1k-w8a8"
    assert name not in qzoo.list_models(pretrained=True)
    with pytest.raises(CheckpointError, match=rf"only a recipe; `qzoo build {name}"):
        qzoo.load_pretrained(stored(name, tmp_path))


def test_build_all_goes_on_with_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = ROOT / "model_cards" / "tf_efficientnet_lite0.in1k-w8a8"
    assert is_complete(done)
    assert not is_complete(stored("resnet50.tv_in1k-w8a8", tmp_path))
    (tmp_path / done.name).mkdir()
    for file in ("config.json", WEIGHTS):
        (tmp_path / done.name / file).write_bytes((done / file).read_bytes())
    asked = []

    def build(name: str, options: None, job: BuildJob, *, report: object) -> Path:
        assert job.out == tmp_path / name
        assert (options, job.data, job.workers) == (None, "images", 2)
        asked.append(name)
        if name.startswith("resnet18"):
            raise HubError("no network")
        if name.startswith("resnet50"):
            torch.empty(1 << 60)  # more than there is
        return tmp_path / name

    monkeypatch.setattr(sys.modules["qzoo.pipeline.build_all"], "build", build)
    job = BuildJob(data="images", workers=2, out=tmp_path)
    said: list[str] = []
    failed = build_all(job, report=said.append)
    assert failed.pop("resnet18.tv_in1k-w8a8") == "no network"
    ((name, reason),) = failed.items()
    assert name.startswith("resnet50")
    assert reason.startswith("RuntimeError: ")
    assert "memory" in reason
    assert any(
        line.startswith("Traceback") and "torch.empty" in line for line in said
    )  # it is no user's mistake
    assert done.name not in asked
    calibrated = [config.name for config in recipes() if config.training is None]
    assert asked == [name for name in calibrated if name != done.name]
    asked.clear()
    build_all(job, qat=True, report=lambda text: None)
    tuned = [config.name for config in recipes() if config.training is not None]
    assert len(tuned) >= 3
    assert asked[-len(tuned) :] == tuned
    asked.clear()
    build_all(dataclasses.replace(job, again=True), report=lambda text: None)
    assert asked == calibrated
    (tmp_path / done.name / WEIGHTS).write_bytes(b"broken")
    assert not is_complete(tmp_path / done.name)
    assert read_config(tmp_path / done.name).metrics
