"""Models to the Hub and back by their own methods, through the real client."""

# ruff: noqa: F811 - fixtures of another file are arguments here

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hub_server import Hub, Repo
from test_hub import NAME, REPO, checkpoint, repo, same, server  # noqa: F401 - fixtures
from torch import nn

import qzoo
from qzoo.cards.card import card
from qzoo.config import Config, read_config
from qzoo.errors import CheckpointError, HubError
from qzoo.models.resnet import ResNet
from qzoo.models.resnet_cifar import CifarResNet
from qzoo.registry import architecture, families


def test_every_network_of_the_zoo_has_the_methods() -> None:
    examples = {architecture(name).build.__module__: name for name in qzoo.list_models()}
    assert len(examples) == len(families())
    for name in examples.values():
        with torch.device("meta"):
            model = qzoo.create_model(name)
        assert isinstance(model, qzoo.HubMixin), name
        assert isinstance(model, nn.Module)


def test_to_a_folder_and_back(tmp_path: Path, checkpoint: Path) -> None:
    model = CifarResNet.from_pretrained(checkpoint)
    assert type(model) is CifarResNet
    folder = model.save_pretrained(str(tmp_path / "again"), form="master")
    assert read_config(folder).form == "master"
    assert same(CifarResNet.from_pretrained(str(folder), target="tensorrt"), checkpoint) is False  # no uint8
    assert same(CifarResNet.from_pretrained(folder), checkpoint)
    with pytest.raises(CheckpointError, match=r"holds resnet20, a CifarResNet; ResNet.from_pretrained"):
        ResNet.from_pretrained(checkpoint)


def test_push_and_load_again(server: Hub, checkpoint: Path) -> None:
    model = CifarResNet.from_pretrained(checkpoint)
    address = model.push_to_hub("me/mine", private=True, commit_message="First", token="hf_givenByArgument")
    pushed = server.repos["me/mine"]
    assert pushed.private
    assert address.endswith(pushed.refs["main"])
    assert len(server.requests("POST .*/commit/")) == 1
    assert {line.rpartition(" ")[2] for line in server.authorization} == {"hf_givenByArgument"}
    files = pushed.commits[pushed.refs["main"]]
    assert files.keys() - {".gitattributes"} == {"README.md", "config.json", "model.safetensors"}
    config = Config.from_json(files["config.json"].decode())
    text = files["README.md"].decode()
    assert text == card(config, "me/mine")
    assert 'qzoo.load_pretrained("me/mine", target="onnxruntime")' in text
    assert "create_model" not in text  # which would load the zoo's
    assert same(CifarResNet.from_pretrained("me/mine"), checkpoint)


def test_the_card_of_a_model_that_nothing_is_known_of_claims_nothing(checkpoint: Path) -> None:
    config = read_config(checkpoint)
    text = card(config)
    assert "is not recorded" in text
    assert "license:" not in text
    assert re.search(r"## Measured\n\nNothing yet.", text)


def test_push_again_to_a_branch_and_after_a_fault(server: Hub, checkpoint: Path) -> None:
    model = CifarResNet.from_pretrained(checkpoint)
    server.fault("POST .*/commit/", "500", times=50)
    with pytest.raises(HubError, match="not pushed to me/mine") as error:
        model.push_to_hub("me/mine", token="hf_givenByArgument")
    assert "givenByArgument" not in str(error.value)
    server.faults.clear()
    uploads = len(server.requests("PUT"))
    model.push_to_hub("me/mine", revision="next")
    assert len(server.requests("PUT")) == uploads  # the weights were there
    assert set(server.repos["me/mine"].refs) == {"main", "next"}
    assert same(CifarResNet.from_pretrained("me/mine", revision="next"), checkpoint)
    model.push_to_hub("me/mine", revision="next", commit_message="Again")  # the branch is there
    with pytest.raises(HubError, match="expected org/name"):
        model.push_to_hub("mine")


def test_cache_token_and_local_files(server: Hub, repo: Repo, checkpoint: Path, tmp_path: Path) -> None:
    cache = tmp_path / "elsewhere"
    with pytest.raises(HubError, match="local_files_only"):
        CifarResNet.from_pretrained(REPO, cache_dir=cache, local_files_only=True)
    assert server.log == []
    assert same(CifarResNet.from_pretrained(REPO, cache_dir=cache, token="hf_another"), checkpoint)
    assert {line.rpartition(" ")[2] for line in server.authorization} == {"hf_another"}
    assert list(cache.rglob("model.safetensors"))
    assert not list((tmp_path / "cache").rglob("model.safetensors"))
    before = len(server.log)
    assert same(qzoo.load_pretrained(REPO, cache_dir=cache, local_files_only=True), checkpoint)
    assert len(server.log) == before
