"""Rules about operators that only move values: whether a runtime carries Q and DQ across them."""

from __future__ import annotations

import onnx_ir as ir

from qzoo.export.graph import input_of, made_by, text
from qzoo.export.lint.graph import Graph
from qzoo.export.lint.rule import ORT, Hits, Rule
from qzoo.runtimes.operators import CARRIED_IN_ORT, CLAMPS, KERNELS, MOVES, WEIGHTED

_REPEATED = tuple(kind for kind in CARRIED_IN_ORT if kind not in ("Identity", "Dropout"))
_STAY = tuple(kind for kind in MOVES if kind not in CARRIED_IN_ORT)


def _scale_changes(graph: Graph) -> Hits:
    for move in graph.of(*MOVES):
        dq = made_by(move.inputs[0], "DequantizeLinear")
        readers = graph.readers(move)
        if dq is None or graph.is_weight(dq) or len(readers) != 1:
            continue
        q = readers[0]
        if q.op_type == "QuantizeLinear" and graph.parameters(dq) != graph.parameters(q):
            yield (dq, move, q)


def _not_loaded(graph: Graph) -> Hits:
    """The Q that ONNX Runtime puts behind the operator has a wrong output_dtype from opset 21 on."""
    opsets = graph.model.opset_imports
    opset = opsets.get("", opsets.get("ai.onnx", 0))
    for dq in graph.of("DequantizeLinear") if opset >= 21 else ():
        scale = graph.scale(dq)
        if (
            graph.int_type(dq) != "int8"
            or graph.is_weight(dq)
            or scale is None
            or scale.size != 1
            or len(dq.inputs) < 3
        ):
            continue
        for move in graph.readers(dq):
            if move.op_type not in _REPEATED or len(graph.readers(move)) > 1:
                continue
            if not any(map(_is_q, graph.sinks(move, through=CARRIED_IN_ORT))):
                yield (dq, move)


def _is_q(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == "QuantizeLinear"


def _not_carried(graph: Graph) -> Hits:
    yield from _before_q(graph)
    yield from _behind_dq(graph)


def _before_q(graph: Graph) -> Hits:
    """Layer, move, Q: a ReLU is dropped only right behind the layer, so that a move must not come first, either."""
    for node in graph.nodes:
        # Matrix products have integer kernels that write float, too.
        if not graph.has_int8_kernel(node) or node.op_type == "MatMul" or graph.writes_float(node):
            continue
        path = graph.path_to_q(node, lambda step: step.op_type in (*MOVES, *CLAMPS))[:-1]
        kinds = [step.op_type for step in path]
        places = [i for i, kind in enumerate(kinds) if kind in MOVES and not _passes_relu(node, kind)]
        late = bool(places) and any(kind in CLAMPS for kind in kinds[places[0] :])
        if late or any(kind in _STAY for kind in kinds):
            yield (node, *path)


def _passes_relu(node: ir.Node, kind: str) -> bool:
    """ONNX Runtime moves transpositions behind a ReLU, but keeps them at convolutions; it drops the last two."""
    return kind in ("Identity", "Dropout") or (kind == "Transpose" and node.op_type not in WEIGHTED)


def _behind_dq(graph: Graph) -> Hits:
    """DQ, move, layer."""
    for move in graph.of(*_STAY):
        dq = graph.source(move.inputs[0], through=CARRIED_IN_ORT)
        if dq is None or dq.op_type != "DequantizeLinear" or graph.is_weight(dq):
            continue
        for reader in graph.sinks(move, through=CARRIED_IN_ORT):
            if (
                reader is None
                or reader.op_type not in (*WEIGHTED, *KERNELS)
                or _is_padding(graph, move, reader)
            ):
                continue
            if graph.has_int8_kernel(reader):
                yield (move, reader)


def _is_padding(graph: Graph, pad: ir.Node, reader: ir.Node) -> bool:
    """Zeros around the image, which ONNX Runtime makes the convolution's own padding."""
    if pad.op_type != "Pad" or reader.op_type not in ("Conv", "AveragePool") or len(graph.readers(pad)) != 1:
        return False
    amounts, value = graph.array(input_of(pad, 1)), graph.array(input_of(pad, 2))
    if text(pad, "mode", "constant") != "constant" or amounts is None or (value is not None and value.any()):
        return False
    half = len(amounts) // 2
    return not (amounts[:2].any() or amounts[half : half + 2].any() or (amounts < 0).any())


RULES = (
    Rule(
        "scale-changes",
        (ORT,),
        "The operator only moves values, but the scale before and behind differs: it runs in float between the two.",
        "Use the same scale and zero point on both sides.",
        _scale_changes,
    ),
    Rule(
        "int8-not-loaded",
        (ORT,),
        "ONNX Runtime 1.32 does not load the file: in opset 21 and later it fails to carry an int8 pair across this "
        'operator ("output_dtype INT8 does not match y_zero_point type UINT8").',
        "Use uint8 with zero point 128: the same levels; or put a Q/DQ pair behind the operator; or write opset 20.",
        _not_loaded,
        refuses=(ORT,),
    ),
    Rule(
        "move-not-crossed",
        (ORT,),
        "ONNX Runtime carries Q and DQ across MaxPool, Reshape, Transpose, Squeeze, Unsqueeze and Slice only, and "
        "drops a ReLU or Clip only right behind the layer: here the layer runs in float.",
        "Put a pair with one scale on both sides of the operator, and ReLU or Clip before it.",
        _not_carried,
        floats=(ORT,),
    ),
)
