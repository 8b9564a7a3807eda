"""Number formats beside int8: what is in the file, that ONNX Runtime computes the simulation, what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exact import make_exact_
from onnx import TensorProto, numpy_helper
from qdq_graphs import optimized_ops
from small_data import calibrate_as_in_the_guide
from torch import Tensor, nn

from qzoo.errors import ExportError
from qzoo.export import check, export_onnx, lint
from qzoo.quant import nn as qnn
from qzoo.quant.onnx_translation import custom_translation_table
from qzoo.quant.tensor_quant import QuantDescriptor
from qzoo.runtimes import load


def net(
    weight: QuantDescriptor, activation: QuantDescriptor, dtype=torch.float32
) -> tuple[nn.Module, Tensor]:
    """Convolution, ReLU, pooling, linear; ranges of random images."""
    torch.manual_seed(0)
    conv = qnn.QuantConv2d(8, 16, 3, padding=1, quant_desc_weight=weight, quant_desc_input=activation)
    fc = qnn.QuantLinear(16, 8, quant_desc_weight=weight, quant_desc_input=activation)
    model = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), fc)
    images = torch.randn(4, 8, 6, 6)
    calibrate_as_in_the_guide(model, images)
    return model.to(dtype).eval(), images.to(dtype)


def float8_pair(fmt: str, between: nn.Module) -> tuple[nn.Module, Tensor]:
    """Two convolutions with something between them."""
    desc, weight = QuantDescriptor(float_format=fmt), QuantDescriptor(axis=0, float_format=fmt)
    first = qnn.QuantConv2d(8, 16, 3, quant_desc_weight=weight, quant_desc_input=desc)
    second = qnn.QuantConv2d(16, 8, 1, quant_desc_weight=weight, quant_desc_input=desc)
    model, images = nn.Sequential(first, between, second, nn.Flatten()), 5 * torch.randn(4, 8, 6, 6)
    calibrate_as_in_the_guide(model, images)
    return model.eval(), images


class Rows(nn.Module):
    """All rows but the first: a Slice."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, 1:]


def simulated(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)


def close(a: Tensor, b: Tensor, db: float = 35.0) -> bool:
    """A rounding or two may flip."""
    return bool((a.double() - b.double()).square().sum() < 10 ** (-db / 10) * b.double().square().sum())


def initializers(path: Path) -> dict[str, onnx.TensorProto]:
    return {i.name: i for i in onnx.load(path).graph.initializer}


def opset(path: Path) -> int:
    return onnx.load(path).opset_import[0].version


@pytest.mark.parametrize("bits", [2, 3, 6])
def test_narrow_weights_and_activations(tmp_path: Path, bits: int) -> None:
    """int8 with the format's scale: the levels of the weights, and activations clipped to theirs."""
    model, images = net(QuantDescriptor(bits, axis=0, narrow_range=True), QuantDescriptor(bits))
    path = export_onnx(model, tmp_path / "m.onnx", example=images)
    assert opset(path) == 18
    q = numpy_helper.to_array(initializers(path)["0.weight_quantized"])
    assert (q.dtype, np.abs(q).max()) == (np.dtype(np.int8), 2 ** (bits - 1) - 1)
    assert [n.op_type for n in onnx.load(path).graph.node].count("Clip") == 2
    assert close(load(path)(3 * images), simulated(model, 3 * images)), "clipping included"


@pytest.mark.parametrize("bits", [12, 16])
def test_wide_integers(tmp_path: Path, bits: int) -> None:
    model, images = net(QuantDescriptor(bits, axis=0, narrow_range=True), QuantDescriptor(bits))
    path = export_onnx(model, tmp_path / "m.onnx", example=images)
    assert opset(path) == 21
    q = numpy_helper.to_array(initializers(path)["0.weight_quantized"])
    assert (q.dtype, np.abs(q).max()) == (np.dtype(np.int16), 2 ** (bits - 1) - 1)
    assert close(load(path)(3 * images), simulated(model, 3 * images), 60)


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_float8(tmp_path: Path, fmt: str) -> None:
    desc = QuantDescriptor(float_format=fmt)
    model, images = net(QuantDescriptor(axis=0, float_format=fmt), desc)
    path = export_onnx(model, tmp_path / "m.onnx", example=images)
    assert opset(path) == 19
    kind = TensorProto.FLOAT8E4M3FN if fmt == "e4m3" else TensorProto.FLOAT8E5M2
    assert initializers(path)["0.weight_quantized"].data_type == kind
    assert close(load(path)(3 * images), simulated(model, 3 * images))
    assert "activation-type" in {f.rule for f in lint(path, "onnxruntime")}


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
@pytest.mark.parametrize(
    "between",
    [nn.ReLU(), nn.ReLU6(), nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), nn.Sequential(nn.ReLU(), Rows())],
)
def test_activations_before_float8_are_computed(tmp_path: Path, fmt: str, between: nn.Module) -> None:
    """ONNX Runtime drops a ReLU before a Q to float8, whose lowest value is below zero, and fails on a Clip."""
    model, images = float8_pair(fmt, between)
    path = export_onnx(model, tmp_path / "m.onnx", example=images)
    assert close(load(path)(images), simulated(model, images))


def test_float8_for_tensorrt_is_checked_as_written(tmp_path: Path) -> None:
    model, images = float8_pair("e4m3", nn.ReLU())
    path = export_onnx(model, tmp_path / "m.onnx", example=images, target="tensorrt")
    assert check(path, model, images, runtime="onnxruntime").sqnr_db > 60
    assert not close(load(path)(images), simulated(model, images)), "no ReLU is dropped any more"


def test_int4_weights_are_packed_and_exact(build, tmp_path: Path) -> None:
    model, images = build("resnet8", 16, scheme="w4a8")
    make_exact_(model, "onnxruntime", images)
    wide = export_onnx(model, tmp_path / "8.onnx", example=images)
    path = export_onnx(model, tmp_path / "4.onnx", example=images, weights="int4")
    assert opset(path) == 21
    stored = initializers(path)["layer3.0.conv2.weight_quantized"]
    assert (stored.data_type, len(stored.raw_data)) == (TensorProto.INT4, 64 * 64 * 9 // 2)
    assert path.stat().st_size < 0.62 * wide.stat().st_size
    assert torch.equal(load(path)(images), simulated(model, images))
    assert "narrow-convolution" in {f.rule for f in lint(path)}


@pytest.mark.parametrize("bits", [4, 8])
def test_ranges_per_block(tmp_path: Path, bits: int) -> None:
    desc = QuantDescriptor(bits, axis=0, block=(1, 4), narrow_range=True)
    model, images = net(desc, QuantDescriptor(8))
    path = export_onnx(model, tmp_path / "m.onnx", example=images, weights="int4" if bits == 4 else "int8")
    assert opset(path) == 21
    blocked = [n for n in onnx.load(path).graph.node if any(a.name == "block_size" for a in n.attribute)]
    assert {a.i for n in blocked for a in n.attribute if a.name == "block_size"} == {4}
    stored = initializers(path)
    sizes = {tuple(stored[n.input[0]].dims): tuple(stored[n.input[1]].dims) for n in blocked}
    assert sizes == {(16, 8, 3, 3): (16, 2, 3, 3), (8, 16): (8, 4)}
    kinds = {stored[n.input[0]].data_type for n in blocked}
    assert kinds == {TensorProto.INT4 if bits == 4 else TensorProto.INT8}
    assert close(load(path)(images), simulated(model, images))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_in_int8(build, tmp_path: Path, dtype: torch.dtype) -> None:
    model, images = build("resnet8", 16)
    narrow = copy.deepcopy(model).to(dtype)
    path = export_onnx(narrow, tmp_path / "half.onnx", example=images)
    graph = onnx.load(path).graph
    kind = TensorProto.FLOAT16 if dtype == torch.float16 else TensorProto.BFLOAT16
    assert [v.type.tensor_type.elem_type for v in (graph.input[0], graph.output[0])] == [kind, kind]
    assert {i.data_type for i in graph.initializer} <= {
        TensorProto.FLOAT,
        TensorProto.INT8,
        TensorProto.UINT8,
        7,
    }
    assert lint(path, "onnxruntime") == []
    ops = optimized_ops(path)
    assert (ops["QLinearConv"], ops["QLinearAdd"], ops["Conv"]) == (9, 3, 0)
    assert next(narrow.parameters()).dtype == dtype
    if dtype == torch.float16:
        # The widened model computes the same function more precisely.
        assert close(load(path)(images.half()), simulated(narrow.float(), images.half().float()), 15)


def test_float16_model_without_quantizers_stays_float16(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).half()
    path = export_onnx(model, tmp_path / "m.onnx", example=torch.randn(1, 3, 8, 8))
    assert {i.data_type for i in onnx.load(path).graph.initializer} == {TensorProto.FLOAT16}


INT8 = QuantDescriptor(8)


@pytest.mark.parametrize(
    ("weight", "activation", "options", "message"),
    [
        (INT8, QuantDescriptor(float_format="e4m3"), {"opset": 18}, r"opset 18 .*19 .*8-bit floating"),
        (INT8, QuantDescriptor(16), {"opset": 20}, r"opset 20 .*21 .*16 bits \(0\._input"),
        (QuantDescriptor(4, axis=0, narrow_range=True), INT8, {"weights": "int4", "opset": 19}, "21.*int4"),
        (QuantDescriptor(8, axis=0, block=(1, 4)), INT8, {"opset": 18}, "range per block"),
        (QuantDescriptor(8, axis=0, narrow_range=True), INT8, {"weights": "int4"}, "no layer has weights"),
        (INT8, QuantDescriptor(float_format="e5m2"), {"target": "tensorrt"}, r"0\._input_quantizer is E5M2"),
        (INT8, QuantDescriptor(float_format="e4m3"), {"target": "openvino"}, "OpenVINO"),
        (INT8, QuantDescriptor(16), {"target": "tensorrt"}, "16 bits"),
        (INT8, QuantDescriptor(16), {"target": "openvino"}, "16 bits"),
        (INT8, QuantDescriptor(20), {}, "2 to 16 bits"),
        (INT8, QuantDescriptor(8, axis=1), {}, r"0\._input_quantizer has several ranges.*axis=None"),
        (INT8, QuantDescriptor(8, axis=1), {"target": "openvino"}, r"0\._input_quantizer has several ranges"),
        (
            QuantDescriptor(8, axis=(0, 1)),
            INT8,
            {},
            r"0\._weight_quantizer has several ranges along two axes",
        ),
    ],
)
def test_refused_before_the_export(tmp_path: Path, monkeypatch, weight, activation, options, message) -> None:
    model, images = net(weight, activation)
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: pytest.fail("was exported"))
    with pytest.raises(ExportError, match=message):
        export_onnx(model, tmp_path / "m.onnx", example=images, **options)
    assert list(tmp_path.iterdir()) == []


def test_ranges_of_input_channels_and_batchnorm(tmp_path: Path, monkeypatch) -> None:
    """They can be written, but a BatchNorm that is folded has a range for every pair of channels as its result."""
    conv = qnn.QuantConv2d(8, 16, 3, quant_desc_weight=QuantDescriptor(8, axis=1), quant_desc_input=INT8)
    model, images = nn.Sequential(conv, nn.Flatten()).eval(), torch.randn(4, 8, 6, 6)
    calibrate_as_in_the_guide(model, images)
    path = export_onnx(model, tmp_path / "m.onnx", example=images)
    assert close(load(path)(images), simulated(model, images))
    model.insert(1, nn.BatchNorm2d(16).eval())
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: pytest.fail("was exported"))
    with pytest.raises(ExportError, match=r"per input channel: 0\._weight_quantizer;.*axis=0"):
        export_onnx(model, tmp_path / "x.onnx", example=images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("desc", "version"), [(INT8, 18), (QuantDescriptor(float_format="e4m3"), 19)])
def test_exported_by_hand(tmp_path: Path, desc: QuantDescriptor, version: int, dtype: torch.dtype) -> None:
    """torch.onnx.export with the translation table, without qzoo.export_onnx."""
    model, images = net(desc, desc, dtype)
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        opset_version=version,
        dynamic_shapes=({0: "batch"},),
        custom_translation_table=custom_translation_table(),
        verbose=False,
    )
    path = tmp_path / "m.onnx"
    program.save(path)
    kinds = [n.op_type for n in onnx.load(path).graph.node]
    assert kinds.count("QuantizeLinear") == kinds.count("DequantizeLinear") == 4
    assert close(load(path)(images), simulated(model, images), 25 if dtype == torch.float16 else 35)
