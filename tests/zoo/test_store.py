"""The user's store: what is made by name is found by name, from everywhere."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

import qzoo
from qzoo.config import config_of, read_config
from qzoo.errors import CheckpointError, HubError, UnknownModelError
from qzoo.pipeline.plan import BuildJob
from qzoo.pipeline.train_job import TrainJob
from qzoo.zoo import hub
from qzoo.zoo.checkpoint import save_pretrained
from qzoo.zoo.store import checkpoint_folder, home, stored

NAME = "resnet20.fmnist-w8a8"
CARDS = Path(hub.__file__).parent / "model_cards"


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


def test_names_that_only_the_store_has_are_listed_and_found() -> None:
    name = "resnet20.mine"
    with pytest.raises(UnknownModelError, match="mine"):
        qzoo.create_model(name, pretrained=True)
    model = qzoo.load_pretrained("resnet20.fmnist")
    save_pretrained(model, checkpoint_folder(name), config=dataclasses.replace(config_of(model), name=name))
    assert name in qzoo.list_models("resnet20*", pretrained=True)
    x = torch.randn(1, 1, 28, 28)
    assert torch.equal(qzoo.create_model(name, pretrained=True)(x), model(x))
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
    with pytest.raises(HubError, match=r"no folder 'mine/pets-w8a9'; did you mean 'mine/pets-w8a8'"):
        qzoo.load_pretrained("mine/pets-w8a9")
    with pytest.raises(CheckpointError, match=r"did you mean 'mine/pets-w8a8'"):
        qzoo.load_pretrained("./mine/pets_w8a8")
    with pytest.raises(HubError, match=r"no folder 'xyz/abc'; as a Hub repository"):
        qzoo.load_pretrained("xyz/abc")
