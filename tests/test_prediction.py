"""``predict`` on a checkpoint made on the spot, against the steps done by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import qzoo.prediction
from qzoo.data import load_data
from qzoo.data.fashion_mnist import LABELS, fashion_mnist
from qzoo.errors import DataError, UnknownModelError
from qzoo.prediction import predict
from qzoo.ptq.ranges import calibrate
from qzoo.quant.nn import TensorQuantizer
from qzoo.zoo.create import create_model


class Made:
    """Stands in for the zoo's checkpoints: one calibrated ResNet-20 with random weights."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = create_model("resnet20.fmnist", quantize="w8a8", target="onnxruntime").eval()
        self.calls: list[tuple] = []
        config = self.model.qzoo_config
        loader = load_data(config.preprocessing, config.labels, subset="0:64")
        self.preprocessing = config.preprocessing
        calibrate(self.model, loader, progress=False)

    def __call__(self, name: str, **arguments: object) -> nn.Module:
        self.calls.append((name, arguments))
        return self.model


@pytest.fixture(scope="module")
def made() -> Made:
    return Made()


@pytest.fixture(autouse=True)
def _no_cache() -> Iterator[None]:
    qzoo.prediction._ready.cache_clear()
    yield
    qzoo.prediction._ready.cache_clear()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    image = fashion_mnist("test")[0][11, 0].numpy()
    Image.fromarray(image).save(tmp_path / "shoe.png")
    return tmp_path / "shoe.png"


@pytest.mark.parametrize("runtime", ["pytorch", "onnxruntime"])
def test_top_labels(made: Made, photo: Path, monkeypatch: pytest.MonkeyPatch, runtime: str) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(qzoo.prediction, "create_model", made)
    found = predict(photo, "resnet20", runtime, k=3)
    assert made.calls[-1] == (
        "resnet20",
        {"pretrained": True, "quantize": True, "target": "onnxruntime"},
    )
    pixels = fashion_mnist("test")[0][11:12].double() / 255
    with torch.no_grad():
        logits = made.model(((pixels - 0.2860) / 0.3530).float())[0].double().numpy()
    probabilities = np.exp(logits) / np.exp(logits).sum()
    order = np.argsort(-probabilities)[:3]
    if runtime == "pytorch":
        assert [label for label, _ in found] == [LABELS[i] for i in order]
    # Another runtime may flip roundings; one step of the logits' quantizer is allowed.
    step = made.model.output_quantizer.amax.item() / 127
    for label, p in found:
        assert p == pytest.approx(probabilities[LABELS.index(label)], rel=4 * step + 1e-6)
    assert [p for _, p in found] == sorted((p for _, p in found), reverse=True)


def test_more_labels_than_classes(made: Made, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qzoo.prediction, "create_model", made)
    found = predict(photo, "resnet20", "pytorch", k=50)
    assert {label for label, _ in found} == set(LABELS)
    assert sum(p for _, p in found) == pytest.approx(1)


def test_a_name_with_a_scheme_is_taken_as_it_is_and_built_once(
    made: Made, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qzoo.prediction, "create_model", made)
    made.calls.clear()
    assert predict(photo, "resnet20.fmnist-w4a4_qat", "pytorch") == predict(
        photo, "resnet20.fmnist-w4a4_qat", "pytorch"
    )
    assert [(name, arguments["quantize"]) for name, arguments in made.calls] == [
        ("resnet20.fmnist-w4a4_qat", None)
    ]


def test_colour_photos_of_any_size(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qzoo.prediction, "create_model", made)
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.jpg")
    assert len(predict(tmp_path / "noise.jpg", "resnet20", "pytorch")) == 5


def test_refusals(made: Made, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownModelError, match="resnet50"):
        predict(photo, "resnett50", "pytorch")
    with pytest.raises(ValueError, match="no runtime 'tflite'"):
        predict(photo, "resnet20", "tflite")
    with pytest.raises(ValueError, match="k must be at least 1"):
        predict(photo, "resnet20", k=0)
    monkeypatch.setattr(qzoo.prediction, "create_model", made)
    with pytest.raises(DataError, match=r"none\.jpg can't be read"):
        predict(tmp_path / "none.jpg", "resnet20", "pytorch")


def test_the_model_in_use_quantizes(made: Made) -> None:
    """Else the tests above would compare two float models."""
    quantizers = [m for m in made.model.modules() if isinstance(m, TensorQuantizer)]
    assert all(not q._disabled and q.amax is not None for q in quantizers)
