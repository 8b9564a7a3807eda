"""The user's store: what is made by name is found by name, from everywhere."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path

import pytest
import torch
from small_data import write_splits

import qzoo
from qzoo import registry
from qzoo.__main__ import main
from qzoo.config import config_of, read_config
from qzoo.errors import CheckpointError, HubError, UnknownModelError
from qzoo.pipeline import steps
from qzoo.pipeline.plan import BuildJob, how_made
from qzoo.pipeline.train_job import TrainJob
from qzoo.zoo import hub
from qzoo.zoo.checkpoint import save_pretrained
from qzoo.zoo.store import checkpoint_folder, home, stored

NAME = "resnet20.fmnist-w8a8"
CARDS = Path(qzoo.__file__).parent / "model_cards"


def changed_copy(name: str, folder: Path) -> Path:
    """A checkpoint that can be told from the package's: its classifier's bias is 7 everywhere."""
    model = qzoo.load_pretrained(CARDS / name)
    with torch.no_grad():
        model.fc.bias.fill_(7.0)
    return save_pretrained(model, folder)


def is_changed(model: torch.nn.Module) -> bool:
    return bool((model.fc.bias == 7.0).all())


def test_the_store_lies_where_the_variable_says_or_in_the_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QZOO_HOME", str(tmp_path / "mine"))
    assert home() == tmp_path / "mine"
    assert checkpoint_folder(NAME) == tmp_path / "mine" / "checkpoints" / NAME
    monkeypatch.delenv("QZOO_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert home() == tmp_path / "qzoo"
    assert stored() == {}


def test_build_and_train_write_where_names_are_looked_for(tmp_path: Path) -> None:
    for job in (BuildJob(), TrainJob()):
        assert job.folder(NAME) == checkpoint_folder(NAME)
    assert BuildJob(out=tmp_path).folder(NAME) == tmp_path


def test_names_mean_the_users_own_checkpoint_first() -> None:
    assert not is_changed(qzoo.create_model(NAME, pretrained=True))
    changed_copy(NAME, checkpoint_folder(NAME))
    assert is_changed(qzoo.create_model(NAME, pretrained=True))
    assert is_changed(qzoo.resnet20(pretrained=True, quantize="w8a8"))
    assert is_changed(qzoo.load_pretrained(NAME))
    assert hub.place_of(NAME) == str(checkpoint_folder(NAME))
    assert hub.place_of("resnet20.fmnist") == "in the package"


def test_names_that_only_the_store_has_are_listed_and_found(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "resnet20.mine"
    with pytest.raises(UnknownModelError, match="mine"):
        qzoo.create_model(name, pretrained=True)
    model = qzoo.load_pretrained("resnet20.fmnist")
    save_pretrained(model, checkpoint_folder(name), config=dataclasses.replace(config_of(model), name=name))
    assert name in qzoo.list_models("resnet20*", pretrained=True)
    x = torch.randn(1, 1, 28, 28)
    assert torch.equal(qzoo.create_model(name, pretrained=True)(x), model(x))
    # An architecture without public weights: the one float checkpoint that there is.
    entry = dataclasses.replace(registry.architecture("resnet44"), weights={})
    monkeypatch.setitem(registry._entries, "resnet44", entry)
    only = dataclasses.replace(config_of(model), name="resnet44.mine", architecture="resnet44")
    other = qzoo.create_model("resnet44", in_channels=1)
    save_pretrained(other, checkpoint_folder("resnet44.mine"), config=only)
    assert torch.equal(qzoo.resnet44(pretrained=True)(x), other.eval()(x))
    second = dataclasses.replace(only, name="resnet44.yours")
    save_pretrained(other, checkpoint_folder("resnet44.yours"), config=second)
    with pytest.raises(UnknownModelError, match=r"checkpoints: resnet44.mine, resnet44.yours"):
        qzoo.resnet44(pretrained=True)
    (checkpoint_folder(name) / "model.safetensors").unlink()
    assert name not in qzoo.list_models(pretrained=True)


def test_a_folder_of_the_store_has_its_checkpoints_name() -> None:
    shutil.copytree(CARDS / NAME, checkpoint_folder("resnet20.fmnist-w6a8"))
    with pytest.raises(CheckpointError, match=rf"holds {NAME}"):
        qzoo.create_model("resnet20.fmnist-w6a8", pretrained=True)


def test_a_checkpoint_folder_here_wins_for_loading_and_names_stay_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(NAME).mkdir()  # no checkpoint, just a folder of that name
    assert not is_changed(qzoo.load_pretrained(NAME))
    changed_copy(NAME, tmp_path / NAME)
    assert is_changed(qzoo.load_pretrained(NAME))
    assert not is_changed(qzoo.create_model(NAME, pretrained=True))
    finding = qzoo.verify([NAME], progress=False)[0]
    assert (finding.place, read_config(tmp_path / NAME).name) == ("folder", NAME)


def test_a_folder_that_is_misspelt_is_said_not_to_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "mine" / "pets-w8a8").mkdir(parents=True)
    with pytest.raises(HubError, match=r"no folder 'mine/pets-w8a9'; .*; did you mean 'mine/pets-w8a8'"):
        qzoo.load_pretrained("mine/pets-w8a9")
    with pytest.raises(CheckpointError, match=r"did you mean 'mine/pets-w8a8'"):
        qzoo.load_pretrained("./mine/pets_w8a8")
    with pytest.raises(HubError, match=r"no folder 'xyz/abc'; as a Hub repository"):
        qzoo.load_pretrained("xyz/abc")


MY_NET = """
from torch import nn
from qzoo.models.layers import conv2d, linear
from qzoo.registry import register_model

class Net(nn.Module):
    def __init__(self, classes, channels, quantize):
        super().__init__()
        self.conv = conv2d(channels, 8, 3, quantize=quantize)
        self.fc = linear(8, classes, quantize=quantize)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))

@register_model()
def net_of_mine(*, num_classes=10, in_channels=3, quantize=None):
    return Net(num_classes, in_channels, quantize)
"""


def test_ones_own_network_is_trained_built_listed_and_measured_by_name_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.list_architectures()  # the zoo's own register once
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(steps, "code_digest", lambda: "code")  # whatever is edited meanwhile
    file, data = tmp_path / "net_of_mine_file.py", write_splits(tmp_path / "pets")
    file.write_text(MY_NET)

    def run(*words: str) -> str:
        assert main([*words, "--import", str(file), "-q"]) == 0
        return capsys.readouterr().out

    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    options = ("--data", str(data), "--batch-size", "8", "--epochs", "1")
    run("train", "net_of_mine.pets", "--dataset", "folders", *options)
    monkeypatch.chdir(tmp_path / "there")
    run("build", "net_of_mine.pets-w8a8", "--data", str(data), "--calibration-subset", "0:16", "--no-onnx")
    listed = run("list", "net_of_mine*", "--pretrained")
    assert "net_of_mine.pets" in listed
    assert "net_of_mine.pets-w8a8" in listed
    monkeypatch.chdir(tmp_path)
    measured = run("evaluate", "net_of_mine.pets-w8a8", "--data", str(data))
    assert "target onnxruntime" in measured
    assert "same images" in measured  # the float model was found by name, too
    named = run("evaluate", "net_of_mine.pets-w8a8", "--data", str(data), "--float", "net_of_mine.pets")
    assert "same images" in named
    _, source = how_made("net_of_mine.pets-w8a8", tmp_path / "elsewhere")
    assert source == str(checkpoint_folder("net_of_mine.pets-w8a8") / "config.json")
    assert str(checkpoint_folder("net_of_mine.pets-w8a8")) in run("card", "net_of_mine.pets-w8a8")
    config = read_config(checkpoint_folder("net_of_mine.pets-w8a8"))
    assert (config.labels, config.arguments.num_classes) == ("folders", 2)
