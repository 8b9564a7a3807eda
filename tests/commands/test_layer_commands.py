"""The commands inspect, sensitivity and benchmark on the embedded checkpoint, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qzoo.__main__ import main

NAME = "resnet20.fmnist-w8a8"


def test_inspect(capsys) -> None:
    assert main(["inspect", NAME, "--images", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "64 quantizers, 64 on, activations counted on 4 images"
    assert sum("_weight_quantizer" in line for line in lines) == 22
    assert main(["inspect", NAME, "--images", "0", "--target", "tensorrt"]) == 0
    assert capsys.readouterr().out.startswith("64 quantizers, 53 on\n")


def test_sensitivity(capsys, tmp_path: Path) -> None:
    out = tmp_path / "sensitivity.json"
    assert main(["sensitivity", NAME, "--images", "2", "-q", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{NAME}, target onnxruntime, 2 images")
    layers = json.loads(out.read_text())["layers"]
    *table, advice = text.splitlines()[3:]
    assert [layer["name"] for layer in layers] == [line.split()[0] for line in table]
    costly = [layer["name"] for layer in layers if "weight 8 bit" in layer["quantizers"]]
    assert advice.endswith(f"qzoo build {NAME} --layer-bits {costly[0]}=float {costly[1]}=float")


def test_benchmark_refuses_early(capsys) -> None:
    assert main(["benchmark", NAME, "--runtimes", "tflite"]) == 2
    assert "expected some of pytorch, torch.compile, onnxruntime" in capsys.readouterr().err
    assert main(["benchmark", NAME, "--compare", "quantize_static", "--runtimes", "pytorch"]) == 2
    assert "add it to the runtimes" in capsys.readouterr().err


@pytest.mark.slow
def test_benchmark(capsys, tmp_path: Path) -> None:
    """The whole run with a peer and all files, as the README shows it."""
    subset = ["--subset", "128:328", "--seconds", "0.1", "-q"]
    assert main(["benchmark", NAME, "--compare", "quantize_static", "--out", str(tmp_path), *subset]) == 0
    assert "times as fast as quantize_static" in capsys.readouterr().out
    for kind in ("json", "csv", "html", "png"):
        assert (tmp_path / f"benchmark.{kind}").stat().st_size > 1000
