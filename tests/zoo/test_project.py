"""A project that ``qzoo new`` writes: its tests pass at once, and installed the zoo finds it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import qzoo
from qzoo.__main__ import main
from qzoo.errors import ArgumentError
from qzoo.zoo.project import write_project

ROOT = Path(qzoo.__file__).parent.parent


def run(*command: str, folder: Path, path: str = "") -> str:
    """Run a command in a folder, with this qzoo and no settings of this run of pytest; returns what it prints."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (path, str(ROOT))))
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_tests_of_a_new_project_pass(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    assert main(["new", "my_net", "--out", str(tmp_path)]) == 0
    printed = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", folder=tmp_path / "my_net")
    assert "6 passed, 1 skipped" in printed  # without a reference nothing is compared with one


@pytest.mark.slow
def test_tests_of_a_project_find_what_is_wrong(tmp_path: Path) -> None:
    """A ReLU that is left out, so that an input said to be non-negative is not."""
    folder = write_project("my_net", tmp_path)
    text = (folder / "my_net.py").read_text()
    broken = text.replace("out = self.relu(self.bn1(self.conv1(x)))", "out = self.bn1(self.conv1(x))")
    assert broken != text
    (folder / "my_net.py").write_text(broken)
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "-q", "-k", "nonnegative", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, cwd=folder, env=env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "layer1.0.conv2" in done.stdout


def test_an_installed_project_is_listed_without_import(tmp_path: Path) -> None:
    """What ``pip install`` leaves: the module, and metadata that name it as an entry point."""
    pytest.importorskip("setuptools", minversion="77")
    folder = write_project("my_net", tmp_path)
    code = "from setuptools import build_meta; build_meta.build_wheel('.')"
    run(sys.executable, "-c", code, folder=folder)
    (wheel,) = folder.glob("my_net-0.1.0-*.whl")
    assert "my_net" in run(sys.executable, "-m", "qzoo", "list", "my_*", folder=tmp_path, path=str(wheel))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("My-Net", "lower-case letters"),
        ("class", "can't be the name"),
        ("resnet50", "is in the zoo already"),
        ("timm", "is installed already"),
        ("there", "is there already"),
    ],
)
def test_names_that_cannot_be_are_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ArgumentError, match=message):
        write_project(name, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_definition_is_the_template_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qzoo.registry, "_entries", dict(qzoo.registry._entries))
    folder = write_project("small_one", tmp_path)
    names: dict[str, object] = {"__name__": "small_one"}
    exec(compile((folder / "small_one.py").read_text(), "small_one.py", "exec"), names)
    model = qzoo.create_model("small_one", num_classes=3)
    assert isinstance(model, nn.Module)
    assert type(model).__name__ == "SmallOne"
    assert "tiny" not in (folder / "small_one.py").read_text().lower()


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("timm:test_efficientnet", 'timm.create_model("test_efficientnet"'),
        ("timm:test_vit", 'timm.create_model("test_vit"'),
        ("torchvision:squeezenet1_1", 'torchvision.models.get_model("squeezenet1_1"'),
    ],
)
@pytest.mark.slow
def test_tests_of_a_project_that_starts_from_a_network_pass(tmp_path: Path, source: str, call: str) -> None:
    """Its checks hold, and its definition is an architecture: it trains no class of the zoo's, and reloads."""
    pytest.importorskip("onnxruntime")
    assert main(["new", "my_net", "--out", str(tmp_path), "--from", source]) == 0
    folder = tmp_path / "my_net"
    assert call in (folder / "my_net.py").read_text()
    printed = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", folder=folder)
    assert "8 passed" in printed
    code = """if True:
        import torch, qzoo, my_net
        model = qzoo.create_model("my_net", quantize="w8a8", num_classes=5)
        qzoo.calibrate(model, [torch.rand(2, 3, my_net.SIZE, my_net.SIZE)], progress=False)
        loaded = qzoo.load_pretrained(qzoo.save_pretrained(model, "made"))
        x = torch.rand(1, 3, my_net.SIZE, my_net.SIZE)
        print(torch.equal(loaded(x), model.eval()(x)))"""
    assert run(sys.executable, "-c", code, folder=folder).endswith("True\n")


@pytest.mark.parametrize("start", ["keras:resnet50", "timm:no_such_network", "resnet18"])
def test_starts_that_are_no_network_are_refused(tmp_path: Path, start: str) -> None:
    with pytest.raises(ArgumentError, match=r"expected timm:NAME|has no network"):
        write_project("my_net", tmp_path, start)
    assert not list(tmp_path.iterdir())
