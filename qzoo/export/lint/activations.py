"""Rules about what stands between the layers: ReLU, adds, pooling, pairs that are doubled or change the scale."""

from __future__ import annotations

from onnx import NodeProto

from qzoo.export.lint.graph import CLAMPS, MOVES, WEIGHTED, Graph
from qzoo.export.lint.rule import EVERY, ORT, OV, TRT, Hits, Rule

_POOLS = ("AveragePool", "GlobalAveragePool")
# With both operands from DQ and one Q behind, ONNX Runtime has int8 kernels for these.
_KERNELS = ("Add", "Mul", "Concat", "Sigmoid", "LeakyRelu", "Softmax", "Where", "Resize", *_POOLS)
_OWN_RULES = (*WEIGHTED, *CLAMPS, *_POOLS, "Add", "BatchNormalization", "ReduceMean")


def _pair_before_relu(graph: Graph) -> Hits:
    for relu in graph.of(*CLAMPS):
        dq = graph.producer(relu.input[0])
        if dq is None or dq.op_type != "DequantizeLinear":
            continue
        q = graph.producer(dq.input[0])
        layer = graph.producer(q.input[0]) if q is not None else None
        if q is not None and layer is not None and layer.op_type in (*WEIGHTED, "Add", "BatchNormalization"):
            yield (layer, q, relu)


def _signed_after_relu(graph: Graph) -> Hits:
    for relu, q in _clamped(graph):
        zero = graph.zero_point(q)
        if graph.is_nonnegative(relu) and zero is not None:
            kind = graph.int_type(q)
            if kind.startswith("int") or (kind.startswith("uint") and zero.any()):
                yield (relu, q)


def _clip_left(graph: Graph) -> Hits:
    for clip, q in _clamped(graph):
        high = graph.array(clip.input[2]) if clip.op_type == "Clip" and len(clip.input) > 2 else None
        scale, zero = graph.scale(q), graph.zero_point(q)
        if high is None or scale is None or zero is None or scale.size > 1 or graph.int_type(q) != "uint8":
            continue
        if not zero.any() and 255 * float(scale.reshape(-1)[0]) > float(high) * (1 + 1e-6):
            yield (clip, q)


def _clamped(graph: Graph) -> list[tuple[NodeProto, NodeProto]]:
    """Each ReLU or Clip with the Q that reads it."""
    return [
        (clamp, q)
        for clamp in graph.of(*CLAMPS)
        for q in graph.sinks(clamp)
        if q is not None and q.op_type == "QuantizeLinear"
    ]


def _add_float_input(graph: Graph) -> Hits:
    for add in _adds(graph):
        quantized = [graph.is_dequantized(x) for x in add.input]
        if not all(quantized) and (any(quantized) or any(_is_int8_layer(graph, x) for x in add.input)):
            yield (add, *_makers(graph, add, quantized))


def _makers(graph: Graph, add: NodeProto, quantized: list[bool]) -> list[NodeProto]:
    found = (graph.producer(x) for x, done in zip(add.input, quantized, strict=True) if not done)
    return [node for node in found if node is not None]


def _residual_float(graph: Graph) -> Hits:
    for add in _adds(graph):
        if any(_is_int8_layer(graph, x) for x in add.input) and not any(
            graph.is_dequantized(x) for x in add.input
        ):
            yield (add,)


def _pair_on_branch(graph: Graph) -> Hits:
    for add in _adds(graph):
        pairs = [_branch(graph, x) for x in add.input]
        if all(graph.is_dequantized(x) for x in add.input) and any(pairs):
            yield (*next(pair for pair in pairs if pair), add)


def _branch(graph: Graph, tensor: str) -> tuple[NodeProto, ...]:
    """Layer and Q whose values go to the add alone."""
    dq = graph.producer(tensor)
    q = graph.producer(dq.input[0]) if dq is not None and dq.op_type == "DequantizeLinear" else None
    layer = graph.producer(q.input[0]) if q is not None else None
    if dq is None or q is None or layer is None or layer.op_type not in WEIGHTED:
        return ()
    alone = all(len(graph.readers(node)) == 1 for node in (layer, q, dq))
    return (layer, q) if alone else ()


def _add_output_float(graph: Graph) -> Hits:
    for node in graph.of("Add", "Mul", *_POOLS):
        operands = node.input[:1] if node.op_type in _POOLS else node.input
        if all(graph.is_dequantized(x) for x in operands) and not graph.is_quantized_once(node):
            yield (node,)


def _pool_float_input(graph: Graph) -> Hits:
    for pool in graph.of(*_POOLS):
        source = graph.source(pool.input[0], through=(*MOVES, *CLAMPS))
        if source is not None and (graph.runs_quantized(source) or _is_int8_add(graph, source)):
            yield (source, pool)


def _reduce_mean(graph: Graph) -> Hits:
    for node in graph.of("ReduceMean"):
        source = graph.source(node.input[0], through=(*MOVES, *CLAMPS))
        if graph.is_dequantized(node.input[0]) or (source is not None and graph.runs_quantized(source)):
            yield (node,)


def _max_pool_before_q(graph: Graph) -> Hits:
    for pool in graph.of("MaxPool"):
        source = graph.source(pool.input[0], through=(*MOVES, *CLAMPS))
        into_q = any(n is not None and n.op_type == "QuantizeLinear" for n in graph.sinks(pool))
        if into_q and source is not None and graph.runs_quantized(source):
            yield (source, pool)


def _doubled(graph: Graph) -> Hits:
    for q in graph.of("QuantizeLinear"):
        dq = graph.producer(q.input[0])
        if dq is not None and dq.op_type == "DequantizeLinear":
            yield (dq, q)


def _scale_changes(graph: Graph) -> Hits:
    for move in graph.of(*MOVES):
        dq = graph.producer(move.input[0])
        readers = graph.readers(move)
        if dq is None or dq.op_type != "DequantizeLinear" or graph.is_weight(dq) or len(readers) != 1:
            continue
        q = readers[0]
        if q.op_type == "QuantizeLinear" and graph.parameters(dq) != graph.parameters(q):
            yield (dq, move, q)


def _shared_int8(graph: Graph) -> Hits:
    for q in graph.of("QuantizeLinear"):
        if graph.is_weight(q) or graph.int_type(q) != "int8":
            continue
        pairs = [reader for reader in graph.readers(q) if reader.op_type == "DequantizeLinear"]
        readers = [reader for dq in pairs for reader in graph.readers(dq)]
        if len(readers) > 1:
            yield (q, *readers)


def _island(graph: Graph) -> Hits:
    """Connected operators without int8 kernel that have int8 layers before and a Q behind."""
    island_of: dict[str, list[NodeProto]] = {}  # by the tensors that its nodes make
    islands: list[list[NodeProto]] = []
    for node in graph.nodes:
        if not _is_float(graph, node):
            continue
        joined = [node]
        for other in [island for island in islands if any(island_of.get(x) is island for x in node.input)]:
            islands.remove(other)
            joined = [*other, *joined]
        islands.append(joined)
        island_of |= {name: joined for member in joined for name in member.output}
    for island in islands:
        yield from _closed(graph, island)


def _closed(graph: Graph, island: list[NodeProto]) -> Hits:
    before = any(graph.is_dequantized(x) or _is_int8_layer(graph, x) for node in island for x in node.input)
    behind = any(
        n is not None and n.op_type == "QuantizeLinear" for node in island for n in graph.sinks(node)
    )
    if before and behind:
        yield tuple(island)


def _is_float(graph: Graph, node: NodeProto) -> bool:
    if node.op_type in (*_OWN_RULES, *MOVES, "QuantizeLinear", "DequantizeLinear", "Shape", "Cast"):
        return False
    operands = [x for x in node.input if x and not graph.is_constant(x)]
    if not any(graph.producer(x) is not None and not graph.is_stored(x) for x in operands):
        return False
    return node.op_type not in _KERNELS or not all(graph.is_dequantized(x) for x in operands)


def _adds(graph: Graph) -> list[NodeProto]:
    return [add for add in graph.of("Add") if not any(graph.is_stored(x) for x in add.input)]


def _is_int8_add(graph: Graph, node: NodeProto) -> bool:
    return node.op_type == "Add" and any(graph.is_dequantized(x) for x in node.input)


def _is_int8_layer(graph: Graph, tensor: str) -> bool:
    node = graph.producer(tensor)
    return node is not None and graph.runs_quantized(node)


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
    ),
    Rule(
        "clip-wider-range",
        (ORT,),
        "The quantizer reaches beyond the upper limit of the Clip, so that the Clip must stay, and the layer before it "
        "runs in float.",
        "Limit the range (amax) to the Clip's upper limit.",
        _clip_left,
    ),
    Rule(
        "add-float-input",
        (ORT,),
        "An input of the add is not quantized: the add, and the layer that makes the input, run in float.",
        "Quantize both inputs of the add (target 'onnxruntime' of qzoo.export_onnx).",
        _add_float_input,
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
        "The average pooling's input is not quantized: it runs in float, and so does the layer before it in ONNX "
        "Runtime.",
        "Quantize the input of the pooling.",
        _pool_float_input,
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
        "scale-changes",
        (ORT,),
        "The operator only moves values, but the scale before and behind differs: it runs in float between the two.",
        "Use the same scale and zero point on both sides.",
        _scale_changes,
    ),
    Rule(
        "shared-int8",
        (ORT,),
        "An int8 activation with several readers: ONNX Runtime's x86 kernels want uint8, and it converts only tensors "
        "with one reader; the layers around run in float.",
        "Use uint8 with zero point 128: the same levels.",
        _shared_int8,
    ),
    Rule(
        "float-island",
        (ORT,),
        "Operators without an int8 kernel between two int8 layers: the tensor is converted to float and back.",
        "Use an operator with a kernel (ReLU, Sigmoid or LeakyRelu with Q/DQ around), or accept the cost.",
        _island,
    ),
)
