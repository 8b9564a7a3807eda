"""Calibrated state dicts of the old toolkit: its key names, its shapes, its placement."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torchvision
from small_data import calibrate_as_in_the_guide
from torch import nn

import qzoo
from qzoo.accuracy import sqnr
from qzoo.errors import CheckpointError, MissingRangeError
from qzoo.quant import initialize
from qzoo.quantizers import quantizers
from qzoo.scheme import Scheme


@pytest.fixture(scope="module")
def calibrated() -> nn.Module:
    torch.manual_seed(0)
    model = qzoo.create_model("resnet18-w8a8", num_classes=10, target="tensorrt")
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


def test_outputs_are_those_of_the_old_model(calibrated: nn.Module, old_file: Path) -> None:
    """With the quantizer before the average pooling, which the target tensorrt has not."""
    model = qzoo.load_calibrated(fresh(), old_file)
    old = copy.deepcopy(calibrated)
    old.pool_quantizer.enable()
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(model(x), old(x))
        assert not torch.equal(old(x), calibrated(x))
    assert model.pool_quantizer.amax == calibrated.pool_quantizer.amax
    assert model.conv1.input_quantizer.amax.shape == ()
    assert not model.training


@pytest.fixture
def by_the_guide() -> nn.Module:
    """A torchvision network built under initialize() and calibrated: no quantizers at the adds."""
    torch.manual_seed(0)
    with initialize():
        model = torchvision.models.resnet18(num_classes=10).eval()
    calibrate_as_in_the_guide(model, torch.randn(2, 3, 32, 32))
    return model


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_the_file_of_the_old_guide_loads_as_it_was(
    by_the_guide: nn.Module, target: str, tmp_path: Path, caplog
) -> None:
    with torch.no_grad():  # a range that the old toolkit's -128 reaches beyond
        by_the_guide.conv1._weight_quantizer._amax[0] *= 0.5
    torch.save(by_the_guide.state_dict(), tmp_path / "quant_resnet18-calibrated.pth")
    model = qzoo.create_model("resnet18", quantize=Scheme(target=target), num_classes=10)
    with caplog.at_level("WARNING"):
        qzoo.load_calibrated(model, tmp_path / "quant_resnet18-calibrated.pth")
    assert "no ranges for 17 quantizers, which stay off: layer1.0.residual_quantizer" in caplog.text
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = by_the_guide(x)
        assert torch.equal(model(x), expected)
        assert torch.equal(qzoo.set_target(model, "tensorrt")(x), expected)


def test_the_export_of_such_a_file_has_its_placement(by_the_guide: nn.Module, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = qzoo.load_calibrated(fresh(), by_the_guide.state_dict())
    x = torch.randn(1, 3, 32, 32)
    path = qzoo.export_onnx(model, tmp_path / "m.onnx", target="tensorrt", example=x)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    with torch.inference_mode():
        assert sqnr(by_the_guide(x), found) > 25
    with pytest.raises(CheckpointError, match="branch_quantizer"):
        qzoo.save_pretrained(model, tmp_path / "c")


def test_a_file_with_some_of_a_role_is_refused(calibrated: nn.Module) -> None:
    state = {k: v for k, v in calibrated.state_dict().items() if k != "layer1.0.residual_quantizer._amax"}
    with pytest.raises(CheckpointError, match=r"no range.*layer1\.0\.residual_quantizer"):
        qzoo.load_calibrated(fresh(), state)


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


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("more", torch.zeros(1).expand(1 << 40), "unexpected: more"),
        ("fc.bias", torch.zeros(1).expand(1 << 40), r"misshaped: fc\.bias \[1099511627776\]"),
        ("fc.bias", torch.zeros(10).to_sparse(), r"fc\.bias must be dense tensors with values"),
        ("fc.bias", torch.zeros(10, device="meta"), r"fc\.bias must be dense tensors with values"),
        ("conv1._input_quantizer._amax", torch.ones(1).to_sparse(), "must be dense tensors with values"),
    ],
)
def test_tensors_that_no_model_has_take_no_memory(
    old_file: Path, key: str, value: torch.Tensor, message: str
) -> None:
    """A file of a few kilobytes may name tensors of terabytes: one value, and steps of nothing."""
    torch.save({**torch.load(old_file), key: value}, old_file)
    for source in (old_file, torch.load(old_file)):
        with pytest.raises(CheckpointError, match=message):
            qzoo.load_calibrated(fresh(), source)
