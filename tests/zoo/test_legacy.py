"""Calibrated state dicts of the old toolkit: its key names, its shapes, its placement."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import qzoo
from qzoo.errors import CheckpointError, MissingRangeError
from qzoo.zoo.tensors import quantizers


@pytest.fixture(scope="module")
def calibrated() -> nn.Module:
    torch.manual_seed(0)
    model = qzoo.create_model("resnet18-w8a8", num_classes=10)
    qzoo.calibrate(model, [torch.randn(2, 3, 32, 32)], progress=False)
    return model.eval()


@pytest.fixture
def old_file(calibrated: nn.Module, tmp_path: Path) -> Path:
    """What the old toolkit's ResNet example saves: quantizers where TensorRT wants them, the pooling's inside."""
    state = {}
    for key, value in calibrated.state_dict().items():
        if "branch_quantizer" in key or "output_quantizer" in key:
            continue
        key = key.replace("pool_quantizer", "avgpool._input_quantizer")
        if key.endswith("_input_quantizer._amax"):
            value = value.reshape(1)
        state[f"module.{key}"] = value.clone()
    path = tmp_path / "quant_resnet18-calibrated.pth"
    torch.save(state, path)
    return path


def fresh() -> nn.Module:
    torch.manual_seed(1)
    return qzoo.create_model("resnet18-w8a8", num_classes=10)


def test_outputs_are_those_of_the_calibrated_model(calibrated: nn.Module, old_file: Path) -> None:
    model = qzoo.load_calibrated(fresh(), old_file)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(model(x), calibrated(x))
    assert model.pool_quantizer.amax == calibrated.pool_quantizer.amax
    assert model.conv1.input_quantizer.amax.shape == ()
    assert not model.training


def test_a_state_dict_will_do(calibrated: nn.Module) -> None:
    model = qzoo.load_calibrated(fresh(), calibrated.state_dict())
    assert set(model.state_dict()) == set(calibrated.state_dict())


def test_ranges_that_the_file_has_not_are_errors_where_they_are_needed(old_file: Path) -> None:
    model = qzoo.load_calibrated(fresh(), old_file)
    qzoo.set_target(model, "onnxruntime")
    with pytest.raises(MissingRangeError, match=r"layer1\.0\.branch_quantizer"):
        model(torch.randn(1, 3, 32, 32))
    with pytest.raises(CheckpointError, match="branch_quantizer"):
        qzoo.save_pretrained(qzoo.set_target(model, "tensorrt"), old_file.parent / "c")


def test_what_does_not_fit_is_named(calibrated: nn.Module, old_file: Path) -> None:
    state = calibrated.state_dict()
    with pytest.raises(CheckpointError, match="was not calibrated"):
        qzoo.load_calibrated(fresh(), {k: v for k, v in state.items() if not k.endswith("_amax")})
    with pytest.raises(CheckpointError, match=r"no range.*conv1\._input_quantizer"):
        qzoo.load_calibrated(fresh(), {k: v for k, v in state.items() if k != "conv1._input_quantizer._amax"})
    with pytest.raises(CheckpointError, match=r"missing: fc.bias; unexpected: head.bias"):
        qzoo.load_calibrated(fresh(), {k.replace("fc.bias", "head.bias"): v for k, v in state.items()})
    state["fc._input_quantizer._amax"] = torch.tensor(float("nan"))
    with pytest.raises(CheckpointError, match=r"fc\._input_quantizer.*NaN"):
        qzoo.load_calibrated(fresh(), state)
    assert quantizers(fresh())["conv1._input_quantizer"].amax is None
