"""docs/zoo.md is what configs, registry and recipes generate."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import qzoo
from qzoo.__main__ import main
from qzoo.config import Config
from qzoo.pipeline.recipes import recipes
from qzoo.registry import architecture, list_architectures, natural_key
from qzoo.release.tables import embedded_configs, unbuilt
from qzoo.release.verify import verify_page
from qzoo.release.zoo_page import write_page, zoo_page
from qzoo.zoo import hub

ROOT = Path(qzoo.__file__).parent.parent
PAGE = ROOT / "docs" / "zoo.md"


def test_page_equals_what_the_configs_generate() -> None:
    finding = verify_page(PAGE)
    assert finding.problem == ""


def section(text: str, title: str) -> str:
    return text.split(f"## {title}")[1].split("\n## ")[0]


def test_every_checkpoint_has_its_figures_and_every_recipe_stands_apart() -> None:
    configs = embedded_configs()
    text = zoo_page(configs)
    built, planned = section(text, "Checkpoints"), section(text, "Recipes")
    for config in configs:
        part = built if config.scheme is not None else section(text, "Trained here")
        (line,) = [line for line in part.splitlines() if line.startswith(f"| [`{config.name}`]")]
        assert f"{config.metrics[0].top1:.2f}" in line
        assert f"`{config.name}`" not in planned
    names = {config.name for config in configs}
    for recipe in recipes():
        assert (f"| `{recipe.name}` |" in planned) == (recipe.name not in names)
        assert recipe.name in names or f"`{recipe.name}`" not in built


def test_encoders_stand_among_the_recipes_calibrated_without_images() -> None:
    planned = section(zoo_page([]), "Recipes")
    encoders = [arch for arch in list_architectures() if architecture(arch).is_encoder]
    assert len(encoders) >= 2
    for arch in encoders:
        for tag in architecture(arch).weights:
            (line,) = [line for line in planned.splitlines() if line.startswith(f"| `{arch}.{tag}-w8a8` |")]
            assert "procedural" in line
            assert "no images | none |" in line
    names = [line.split("`")[1] for line in planned.splitlines() if line.startswith("| `")]
    assert set(unbuilt(set())) <= set(names)  # which the README says of the page
    assert names == sorted(names, key=natural_key)


def test_what_is_checked_of_float_weights_is_said() -> None:
    text = section(zoo_page([]), "Float weights")
    for arch in list_architectures():
        for tag, weights in architecture(arch).weights.items():
            for source, digest in zip(weights.sources, weights.sha256, strict=False):
                line = next(line for line in text.splitlines() if f"| `{arch}.{tag}` | `{source}`" in line)
                assert ("whole" in line) == (len(digest) == 64)
                assert ("8 digits" in line) == (len(digest) == 8)


def test_links_lead_somewhere() -> None:
    for target in set(re.findall(r"\]\((\.\./[^)]+)\)", PAGE.read_text(encoding="utf-8"))):
        assert (PAGE.parent / target).exists(), target


def test_command_writes_it_and_verify_tells_a_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub, "EMBEDDED", tmp_path / "none")
    monkeypatch.setattr(hub, "pins", lambda: {"resnet20.fmnist": hub.Pin("org/name", "1" * 40, "2" * 64)})
    path = tmp_path / "zoo.md"
    assert main(["card", "--page", str(path)]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    assert not write_page(path)
    assert "`org/name` at `" + "1" * 40 in path.read_text()
    assert verify_page(path).problem == ""
    path.write_text(path.read_text() + "more\n")
    assert "qzoo card --page" in verify_page(path).problem
    assert "No such file" in verify_page(tmp_path / "other.md").problem
    assert main(["card"]) == 2


def test_of_no_configs_nothing_is_claimed() -> None:
    text = zoo_page([])
    assert text.count("None yet.") == 2
    assert "%" not in section(text, "Checkpoints")
    assert all(isinstance(config, Config) for config in recipes())
