"""Rules about the numbers: types, zero points, scales and their granularity."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qzoo.export.graph import made_by, maker
from qzoo.export.lint.graph import Graph
from qzoo.export.lint.rule import EVERY, ORT, OV, TRT, Hits, Rule
from qzoo.runtimes.operators import CARRIED_IN_ORT, CLAMPS
from qzoo.runtimes.processor import saturates

_BYTE = ("int8", "uint8")
# ONNX Runtime does not look at the lowest value of these, which is below zero, when it drops a ReLU before Q.
_SIGNED_WITHOUT_LIMITS = ("float8e4m3fn", "float8e5m2", "int4")


def _activations(graph: Graph) -> list[ir.Node]:
    return [q for q in graph.of("QuantizeLinear") if not graph.is_weight(q)]


def _weights(graph: Graph) -> list[ir.Node]:
    """DQ of stored weights, not of biases."""
    pairs = (dq for dq in graph.of("DequantizeLinear") if graph.is_weight(dq))
    return [dq for dq in pairs if graph.int_type(dq) != "int32"]


def _asymmetric(graph: Graph) -> Hits:
    for node in (*_activations(graph), *_weights(graph)):
        zero = graph.zero_point(node)
        if zero is not None and zero.any():
            yield (node,)


def _unsigned(graph: Graph) -> Hits:
    for node in (*_activations(graph), *_weights(graph)):
        if graph.int_type(node).startswith("uint"):
            yield (node,)


def _weight_zero_point(graph: Graph) -> Hits:
    for node in _weights(graph):
        zero = graph.zero_point(node)
        if zero is not None and (zero.any() or graph.int_type(node) == "uint8"):
            yield (node,)


def _saturating(graph: Graph) -> Hits:
    """Weights beyond 7 bits that meet activations of uint8, where this machine's kernels cut the sums off."""
    for dq in _weights(graph) if saturates() else ():
        weights = graph.array(dq.inputs[0]) if graph.int_type(dq) == "int8" else None
        if weights is not None and weights.size and int(np.abs(weights.astype(np.int16)).max()) > 64:
            yield (dq,)


def _saturating_product(graph: Graph) -> Hits:
    for node in graph.of("MatMul") if saturates() else ():
        right = graph.source(node.inputs[1])
        if right is None or graph.has_weight(node) or not graph.runs_quantized(node):
            continue
        if graph.int_type(right) == "int8":
            yield (right, node)


def _per_channel(graph: Graph) -> Hits:
    for q in _activations(graph):
        scale = graph.scale(q)
        if scale is not None and scale.size > 1:
            yield (q,)


def _wide_activation(graph: Graph) -> Hits:
    for q in _activations(graph):
        if graph.int_type(q) and graph.int_type(q) not in _BYTE:
            yield (q,)


def _odd_activation(graph: Graph) -> Hits:
    for q in _activations(graph):
        if graph.int_type(q) not in ("", *_BYTE, "float8e4m3fn", "float4e2m1"):
            yield (q,)


def _dropped_relu(graph: Graph) -> Hits:
    for q in _activations(graph):
        clamp = graph.source(q.inputs[0], through=CARRIED_IN_ORT)
        if clamp is not None and clamp.op_type in CLAMPS and graph.int_type(q) in _SIGNED_WITHOUT_LIMITS:
            yield (clamp, q)


def _narrow_convolution(graph: Graph) -> Hits:
    for node in graph.of("Conv", "ConvTranspose"):
        dq = made_by(node.inputs[1], "DequantizeLinear")
        if dq is not None and graph.int_type(dq) not in ("", *_BYTE):
            yield (dq, node)


def _narrow_product(graph: Graph) -> Hits:
    for node in graph.of("MatMul", "Gemm"):
        dq = maker(node.inputs[1])
        if dq is not None and graph.runs_quantized(node) and graph.int_type(dq).endswith(("int4", "int2")):
            yield (dq, node)


def _bad_scale(graph: Graph) -> Hits:
    for node in graph.of("QuantizeLinear", "DequantizeLinear"):
        scale = graph.scale(node)
        if scale is not None and not (np.isfinite(scale) & (scale != 0)).all():
            yield (node,)


RULES = (
    Rule(
        "zero-point",
        (TRT,),
        "TensorRT quantizes symmetrically: the zero point must be 0.",
        "Use zero point 0 (target 'tensorrt' of qzoo.export_onnx; ActivationSymmetric and WeightSymmetric in "
        "onnxruntime.quantization).",
        _asymmetric,
        floats=(TRT,),
    ),
    Rule(
        "unsigned-type",
        (TRT,),
        "TensorRT has no uint8: its quantized integers are signed.",
        "Use int8 with zero point 0 (target 'tensorrt' of qzoo.export_onnx).",
        _unsigned,
        floats=(TRT,),
    ),
    Rule(
        "weight-zero-point",
        (OV,),
        "The weight has a zero point, or is unsigned, with which OpenVINO runs the layer in float.",
        "Quantize weights symmetrically: int8 with zero point 0.",
        _weight_zero_point,
        floats=(OV,),
    ),
    Rule(
        "saturating-weights",
        (ORT, OV),
        "This machine's processor has no VNNI: the sum of two products of a uint8 and an int8 is cut off at 16 bits.",
        "Write weights of 7 bits: qzoo.export_onnx(..., reduce_range=True), or run the file on a processor with VNNI.",
        _saturating,
    ),
    Rule(
        "saturating-product",
        (ORT,),
        "This machine's processor has no VNNI: the sum of two products of a uint8 and an int8 is cut off at 16 bits, "
        "and the right operand of this product of two activations is int8.",
        "Write it as uint8: qzoo.export_onnx(..., reduce_range=True), or run the file on a processor with VNNI.",
        _saturating_product,
    ),
    Rule(
        "per-channel-activation",
        (ORT, TRT),
        "The activation has a scale per channel; int8 kernels sum over channels and take one scale.",
        "Quantize activations per tensor; equalize the channels' ranges before (qzoo.ptq.equalize).",
        _per_channel,
        floats=(ORT, TRT),
    ),
    Rule(
        "activation-type",
        (ORT, OV),
        "The CPU kernels take activations of 8-bit integers; in this type the layers run in float.",
        "Use uint8 or int8.",
        _wide_activation,
        floats=(ORT, OV),
    ),
    Rule(
        "relu-dropped",
        (ORT,),
        "ONNX Runtime drops the ReLU (or fails on the Clip) before a Q to this type, whose lowest value is below zero: "
        "the results are wrong.",
        "Write Max (and Min) for it, as qzoo.export_onnx does; or run the file with the graph optimization level "
        "'basic'.",
        _dropped_relu,
    ),
    Rule(
        "activation-type-tensorrt",
        (TRT,),
        "TensorRT quantizes activations to int8, FP8 E4M3 or FP4.",
        "Use int8 or E4M3.",
        _odd_activation,
        floats=(TRT,),
    ),
    Rule(
        "narrow-convolution",
        EVERY,
        "No convolution kernel takes weights of this type: they are converted and the layer runs in float.",
        "Store the weights as int8; narrower ones keep their levels in it.",
        _narrow_convolution,
        floats=EVERY,
    ),
    Rule(
        "narrow-product",
        EVERY,
        "No matrix product takes quantized activations with weights of this type: the layer runs in float.",
        "Store the weights as int8, or leave the activation in float (where ONNX Runtime has MatMulNBits).",
        _narrow_product,
        floats=EVERY,
    ),
    Rule(
        "scale",
        EVERY,
        "A scale is zero or not finite.",
        "Calibrate again; channels of zeros take the scale 1.",
        _bad_scale,
    ),
)
