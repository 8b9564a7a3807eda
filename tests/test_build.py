"""One call from a name to a checkpoint, on real images with small numbers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import qzoo
from qzoo import hub
from qzoo.build import build
from qzoo.cards import card
from qzoo.config import read_config
from qzoo.data import load_data
from qzoo.errors import CheckpointError, UnknownModelError

build_module = sys.modules["qzoo.build"]  # qzoo.build is the function
NAME = "resnet20.fmnist-w8a8"
SMALL = {"calibration_subset": "0:32", "evaluation_subset": "100:164", "progress": False}


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

    monkeypatch.setattr(build_module, "load_data", load)
    return store


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
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    config = read_config(first)
    assert config.calibration is not None
    assert {c["method"] for c in config.calibration.candidates} == {"max", "percentile", "mse", "entropy"}
    build(NAME, out=first, progress=False)  # the folder's own config says how it is made
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before


def test_names_that_are_not_built_by_calibration() -> None:
    with pytest.raises(UnknownModelError, match="give a scheme"):
        build("resnet20.fmnist")
    with pytest.raises(UnknownModelError, match="qzoo train"):
        build("resnet20.fmnist-w4a4_qat")


def test_a_folder_with_another_checkpoint_is_not_overwritten(small_world: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds resnet20.fmnist;"):
        build(NAME, out=small_world / "resnet20.fmnist", **SMALL)


def test_edge_bits_are_kept_and_repeated(small_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "measure", lambda *args: ())  # what counts here is not measured
    name = "resnet20.fmnist-w4a8"
    folder = build(name, out=small_world / name, method="max", edge_bits=8, **SMALL)
    config = read_config(folder)
    assert config.scheme is not None
    assert config.scheme.edge_bits == 8
    model = qzoo.create_model(name, pretrained=True)
    bits = {
        n: m.weight_quantizer.num_bits for n, m in model.named_modules() if hasattr(m, "weight_quantizer")
    }
    assert (bits.pop("conv1"), bits.pop("fc")) == (8, 8)
    assert set(bits.values()) == {4}
    assert "The first and the last layer have 8." in card(config)
    assert "--edge-bits 8" in card(config)
    before = (folder / "model.safetensors").read_bytes()
    build(name, out=folder, calibration_subset="0:32", progress=False)
    assert (folder / "model.safetensors").read_bytes() == before
