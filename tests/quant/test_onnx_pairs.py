"""Q/DQ pairs in exported graphs, checked in ONNX Runtime."""

import io
import logging

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from small_data import calibrate_as_in_the_guide
from torch import nn

from qzoo.errors import ExportError
from qzoo.quant import TensorQuantizer, calib, enable_onnx_export, quantize_
from qzoo.quant import nn as qnn
from qzoo.quant.onnx_translation import custom_translation_table
from qzoo.quant.tensor_quant import QuantDescriptor

pytestmark = pytest.mark.filterwarnings("ignore")

BOTH = pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])


def model(dtype=torch.float32, weight=None, activation=None):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
    quantize_(layers, quant_desc_weight=weight, quant_desc_input=activation)
    calibrate_as_in_the_guide(layers, torch.randn(4, 16))
    return layers.to(dtype)


def exported(layers, x, **kwargs):
    buffer = io.BytesIO()
    with enable_onnx_export():
        torch.onnx.export(layers, (x,), buffer, **kwargs)
    return onnx.load_from_string(buffer.getvalue())


def run(graph, x):
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def count(graph, kind):
    return sum(node.op_type == kind for node in graph.graph.node)


def cosine_distance(a, b):
    a, b = np.asarray(a, dtype=np.float64).ravel(), np.asarray(b, dtype=np.float64).ravel()
    return 1 - a @ b / np.sqrt((a @ a) * (b @ b))


@BOTH
@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_int8_runs_in_onnxruntime(dtype, axis, dynamo):
    layers = model(dtype, QuantDescriptor(axis=axis))
    x = torch.randn(4, 16).to(dtype)
    graph = exported(layers, x, dynamo=dynamo, opset_version=17 if not dynamo else 18)
    assert count(graph, "QuantizeLinear") == count(graph, "DequantizeLinear") == 6
    axes = [
        a.i
        for n in graph.graph.node
        if n.op_type == "QuantizeLinear"
        for a in n.attribute
        if a.name == "axis"
    ]
    assert [a for a in axes if a != 1] == ([0] * 3 if axis == 0 else [])
    # Both sides accumulate float16 products in their own way, and a rounding may flip.
    assert cosine_distance(run(graph, x), layers(x).detach()) < (1e-6 if dtype == torch.float32 else 1e-4)


@BOTH
def test_bfloat16_is_cast_around_the_pair(dynamo):
    layers = model(torch.bfloat16)
    graph = exported(layers, torch.randn(4, 16).bfloat16(), dynamo=dynamo)
    assert count(graph, "QuantizeLinear") == 6
    assert count(graph, "Cast") >= 6


def test_no_dynamo_argument_as_old_scripts_call_it():
    layers = model()
    x = torch.randn(4, 16)
    graph = exported(layers, x, opset_version=17, do_constant_folding=True)
    assert cosine_distance(run(graph, x), layers(x).detach()) < 1e-6


@BOTH
def test_use_fb_fake_quant_leads_to_the_same_pairs(dynamo, monkeypatch):
    layers = model()
    x = torch.randn(4, 16)
    monkeypatch.setattr(TensorQuantizer, "use_fb_fake_quant", True)
    buffer = io.BytesIO()
    torch.onnx.export(layers, (x,), buffer, dynamo=dynamo)
    assert count(onnx.load_from_string(buffer.getvalue()), "QuantizeLinear") == 6


@BOTH
def test_unsigned_transposed_and_zero_ranges(dynamo):
    layers = nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(3, 4, 3))
    quantize_(layers, quant_desc_input=QuantDescriptor(unsigned=True))
    layers[1].weight.data[:, 1] = 0
    x = torch.randn(2, 3, 5, 5)
    calibrate_as_in_the_guide(layers, x)
    assert layers[1].weight_quantizer.amax[0, 1].item() == 0
    graph = exported(layers, x, dynamo=dynamo)
    values = {i.name: onnx.numpy_helper.to_array(i) for i in graph.graph.initializer}
    for node in graph.graph.node:
        for output, attribute in ((node.output, a) for a in node.attribute if node.op_type == "Constant"):
            values[output[0]] = onnx.numpy_helper.to_array(attribute.t)
    pairs = [n for n in graph.graph.node if n.op_type == "QuantizeLinear"]
    zero_types = {values[n.input[2]].dtype.name for n in pairs}
    assert zero_types == {"int8", "uint8"}
    scales = next(values[n.input[1]] for n in pairs if values[n.input[1]].ndim == 1)
    assert scales[1] == 1
    assert [a.i for n in pairs for a in n.attribute if a.name == "axis" and values[n.input[1]].ndim == 1] in (
        [1],
        [],
    )
    np.testing.assert_allclose(run(graph, x), layers(x).detach(), rtol=1e-4, atol=1e-5)


@BOTH
@pytest.mark.parametrize("convolution", [False, True])
def test_e4m3(convolution, dynamo):
    desc = QuantDescriptor((4, 3))
    if convolution:
        layers = nn.Sequential(nn.Conv2d(3, 4, 3))
        x = torch.randn(2, 3, 5, 5)
        quantize_(layers, quant_desc_input=desc, quant_desc_weight=desc)
        calibrate_as_in_the_guide(layers, x)
    else:
        layers, x = model(torch.float16, desc, desc), torch.randn(4, 16).half()
    if convolution and not dynamo:
        with pytest.raises(AssertionError, match="dynamo=True"):
            exported(layers, x, dynamo=dynamo)
        return
    graph = exported(layers, x, dynamo=dynamo)
    found = [n for n in graph.graph.node if n.domain == "trt"]
    assert [n.op_type for n in found[:2]] == ["TRT_FP8QuantizeLinear", "TRT_FP8DequantizeLinear"]
    assert len(found) == (4 if convolution else 12)


def test_a_translated_program_has_a_dynamic_batch():
    layers = model(weight=QuantDescriptor(axis=0))
    x = torch.randn(4, 16)
    program = torch.export.export(layers, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    written = torch.onnx.export(program, custom_translation_table=custom_translation_table())
    graph = written.model_proto
    assert count(graph, "QuantizeLinear") == 6
    more = torch.randn(7, 16)
    assert cosine_distance(run(graph, more), layers(more).detach()) < 1e-6


def test_powers_of_two_agree_to_the_last_bit():
    layers = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False))
    quantize_(layers)
    layers[0].input_quantizer.amax = 127 / 64
    layers[0].weight_quantizer.amax = (127 / 256 * torch.ones(4, 1, 1, 1)).numpy()
    x = torch.randn(2, 3, 6, 6)
    graph = exported(layers, x, dynamo=True)
    np.testing.assert_array_equal(run(graph, x), layers(x).detach().numpy())


# Refusals


@pytest.mark.parametrize(
    ("desc", "message", "dynamo"),
    [
        (QuantDescriptor(4), "Only INT8 ONNX export is supported", True),
        (QuantDescriptor(4), "Only INT8 ONNX export is supported", False),
        (QuantDescriptor(narrow_range=True), "narrow range", False),
        (QuantDescriptor(axis=(0, 1)), "one axis", False),
        (
            QuantDescriptor((4, 3), axis=0),
            "E4M3 supports ONNX export only for per-tensor quantization",
            False,
        ),
    ],
)
def test_formats_that_onnx_lacks(desc, message, dynamo):
    with pytest.raises(AssertionError, match=message):
        exported(model(weight=desc), torch.randn(4, 16), dynamo=dynamo)


@BOTH
def test_uncalibrated_is_refused_inside(dynamo):
    layers = nn.Sequential(qnn.QuantLinear(16, 4))
    with pytest.raises(AssertionError, match="Quantizer has not been calibrated"):
        exported(layers, torch.randn(4, 16), dynamo=dynamo)
    with enable_onnx_export(), pytest.raises(AssertionError, match="Quantizer has not been calibrated"):
        layers(torch.randn(4, 16))


def test_the_torchscript_exporter_alone_says_what_to_call():
    layer = qnn.QuantLinear(4, 2)
    for quantizer in (layer.input_quantizer, layer.weight_quantizer):
        quantizer.amax = torch.tensor(1.0)
    with pytest.raises(ExportError, match=r"dynamo=False.*enable_onnx_export.*qzoo\.export_onnx"):
        torch.onnx.export(layer, (torch.randn(1, 4),), io.BytesIO(), dynamo=False)


def test_still_calibrating_is_a_warning(caplog):
    layers = model()
    layers[0].input_quantizer.enable_calib()
    with caplog.at_level(logging.WARNING), enable_onnx_export():
        layers(torch.randn(4, 16))
    assert "calibrating" in caplog.text


def test_the_switch_nests():
    with enable_onnx_export():
        with enable_onnx_export():
            pass
        assert TensorQuantizer._enable_onnx_export
    assert not TensorQuantizer._enable_onnx_export


def test_learned_ranges_export():
    layers = nn.Sequential(nn.Linear(16, 4))
    quantize_(layers, quant_desc_input=QuantDescriptor(amax=1.0, learn_amax=True))
    calib.calibrate_weights(layers, "max")
    x = torch.randn(4, 16)
    graph = exported(layers, x, dynamo=True)
    np.testing.assert_allclose(run(graph, x), layers(x).detach(), rtol=1e-4, atol=1e-5)
