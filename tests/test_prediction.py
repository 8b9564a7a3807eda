"""``predict`` on the zoo's checkpoints and on one's own, against the steps done by hand."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import qzoo
from qzoo import prediction, runtimes
from qzoo.__main__ import main
from qzoo.config import WEIGHTS, config_of, read_config
from qzoo.data.fashion_mnist import fashion_mnist
from qzoo.data.sets import label_names
from qzoo.errors import ArgumentError, CheckpointError, DataError, UnknownModelError
from qzoo.pipeline.onnx_files import export_files, with_files
from qzoo.prediction import predict

LABELS = label_names("fashion-mnist")
NAME = "resnet20.fmnist-w8a8"


@pytest.fixture(autouse=True)
def _no_cache() -> Iterator[None]:
    prediction._ready.cache_clear()
    yield
    prediction._ready.cache_clear()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    image = fashion_mnist("test")[0][11, 0].numpy()
    Image.fromarray(image).save(tmp_path / "shoe.png")
    return tmp_path / "shoe.png"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A checkpoint of somebody's own, with random weights, 3 classes of a folder, and the ONNX file of one target."""
    torch.manual_seed(0)
    return save_own(tmp_path / "own", "ant", "bee", "cow")


def save_own(folder: Path, *classes: str) -> Path:
    model = qzoo.create_model("resnet20-w8a8", num_classes=len(classes))
    qzoo.calibrate(model, [torch.randn(2, 3, 32, 32)], progress=False)
    config = dataclasses.replace(config_of(model), labels="folders", classes=classes)
    qzoo.save_pretrained(model, folder, config=config)
    names = export_files(model.eval(), config, folder, ["onnxruntime"])
    (folder / "config.json").write_text(with_files(read_config(folder), folder, (WEIGHTS, *names)).to_json())
    return folder


def by_hand(index: int) -> np.ndarray:
    """Probabilities of an image of Fashion-MNIST's test set."""
    model = qzoo.load_pretrained(NAME, target="onnxruntime")
    pixels = fashion_mnist("test")[0][index : index + 1].double() / 255
    with torch.no_grad():
        logits = model(((pixels - 0.2860) / 0.3530).float())[0].double().numpy()
    return np.exp(logits) / np.exp(logits).sum()


@pytest.mark.parametrize(
    "runtime", ["pytorch", "onnxruntime", pytest.param("torch.compile", marks=pytest.mark.slow)]
)
def test_top_labels(photo: Path, runtime: str) -> None:
    runtimes.check(runtime)
    found = predict(photo, "resnet20", runtime, k=3)
    probabilities = by_hand(11)
    order = np.argsort(-probabilities)[:3]
    assert [label for label, _ in found] == [LABELS[i] for i in order]
    # Another runtime may flip roundings, by a step of the logits' quantizer.
    assert [p for _, p in found] == pytest.approx(probabilities[order].tolist(), abs=0.02)


@pytest.mark.parametrize(
    ("runtime", "target"),
    [
        ("onnxruntime", "onnxruntime"),
        ("onnxruntime-cuda", "onnxruntime"),
        ("onnxruntime-tensorrt", "tensorrt"),
    ],
)
def test_every_runtime_of_onnx_runtime_gets_a_file_of_its_target(
    photo: Path, qzoo_home: Path, monkeypatch: pytest.MonkeyPatch, runtime: str, target: str
) -> None:
    """Without a GPU here the processor stands in for it; the file is what matters."""
    processor = dataclasses.replace(runtimes.runtime_named(runtime), provider="CPUExecutionProvider")
    monkeypatch.setitem(runtimes._ALL, runtime, processor)
    assert predict(photo, NAME, runtime, k=1)[0][0] == LABELS[int(by_hand(11).argmax())]
    (file,) = (qzoo_home / "exports").iterdir()
    facts = {prop.key: prop.value for prop in onnx.load(file).metadata_props}
    assert facts["qzoo.target"] == target


def test_several_photos_are_labelled_one_by_one(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(fashion_mnist("test")[0][0, 0].numpy()).save(tmp_path / "boot.png")
    photos = [photo, tmp_path / "boot.png"]
    found = predict(photos, NAME, k=2)
    assert found == [predict(each, NAME, k=2) for each in photos]
    assert qzoo.predict is predict
    assert main(["predict", *map(str, photos), "--model", NAME, "--top", "2", "--runtime", "pytorch"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [lines[0], lines[3]] == [str(each) for each in photos]
    simulated = predict(photo, NAME, "pytorch", k=2)
    assert lines[1:3] == [f"{100 * share:6.2f} %  {label}" for label, share in simulated]


def test_more_labels_than_classes(photo: Path) -> None:
    with pytest.raises(ArgumentError, match=r"not Identity: keep .* qzoo\.save_pretrained"):
        predict(photo, torch.nn.Identity())  # type: ignore[call-overload]
    found = predict(photo, "resnet20", "pytorch", k=50)
    assert {label for label, _ in found} == set(LABELS)
    assert sum(p for _, p in found) == pytest.approx(1)


def test_the_file_is_exported_once_and_kept(
    photo: Path, qzoo_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = predict(photo, NAME)
    (file,) = (qzoo_home / "exports").iterdir()
    written = file.stat().st_mtime_ns
    prediction._ready.cache_clear()  # as another process

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model was loaded or exported, where the file is there")

    monkeypatch.setattr(prediction, "load_pretrained", never)
    monkeypatch.setattr(prediction, "export_onnx", never)
    assert predict(photo, NAME) == first
    assert file.stat().st_mtime_ns == written


def test_where_nothing_can_be_kept_it_is_said(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QZOO_HOME", str(tmp_path / "file" / "home"))
    with pytest.warns(UserWarning, match=r"can't be kept in .*QZOO_HOME"):
        assert predict(photo, NAME, k=1)[0][0] == LABELS[int(by_hand(11).argmax())]


def test_ones_own_folder_its_file_and_its_classes(own: Path, photo: Path, qzoo_home: Path) -> None:
    found = predict(photo, own)
    assert {label for label, _ in found} == {"ant", "bee", "cow"}
    assert not qzoo_home.exists(), "the file in the folder was used"
    unnamed = dataclasses.replace(read_config(own), classes=())
    (own / "config.json").write_text(unnamed.to_json())
    assert [label for label, _ in predict(photo, own)] == [
        f"class {('ant', 'bee', 'cow').index(label)}" for label, _ in found
    ]


def test_a_rebuilt_folder_is_loaded_anew(own: Path, photo: Path) -> None:
    before = predict(photo, own)
    shutil.rmtree(own)
    save_own(own, "dog", "elk", "fox")
    after = predict(photo, own)
    assert {label for label, _ in after} == {"dog", "elk", "fox"}
    model = qzoo.load_pretrained(own)
    torch.nn.init.normal_(model.fc.weight)
    qzoo.save_pretrained(model, own)  # beside the file of the weights before
    assert predict(photo, own) != after
    assert [p for _, p in after] != [p for _, p in before]
    fresh = runtimes.load(own / "onnx" / "model_int8.onnx", "onnxruntime")
    preprocessing = read_config(own).preprocessing
    logits = fresh(preprocessing.transform()(Image.open(photo).convert("RGB")).unsqueeze(0))[0]
    assert max(p for _, p in after) == pytest.approx(logits.softmax(0).max().item(), rel=1e-5)


def test_an_altered_file_is_refused(own: Path, photo: Path) -> None:
    file = own / "onnx" / "model_int8.onnx"
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match=r"model_int8\.onnx has another SHA-256"):
        predict(photo, own)


def test_colour_photos_of_any_size(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.jpg")
    assert len(predict(tmp_path / "noise.jpg", "resnet20", "pytorch")) == 5


def test_refusals(photo: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match="resnet50"):
        predict(photo, "resnett50", "pytorch")
    with pytest.raises(ValueError, match="no runtime 'tflite'"):
        predict(photo, "resnet20", "tflite")
    with pytest.raises(ValueError, match="k must be at least 1"):
        predict(photo, "resnet20", k=0)
    with pytest.raises(DataError, match=r"none\.jpg can't be read"):
        predict(tmp_path / "none.jpg", "resnet20", "pytorch")


@pytest.mark.parametrize("image", [3, [3], np.zeros((8, 8, 3)), None], ids=["int", "list", "array", "none"])
def test_what_is_no_path_is_said(image: object) -> None:
    with pytest.raises(ValueError, match=r"predict takes the path of a photo, or several paths, not \w+"):
        qzoo.predict(image, NAME, runtime="pytorch")  # type: ignore[call-overload]
