"""How much of a file runs in int8: its layers and their multiply-adds, in each runtime."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from qzoo.export.graph import integer, is_stored
from qzoo.export.lint.graph import Graph, is_dq
from qzoo.export.lint.rule import ORT, TRT, Rule
from qzoo.export.lint.rules import float_hits_of
from qzoo.runtimes.operators import CLAMPS, INTEGER_LAYERS, MOVES, PAIR, WEIGHTED

_WEIGHTS_ALONE = {"MatMulNBits": (0, 1)}
_FEW = 0.5  # of the multiply-adds


@dataclass(frozen=True)
class Coverage:
    """The part of a file's layers that one runtime computes in int8 (TensorRT: or in FP8).

    A layer is a convolution or a matrix product in the main graph.

    Attributes:
        target: the runtime.
        layers: number of layers.
        int8: number of those that run in int8.
        share: part of the multiply-adds that these are, from 0 to 1; None where the file does not say the sizes.
    """

    target: str
    layers: int
    int8: int
    share: float | None

    def __str__(self) -> str:
        share = "" if self.share is None else f" ({100 * self.share:.3g} % of the multiply-adds)"
        return f"{self.int8}{share} in {self.target}"


def coverage(path: str | os.PathLike[str], target: str) -> Coverage:
    """Count the layers of an ONNX file that a runtime computes in int8, and their share of the multiply-adds.

    Args:
        path: an ONNX file.
        target: ``"onnxruntime"``, ``"openvino"`` or ``"tensorrt"``.

    Raises:
        FileNotFoundError: there is no such file.
        GraphError: no ONNX file, or one that is too large or too deep.
    """
    graph = Graph(path)
    return covered(graph, (target,), float_hits_of(graph, target))[0]


def covered(
    graph: Graph, targets: Iterable[str], hits: Mapping[Rule, list[tuple[ir.Node, ...]]]
) -> list[Coverage]:
    """Count the layers in int8 for each target as :func:`coverage` does, by the hits of the rules."""
    layers = _layers(graph)
    sizes = [_multiply_adds(node, graph.shapes) for node in layers]
    total = sum(size for size in sizes if size is not None)
    known = total > 0 and None not in sizes
    rows = []
    for target in targets:
        int8 = _are_in_int8(graph, layers, target, hits)
        done = sum(size for size, yes in zip(sizes, int8, strict=True) if yes and size is not None)
        rows.append(Coverage(target, len(layers), sum(int8), done / total if known else None))
    return rows


def warn_of_float(path: str | os.PathLike[str], target: str, name: str) -> None:
    """Warn when less than half of the multiply-adds of a Q/DQ file will run in int8.

    Args:
        name: what the warning calls the file.
    """
    graph = Graph(path)
    if not any(graph.of(*PAIR)):
        return
    hits = float_hits_of(graph, target)
    if all(_are_in_int8(graph, _layers(graph), target, hits)):  # and their sizes need not be inferred
        return
    (coverage,) = covered(graph, (target,), hits)
    if coverage.share is not None and coverage.share < _FEW:
        warnings.warn(
            f"{name}: only {100 * coverage.share:.3g} % of the multiply-adds ({coverage.int8} of {coverage.layers} "
            f"layers) will run in int8 in {target}; `qzoo lint FILE --target {target}` names the reasons",
            stacklevel=3,
        )


def _layers(graph: Graph) -> list[ir.Node]:
    return list(graph.layers(*WEIGHTED, *INTEGER_LAYERS, *_WEIGHTS_ALONE))


def _are_in_int8(
    graph: Graph, layers: list[ir.Node], target: str, hits: Mapping[Rule, list[tuple[ir.Node, ...]]]
) -> list[bool]:
    floats = _in_float(graph, target, hits)
    return [id(node) not in floats and _is_quantized(graph, node, target) for node in layers]


def _is_quantized(graph: Graph, node: ir.Node, target: str) -> bool:
    if node.op_type in INTEGER_LAYERS:
        return target == ORT or (target != TRT and node.op_type.startswith("QLinear"))
    if node.op_type not in WEIGHTED or len(node.inputs) < 2:
        return False
    left, right = (_is_dequantized(graph, x, target) for x in node.inputs[:2])
    return left and (right or (target == ORT and _is_quantized_by_runtime(graph, node)))


def _is_quantized_by_runtime(graph: Graph, node: ir.Node) -> bool:
    """Whether ONNX Runtime quantizes the layer's float weight itself: between Q/DQ, with BatchNorm folded."""
    readers = graph.readers(node)
    last = readers[0] if [reader.op_type for reader in readers] == ["BatchNormalization"] else node
    dq = graph.source(node.inputs[0])
    step = None if dq is None else graph.scale(dq)
    one_scale = step is None or step.size == 1
    stored = node.op_type in ("Conv", "Gemm") and is_stored(node.inputs[1])
    return stored and one_scale and graph.is_quantized_once(last)


def _is_dequantized(graph: Graph, value: ir.Value | None, target: str) -> bool:
    return is_dq(graph.source(value)) or (target not in (ORT, TRT) and graph.is_equal_concat(value))


def _in_float(graph: Graph, target: str, hits: Mapping[Rule, list[tuple[ir.Node, ...]]]) -> set[int]:
    """The layers at the places of rules whose layers run in float; all of them where the file is not loaded."""
    if any(places for rule, places in hits.items() if target in rule.refuses):
        return {id(node) for node in graph.nodes}
    slow = [nodes for rule, places in hits.items() if target in rule.floats for nodes in places]
    return {id(layer) for nodes in slow for layer in _layers_of(graph, nodes)}


def _layers_of(graph: Graph, nodes: tuple[ir.Node, ...]) -> list[ir.Node]:
    """The layers at one place; a stored operand that it names beside a layer may have other layers as readers."""
    named = any(node.op_type in WEIGHTED for node in nodes)
    alone = [node for node in nodes if not (named and node.op_type in PAIR and graph.is_weight(node))]
    return [layer for node in alone for layer in _layers_at(graph, node)]


def _layers_at(graph: Graph, node: ir.Node) -> list[ir.Node]:
    """The layer itself; else the one that makes the node's input, and for Q and DQ those that read its values."""
    if node.op_type in WEIGHTED:
        return [node]
    nodes = [graph.source(node.inputs[0], through=(*MOVES, *CLAMPS))] if node.inputs else []
    if node.op_type in PAIR:
        nodes += graph.sinks(node, through=(*MOVES, *CLAMPS, "DequantizeLinear"))
    return [layer for layer in nodes if layer is not None and layer.op_type in WEIGHTED]


# Multiply-adds


def _multiply_adds(node: ir.Node, shapes: Mapping[str, list[int]]) -> int | None:
    left, right = {**INTEGER_LAYERS, **_WEIGHTS_ALONE}.get(node.op_type, (0, 1))
    x, w, y = (
        shapes.get(str(v.name)) if v else None
        for v in (node.inputs[left], node.inputs[right], node.outputs[0])
    )
    if node.op_type == "MatMulNBits":
        count = integer(node, "N", 0)
        return prod(x) * count if x else None
    if node.op_type == "ConvTranspose":  # every input pixel meets the weights of its channel
        return prod(x) * prod(w[1:]) if x and w else None
    if "Conv" in node.op_type:
        return prod(y) * prod(w[1:]) if y and w else None
    if node.op_type == "Gemm":
        turned = integer(node, "transA", 0)
        return prod(y) * x[0 if turned else -1] if y and x else None
    if y and x:
        return prod(y) * x[-1]
    return prod(x) * w[-1] if x and w else None
