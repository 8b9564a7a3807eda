"""Rules about what stands between the layers: ReLU, adds, pooling, pairs that are doubled or shared."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qzoo.export.graph import made_by, maker
from qzoo.export.lint.graph import Graph
from qzoo.export.lint.rule import EVERY, ORT, OV, TRT, Hits, Rule
from qzoo.runtimes.operators import CLAMPS, MOVES, POOLS, WEIGHTED

_EPSILON = np.finfo(np.float32).eps


def _pair_before_relu(graph: Graph) -> Hits:
    for relu in graph.of(*CLAMPS):
        dq = made_by(relu.inputs[0], "DequantizeLinear")
        q = maker(dq.inputs[0]) if dq else None
        layer = made_by(q.inputs[0], *WEIGHTED, "Add", "BatchNormalization") if q else None
        if q is not None and layer is not None and _may_clip_in_q(graph, relu):
            yield (layer, q, relu)


def _may_clip_in_q(graph: Graph, clamp: ir.Node) -> bool:
    """Whether a Q behind may have its limits: a ReLU's, from zero on, or the same on both sides."""
    if clamp.op_type == "Relu":
        return True
    low, high = graph.limits(clamp)
    return low is not None and high is not None and low in (0, -high)


def _signed_after_relu(graph: Graph) -> Hits:
    for relu, q in _clamped(graph):
        zero = graph.zero_point(q)
        if graph.is_nonnegative(relu) and zero is not None:
            kind = graph.int_type(q)
            if kind.startswith(("int", "uint")) and (zero != _lowest(kind)).any():
                yield (relu, q)


def _lowest(kind: str) -> int:
    return -(2 ** (int(kind[3:]) - 1)) if kind.startswith("int") else 0


def _clip_kept(graph: Graph) -> Hits:
    for clip, q in _clamped(graph):
        scale, zero = graph.scale(q), graph.zero_point(q)
        source = graph.source(clip.inputs[0], through=(*MOVES, *CLAMPS))
        if clip.op_type != "Clip" or source is None or not graph.has_int8_kernel(source):
            continue
        if graph.int_type(q) not in ("int8", "uint8") or scale is None or zero is None or scale.size > 1:
            continue
        levels = np.iinfo(graph.int_type(q))
        first, last = (level - int(zero.reshape(-1)[0]) for level in (levels.min, levels.max))
        low, high = graph.limits(clip)
        if low == 0 and first != 0:
            low = -np.inf  # signed-after-relu
        if low is None or high is None or scale.ndim or not _is_dropped(low, high, float(scale), first, last):
            yield (clip, q)


def _is_dropped(low: float, high: float, scale: float, first: int, last: int) -> bool:
    """Whether Q clips as tightly: in its real ends to float32's epsilon, or in what the limits are rounded to."""
    if not np.isfinite(scale) or scale <= 0:
        return False
    step = np.float32(scale)
    if np.float32(low) - step * np.float32(first) <= _EPSILON >= step * np.float32(last) - np.float32(high):
        return True
    # The rounded limit is an int32, which a missing upper limit overflows.
    return bool(np.rint(low / scale) <= first and last <= np.rint(high / scale) < 2**31)


def _clamped(graph: Graph) -> list[tuple[ir.Node, ir.Node]]:
    """Each ReLU or Clip with the Q that reads it."""
    return [
        (clamp, q)
        for clamp in graph.of(*CLAMPS)
        for q in graph.sinks(clamp)
        if q is not None and q.op_type == "QuantizeLinear"
    ]


def _add_float_input(graph: Graph) -> Hits:
    for add in graph.of("Add"):
        quantized = [graph.is_dequantized(x) for x in add.inputs]
        layers = not any(graph.is_made_of_stored(x) for x in add.inputs) and any(
            map(graph.is_int8_layer, add.inputs)
        )
        if not graph.has_int8_kernel(add) and (any(quantized) or layers):  # layer and stored: its bias
            yield (add, *_makers(graph, add, quantized))


def _makers(graph: Graph, add: ir.Node, quantized: list[bool]) -> list[ir.Node]:
    makers = (maker(x) for x, done in zip(add.inputs, quantized, strict=True) if not done)
    return [node for node in makers if node is not None and node.op_type != "DequantizeLinear"]


def _residual_float(graph: Graph) -> Hits:
    for add in _adds(graph):
        if any(graph.is_int8_layer(x) for x in add.inputs) and not any(
            graph.is_dequantized(x) for x in add.inputs
        ):
            yield (add,)


def _pair_on_branch(graph: Graph) -> Hits:
    for add in _adds(graph):
        pairs = [_branch(graph, x) for x in add.inputs]
        if all(graph.is_dequantized(x) for x in add.inputs) and any(pairs):
            yield (*next(pair for pair in pairs if pair), add)


def _branch(graph: Graph, value: ir.Value | None) -> tuple[ir.Node, ...]:
    """Layer and Q whose values go to the add alone."""
    dq = made_by(value, "DequantizeLinear")
    q = maker(dq.inputs[0]) if dq else None
    layer = made_by(q.inputs[0], *WEIGHTED) if q else None
    if dq is None or q is None or layer is None:
        return ()
    alone = all(len(graph.readers(node)) == 1 for node in (layer, q, dq))
    return (layer, q) if alone else ()


def _add_output_float(graph: Graph) -> Hits:
    for node in graph.of("Add", "Mul", *POOLS):
        if graph.has_int8_kernel(node) and not graph.is_quantized_once(node):
            yield (node,)


def _pool_float_input(graph: Graph) -> Hits:
    for pool in graph.of(*POOLS, "ReduceMean"):
        source = graph.source(pool.inputs[0], through=(*MOVES, *CLAMPS))
        if source is not None and (graph.runs_quantized(source) or _is_int8_add(graph, source)):
            yield (source, pool)


def _reduce_mean(graph: Graph) -> Hits:
    for node in graph.of("ReduceMean"):
        source = graph.source(node.inputs[0], through=(*MOVES, *CLAMPS))
        if graph.is_dequantized(node.inputs[0]) or (source is not None and graph.runs_quantized(source)):
            yield (node,)


def _max_pool_before_q(graph: Graph) -> Hits:
    for pool in graph.of("MaxPool"):
        source = graph.source(pool.inputs[0], through=(*MOVES, *CLAMPS))
        into_q = any(n is not None and n.op_type == "QuantizeLinear" for n in graph.sinks(pool))
        if into_q and source is not None and graph.runs_quantized(source):
            yield (source, pool)


def _doubled(graph: Graph) -> Hits:
    for q in graph.of("QuantizeLinear"):
        if dq := made_by(q.inputs[0], "DequantizeLinear"):
            yield (dq, q)


def _shared_int8(graph: Graph) -> Hits:
    for q in graph.of("QuantizeLinear"):
        if graph.is_weight(q) or graph.int_type(q) != "int8":
            continue
        pairs = [reader for reader in graph.readers(q) if reader.op_type == "DequantizeLinear"]
        readers = [reader for dq in pairs for reader in graph.readers(dq)]
        if len(readers) > 1:
            yield (q, *readers)


def _adds(graph: Graph) -> list[ir.Node]:
    return [add for add in graph.of("Add") if not any(graph.is_made_of_stored(x) for x in add.inputs)]


def _is_int8_add(graph: Graph, node: ir.Node) -> bool:
    return node.op_type == "Add" and any(graph.is_dequantized(x) for x in node.inputs)


RULES = (
    Rule(
        "q-before-relu",
        EVERY,
        "Q/DQ between a layer and its ReLU: the two can't be fused, and the ReLU, or a second rounding in its place, "
        "runs on its own.",
        "Quantize after the ReLU only.",
        _pair_before_relu,
    ),
    Rule(
        "signed-after-relu",
        (ORT, OV),
        "After a ReLU half of the signed range is never used. ONNX Runtime drops a ReLU only where the zero point is "
        "the type's lowest value, and runs the layer before it in float.",
        "Use uint8 with zero point 0.",
        _signed_after_relu,
        floats=(ORT,),
    ),
    Rule(
        "clip-wider-range",
        (ORT,),
        "The quantizer reaches beyond a limit of the Clip (or a limit is computed, or the scale is no scalar), so that "
        "the Clip must stay, and the layer before it runs in float.",
        "Choose scale and zero point such that the range ends at the Clip's limits or within, or clip the integers "
        "behind the QuantizeLinear.",
        _clip_kept,
        floats=(ORT,),
    ),
    Rule(
        "add-float-input",
        (ORT,),
        "An input of the add is not quantized (or stored in another form than uint8 with one scale): the add, and the "
        "layer that makes the input, run in float.",
        "Quantize both inputs of the add: qzoo.quantize, and target 'onnxruntime' of qzoo.export_onnx.",
        _add_float_input,
        floats=(ORT,),
    ),
    Rule(
        "residual-float",
        (TRT,),
        "TensorRT fuses convolution and add in int8 only when the add's other input is quantized.",
        "Quantize the skip, and not the convolution's output.",
        _residual_float,
    ),
    Rule(
        "q-on-branch",
        (TRT,),
        "Q/DQ between a convolution and the add that TensorRT would fuse it with.",
        "Quantize only the skip input of the add (target 'tensorrt' of qzoo.export_onnx).",
        _pair_on_branch,
    ),
    Rule(
        "op-output-float",
        (ORT,),
        "The inputs are quantized, but the output does not go into one QuantizeLinear and nowhere else: the operator "
        "runs in float.",
        "Quantize the output, once for all its readers; or repeat the operator for each Q (qzoo.export_onnx does).",
        _add_output_float,
    ),
    Rule(
        "pool-float-input",
        (ORT, OV),
        "The input of the average is not quantized: it runs in float, and so does the layer before it in ONNX "
        "Runtime.",
        "Quantize the input of the pooling, as qzoo.quantize does.",
        _pool_float_input,
        floats=(ORT,),
    ),
    Rule(
        "reduce-mean",
        (ORT,),
        "ONNX Runtime has no int8 kernel for ReduceMean.",
        "Write GlobalAveragePool (qzoo.export_onnx does).",
        _reduce_mean,
    ),
    Rule(
        "max-pool-before-q",
        (OV,),
        "The max pooling stands before the QuantizeLinear: OpenVINO runs it in float.",
        "Quantize before the pooling; the largest value is the same.",
        _max_pool_before_q,
    ),
    Rule(
        "double-pair",
        (OV, TRT),
        "A QuantizeLinear directly behind a DequantizeLinear: the tensor is quantized twice, which costs a pass and "
        "accuracy.",
        "Keep one of the two pairs.",
        _doubled,
    ),
    Rule(
        "shared-int8",
        (ORT,),
        "An int8 activation with several readers: ONNX Runtime's x86 kernels want uint8, and it converts only tensors "
        "with one reader; the layers around run in float.",
        "Use uint8 with zero point 128: the same levels.",
        _shared_int8,
        floats=(ORT,),
    ),
)
