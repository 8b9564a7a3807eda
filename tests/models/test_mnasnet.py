"""MNASNet against torchvision's, and in two runtimes."""

from __future__ import annotations

from pathlib import Path

import pytest
import shelf

LARGE = ("mnasnet0_75", "mnasnet1_0", "mnasnet1_3")
ARCHITECTURES = ["mnasnet0_5", *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_mnasnet_is_torchvisions(arch: str) -> None:
    shelf.is_torchvisions_in_eval_and_in_training(arch, 64)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["mnasnet0_5", *LARGE])
def test_mnasnet_runs_in_int8(arch: str, tmp_path: Path) -> None:
    assert shelf.runs_in_int8_in_onnxruntime(arch, 64, tmp_path)["QLinearAdd"] == 10
    shelf.runs_in_int8_in_openvino(arch, 64, tmp_path)
    shelf.is_clean_for_tensorrt(arch, 64, tmp_path)
