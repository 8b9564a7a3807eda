"""Rules about operators without an int8 form between int8 layers: what each runtime converts to float and back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import onnx_ir as ir

from qzoo.export.graph import maker, text
from qzoo.export.lint.graph import Graph
from qzoo.export.lint.rule import ORT, OV, TRT, Hits, Rule
from qzoo.runtimes.operators import (
    CLAMPS,
    EXTREMA,
    FLOAT,
    KERNELS,
    MOVES,
    NORMS,
    PAIR,
    POOLS,
    WEIGHTED,
    taken,
)

_OWN_RULES = (*WEIGHTED, *CLAMPS, *POOLS, "Add", "BatchNormalization", "ReduceMean")
# OpenVINO fuses elementwise operators with the layer before or the Q behind, but not these.
_FLOAT_IN_OPENVINO = taken(OV, FLOAT)
# They keep the type of a quantized input; Resize does in its mode "nearest".
_OF_ANY_TYPE = (*EXTREMA, "Resize")
# No documented quantized form, and no elementwise operator that is fused with a layer; never run.
_FLOAT_IN_TENSORRT = ("Softmax", "LogSoftmax", *NORMS)


def _island(graph: Graph) -> Hits:
    """Connected operators without int8 kernel that have int8 layers before and a Q behind."""
    yield from _islands(graph, _is_float)


def _in_openvino(graph: Graph) -> Hits:
    for island in _islands(graph, _is_between):
        yield from ((node,) for node in island if _is_float_in_openvino(graph, node))


def _in_tensorrt(graph: Graph) -> Hits:
    for island in _islands(graph, _is_between):
        nodes = (node for node in island if node.op_type in _FLOAT_IN_TENSORRT)
        yield from ((node,) for node in nodes if not _is_attention(graph, node))


def _is_float_in_openvino(graph: Graph, node: ir.Node) -> bool:
    if node.op_type in _OF_ANY_TYPE:
        return text(node, "mode", "nearest") != "nearest" or not graph.is_dequantized(node.inputs[0])
    return node.op_type in _FLOAT_IN_OPENVINO and not _is_attention(graph, node)


def _is_attention(graph: Graph, node: ir.Node) -> bool:
    """Softmax between two matrix products of activations.

    OpenVINO and TensorRT compute all three as one operator; ONNX Runtime's integer product writes float by itself.
    """
    before = graph.source(node.inputs[0], through=(*MOVES, "Mul", "Div", "Add", *PAIR))
    behind = graph.sinks(node, through=(*MOVES, *PAIR))
    products = [n for n in (before, *behind) if n is not None and n.op_type == "MatMul"]
    return "Softmax" in node.op_type and len(products) > 1 and not any(graph.has_weight(n) for n in products)


def _islands(graph: Graph, belongs: Callable[[Graph, ir.Node], bool]) -> Hits:
    members = [node for node in graph.nodes if belongs(graph, node)]
    parent = list(range(len(members)))  # a forest: each tree is an island
    owner = {value: index for index, node in enumerate(members) for value in node.outputs}

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    for index, node in enumerate(members):
        for other in {owner[value] for value in node.inputs if value in owner}:
            parent[root(other)] = root(index)
    islands: dict[int, list[ir.Node]] = defaultdict(list)
    for index, node in enumerate(members):
        islands[root(index)].append(node)
    for island in islands.values():
        yield from _closed(graph, island)


def _closed(graph: Graph, island: list[ir.Node]) -> Hits:
    before = any(graph.is_dequantized(x) or graph.is_int8_layer(x) for node in island for x in node.inputs)
    behind = any(
        n is not None and n.op_type == "QuantizeLinear" for node in island for n in graph.sinks(node)
    )
    if before and behind:
        yield tuple(island)


def _is_between(graph: Graph, node: ir.Node) -> bool:
    """Whether a node works on activations, is no layer and is judged by no other rule."""
    if node.op_type in (*_OWN_RULES, *MOVES, *PAIR, "Shape", "Cast"):
        return False
    return any(maker(x) is not None and not graph.is_made_of_stored(x) for x in node.inputs)


def _is_float(graph: Graph, node: ir.Node) -> bool:
    if not _is_between(graph, node) or _is_attention(graph, node):
        return False
    return not (node.op_type in KERNELS and graph.has_int8_kernel(node))


RULES = (
    Rule(
        "float-island",
        (ORT,),
        "Operators without an int8 kernel, or with an operand that it does not take (a float constant, a stored tensor "
        "of another form than uint8 with one scale), between two int8 layers: the tensor is converted to float and "
        "back.",
        "Use an operator with a kernel (ReLU, Sigmoid or LeakyRelu with Q/DQ around), or accept the cost.",
        _island,
    ),
    Rule(
        "float-island-openvino",
        (OV,),
        "OpenVINO runs the operator in float between two int8 layers: the layer before writes float, and what the "
        "operator makes is quantized again.",
        "Quantize its input too, if it only picks values (ReduceMax, nearest Resize); else use an operator that is "
        "fused (ReLU, Sigmoid, HardSwish), or accept the cost.",
        _in_openvino,
    ),
    Rule(
        "float-island-tensorrt",
        (TRT,),
        "TensorRT fuses Q and DQ into layers with a quantized form only. As far as it is documented this operator has "
        "none and runs in floating point, with a conversion on either side (not run by the project).",
        "Use an operator that is fused with the layer before (ReLU), or accept the cost.",
        _in_tensorrt,
    ),
)
