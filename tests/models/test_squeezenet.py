"""SqueezeNet against torchvision's, and in two runtimes."""

from __future__ import annotations

from pathlib import Path

import pytest
import shelf

ARCHITECTURES = ["squeezenet1_1", pytest.param("squeezenet1_0", marks=pytest.mark.slow)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_squeezenet_is_torchvisions(arch: str) -> None:
    shelf.is_torchvisions_in_eval_and_in_training(arch, 64)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_squeezenet_runs_in_int8(arch: str, tmp_path: Path) -> None:
    assert shelf.runs_in_int8_in_onnxruntime(arch, 64, tmp_path)["QLinearConcat"] == 8
    shelf.runs_in_int8_in_openvino(arch, 64, tmp_path)
    shelf.is_clean_for_tensorrt(arch, 64, tmp_path)
