"""Rules about convolutions and linear layers: operands, bias, output, BatchNorm."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qzoo.export.graph import input_of, integer, is_stored, made_by, maker, nodes_within, stored_shape
from qzoo.export.lint.graph import Graph, is_dq
from qzoo.export.lint.rule import EVERY, ORT, OV, TRT, Hits, Rule
from qzoo.runtimes.operators import (
    CARRIED_IN_ORT,
    CLAMPS,
    CONVOLUTIONS,
    DYNAMIC,
    MOVES,
    PAIR,
    WEIGHTED,
    WEIGHTS_ALONE,
)

_TOLERANCE = 1e-3
_INTEGER = ("ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "QGemm", "QAttention")
_QUANTIZED = (*PAIR, *_INTEGER, *DYNAMIC, *WEIGHTS_ALONE)


def _not_quantized(graph: Graph) -> Hits:
    every = [n for node in graph.nodes for n in (node, *nodes_within(node))]
    if not any(_is_quantized(n) for n in every):
        yield ()


def _is_quantized(node: ir.Node) -> bool:
    return node.op_type in _QUANTIZED or "QLinear" in node.op_type


def _body(graph: Graph) -> Hits:
    for node in graph.nodes:
        if any(_is_quantized(n) or n.op_type in WEIGHTED for n in nodes_within(node)):
            yield (node,)


def _dynamic_ranges(graph: Graph) -> Hits:
    for q in graph.of("DynamicQuantizeLinear"):
        readers = {layer.outputs[0]: layer for layer in graph.readers(q)}  # each is there three times
        yield (q, *(layer for layer in readers.values() if layer.op_type in _INTEGER))
    yield from ((layer,) for layer in graph.of(*DYNAMIC))


def _integer_operators(graph: Graph) -> Hits:
    for node in graph.nodes:
        if node.op_type.startswith("QLinear") or node.op_type in (*_INTEGER, *DYNAMIC, *WEIGHTS_ALONE):
            yield (node,)


def _float_input(graph: Graph) -> Hits:
    if any(graph.of(*PAIR)):
        for node in graph.layers(*WEIGHTED):
            floats = _float_operands(graph, node)
            if not all(graph.is_equal_concat(x) for x in floats) and not _is_float_product(graph, node):
                yield (node,)


def _float_product(graph: Graph) -> Hits:
    if any(graph.of(*PAIR)):
        yield from ((node,) for node in graph.layers("MatMul") if _is_float_product(graph, node))


def _is_float_product(graph: Graph, node: ir.Node) -> bool:
    """Whether it multiplies two activations, neither of them quantized."""
    return node.op_type == "MatMul" and not graph.has_weight(node) and len(_float_operands(graph, node)) == 2


def _float_concat(graph: Graph) -> Hits:
    for node in graph.of(*WEIGHTED):
        floats = _float_operands(graph, node)
        concats = [graph.source(x, through=(*MOVES, *CLAMPS)) for x in floats if graph.is_equal_concat(x)]
        if floats and len(concats) == len(floats):
            yield (*(concat for concat in concats if concat is not None), node)


def _float_operands(graph: Graph, node: ir.Node) -> list[ir.Value | None]:
    """The activations that no DQ makes; none if one comes out of a body."""
    operands = node.inputs[:1] if graph.has_weight(node) else node.inputs[:2]
    floats = [x for x in operands if not graph.is_dequantized(x)]
    return [] if any(_from_body(graph, x) for x in floats) else floats


def _from_body(graph: Graph, value: ir.Value | None) -> bool:
    source = graph.source(value)
    return source is not None and bool(nodes_within(source))


def _float_weight(graph: Graph) -> Hits:
    for node in graph.of(*WEIGHTED):
        if is_stored(node.inputs[1]) and graph.is_dequantized(node.inputs[0]):
            yield (node,)


def _quantized_at_load(graph: Graph) -> Hits:
    for node in graph.of("QuantizeLinear"):
        if is_stored(node.inputs[0]):
            yield (node,)


def _no_kernel(graph: Graph) -> Hits:
    for node in graph.of("ConvTranspose"):
        if graph.runs_quantized(node):
            yield (node,)


def _transposed_with_zero_point(graph: Graph) -> Hits:
    for node in graph.of("ConvTranspose"):
        dq = graph.source(node.inputs[0])
        if graph.runs_quantized(node) and dq is not None and _is_shifted(graph, dq):
            yield (node,)


def _product_of_activations(graph: Graph) -> Hits:
    """OpenVINO's kernel wants the left operand without zero point, the right one symmetric and of 8 bits."""
    for node in graph.of("MatMul"):
        left, right = (graph.source(x) for x in node.inputs)
        if left is None or right is None or graph.has_weight(node) or not graph.runs_quantized(node):
            continue
        zero = graph.zero_point(right)
        middle = 128 if graph.int_type(right) == "uint8" else 0
        if _is_shifted(graph, left) or zero is None or (zero != middle).any():
            yield (right, node)


def _is_shifted(graph: Graph, dq: ir.Node) -> bool:
    zero = graph.zero_point(dq)
    return zero is None or bool(zero.any())


def _channel_axis(graph: Graph) -> Hits:
    for node in graph.of(*WEIGHTED):
        dq = made_by(node.inputs[1], "DequantizeLinear")
        scale = graph.scale(dq) if dq is not None else None
        if dq is None or scale is None or scale.size == 1 or integer(dq, "block_size", 0):
            continue
        rank = len(stored_shape(dq.inputs[0]))
        if rank and integer(dq, "axis", 1) % rank != _output_axis(node, rank):
            yield (dq, node)


def _output_axis(node: ir.Node, rank: int) -> int:
    if node.op_type == "Gemm":
        return 0 if integer(node, "transB", 0) else 1
    return {"Conv": 0, "ConvTranspose": 1, "MatMul": rank - 1}[node.op_type]


def _output_float(graph: Graph) -> Hits:
    for node in graph.of("Conv", "Gemm"):
        if (
            graph.runs_quantized(node)
            and not _has_own_rule(graph, node)
            and not graph.is_quantized_once(node)
            and not (graph.writes_float(node) and not _reaches_q(graph, node))
        ):
            yield (node,)
    for node in graph.of("MatMul"):
        if graph.runs_quantized(node) and _becomes_gemm(graph, node):
            adds = [reader for reader in graph.readers(node) if reader.op_type == "Add"]
            if any(_adds_bias(graph, add) and not graph.is_quantized_once(add) for add in adds):
                yield (node, *adds)


def _becomes_gemm(graph: Graph, product: ir.Node) -> bool:
    """Whether ONNX Runtime makes a Gemm of it and its bias: of more than two sizes only where all are fixed."""
    first = product.inputs[0]
    rank = len(graph.shapes.get(str(first.name), ())) if first else 0
    return rank == 2 or (rank > 2 and graph.has_fixed_inputs)


def _adds_bias(graph: Graph, add: ir.Node) -> bool:
    """Whether a stored tensor is added: ONNX Runtime makes a Gemm of this and the product before."""
    return any(is_stored(x) for x in add.inputs)


def _reaches_q(graph: Graph, node: ir.Node) -> bool:
    """A Q among several readers gets no kernel, since it reads a float tensor that others read too.

    ONNX Runtime carries a Q up to the layer across what it alone reads; behind a Split it stays, and the layer before
    writes float.
    """
    for reader in graph.readers(node):
        while reader.op_type in (*CARRIED_IN_ORT, *CLAMPS) and len(behind := graph.readers(reader)) == 1:
            (reader,) = behind
        if reader.op_type == "QuantizeLinear":
            return True
    return False


def _has_own_rule(graph: Graph, node: ir.Node) -> bool:
    return any(reader.op_type in ("BatchNormalization", "Add") for reader in graph.readers(node))


def _loose_bias(graph: Graph) -> Hits:
    for add in graph.of("Add"):
        for x, other in (add.inputs, reversed(add.inputs)):
            layer = made_by(x, *CONVOLUTIONS)
            if layer is not None and is_stored(other):
                yield (layer, add)


def _bias_scale(graph: Graph) -> Hits:
    for node in graph.of("Conv", "Gemm"):
        operands = [graph.source(name) for name in node.inputs[:3]]
        if len(operands) < 3 or not all(map(is_dq, operands)):
            continue
        x, w, bias = (graph.scale(n) for n in operands if n is not None)
        if x is None or w is None or bias is None or x.size != 1 or len({1, w.size, bias.size}) > 2:
            continue
        if not np.allclose(bias.reshape(-1), (x * w).reshape(-1), rtol=_TOLERANCE, atol=0.0):
            yield tuple(n for n in (operands[2], node) if n is not None)


def _int32_bias(graph: Graph) -> Hits:
    for node in graph.of("DequantizeLinear"):
        if graph.int_type(node) == "int32":
            yield (node,)


def _bias_too_large(graph: Graph) -> Hits:
    """A float bias beyond 2**31 of its unit: a channel of nearly zero weights, as a rule."""
    for node in graph.of("Conv", "Gemm"):
        bias = graph.array(input_of(node, 2)) if graph.runs_quantized(node) else None
        x, w = (graph.source(name) for name in node.inputs[:2])
        if bias is None or x is None or w is None:
            continue
        steps = (graph.scale(x), graph.scale(w))
        if steps[0] is None or steps[1] is None or steps[0].size != 1:
            continue
        unit = (steps[0].astype(np.float64) * steps[1]).reshape(-1)
        if len(unit) in (1, bias.size) and (np.abs(bias.reshape(-1)) >= 2.0**31 * np.abs(unit)).any():
            yield (node,)


def _norm_after_layer(graph: Graph) -> Hits:
    for norm in graph.of("BatchNormalization"):
        layer = maker(norm.inputs[0])
        if layer is not None and graph.runs_quantized(layer):
            yield (layer, norm)


def _norm_after_pair(graph: Graph) -> Hits:
    for norm in graph.of("BatchNormalization"):
        dq = graph.source(norm.inputs[0])
        if dq is not None and graph.is_dequantized(norm.inputs[0]):
            yield (dq, norm)


RULES = (
    Rule(
        "not-quantized",
        EVERY,
        "The file has no QuantizeLinear: everything runs in floating point.",
        "Quantize the model (qzoo.quantize) and calibrate it, then export it.",
        _not_quantized,
        floats=EVERY,
    ),
    Rule(
        "body-not-read",
        EVERY,
        "Layers or Q/DQ stand in a body (of an If, Loop or Scan), into which lint does not look.",
        "Choose the branch, or unroll the loop, before the export; or lint the body as a file of its own.",
        _body,
    ),
    Rule(
        "integer-operators",
        (TRT,),
        "TensorRT reads Q/DQ pairs; it has no operators of the QLinear and Integer kind.",
        "Write the Q/DQ format (QuantFormat.QDQ in onnxruntime.quantization).",
        _integer_operators,
    ),
    Rule(
        "dynamic-ranges",
        (ORT, OV),
        "The range of the activation is computed at every call: ONNX Runtime fuses none of its layers with what "
        "follows, and OpenVINO runs them in float.",
        "Calibrate, and write static Q/DQ (qzoo.calibrate and qzoo.export_onnx; quantize_static).",
        _dynamic_ranges,
        floats=(OV,),
    ),
    Rule(
        "float-input",
        EVERY,
        "The layer's input is not quantized, so the layer runs in floating point.",
        "Quantize every input of a weighted layer, as qzoo.quantize does.",
        _float_input,
        floats=EVERY,
    ),
    Rule(
        "float-product",
        EVERY,
        "Neither operand of the product of two activations is quantized, so it runs in floating point.",
        "Quantize both operands, symmetrically, as qzoo.quantize does.",
        _float_product,
        floats=EVERY,
    ),
    Rule(
        "float-concat",
        (ORT, TRT),
        "The layer reads a Concat of dequantized tensors that is not quantized itself, so the layer runs in floating "
        "point. (OpenVINO carries one scale of all across the Concat.)",
        "Put a pair behind the Concat, as qzoo.quantize does.",
        _float_concat,
        floats=(ORT, TRT),
    ),
    Rule(
        "float-weight",
        (OV, TRT),
        "The input is quantized and the weight is not: the layer runs in floating point.",
        "Store the weight as int8 with a DequantizeLinear, one scale per output channel.",
        _float_weight,
        floats=(OV, TRT),
    ),
    Rule(
        "weight-quantized-at-load",
        (ORT, OV),
        "The weight is stored in floating point behind a QuantizeLinear: the file is four times as large, and the "
        "weight is quantized again at each load.",
        "Store the integers (weights='int8' in qzoo.export_onnx).",
        _quantized_at_load,
    ),
    Rule(
        "no-int8-kernel",
        (ORT,),
        "There is no int8 kernel for a transposed convolution.",
        "Leave it in float without Q/DQ, or upsample by Resize and a convolution.",
        _no_kernel,
        floats=(ORT,),
    ),
    Rule(
        "transposed-zero-point",
        (OV,),
        "The input of the transposed convolution has a zero point, with which OpenVINO runs it in float.",
        "Quantize its input with zero point 0.",
        _transposed_with_zero_point,
        floats=(OV,),
    ),
    Rule(
        "product-of-activations",
        (OV,),
        "OpenVINO multiplies two activations in int8 only where the left one has zero point 0 and the right one is "
        "symmetric (int8 with zero point 0, or uint8 with 128); here it runs in float.",
        "Quantize both as int8 with zero point 0 (a Softmax on the left as uint8).",
        _product_of_activations,
        floats=(OV,),
    ),
    Rule(
        "channel-axis",
        EVERY,
        "The weight has one scale per input channel; an int8 kernel can only rescale output channels.",
        "Quantize per output channel: axis 0 of Conv, the last axis of MatMul's right operand.",
        _channel_axis,
        floats=EVERY,
    ),
    Rule(
        "output-float",
        (ORT,),
        "ONNX Runtime makes an int8 kernel only of a layer (with a bias of its own) whose output goes into one "
        "QuantizeLinear and nowhere else; this one runs in float.",
        "Quantize the output (after the ReLU where there is one), once for all its readers, as qzoo.quantize does.",
        _output_float,
        floats=(ORT,),
    ),
    Rule(
        "loose-bias",
        (ORT,),
        "The bias is an Add of its own between the convolution and the next QuantizeLinear, which keeps the "
        "convolution in float.",
        "Make it the convolution's third input.",
        _loose_bias,
        floats=(ORT,),
    ),
    Rule(
        "bias-scale",
        (ORT,),
        "The scale of the int32 bias is not input scale x weight scale, so that it can't be added to the int32 sums; "
        "the layer runs in float.",
        "Quantize the bias with that scale, or keep it in float: the runtime converts it.",
        _bias_scale,
        floats=(ORT,),
    ),
    Rule(
        "int32-bias",
        (TRT,),
        "TensorRT's DequantizeLinear takes no int32.",
        "Keep the bias in float (QuantizeBias=False in onnxruntime.quantization).",
        _int32_bias,
        floats=(TRT,),
    ),
    Rule(
        "bias-overflow",
        (ORT, OV),
        "The bias does not fit an int32 in units of input scale x weight scale: it saturates, and its channel is "
        "wrong.",
        "Give the channel, whose weights are nearly zero, a wider weight range.",
        _bias_too_large,
    ),
    Rule(
        "bn-not-folded",
        (ORT,),
        "A BatchNormalization between the layer and the next QuantizeLinear keeps the layer in float.",
        "Fold it into the weights before the export (qzoo.export_onnx does).",
        _norm_after_layer,
        floats=(ORT,),
    ),
    Rule(
        "bn-after-dq",
        EVERY,
        "Q/DQ between a layer and its BatchNormalization: the two can't be fused, and the BatchNormalization runs in "
        "float.",
        "Fold it into the weights before the export, or move the Q/DQ behind it.",
        _norm_after_pair,
    ),
)
