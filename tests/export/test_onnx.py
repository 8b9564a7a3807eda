"""The exported file: what is in it, that it computes the simulation, and what is refused."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import qzoo
from qzoo.deployment import deploy
from qzoo.errors import ExportError
from qzoo.export import export_onnx
from qzoo.export.formats import NEWEST_OPSET
from qzoo.export.lint import coverage, lint
from qzoo.models.resnet_cifar import CifarResNet
from qzoo.ptq.ranges import calibrate
from qzoo.quant import ops, quantize_
from qzoo.quant.fold import fold_batchnorm_
from qzoo.quantizers import set_target
from qzoo.runtimes import load


@pytest.fixture(scope="module")
def resnet(build) -> tuple[nn.Module, Tensor]:
    return build("resnet8", 28, in_channels=1)


@pytest.fixture(scope="module")
def exported(resnet, tmp_path_factory) -> Path:
    model, images = resnet
    return export_onnx(model, tmp_path_factory.mktemp("onnx") / "resnet8.onnx", example=images)


def constants(path: Path) -> dict[str, np.ndarray]:
    return {i.name: numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}


def test_weights_are_the_integers_of_the_simulation(resnet, exported: Path) -> None:
    folded = copy.deepcopy(resnet[0])
    fold_batchnorm_(folded, resnet[1])
    stored, checked = constants(exported), 0
    for name, layer in folded.named_modules():
        quantizer = getattr(layer, "_weight_quantizer", None)
        if quantizer is not None:
            expected = ops.quantize(layer.weight, quantizer.amax).numpy()
            found = stored[f"{name}.weight_quantized"]
            assert found.dtype == np.int8
            if name == "conv1":  # one channel, and three of zeros
                assert found.shape[1] == 4
                assert not found[:, 1:].any()
                found = found[:, :1]
            np.testing.assert_array_equal(found, expected)
            checked += 1
    assert checked == 10
    floats = [a.size for a in stored.values() if a.dtype == np.float32]
    assert max(floats) <= 64, "only biases and scales may be float"


def test_agrees_with_the_simulation(resnet, exported: Path) -> None:
    model, images = copy.deepcopy(resnet[0]), resnet[1]
    set_target(model, "onnxruntime")
    with torch.no_grad():
        expected = model(images)
    got = load(exported)(images)
    # Flipped roundings cascade, so this is a loose check; test_parity.py has the exact one.
    assert (got - expected).square().sum() < 0.01 * expected.square().sum()


def test_dynamic_and_fixed_batch(resnet, exported: Path, tmp_path: Path) -> None:
    model, images = resnet
    run = load(exported)
    assert run(images[:1]).shape == (1, 20)
    torch.testing.assert_close(run(images)[:1], run(images[:1]), rtol=0, atol=0)
    dim = onnx.load(exported).graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dim] == ["batch", 1, 28, 28]
    fixed = onnx.load(export_onnx(model, tmp_path / "one.onnx", example=images, batch=1))
    assert [d.dim_value for d in fixed.graph.input[0].type.tensor_type.shape.dim] == [1, 1, 28, 28]


def test_nodes_are_named_by_module_and_hold_no_paths(exported: Path) -> None:
    proto = onnx.load(exported)
    names = [node.name for node in proto.graph.node]
    assert len(set(names)) == len(names)
    assert "layer2.0.downsample.0/Conv" in names
    assert "layer1.0.branch_quantizer/QuantizeLinear" in names
    assert [i.name for i in proto.graph.input] == ["image"]
    assert [o.name for o in proto.graph.output] == ["logits"]
    assert b".py" not in proto.SerializeToString(), "the exporter's stack traces must not be in the file"
    facts = {p.key: p.value for p in proto.metadata_props}
    assert facts["qzoo.target"] == "onnxruntime"
    assert "qzoo_version" in facts


def test_translations_that_are_kept_change_nothing(
    resnet, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte the file of torch's exporter when it makes its own table; and that is its own again."""
    registry = pytest.importorskip("torch.onnx._internal.exporter._registration").ONNXRegistry
    assert "qzoo::fake_quantize" not in registry.from_torchlib().functions
    monkeypatch.setattr("qzoo.export.onnx._keep_translations", nullcontext)
    again = export_onnx(resnet[0], tmp_path / "again.onnx", example=resnet[1])
    assert again.read_bytes() == exported.read_bytes()


def test_scales_and_zero_points(resnet, exported: Path) -> None:
    """After ReLU uint8 from 0; signed tensors are uint8 around 128 for ONNX Runtime; weights int8 around 0."""
    proto, stored = onnx.load(exported), constants(exported)
    pairs = {n.name.split("/")[0]: n for n in proto.graph.node if n.op_type == "QuantizeLinear"}
    for place, zero in (("layer1.0.conv2._input_quantizer", 0), ("layer1.0.branch_quantizer", 128)):
        point = stored[pairs[place].input[2]]
        assert (point.dtype, int(point)) == (np.uint8, zero)
    quantizer = resnet[0].layer1[0].conv2._input_quantizer
    scale = stored[pairs["layer1.0.conv2._input_quantizer"].input[1]]
    assert scale == np.float32(quantizer.amax.numpy()) / np.float32(255)
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in stored:
            assert not stored[node.input[2]].any()


def test_caller_keeps_the_model(resnet, tmp_path: Path) -> None:
    model = copy.deepcopy(resnet[0]).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    switches = [(m._disabled, m.unsigned) for m in model.modules() if hasattr(m, "_disabled")]
    export_onnx(model, tmp_path / "x.onnx", example=resnet[1])
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert len(model.state_dict()) == len(before)
    assert switches == [(m._disabled, m.unsigned) for m in model.modules() if hasattr(m, "_disabled")]


def test_float_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CifarResNet(1).eval()
    images = torch.randn(4, 3, 16, 16)
    path = export_onnx(model, tmp_path / "float.onnx", example=images)
    assert not {n.op_type for n in onnx.load(path).graph.node} & {"QuantizeLinear", "BatchNormalization"}
    with torch.no_grad():
        torch.testing.assert_close(load(path)(images), model(images), rtol=1e-3, atol=1e-3)


def test_float_weights(resnet, exported: Path, tmp_path: Path) -> None:
    model, images = resnet
    path = export_onnx(model, tmp_path / "x.onnx", example=images, weights="float")
    assert constants(path)["layer1.0.conv1.weight"].dtype == np.float32
    torch.testing.assert_close(load(path)(images), load(exported)(images), rtol=0, atol=0)


def test_half_precision(tmp_path: Path, build) -> None:
    model, images = build("resnet8", 16)
    path = export_onnx(model.half(), tmp_path / "half.onnx", example=images)
    assert onnx.load(path).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    assert np.isfinite(load(path)(images.half()).numpy()).all()


def test_opset_asked_is_opset_written(resnet, exported: Path, tmp_path: Path) -> None:
    assert onnx.load(exported).opset_import[0].version == 18
    path = export_onnx(resnet[0], tmp_path / "x.onnx", example=resnet[1], opset=21)
    assert onnx.load(path).opset_import[0].version == 21


def test_refusals_name_what_to_do(resnet, tmp_path: Path) -> None:
    model, images = resnet
    path = tmp_path / "x.onnx"
    with pytest.raises(ExportError, match="13 was asked for"):
        export_onnx(model, path, example=images, opset=13)
    with pytest.raises(ExportError, match=rf"99 was asked for, but 18 to {NEWEST_OPSET} can be written"):
        export_onnx(model, path, example=images, opset=99)
    for opset in ("19", 19.0, True):
        with pytest.raises(TypeError, match="whole number of 18 to"):
            export_onnx(model, path, example=images, opset=opset)
    for example in (images.numpy(), (images,)):
        with pytest.raises(TypeError, match=r"must be a tensor, .* not (ndarray|tuple)"):
            export_onnx(model, path, example=example)
    with pytest.raises(ExportError, match="example has NaN"):
        export_onnx(model, path, example=images * float("nan"))
    with pytest.raises(ExportError, match=r"can't run the example, \[2, 5, 8, 8\]"):
        export_onnx(model, path, example=torch.zeros(1, 5, 8, 8))
    with pytest.raises(ExportError, match="is a folder"):
        export_onnx(model, tmp_path, example=images)
    with pytest.raises(TypeError, match=r"not 'resnet18'; qzoo\.create_model"):
        export_onnx("resnet18", path)
    with pytest.raises(ExportError, match="example="):
        export_onnx(model, path)
    with pytest.raises(ValueError, match="tensorrt"):
        export_onnx(model, path, example=images, target="tflite")
    with pytest.raises(ValueError, match="batch"):
        export_onnx(model, path, example=images, batch=0)
    with pytest.raises(ValueError, match="batch"):
        export_onnx(model, path, example=images, batch=True)
    bad = copy.deepcopy(model)
    bad.layer1[0].conv1._input_quantizer.reset_amax()
    with pytest.raises(ExportError, match=r"layer1\.0\.conv1\._input_quantizer"):
        export_onnx(bad, path, example=images)
    bad = copy.deepcopy(model)
    bad.layer1[0].conv2._input_quantizer.enable_calib()
    with pytest.raises(ExportError, match=r"calibrating.*layer1\.0\.conv2\._input_quantizer"):
        export_onnx(bad, path, example=images)
    assert list(tmp_path.iterdir()) == [], "a refused export must leave nothing behind"


class Wrapped(nn.Module):
    """A linear layer; its result in another form, or of two inputs."""

    def __init__(self, form) -> None:
        super().__init__()
        self.fc, self.form = nn.Linear(4, 3), form

    def forward(self, x: Tensor, **more: Tensor):
        return self.form(self.fc(x), **more)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda y: (y, y), "Wrapped returns a tuple of 2;.*one tensor"),
        (lambda y: [y], "a list of 1"),
        (lambda y: {"out": y, "aux": y}, "a dict of 'out', 'aux'"),
        (lambda y: None, "returns None"),
        (lambda y, z: y + z, "can't run the example, .* as its only input: .*missing 1 required"),
    ],
)
def test_anything_but_one_tensor_is_refused(tmp_path: Path, form, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        export_onnx(Wrapped(form), tmp_path / "m.onnx", example=torch.zeros(1, 4))
    assert list(tmp_path.iterdir()) == []


def fails(*args: object) -> None:
    raise KeyError("of the caller")


def scales(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return 0.5 * output


@pytest.mark.parametrize(("hook", "message"), [(fails, "KeyError: 'of the"), (scales, "hooks of its own")])
def test_hooks_that_stand_in_the_way(tmp_path: Path, hook, message: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[1].running_mean.fill_(1)
    model[0].register_forward_hook(hook)
    with pytest.raises(ExportError, match=message):
        export_onnx(model, tmp_path / "m.onnx", example=torch.randn(1, 3, 8, 8))


def test_what_can_not_be_copied_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    model.seen = model(torch.zeros(1, 4))
    with pytest.raises(ExportError, match="Sequential can't be copied"):
        export_onnx(model, tmp_path / "m.onnx", example=torch.zeros(1, 4))


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_the_module_in_a_wrapper(tmp_path: Path, wrap) -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
    path = export_onnx(wrap(model), tmp_path / "m.onnx", example=x)
    with torch.no_grad():
        torch.testing.assert_close(load(path)(x), model(x))
    assert {node.name for node in onnx.load(path).graph.node} == {"0/Gemm"}, "no wrapper in the names"


@pytest.mark.parametrize("opset", [24, 25])
def test_the_newest_opsets(resnet, exported: Path, tmp_path: Path, opset: int) -> None:
    """onnx has newer ones, which the exporter does not write rightly."""
    if opset > NEWEST_OPSET:
        pytest.skip("not in this onnx")
    path = export_onnx(resnet[0], tmp_path / "m.onnx", example=resnet[1], opset=opset)
    assert onnx.load(path).opset_import[0].version == opset
    assert torch.equal(load(path)(resnet[1]), load(exported)(resnet[1]))


def test_nearly_dead_channels_keep_their_bias(build, tmp_path: Path) -> None:
    """A channel of (nearly) zero weights is its bias alone, which runtimes round in units of the weight scale."""
    model, images = build("resnet8", 16)
    with torch.no_grad():
        conv, norm = model.conv1, model.bn1
        conv.weight[0] = 0.0
        conv.weight[1] *= 1e-9
        norm.bias[:2] = 1.0
        conv.weight_quantizer.amax = conv.weight.abs().amax((1, 2, 3), keepdim=True).numpy()
    set_target(model, "onnxruntime")
    with torch.no_grad():
        expected = model(images)
    got = load(export_onnx(model, tmp_path / "m.onnx", target="onnxruntime", example=images))(images)
    assert (got - expected).square().sum() < 0.01 * expected.square().sum()


def test_a_model_that_runs_mostly_in_float_is_written_with_a_warning(tmp_path: Path) -> None:
    """A SiLU between layer and quantizer keeps ONNX Runtime's layers in float, not OpenVINO's."""
    torch.manual_seed(0)
    layers = [make for _ in range(2) for make in (nn.Conv2d(8, 8, 3), nn.SiLU())]
    images = torch.randn(2, 8, 12, 12)
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    quantize_(model)
    calibrate(model, [images], method="max", progress=False)
    path = tmp_path / "model.onnx"
    with pytest.warns(
        UserWarning, match=r"Sequential: only 0 % .*0 of 2 layers.* in onnxruntime; `qzoo lint"
    ):
        export_onnx(model, path, example=images)
    with pytest.warns(UserWarning, match=r"model\.onnx: only 0 %"):
        deploy(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_onnx(model, path, example=images, target="openvino")
        assert coverage(path, "openvino").share == 1


def test_an_adaptive_pooling_that_changes_nothing_is_left_out(tmp_path: Path) -> None:
    layers = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(6),
        nn.Flatten(),
        nn.Linear(288, 4),
    ]
    image = torch.randn(2, 3, 6, 6)
    model = qzoo.quantize(nn.Sequential(*layers).eval(), image)
    qzoo.calibrate(model, [image], method="max")
    path = export_onnx(model, tmp_path / "model.onnx", example=image)
    assert "AveragePool" not in {node.op_type for node in onnx.load(path).graph.node}
    assert lint(path, "onnxruntime") == []
