"""A world of its own for tests that build checkpoints."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch
from small_data import shallow_resnet20

import qzoo
from qzoo.data import load_data
from qzoo.zoo import hub


@pytest.fixture
def small_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with a float resnet20 of random weights, and test images in place of the training images.

    It has one block a stage: what the steps do with a network does not depend on its depth, half of their time does.
    """
    store = tmp_path / "model_cards"
    store.mkdir()
    monkeypatch.setattr(hub, "EMBEDDED", store)
    monkeypatch.setattr(hub, "pins", dict)
    monkeypatch.setitem(qzoo.registry._entries, "resnet20", shallow_resnet20())
    torch.manual_seed(0)
    qzoo.save_pretrained(qzoo.create_model("resnet20.fmnist"), store / "resnet20.fmnist")

    def load(*args, split: str = "test", **kwargs):
        return load_data(*args, **kwargs)

    monkeypatch.setattr(import_module("qzoo.pipeline.parts"), "load_data", load)
    monkeypatch.chdir(tmp_path)
    return store
