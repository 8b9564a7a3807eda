"""Rules about forms that OpenVINO computes otherwise than the file says, whatever their speed.

Each was reproduced in a few nodes with OpenVINO 2026.4 on a CPU, where ONNX Runtime gives what the file says; the
tests run both. ``qzoo.export_onnx(target="openvino")`` writes none of them (:mod:`qzoo.export.for_openvino`).
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import numpy as np
import onnx_ir as ir

from qzoo.export.graph import (
    input_of,
    integer,
    integers,
    is_output,
    is_stored,
    made_by,
    maker,
    number,
    readers,
    stored_shape,
)
from qzoo.export.lint.graph import Graph, is_dq
from qzoo.export.lint.rule import OV, Hits, Rule
from qzoo.runtimes.operators import ARITHMETIC, CLAMPS, CONVOLUTIONS, EXTREMA, MOVES, NORMS, POOLS, WEIGHTED

_LINEAR = ("MatMul", "Gemm")
_SCALINGS = (*ARITHMETIC, "BatchNormalization")
# OpenVINO carries a DQ across these (and the scale of a layer that reads one).
_CARRIED = (*MOVES, "Relu", "AveragePool", "Resize", "Concat", "Mul")
_CARRIED_FROM_LAYER = ("QuantizeLinear", "Relu", "MaxPool", "ReduceMean", *POOLS)
# And carries the integers themselves across these.
_MOVED = (
    *("MaxPool", "AveragePool", "GlobalMaxPool", "ReduceMax", "ReduceMin", "Relu", "Resize", "Expand"),
    *("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Gather", "Split"),
)
# Across these it moves the scale of a whole tensor, to behind a normalization.
_SCALED = (*MOVES, "Relu", "MaxPool")
# From a Shape to the sizes that a Concat joins: read only, or computed with.
_READS_SIZE = ("Gather", "Slice", "Squeeze", "Unsqueeze", "Cast", "Identity")
_COMPUTES_SIZE = (*ARITHMETIC, "Concat", "Reshape")


def _is_dynamic(graph: Graph) -> bool:
    """Whether the batch of an input is not fixed."""
    return any(value.shape and not isinstance(value.shape[0], int) for value in graph.model.graph.inputs)


def _int8_joined(graph: Graph) -> Hits:
    for concat in graph.of("Concat"):
        if any(_is_int8_convolution(graph, node) for node in graph.sinks(concat)):
            sources = [_quantizer(graph, x) for x in concat.inputs if not is_stored(x)]
            signed = [q for q in sources if q is not None and graph.int_type(q) == "int8"]
            if signed and None not in sources:
                yield (signed[0], concat)
        # ReLU and scaling by constants that OpenVINO fuses with the Q behind.
        path = graph.path_to_q(concat, lambda n: n.op_type == "Relu" or _is_fused_scale(graph, n))
        if path and graph.int_type(path[-1]) == "int8" and _feeds_convolution(graph, path[-1]):
            yield (concat, *path)


def _is_int8_convolution(graph: Graph, node: ir.Node | None) -> bool:
    return node is not None and node.op_type in CONVOLUTIONS and _has_int8_weight(graph, node)


def _has_int8_weight(graph: Graph, layer: ir.Node) -> bool:
    dq = graph.source(layer.inputs[1])
    return dq is not None and is_dq(dq) and graph.is_weight(dq)


def _quantizer(graph: Graph, value: ir.Value | None) -> ir.Node | None:
    """The Q whose integers the tensor has; of a Concat that of an operand."""
    node = maker(value)
    while node is not None and (node.op_type == "DequantizeLinear" or node.op_type in _CARRIED):
        if node.op_type == "DequantizeLinear":
            return maker(node.inputs[0])
        operands = [
            x
            for x in node.inputs[: 1 if node.op_type != "Concat" else None]
            if not graph.is_made_of_stored(x)
        ]
        node = maker(operands[0]) if operands else None
    return None


def _is_fused_scale(graph: Graph, node: ir.Node) -> bool:
    """One constant for all channels, or in a fixed batch also one for each."""
    sizes = [prod(stored_shape(x)) for x in node.inputs if is_stored(x)]
    return node.op_type in _SCALINGS and bool(sizes) and (max(sizes) == 1 or not _is_dynamic(graph))


def _feeds_convolution(graph: Graph, q: ir.Node) -> bool:
    pairs = [dq for dq in graph.readers(q) if dq.op_type == "DequantizeLinear"]
    return any(_is_int8_convolution(graph, node) for dq in pairs for node in graph.sinks(dq))


def _int8_moved(graph: Graph) -> Hits:
    if not _has_concat(graph):
        return
    for dq in graph.of("DequantizeLinear"):
        if graph.is_weight(dq) or graph.int_type(dq) != "int8":
            continue
        for move in graph.readers(dq):
            layers = graph.sinks(move, through=_MOVED) if move.op_type in _MOVED else []
            yield from ((dq, move, conv) for conv in layers if conv is not None and _is_dense(graph, conv))


def _has_concat(graph: Graph) -> bool:
    """Whether OpenVINO has a Concat in its graph: one of the file's, or of the shape of a Flatten."""
    inner = (integer(node, "axis", 1) not in (0, 1) for node in graph.of("Flatten"))
    joins = (not _is_dissolved(graph, concat) for concat in graph.of("Concat"))
    return any(joins) or (not graph.has_fixed_inputs and any(inner))


def _is_dissolved(graph: Graph, concat: ir.Node) -> bool:
    """Whether it joins sizes, which OpenVINO computes at load: fixed ones, or for a Reshape as they were read."""
    parts = [x for x in concat.inputs if not is_stored(x)]
    if not all(_is_size(graph, x, (*_READS_SIZE, *_COMPUTES_SIZE)) for x in parts):
        return False
    readers = [*graph.readers(concat), *([None] if is_output(concat) else [])]
    reshapes = all(
        r is not None and r.op_type == "Reshape" and r.inputs[1] in concat.outputs for r in readers
    )
    return graph.has_fixed_inputs or (reshapes and all(_is_size(graph, x, _READS_SIZE) for x in parts))


def _is_size(graph: Graph, value: ir.Value | None, through: tuple[str, ...]) -> bool:
    node = graph.source(value, through=through)
    return node is not None and node.op_type in ("Shape", "Size")


def _is_dense(graph: Graph, node: ir.Node) -> bool:
    """Whether it is a convolution of one group, with integer weights."""
    return node.op_type == "Conv" and integer(node, "group", 1) == 1 and _has_int8_weight(graph, node)


def _without_bias(graph: Graph) -> Hits:
    if not _is_dynamic(graph):
        return
    for conv in graph.of(*CONVOLUTIONS):
        bias = np.zeros(()) if input_of(conv, 2) is None else graph.array(conv.inputs[2])
        if bias is None or bias.any() or not graph.runs_quantized(conv):
            continue
        readers = graph.readers(conv)
        kinds = [reader.op_type for reader in readers] + [""] * bool(is_output(conv))
        carried = [kind in _CARRIED_FROM_LAYER for kind in kinds]
        if len(kinds) > 1 and ((any(carried) and not all(carried)) or set(kinds) & set(ARITHMETIC)):
            yield (conv, *readers)


def _padded_average(graph: Graph) -> Hits:
    for pool in graph.of("AveragePool"):
        dq = made_by(pool.inputs[0], "DequantizeLinear")
        if dq is None or not _counts_padding(pool):
            continue
        zero, q = graph.zero_point(dq), maker(dq.inputs[0])
        if zero is not None and zero.any():
            yield (dq, pool)
        elif q is not None and graph.int_type(dq) == "int8":
            others = [node for pair in graph.readers(q) for node in graph.sinks(pair)]
            if any(_is_int8_convolution(graph, node) for node in (*others, *graph.sinks(pool))):
                yield (dq, pool)


def _counts_padding(pool: ir.Node) -> bool:
    return any(integers(pool, "pads")) and integer(pool, "count_include_pad", 0) == 1


def _rounded_average(graph: Graph) -> Hits:
    for pool in graph.of("AveragePool"):
        layers = [node for node in graph.sinks(pool) if node is not None and node.op_type in CONVOLUTIONS]
        if graph.is_dequantized(pool.inputs[0]):
            yield from ((pool, layer) for layer in layers if _has_int8_weight(graph, layer))
            yield from ((pool, reader) for reader in readers_that_round(pool, _is_dynamic(graph)))


def readers_that_round(pool: ir.Node, dynamic: bool) -> list[ir.Node]:
    """Find the operators behind an average of integers that make OpenVINO round it to the steps of its input.

    Those are arithmetic with another computed tensor, and a scale of each channel (BatchNorm) that is not fused with
    the average and a Q behind; with a dynamic batch no scale is that has other readers of the average beside it.
    """
    nodes = []
    several = len(pool.outputs[0].uses()) > 1 or pool.outputs[0].is_graph_output()
    for reader in readers(pool.outputs[0]):
        others = [value for value in reader.inputs if value is not pool.outputs[0]]
        joins = reader.op_type in ARITHMETIC and not any(map(is_stored, others))
        scales = reader.op_type == "BatchNormalization" or (
            reader.op_type in ARITHMETIC and any(prod(stored_shape(value)) > 1 for value in others)
        )
        if joins or (scales and ((several and dynamic) or not _quantized_next(reader))):
            nodes.append(reader)
    return nodes


def _quantized_next(node: ir.Node) -> bool:
    """Whether one Q alone reads the node, maybe behind a ReLU."""
    behind = readers(node.outputs[0])
    if len(behind) == 1 and behind[0].op_type == "Relu":
        behind = readers(behind[0].outputs[0])
    return [reader.op_type for reader in behind] == ["QuantizeLinear"]


def _unrounded_branch(graph: Graph) -> Hits:
    for add in graph.of("Add"):
        behind = [node.op_type for node in readers(add.outputs[0])]
        if is_output(add) or not {"QuantizeLinear", "Relu"} & set(behind):
            continue
        if any(_fused_layer(graph, value) for value in add.inputs):
            continue  # that one is computed with the add
        pairs = [_pair_between(graph, value) for value in add.inputs]
        yield from ((*pair, add) for pair in pairs if pair)


def _pair_between(graph: Graph, value: ir.Value | None) -> tuple[ir.Node, ...]:
    """A convolution and the Q behind it, where that and its DQ are read by one operator alone."""
    dq = made_by(value, "DequantizeLinear")
    q = made_by(dq.inputs[0], "QuantizeLinear") if dq is not None else None
    if dq is None or q is None or not len(readers(q.outputs[0])) == len(readers(dq.outputs[0])) == 1:
        return ()
    layer = _fused_layer(graph, q.inputs[0], graph.zero_point(q))
    return () if layer is None else (layer, q)


def _fused_layer(graph: Graph, value: ir.Value | None, zero: np.ndarray | None = None) -> ir.Node | None:
    """The int8 convolution whose result the value is, behind ReLU, Clip or a constant factor without other readers.

    Args:
        zero: of the Q that reads the value: behind a ReLU, one with levels below zero is rounded.
    """
    node, clamped = maker(value), False
    while node is not None and len(readers(node.outputs[0])) == 1 and not is_output(node):
        if node.op_type in CONVOLUTIONS:
            signed = zero is not None and bool(zero.any())
            return node if _has_int8_weight(graph, node) and not (clamped and signed) else None
        scales = node.op_type == "Mul" and any(map(is_stored, node.inputs))
        if node.op_type not in CLAMPS and not scales:
            return None
        clamped = clamped or node.op_type in CLAMPS
        node = next((layer for source in node.inputs if (layer := maker(source)) is not None), None)
    return None


def _maximum(graph: Graph) -> Hits:
    for node in graph.of(*EXTREMA):
        if node.op_type != "ReduceMin" and graph.is_dequantized(node.inputs[0]):
            continue
        readers = graph.readers(node)
        if len(readers) == 1 and not is_output(node) and _reaches_int8(graph, node):
            yield (node, *readers)


def _reaches_int8(graph: Graph, node: ir.Node) -> bool:
    """Whether a Q comes behind, before any layer, and a layer behind that."""
    seen: set[int] = set()
    todo = [node]
    while todo:
        for reader in graph.readers(todo.pop()):
            if reader.op_type == "QuantizeLinear":
                pairs = graph.readers(reader)
                if any(n is not None and n.op_type in WEIGHTED for dq in pairs for n in graph.sinks(dq)):
                    return True
            elif reader.op_type not in WEIGHTED and id(reader) not in seen:
                seen.add(id(reader))
                todo.append(reader)
    return False


def _gathered_rows(graph: Graph) -> Hits:
    if not _is_dynamic(graph):
        return
    for reshape in graph.of("Reshape"):
        shape, node = graph.array(reshape.inputs[1]), graph.source(reshape.inputs[0], through=("Relu",))
        if shape is None or node is None:
            continue
        width = _scaled_width(graph, node)
        if width and gathers_rows(width, [int(n) for n in shape]):
            yield (node, reshape)


def gathers_rows(width: int, sizes: Iterable[int]) -> bool:
    """Check whether rows of this width, reshaped to these sizes, come together, as many as the width or more.

    >>> gathers_rows(64, [-1, 196, 64]), gathers_rows(64, [-1, 49, 64]), gathers_rows(64, [-1, 64, 1, 1])
    (True, False, False)
    """
    batch, *rest = sizes
    return batch == -1 and len(rest) > 1 and rest[0] >= width and prod(rest) != width


def _scaled_width(graph: Graph, node: ir.Node) -> int:
    """Columns of a matrix whose last operation is a scale per column; 0 for anything else."""
    if node.op_type in _LINEAR:
        is_matrix = node.op_type == "Gemm" or _is_matrix(graph, node.inputs[0])
        bare = len(node.inputs) < 3 and _has_int8_weight(graph, node)
        return _columns(graph, node) if is_matrix and bare else 0
    constants = [x for x in node.inputs if is_stored(x)]
    if node.op_type not in ("Mul", "Div", "BatchNormalization") or not constants:
        return 0
    layer = graph.source(node.inputs[0], through=("Relu",))
    fused = layer is not None and (
        layer.op_type == "Gemm" or (layer.op_type == "MatMul" and node.op_type == "BatchNormalization")
    )
    return 0 if fused or not _is_matrix(graph, node.inputs[0]) else prod(stored_shape(constants[0]))


def _is_matrix(graph: Graph, value: ir.Value | None) -> bool:
    """Whether it was reshaped to two dimensions, before elementwise operators and linear layers."""
    node = maker(value)
    while node is not None:
        if node.op_type in ("Reshape", "Flatten", "Gemm"):
            return node.op_type != "Reshape" or stored_shape(node.inputs[1]) == (2,)
        if node.op_type in (*MOVES, *CONVOLUTIONS, *POOLS):
            return False
        node = maker(node.inputs[0])
    return False


def _columns(graph: Graph, layer: ir.Node) -> int:
    dq = graph.source(layer.inputs[1])
    shape = stored_shape(dq.inputs[0]) if dq is not None else ()
    turned = integer(layer, "transB", 0) == 1 or maker(layer.inputs[1]) is not dq
    return 0 if len(shape) != 2 else shape[0 if turned else 1]


def _unclipped(graph: Graph) -> Hits:
    for q in graph.of("QuantizeLinear"):
        kind, zero = graph.int_type(q), graph.zero_point(q)
        if graph.is_weight(q) or kind not in ("int16", "uint16") or zero is None or zero.size != 1:
            continue
        info = np.iinfo(kind)
        below, above = int(zero) - int(info.min), int(info.max) - int(zero)
        clamp = graph.source(q.inputs[0])
        nonnegative = clamp is not None and clamp.op_type in CLAMPS and graph.is_nonnegative(clamp)
        if abs(below - above) > 1 and not (nonnegative and below <= above):
            yield (q,)


def _shared_zero_points(graph: Graph) -> Hits:
    if not _is_dynamic(graph):
        return
    layers: dict[ir.Value | None, dict[bool, ir.Node]] = {}
    for dq in graph.of("DequantizeLinear"):
        if len(dq.inputs) < 3 or not graph.is_weight(dq) or graph.int_type(dq) == "int32":
            continue
        for layer in graph.sinks(dq, through=MOVES):
            if layer is not None and layer.op_type in WEIGHTED:
                layers.setdefault(dq.inputs[2], {}).setdefault(layer.op_type in CONVOLUTIONS, layer)
    for pair in layers.values():
        if len(pair) == 2:
            yield (pair[True], pair[False])


def _lost_epsilon(graph: Graph) -> Hits:
    for norm in graph.of(*NORMS):
        scale = _moved_scale(graph, norm.inputs[0])
        if scale and number(norm, "epsilon", 1e-5) > scale**2 and not _normalizes_last_of_four(graph, norm):
            yield (norm,)


def _normalizes_last_of_four(graph: Graph, norm: ir.Node) -> bool:
    """Whether it is a LayerNorm of [N, H, W, C] over C, behind which no scale is moved."""
    x = norm.inputs[0]
    rank = 0 if x is None else len(graph.shapes.get(str(x.name), ()))
    return norm.op_type == "LayerNormalization" and rank == 4 and integer(norm, "axis", -1) in (-1, 3)


def _moved_scale(graph: Graph, value: ir.Value | None) -> float:
    """The one scale by which a tensor was dequantized, maybe moved, or multiplied once; 0.0 with a zero point."""
    factor, node = 1.0, graph.source(value, through=_SCALED)
    if node is not None and node.op_type == "Mul":
        numbers = [x for x in map(graph.array, node.inputs) if x is not None and x.size == 1]
        variables = [x for x in node.inputs if not is_stored(x)]
        if len(numbers) != 1 or len(variables) != 1:
            return 0.0
        factor, node = abs(float(numbers[0].reshape(()))), graph.source(variables[0], through=_SCALED)
    if node is None or node.op_type != "DequantizeLinear":
        return 0.0
    scale, zero = graph.array(node.inputs[1]), graph.zero_point(node)
    if scale is None or scale.size != 1 or zero is None or zero.any():
        return 0.0
    return factor * float(scale.reshape(()))


def _lost_bias(graph: Graph) -> Hits:
    if not _is_dynamic(graph):
        return
    biased = (conv for conv in graph.of("Conv") if graph.runs_quantized(conv) and _has_bias(graph, conv))
    conv = next(biased, None)
    if conv is None or not graph.path_to_q(conv, lambda node: node.op_type in CLAMPS):
        return
    for shape in graph.of("Shape"):
        x = shape.inputs[0]
        if x is not None and x.is_graph_input() and _gives_a_size(graph, shape, x):
            yield (shape, conv)


def _has_bias(graph: Graph, conv: ir.Node) -> bool:
    bias = input_of(conv, 2)
    values = None if bias is None else graph.array(bias)
    return bias is not None and (values is None or bool(values.any()))


def _gives_a_size(graph: Graph, shape: ir.Node, image: ir.Value) -> bool:
    """Whether sizes of the image become those of another tensor, by other nodes than a Reshape."""
    todo, known = [shape], {shape}
    while todo:
        for reader in graph.readers(todo.pop()):
            sizes = graph.shapes.get(str(reader.outputs[0].name), [])
            if reader.op_type == "Range":
                return True
            if reader.op_type in ("Expand", "ConstantOfShape") and sizes[1:] != list(image.shape or ())[1:]:
                return True
            if reader.op_type in (*_READS_SIZE, "Concat") and reader not in known:
                known.add(reader)
                todo.append(reader)
    return False


RULES = (
    Rule(
        "concat-int8",
        (OV,),
        "int8 on one side of a Concat, with a convolution behind: OpenVINO reads the bytes as uint8, and every "
        "negative value is wrong.",
        "Use uint8 with zero point 128: the same levels.",
        _int8_joined,
    ),
    Rule(
        "moved-int8",
        (OV,),
        "int8 goes through a MaxPool, Reshape or the like into a convolution, in a graph that has a Concat anywhere "
        "(of sizes too, where OpenVINO computes them in each run; Flatten of axis 2 makes one): OpenVINO reads "
        "the bytes as uint8, and every negative value is wrong.",
        "Use uint8 with zero point 128: the same levels.",
        _int8_moved,
    ),
    Rule(
        "shared-without-bias",
        (OV,),
        "A convolution without bias (or with one of zeros) has several readers: with a dynamic batch OpenVINO gives "
        "one of them the sums without their scale.",
        "Give it a bias that is not zero, such as 1e-30; or fix the batch.",
        _without_bias,
    ),
    Rule(
        "batch-read",
        (OV,),
        "The number of images, read from their Shape, sizes an Expand, Range or ConstantOfShape: with a dynamic batch "
        "OpenVINO reads it from the first int8 convolution, and loses its bias before the QuantizeLinear behind.",
        "Fix the batch; or broadcast, by Pad and Add in place of Expand and Concat.",
        _lost_bias,
    ),
    Rule(
        "padded-average",
        (OV,),
        "The average counts its padding, and its input has a zero point, or is int8 to which OpenVINO gives one: it "
        "pads with the integer 0.",
        "Write a depthwise convolution of ones, or average before the QuantizeLinear.",
        _padded_average,
    ),
    Rule(
        "average-rounded",
        (OV,),
        "Between a DequantizeLinear and a convolution with integer weights, arithmetic with another tensor, or a scale "
        "of each channel, OpenVINO rounds the average to the steps of its input.",
        "Quantize the average with a scale of its own, or write a depthwise convolution of ones.",
        _rounded_average,
    ),
    Rule(
        "branch-not-rounded",
        (OV,),
        "OpenVINO computes a convolution with the Add behind it, and leaves out the Q/DQ pair between the two.",
        "Quantize only the other input of the add (target 'openvino' of qzoo.export_onnx).",
        _unrounded_branch,
    ),
    Rule(
        "maximum-before-q",
        (OV,),
        "OpenVINO fuses the maximum (or minimum) with the QuantizeLinear behind it, and computes it wrongly.",
        "Write MaxPool over the whole image, and quantize before it.",
        _maximum,
    ),
    Rule(
        "rows-gathered",
        (OV,),
        "A Reshape gathers at least as many rows of a matrix as it has columns, directly behind a scale per column: "
        "with a dynamic batch OpenVINO takes the scales of columns for rows, or does not load the file.",
        "Add the bias behind the scale, fold BatchNormalization, or put an Unsqueeze of axis 0 before the Reshape.",
        _gathered_rows,
    ),
    Rule(
        "range-not-clipped",
        (OV,),
        "OpenVINO drops Q/DQ of 16 bits, and with it the clipping of what lies beyond a range that is not symmetric.",
        "Use 8 bits, or a zero point in the middle.",
        _unclipped,
    ),
    Rule(
        "epsilon-lost",
        (OV,),
        "A normalization reads what one scale dequantizes, and its epsilon is more than the square of that scale: "
        "OpenVINO normalizes the integers, and adds epsilon to their variance, where it is next to nothing.",
        "Put a Max with the lowest float32 between, across which no scale is moved; or normalize before quantizing.",
        _lost_epsilon,
    ),
    Rule(
        "zero-point-shared",
        (OV,),
        "Weights of a convolution and of a linear layer have one zero-point constant: both run in float when the "
        "batch of the file is fixed by model.reshape.",
        "Give each its own constant.",
        _shared_zero_points,
    ),
)
