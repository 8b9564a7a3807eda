"""Networks by the name of their factory, their checkpoints, and the command."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision

import qzoo
from qzoo.__main__ import main
from qzoo.cards.card import write_card
from qzoo.data import load_data
from qzoo.errors import ArgumentError, CheckpointError
from qzoo.placement.factory import build_float

NETWORK = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.SiLU(), *head)
"""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return _photos(tmp_path / "photos", 0)


def _photos(folder: Path, seed: int) -> Path:
    from PIL import Image

    torch.manual_seed(seed)
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for i in range(4):
            pixels = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / label / f"{i}.png")
    return folder


def test_a_package_s_network_is_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 64, 64)
    network = torchvision.models.squeezenet1_1(num_classes=7).eval()
    scheme = qzoo.Scheme(4, 8, layers=(("features.3.squeeze", 8),))
    model = qzoo.quantize(
        network, images, scheme, exclude="features.12.*", factory="torchvision:squeezenet1_1"
    )
    qzoo.calibrate(model, [images], progress=False)
    folder = qzoo.save_pretrained(model, tmp_path / "saved")
    loaded = qzoo.load_pretrained(folder, target="openvino")
    config = loaded.qzoo_config
    assert (config.name, config.factory) == ("squeezenet1_1.torchvision-w4a8", "torchvision:squeezenet1_1")
    assert (config.arguments.num_classes, config.preprocessing.input_size) == (7, (3, 64, 64))
    with torch.no_grad():
        assert torch.equal(loaded(images), qzoo.set_target(model, "openvino")(images))


def test_timm_s_networks_know_their_factory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 1, 32, 32)
    made = timm.create_model("lcnet_035", num_classes=3, in_chans=1).eval()
    model = qzoo.quantize(made, images)
    qzoo.calibrate(model, [images], progress=False)
    assert model.qzoo_config.factory.startswith("timm:lcnet_035")
    loaded = qzoo.load_pretrained(qzoo.save_pretrained(model, tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    for options in ({}, {"depth": 1}):
        network = timm.create_model("test_vit", img_size=32, num_classes=3, **options).eval()
        images = torch.randn(1, 3, 32, 32)
        model = qzoo.quantize(network, images)
        qzoo.calibrate(model, [images], progress=False)
        if not options:
            loaded = qzoo.load_pretrained(qzoo.save_pretrained(model, tmp_path / "vit"))
            with torch.no_grad():
                torch.testing.assert_close(loaded(images), model(images))
        else:
            with pytest.raises(CheckpointError, match="name a function that builds this one"):
                qzoo.save_pretrained(model, tmp_path / "other")


def test_a_model_without_a_factory_is_not_saved(tmp_path: Path) -> None:
    images = torch.zeros(1, 3, 8, 8)
    model = qzoo.quantize(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), images)
    with pytest.raises(CheckpointError, match=r"qzoo.quantize\(..., factory="):
        qzoo.save_pretrained(model, tmp_path / "none")
    with pytest.raises(ArgumentError, match="names no network"):
        qzoo.quantize(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), images, factory="squeezenet1_1")
    with pytest.raises(ArgumentError, match=r"from images \[N, C, H, W\]"):
        qzoo.quantize(torch.nn.Sequential(torch.nn.Linear(3, 4)), torch.zeros(1, 3), factory="net.py:make")


def test_the_command_and_a_file_s_network(tmp_path: Path, photos: Path, monkeypatch, capsys) -> None:
    file = tmp_path / "own_net_of_a_test.py"
    file.write_text(NETWORK)
    out = tmp_path / "out"
    monkeypatch.syspath_prepend(tmp_path)
    words = ["quantize", f"{file}:make", "--data", str(photos), "--size", "32", "--out", str(out), "-q"]
    assert main([*words, "--onnx", str(tmp_path / "net.onnx")]) == 0
    assert "make.own_net_of_a_test-w8a8" in capsys.readouterr().out
    card = write_card(out).read_text()
    assert f"network = ...  # as {file.name}:make makes it" in card
    command = re.search(r"Built by `qzoo (.*)`", card)
    assert command is not None
    second = tmp_path / "second"
    names = {f"{file.name}:make": f"{file}:make", "DIR": str(photos), "FOLDER": str(second)}
    assert main([names.get(each, each) for each in shlex.split(command[1])]) == 0
    assert (second / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    with monkeypatch.context() as other:  # as in another process
        other.delitem(sys.modules, file.stem)
        with pytest.raises(CheckpointError, match=r"code that a checkpoint does not run: .* model=network"):
            qzoo.load_pretrained(out)
    again = ["evaluate", str(out), "--data", str(photos), "--import", str(file), "-q"]
    assert main(again) == 0
    assert "agreement" in capsys.readouterr().out
    file.write_text(NETWORK.replace("manual_seed(0)", "manual_seed(1)"))
    monkeypatch.delitem(sys.modules, file.stem)
    assert main([*again, "--float", f"{file}:make"]) == 2
    assert "was made from other weights than" in capsys.readouterr().err
    image = torch.randn(1, 3, 32, 32)
    network = build_float(f"{file}:make")
    loaded = qzoo.load_pretrained(out, model=network)
    by_hand = qzoo.quantize(network, image, "w8a8", factory=f"{file}:make")
    assert by_hand.qzoo_config.name == loaded.qzoo_config.name
    assert by_hand.qzoo_config.preprocessing == loaded.qzoo_config.preprocessing
    assert by_hand.qzoo_config.scheme == loaded.qzoo_config.scheme
    assert loaded.qzoo_config.scheme.affine  # its SiLU
    with torch.no_grad():
        torch.testing.assert_close(
            qzoo.deploy(tmp_path / "net.onnx", runtime="onnxruntime")(image), loaded(image), rtol=0, atol=0.02
        )


@pytest.mark.slow
def test_benchmark_of_a_file_s_network(tmp_path: Path, photos: Path, monkeypatch) -> None:
    """The float network, its simulation and its file, each in a process of its own, with the study of layers."""
    file, out, report = tmp_path / "own_net_to_measure.py", tmp_path / "out", tmp_path / "report"
    file.write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    others = _photos(tmp_path / "others", 1)  # none of those that it was calibrated on
    for folder in (photos, others):
        (folder / "cat" / "4.png").write_bytes(b"no image")
    words = ["quantize", f"{file}:make", "--data", str(photos), "--subset", ":9", "--size", "32"]
    words += ["--out", str(out), "-q"]
    assert main(words) == 2
    assert main([*words, "--skip-broken"]) == 0
    model, reference = qzoo.load_pretrained(out), build_float(f"{file}:make")
    assert (model.qzoo_config.calibration.images, model.qzoo_config.calibration.skipped) == (8, 1)
    words = [
        "benchmark",
        str(out),
        "--data",
        str(others),
        "--import",
        str(file),
        "--batch",
        "1",
        "--seconds",
        "0.05",
    ]
    words += ["--runtimes", "pytorch", "onnxruntime", "--skip-broken", "--out", str(report), "-q"]
    assert main(words) == 0
    found = json.loads((report / "benchmark.json").read_text())
    rows = found["rows"]
    assert any(note.endswith("1 images that do not decode are left out") for note in found["notes"])
    loader = load_data(model.qzoo_config.preprocessing, "folders", others, skip_broken=True)
    scores = {
        "float32": qzoo.evaluate(reference, loader, progress=False).top1,
        "int8": qzoo.evaluate(model, loader, progress=False).top1,
    }
    assert len(rows) == 4
    for row in rows:
        assert row["top1"] == scores[row["precision"].split()[-1]]
        assert row["agreement"] >= 75.0


@pytest.mark.parametrize(
    "name", ["resnet18", "torchvision:no_such_net", "nowhere.py:make", "os:system", "timm:"]
)
def test_what_names_no_network(name: str) -> None:
    with pytest.raises(ArgumentError):
        build_float(name)


def test_a_network_of_the_zoo_takes_no_model() -> None:
    with pytest.raises(ArgumentError, match="without model="):
        qzoo.load_pretrained("resnet20.fmnist-w8a8", model=torch.nn.Identity())
