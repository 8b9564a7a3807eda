"""VGG against torchvision's, and in two runtimes."""

from __future__ import annotations

from pathlib import Path

import pytest
import shelf

LARGE = ("vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn")
ARCHITECTURES = ["vgg11", *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_vgg_is_torchvisions(arch: str) -> None:
    shelf.is_torchvisions_in_eval_and_in_training(arch, 32)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["vgg11", *LARGE])
def test_vgg_runs_in_int8(arch: str, tmp_path: Path) -> None:
    shelf.runs_in_int8_in_onnxruntime(arch, 224, tmp_path)
    shelf.runs_in_int8_in_openvino(arch, 224, tmp_path)
    shelf.is_clean_for_tensorrt(arch, 224, tmp_path)
