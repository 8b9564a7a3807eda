"""AlexNet against torchvision's, and in two runtimes."""

from __future__ import annotations

from pathlib import Path

import pytest
import shelf


def test_alexnet_is_torchvisions() -> None:
    shelf.is_torchvisions_in_eval_and_in_training("alexnet", 64)


@pytest.mark.slow
def test_alexnet_runs_in_int8(tmp_path: Path) -> None:
    shelf.runs_in_int8_in_onnxruntime("alexnet", 224, tmp_path)
    shelf.runs_in_int8_in_openvino("alexnet", 224, tmp_path)
    shelf.is_clean_for_tensorrt("alexnet", 224, tmp_path)
