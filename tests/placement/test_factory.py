"""Networks by the name of their factory, their checkpoints, and the command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qzoo
from qzoo.__main__ import main
from qzoo.errors import ArgumentError, CheckpointError
from qzoo.placement.factory import build_float, quantize_factory

NETWORK = """
from torch import nn

def make():
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.SiLU(), *head)
"""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    from PIL import Image

    torch.manual_seed(0)
    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(4):
            pixels = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / "photos" / label / f"{i}.png")
    return tmp_path / "photos"


def test_a_package_s_network_is_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = quantize_factory("torchvision:squeezenet1_1", size=64, pretrained=False)
    images = torch.randn(4, 3, 64, 64)
    qzoo.calibrate(model, [images], progress=False)
    folder = qzoo.save_pretrained(model, tmp_path / "saved")
    loaded = qzoo.load_pretrained(folder, target="openvino")
    assert loaded.qzoo_config.factory == "torchvision:squeezenet1_1"
    with torch.no_grad():
        assert torch.equal(loaded(images), qzoo.set_target(model, "openvino")(images))


def test_the_command_and_a_file_s_network(tmp_path: Path, photos: Path, monkeypatch, capsys) -> None:
    file = tmp_path / "own_net_of_a_test.py"
    file.write_text(NETWORK)
    out = tmp_path / "out"
    monkeypatch.syspath_prepend(tmp_path)
    words = ["quantize", f"{file}:make", "--data", str(photos), "--size", "32", "--out", str(out), "-q"]
    assert main([*words, "--onnx", str(tmp_path / "net.onnx")]) == 0
    assert "make.own_net_of_a_test-w8a8" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"code that a checkpoint does not run: .* model=network"):
        qzoo.load_pretrained(out)
    image = torch.randn(1, 3, 32, 32)
    loaded = qzoo.load_pretrained(out, model=build_float(f"{file}:make"))
    with torch.no_grad():
        torch.testing.assert_close(
            qzoo.deploy(tmp_path / "net.onnx", runtime="onnxruntime")(image), loaded(image), rtol=0, atol=0.02
        )


@pytest.mark.parametrize(
    "name", ["resnet18", "torchvision:no_such_net", "nowhere.py:make", "os:system", "timm:"]
)
def test_what_names_no_network(name: str) -> None:
    with pytest.raises(ArgumentError):
        build_float(name)


def test_a_network_of_the_zoo_takes_no_model() -> None:
    with pytest.raises(ArgumentError, match="without model="):
        qzoo.load_pretrained("resnet20.fmnist-w8a8", model=torch.nn.Identity())
