"""Simulation and ONNX Runtime agree to the bit when every scale is a power of two, and everything runs in int8.

All architectures of the zoo; transformers are in ``test_parity_vit.py``.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from exact import make_exact_

from qzoo.export import export_onnx, lint
from qzoo.quant.nn import QuantConv2d, TensorQuantizer
from qzoo.registry import list_architectures
from qzoo.runtimes.ort import OnnxRuntimeRunner
from qzoo.runtimes.ov import OpenVinoRunner

LEVELS = ("none", "basic", "extended", "all")

# Model, image size, input channels, then how many convolutions and adds the network has.
MODELS = [
    ("resnet20", 28, 1, 21, 9),
    ("resnet18", 64, 3, 20, 8),
    ("mobilenet_v2", 64, 3, 52, 10),
    ("tf_efficientnet_lite0", 64, 3, 49, 9),
]
LARGE = [
    ("resnet34", 64, 3, 36, 16),
    ("resnet50", 64, 3, 53, 16),
    ("resnet101", 64, 3, 104, 33),
    ("resnet152", 64, 3, 155, 50),
    ("resnext50_32x4d", 64, 3, 53, 16),
    ("wide_resnet50_2", 64, 3, 53, 16),
    ("resnext101_32x8d", 64, 3, 104, 33),
    ("resnext101_64x4d", 64, 3, 104, 33),
    ("wide_resnet101_2", 64, 3, 104, 33),
    ("resnet32", 32, 3, 33, 15),
    ("resnet44", 32, 3, 45, 21),
    ("resnet56", 32, 3, 57, 27),
    ("resnet110", 32, 3, 111, 54),
    ("efficientnet_lite0", 64, 3, 49, 9),
    ("efficientnet_lite1", 64, 3, 64, 14),
    ("efficientnet_lite2", 64, 3, 64, 14),
    ("efficientnet_lite3", 64, 3, 73, 17),
    ("efficientnet_lite4", 64, 3, 91, 23),
    ("tf_efficientnet_lite1", 75, 3, 64, 14),
    ("tf_efficientnet_lite2", 65, 3, 64, 14),
    ("tf_efficientnet_lite3", 70, 3, 73, 17),
    ("tf_efficientnet_lite4", 64, 3, 91, 23),
]
ALL = MODELS + [pytest.param(*row, marks=pytest.mark.slow) for row in LARGE]


def test_every_architecture_of_these_families_is_here() -> None:
    families = (
        "resnet",
        "resnext",
        "wide_resnet",
        "mobilenet_v2",
        "efficientnet_lite",
        "tf_efficientnet_lite",
    )
    assert {row[0] for row in MODELS + LARGE} == {n for n in list_architectures() if n.startswith(families)}


@pytest.mark.parametrize(("name", "size", "channels", "convs", "adds"), ALL)
def test_exact_at_every_level_and_all_int8(
    build, tmp_path: Path, name: str, size: int, channels: int, convs: int, adds: int
) -> None:
    model, images = build(name, size, channels)
    make_exact_(model, "onnxruntime", images)
    with torch.no_grad():
        expected = model(images)
    assert len(expected.unique()) > 5, "a constant output would agree with anything"
    path = export_onnx(model, tmp_path / "model.onnx", example=images)
    assert [str(finding) for finding in lint(path, "onnxruntime")] == []
    for level in LEVELS:
        got = OnnxRuntimeRunner(path, level=level, optimized=tmp_path / "optimized.onnx")(images)
        assert (got - expected).abs().max().item() == 0.0, level
    ops = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    ops.pop("NhwcMaxPool", None)
    assert ops.pop("Pad") == 1, "channels of zeros up to four, for the first convolution's kernel"
    assert ops.pop("Transpose") == 2  # into the int8 kernels' channels-last layout, and back
    expected_ops = {
        "QuantizeLinear": 1,
        "QLinearConv": convs,
        "QLinearAdd": adds,
        "QLinearGlobalAveragePool": 1,
    }
    assert ops == {**expected_ops, "Reshape": 1, "QGemm": 1, "DequantizeLinear": 1}


@pytest.mark.parametrize("target", ["tensorrt", "openvino"])
def test_other_targets_are_exact_too(build, tmp_path: Path, target: str) -> None:
    """ONNX Runtime runs any target's file, if not as fast."""
    model, images = build("resnet8", 28)
    make_exact_(model, target, images)
    with torch.no_grad():
        expected = model(images)
    path = export_onnx(model, tmp_path / "model.onnx", example=images, target=target)
    for level in LEVELS:
        assert torch.equal(OnnxRuntimeRunner(path, level=level)(images), expected), level


@pytest.mark.parametrize("scheme", ["w4a8", "w6a8"])
def test_fewer_weight_bits(build, tmp_path: Path, scheme: str) -> None:
    model, images = build("resnet8", 28, 1, scheme)
    make_exact_(model, "onnxruntime", images)
    with torch.no_grad():
        expected = model(images)
    path = export_onnx(model, tmp_path / "model.onnx", example=images)
    assert torch.equal(OnnxRuntimeRunner(path)(images), expected)


OPENVINO = [
    ("resnet8", 16),
    pytest.param("resnet18", 64, marks=pytest.mark.slow),
    pytest.param("resnet50", 64, marks=pytest.mark.slow),
    pytest.param("mobilenet_v2", 64, marks=pytest.mark.slow),
    pytest.param("tf_efficientnet_lite0", 64, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "size"), OPENVINO)
def test_openvino_is_exact_and_all_int8(build, tmp_path: Path, name: str, size: int) -> None:
    """On images that lie on the input's levels: OpenVINO rounds the image itself with one multiplication more."""
    pytest.importorskip("openvino")
    model, images = build(name, size)
    make_exact_(model, "openvino", images)
    first = next(m for m in model.modules() if isinstance(m, TensorQuantizer) and m.role == "input")
    step = first.step_size.item()
    images = (images / step).round() * step
    with torch.no_grad():
        expected = model(images)
    path = export_onnx(model, tmp_path / "model.onnx", example=images, target="openvino")
    assert [str(finding) for finding in lint(path, "openvino")] == []
    run = OpenVinoRunner(path)
    assert torch.equal(run(images), expected)
    layers = [op.get_rt_info() for op in run.compiled.get_runtime_model().get_ordered_ops()]
    convolutions = [
        i["runtimePrecision"].astype(str) for i in layers if i["layerType"].astype(str) == "Convolution"
    ]
    count = sum(isinstance(m, QuantConv2d) for m in model.modules())
    assert len(convolutions) == count
    assert set(convolutions) <= {"u8", "i8"}


LOW_BITS = [
    ("resnet8", 28, 1, "w4a4"),
    ("resnet8", 28, 1, "w3a3"),
    pytest.param("resnet18", 64, 3, "w4a4", marks=pytest.mark.slow),
    pytest.param("resnet50", 64, 3, "w4a4", marks=pytest.mark.slow),
    pytest.param("mobilenet_v2", 64, 3, "w4a4", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "size", "channels", "scheme"), LOW_BITS)
def test_fewer_activation_bits_run_in_int8(
    build, tmp_path: Path, name: str, size: int, channels: int, scheme: str
) -> None:
    """Each layer is followed by one Q, and the Clip to fewer levels is one of integers."""
    model, images = build(name, size, channels, scheme)
    make_exact_(model, "onnxruntime", images)
    with torch.no_grad():
        expected = model(images)
    path = export_onnx(model, tmp_path / "model.onnx", example=images)
    assert [str(finding) for finding in lint(path, "onnxruntime")] == []
    for level in LEVELS:
        run = OnnxRuntimeRunner(path, level=level, optimized=tmp_path / "optimized.onnx")
        assert torch.equal(run(images), expected), level
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    ops = Counter(node.op_type for node in graph.node)
    convolutions = sum(isinstance(m, QuantConv2d) for m in model.modules())
    skips = sum(isinstance(m, TensorQuantizer) and m.role == "residual" for m in model.modules())
    assert {"Conv", "FusedConv", "Add", "Relu"}.isdisjoint(ops)
    # What goes into a block in few bits and to its skip in 8 is computed twice, once for each.
    assert convolutions <= ops["QLinearConv"]
    assert skips <= ops["QLinearAdd"]
    assert convolutions + skips < ops["QLinearConv"] + ops["QLinearAdd"] <= convolutions + 2 * skips
    assert (ops["QuantizeLinear"], ops["DequantizeLinear"]) == (1, 1)
    clips = {name for node in graph.node if node.op_type == "Clip" for name in node.input[1:]}
    assert {i.data_type for i in graph.initializer if i.name in clips} == {onnx.TensorProto.UINT8}
