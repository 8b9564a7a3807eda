"""Rewrites of the exported graph, each of which keeps the results and makes runtimes find their int8 kernels.

All work in place on an ``onnx_ir`` model.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnx_ir.tensor_adapters import from_torch_dtype

from qzoo.errors import ExportError
from qzoo.export.graph import (
    constant,
    copy_of,
    initializer,
    input_of,
    integer,
    integers,
    is_output,
    made_by,
    maker,
    node_like,
    nodes_of,
    nodes_within,
    readers,
    replace,
    replace_by,
    stored_shape,
    text,
    zero_point,
)
from qzoo.runtimes.operators import CONVOLUTIONS, PAIR

# What QuantizeLinear saturates at. A narrow range is a matter of the weights, which are on their levels already.
_LIMITS = {
    "int8": (-128, 127),
    "uint8": (0, 255),
    "int16": (-32768, 32767),
    "uint16": (0, 65535),
    "float8_e4m3fn": (-448, 448),
    "float8_e5m2": (-57344, 57344),
}


def simplify(model: ir.Model) -> None:
    """Fold constants, and drop what does nothing: the exporter's own optimization without its slowest rule.

    That rule, which makes a Split of two Slices, goes through the whole graph for each node: the time of an export
    grew with the square of its nodes, and was half of a DenseNet's.
    """
    from onnxscript import optimizer, rewriter

    if not hasattr(rewriter, "_DEFAULT_REWRITE_RULES"):  # private: a later onnxscript may not have it
        optimizer.optimize(model)
        return
    rules = [rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule.name != "SlicesSplit"]
    common.InlinePass()(model)
    for _ in range(2):
        folded = optimizer.fold_constants(model, onnx_shape_inference=True)
        changed = rewriter.RewritePass(rules)(model)
        drop_unused(model)
        if not (folded.modified or changed.modified):
            break
    for tidy in (
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        tidy(model)


def fold_scales(model: ir.Model) -> None:
    """Fold what multiplies the channels of a layer by constants, as LayerScale does, into its weights and bias.

    The integers of the weights stay, but for their signs: the factors go into the scales, one for each channel.
    """
    for node in nodes_of(model, "Mul"):
        stored = [constant(value) for value in node.inputs]
        factors, value = (stored[0], node.inputs[1]) if stored[1] is None else (stored[1], node.inputs[0])
        if factors is None or value is None or constant(value) is not None:
            continue
        layer, add = _layer_before(value, factors)
        if layer is not None and _scale_layer(model, layer, add, factors.reshape(-1)):
            replace(model, node, value)


def _layer_before(value: ir.Value, factors: np.ndarray) -> tuple[ir.Node | None, ir.Node | None]:
    """The layer whose output channels the factors are for, and the Add of its bias; nothing else may read either."""
    axes = [axis for axis, size in enumerate(factors.shape, -factors.ndim) if size > 1]
    add = None
    if value.shape is None or len(axes) != 1 or factors.ndim > len(value.shape):
        return None, None
    axis = axes[0] + len(value.shape)
    while len(value.uses()) == 1 and not value.is_graph_output():
        node, last = value.producer(), axis == len(value.shape or ()) - 1
        if node is None or node.inputs[0] is None:
            break
        if node.op_type == "MatMul":
            return (node, add) if last else (None, None)
        if node.op_type == "Conv" or (node.op_type == "Gemm" and integer(node, "transB", 0)):
            return (node, None) if axis == 1 and add is None else (None, None)
        if node.op_type == "Transpose" and add is None:
            axis, value = integers(node, "perm")[axis], node.inputs[0]
        elif node.op_type == "Add" and add is None and last and constant(node.inputs[1]) is not None:
            add, value = node, node.inputs[0]
        else:
            break
    return None, None


def _scale_layer(model: ir.Model, layer: ir.Node, add: ir.Node | None, factors: np.ndarray) -> bool:
    """Multiply a layer's weights, their scales and its bias by factors. Returns False where they can't be."""
    turn = made_by(layer.inputs[1], "Transpose") if layer.op_type == "MatMul" else None
    pair = made_by(layer.inputs[1] if turn is None else turn.inputs[0], "DequantizeLinear")
    quantizer = None if pair is None else made_by(pair.inputs[0], "QuantizeLinear")
    if pair is None or quantizer is None or (layer.op_type == "MatMul") != (turn is not None):
        return False
    holder, place = (layer, 2) if add is None else (add, 1)
    weight, scale, bias = quantizer.inputs[0], pair.inputs[1], input_of(holder, place)
    weights, scales, terms = constant(weight), constant(scale), constant(bias)
    if weight is None or scale is None or weights is None or scales is None or integer(pair, "axis", 1) != 0:
        return False
    if not scales.shape == factors.shape == weights.shape[:1] or (terms is None) != (bias is None):
        return False
    steps = (scales * np.where(factors == 0, 1, np.abs(factors))).astype(scales.dtype)
    if not (steps > np.finfo(steps.dtype).tiny).all() or (terms is not None and terms.shape != factors.shape):
        return False
    products = weights * factors.reshape(-1, *[1] * (weights.ndim - 1))
    steps_in_place = _in_place_of(model, scale, steps)
    first = copy_of(quantizer, [_in_place_of(model, weight, products), steps_in_place, *quantizer.inputs[2:]])
    second = copy_of(pair, [first.outputs[0], steps_in_place, *pair.inputs[2:]])
    new = [first, second] if turn is None else [first, second, copy_of(turn, [second.outputs[0]])]
    model.graph.insert_before(layer, new)
    layer.replace_input_with(1, new[-1].outputs[0])
    if bias is not None and terms is not None:
        holder.replace_input_with(place, _in_place_of(model, bias, terms * factors))
    return True


def _in_place_of(model: ir.Model, value: ir.Value, array: np.ndarray) -> ir.Value:
    """A constant that takes the name of another one, of the same type."""
    name, value.name = str(value.name), f"{value.name}_unscaled"
    dtype = np.asarray(constant(value)).dtype
    return initializer(model, name, array.astype(dtype))


def store_integer_weights(model: ir.Model) -> None:
    """Store what a QuantizeLinear makes of a constant: an integer or float8 initializer before the DequantizeLinear.

    The weights are on their levels already, so rounding is exact; without this the file stays as large as float.
    """
    for node in nodes_of(model, "QuantizeLinear"):
        source = node.inputs[0]
        weight, scale, zero = (constant(value) for value in node.inputs[:3])
        if source is None or weight is None or scale is None or zero is None:
            continue
        shape = [1] * weight.ndim
        if scale.size > 1:
            shape[integer(node, "axis", 1)] = -1
        low, high = _LIMITS[zero.dtype.name]
        q = np.clip(weight / scale.reshape(shape), low, high)
        q = (np.rint(q) if zero.dtype.kind in "iu" else q).astype(zero.dtype)
        replace(model, node, initializer(model, f"{source.name}_quantized", q))


def store_4_bits(model: ir.Model) -> None:
    """Store int8 weights that use the levels -8 to 7 only as int4, two to a byte.

    Raises:
        ExportError: there are none.
    """
    any_stored = False
    for node in nodes_of(model, "DequantizeLinear"):
        q, source = constant(node.inputs[0]), node.inputs[0]
        if q is None or source is None or q.dtype != np.int8 or q.min() < -8 or q.max() > 7:
            continue
        any_stored = True
        name, source.name = str(source.name), f"{source.name}_8"
        node.replace_input_with(0, initializer(model, name, q.astype(ml_dtypes.int4)))
        zero = zero_point(node)
        if zero is not None:
            zeros = initializer(model, f"{name}_zero_point", zero.astype(ml_dtypes.int4))
            node.replace_input_with(2, zeros)
    if not any_stored:
        raise ExportError("weights='int4' was asked for, but no layer has weights of at most 4 bits")


def use_global_pooling(model: ir.Model) -> None:
    """Turn ReduceMean over height and width into GlobalAveragePool, which has an int8 kernel in ONNX Runtime.

    A Reshape drops the two axes: ONNX Runtime carries Q and DQ across it, and not across a Flatten.
    """
    for node in nodes_of(model, "ReduceMean"):
        x, axes = node.inputs[0], constant(input_of(node, 1))
        if x is None or x.shape is None or len(x.shape) != 4 or axes is None:
            continue
        if sorted(int(a) % 4 for a in axes) != [2, 3]:
            continue
        out = node.outputs[0]
        pool = node_like("GlobalAveragePool", [x], like=node, result=out)
        pool.outputs[0].shape = ir.Shape([x.shape[0], x.shape[1], 1, 1])
        shape = initializer(model, f"{out.name}_shape", np.array([0, -1]))
        flat = node_like("Reshape", [pool.outputs[0], shape], like=node, result=out)
        replace_by(model, node, [pool] if integer(node, "keepdims", 1) else [pool, flat])


def drop_pooling_of_one(model: ir.Model) -> None:
    """Remove an AveragePool over single pixels, which an adaptive pooling to the size at hand becomes.

    It changes nothing, but the layer in front of it would run in float.
    """
    for node in nodes_of(model, "AveragePool"):
        one, x = [1] * len(integers(node, "kernel_shape")), node.inputs[0]
        unit_stride = integers(node, "strides") in ([], one)
        padded = any(integers(node, "pads")) or text(node, "auto_pad", "NOTSET") != "NOTSET"
        if x is None or integers(node, "kernel_shape") != one or not unit_stride or padded or is_output(node):
            continue
        replace(model, node, x)


def limit_by_clips(model: ir.Model) -> None:
    """Turn Max with zero into ReLU, and Max and Min with another number into Clip, as ``clamp`` is exported.

    Runtimes compute ReLU and Clip with the layer before, or in the Q behind, and Max and Min in float.
    """
    for node in nodes_of(model, "Max", "Min"):
        if len(node.inputs) != 2:
            continue
        for limit, x in (node.inputs, tuple(reversed(node.inputs))):
            number = constant(limit)
            if limit is None or number is None or number.shape != () or constant(x) is not None:
                continue
            limits = [limit] if node.op_type == "Max" else [None, limit]
            is_relu = node.op_type == "Max" and number == 0
            new = node_like("Relu" if is_relu else "Clip", [x] if is_relu else [x, *limits], like=node)
            new.outputs[0].type, new.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
            replace_by(model, node, [new])
            break


def merge_padding(model: ir.Model) -> None:
    """Move an explicit zero Pad before a convolution into its ``pads``; Q and DQ may stand between the two.

    Zero quantizes to zero, so padding before or after Q/DQ is the same; but a Pad between DQ and Conv keeps the
    convolution in floating point.
    """
    for conv in nodes_of(model, "Conv"):
        path, pad = _find_pad(conv)
        if pad is None or text(conv, "auto_pad", "NOTSET") != "NOTSET":
            continue
        amounts, source = _zero_padding(pad), pad.inputs[0]
        if amounts is None or source is None:
            continue
        rank = len(amounts) // 2
        start, end = amounts[2:rank], amounts[rank + 2 :]
        old = integers(conv, "pads") or [0] * (2 * (rank - 2))
        pads = [a + b for a, b in zip(old, [*start, *end], strict=True)]
        conv.attributes["pads"] = ir.AttrInt64s("pads", pads)
        for node in path:
            for value in node.outputs:
                value.shape = source.shape
        replace(model, pad, source)


def _find_pad(conv: ir.Node) -> tuple[list[ir.Node], ir.Node | None]:
    """The Pad from which the convolution's data comes through Q and DQ only, each without another reader."""
    path: list[ir.Node] = []
    value = conv.inputs[0]
    while value is not None:
        node = value.producer()
        if node is None or len(value.uses()) != 1 or value.is_graph_output():
            return [], None
        if node.op_type == "Pad":
            return path, node
        if node.op_type not in PAIR:
            return [], None
        path.append(node)
        value = node.inputs[0]
    return [], None


def _zero_padding(pad: ir.Node) -> list[int] | None:
    """Amounts of a Pad that appends zeros to the spatial dimensions only, else None."""
    amounts = constant(pad.inputs[1])
    fill = np.zeros(()) if input_of(pad, 2) is None else constant(pad.inputs[2])
    if text(pad, "mode", "constant") != "constant" or amounts is None or fill is None or fill.any():
        return None
    if input_of(pad, 3) is not None:
        return None
    values = [int(a) for a in amounts]
    rank = len(values) // 2
    if rank < 3 or any(values[:2]) or any(values[rank : rank + 2]) or min(values) < 0:
        return None
    return values


def merge_pairs(model: ir.Model) -> None:
    """Merge Q (and DQ) of one tensor with the same scale, zero point and axis.

    A block's input that also feeds the projection and the skip is quantized by three quantizers of equal range; one
    Q/DQ pair keeps the tensor int8 for all readers.
    """
    for op_type in PAIR:
        seen: dict[Any, ir.Node] = {}
        for node in nodes_of(model, op_type):
            key = _pair_key(node)
            if key is None:
                continue
            first = seen.setdefault(key, node)
            if first is not node and not node.outputs[0].is_graph_output():
                replace(model, node, first.outputs[0])


def split_weights(model: ir.Model) -> None:
    """Split weights and biases in the file, as those of query, key and value, which ``nn.MultiheadAttention`` packs.

    ONNX Runtime runs a layer in int8 only where its weight's DequantizeLinear is right before it.
    """
    for node in nodes_of(model, "Split"):
        axis, source = integer(node, "axis", 0), node.inputs[0]
        dq = made_by(source, "DequantizeLinear")
        q = None if dq is None else made_by(dq.inputs[0], "QuantizeLinear")
        holder, ends = source if q is None else q.inputs[0], _ends(node, axis)
        if holder is None or constant(holder) is None or ends is None:
            continue
        steps = [] if dq is None else list(dq.inputs[1:3])
        if dq is not None and (
            integer(dq, "axis", 1) != axis or any(stored_shape(s) != (ends[-1],) for s in steps)
        ):
            continue
        for place, span in enumerate(pairwise(ends)):
            part, *own = (
                _taken(model, value, place, span, axis) for value in (holder, *steps) if value is not None
            )
            if dq is not None and q is not None:
                quantized = copy_of(q, [part, *own])
                pair = [quantized, copy_of(dq, [quantized.outputs[0], *own])]
                model.graph.insert_before(node, pair)
                part = pair[-1].outputs[0]
            node.outputs[place].replace_all_uses_with(part, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)


def _taken(model: ir.Model, whole: ir.Value, place: int, span: tuple[int, int], axis: int) -> ir.Value:
    """A part of what is stored; of one dimension along it."""
    array, name = np.asarray(constant(whole)), f"{whole.name}_{place}"
    while name in model.graph.initializers:  # layers of equal biases have one
        name += "_"
    return initializer(model, name, array.take(range(*span), min(axis, array.ndim - 1)))


def _ends(split: ir.Node, axis: int) -> list[int] | None:
    """Where the parts of a Split begin and end; None where a size is open."""
    ends = [0]
    for value in split.outputs:
        size = None if value.shape is None else value.shape[axis]
        if not isinstance(size, int):
            return None
        ends.append(ends[-1] + size)
    return ends


def _pair_key(node: ir.Node) -> tuple[Any, ...] | None:
    scale, zero = constant(node.inputs[1]), zero_point(node)
    if scale is None or zero is None:
        return None
    axis = integer(node, "axis", 1) if scale.size > 1 else None
    return id(node.inputs[0]), scale.tobytes(), scale.shape, zero.tobytes(), str(zero.dtype), axis


def write_average_as_convolution(model: ir.Model, pool: ir.Node) -> list[ir.Node] | None:
    """Write an AveragePool of dequantized integers as a depthwise convolution by ones, in int8.

    Padding counts as zeros, also where the AveragePool does not count it.

    Returns:
        the DequantizeLinear of the ones and the Conv, not in the graph yet; None where the number of channels is open,
        or windows begin on the image and end beyond its padding (``ceil_mode``).
    """
    x, result = pool.inputs[0], pool.outputs[0]
    channels = None if x is None or x.shape is None else x.shape[1]
    if not isinstance(channels, int) or (integer(pool, "ceil_mode", 0) and not _fits(pool)):
        return None
    kernel, name = integers(pool, "kernel_shape"), f"{result.name}_ones"
    ones = initializer(model, f"{name}_quantized", np.ones((channels, 1, *kernel), np.int8))
    scale = initializer(model, f"{name}_scale", np.array(1 / np.prod(kernel), np.float32))
    point = initializer(model, f"{name}_zero_point", np.array(0, np.int8))
    weight = node_like("DequantizeLinear", [ones, scale, point], like=pool)
    conv = node_like("Conv", [x, weight.outputs[0]], like=pool, result=result, group=channels)
    for attribute in ("strides", "dilations", "pads"):
        if attribute in pool.attributes:
            conv.attributes[attribute] = pool.attributes[attribute]
    return [weight, conv]


def _fits(pool: ir.Node) -> bool:
    """Whether the windows end where the image and its padding end, so that ``ceil_mode`` changes nothing."""
    x, kernel = pool.inputs[0], integers(pool, "kernel_shape")
    sizes = [] if x is None or x.shape is None else list(x.shape)[2:]
    ones, pads = [1] * len(kernel), integers(pool, "pads") or [0] * 2 * len(kernel)
    strides, dilations = (integers(pool, name) or ones for name in ("strides", "dilations"))
    for axis, size in enumerate(sizes):
        reach = (kernel[axis] - 1) * dilations[axis] + 1
        if (
            not isinstance(size, int)
            or (size + pads[axis] + pads[axis + len(kernel)] - reach) % strides[axis]
        ):
            return False
    return len(sizes) == len(kernel)


def use_unsigned(model: ir.Model, quantizers: Iterable[ir.Node]) -> None:
    """Turn int8 activations with zero point 0 into uint8 with zero point 128: the same levels, 128 higher.

    Args:
        quantizers: QuantizeLinear nodes; those of other types, and of weights, stay as they are.
    """
    shifted = initializer(model, "zero_point_128", np.array(128, np.uint8))
    for node in quantizers:
        zero, q = zero_point(node), node.outputs[0]
        if (
            zero is None
            or zero.dtype != np.int8
            or zero.size != 1
            or zero.any()
            or constant(node.inputs[0]) is not None
        ):
            continue
        pairs = readers(q)
        if q.is_graph_output() or any(reader.op_type != "DequantizeLinear" for reader in pairs):
            continue
        for pair_node in [node, *pairs]:
            pair_node.replace_input_with(2, shifted)
        q.type = ir.TensorType(ir.DataType.UINT8)


def widen(model: ir.Model, dtype: torch.dtype) -> None:
    """Let a float32 model take and give ``dtype`` (float16, bfloat16), by a Cast at each end."""
    kind = from_torch_dtype(dtype)
    if all(value.dtype == kind for value in model.graph.inputs):
        return
    for value in model.graph.inputs:
        cast = _cast(value, ir.DataType.FLOAT)
        value.replace_all_uses_with(cast.outputs[0])
        cast.replace_input_with(0, value)
        value.type = ir.TensorType(kind)
        model.graph.insert_before(model.graph[0], cast)
    _cast_results(model, kind)


def narrow(model: ir.Model, dtype: torch.dtype) -> None:
    """Make float16 of what is float32, scales of Q and DQ too; the model takes and gives ``dtype`` as before.

    A Q that reads a float32 image keeps its float32 scale, so that the image is rounded once. Sizes of a Resize stay
    float32, as ONNX wants them.

    Raises:
        ExportError: a body of If, Loop or Scan, whose types are not followed.
    """
    for node in model.graph:
        if nodes_within(node):
            raise ExportError(
                f"dtype='float16' is not possible: {node.op_type} {node.name} has a body of its own"
            )
        for name, attribute in node.attributes.items():
            if name in ("to", "dtype") and attribute.value == ir.DataType.FLOAT:
                node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT16)
            elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == ir.DataType.FLOAT:
                node.attributes[name] = ir.AttrTensor(name, ir.tensor(_halve(attribute.value.numpy())))
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT:
                value.type = ir.TensorType(ir.DataType.FLOAT16)
    wide = dtype != torch.float16
    for value in list(model.graph.initializers.values()):
        if value.dtype == ir.DataType.FLOAT:
            _narrow_constant(model, value, wide)
    for value in model.graph.inputs:
        if not wide:
            value.type = ir.TensorType(ir.DataType.FLOAT16)
        elif uses := [use for use in value.uses() if use.node.op_type not in ("QuantizeLinear", "Shape")]:
            cast = _cast(value, ir.DataType.FLOAT16)
            for reader, index in uses:
                reader.replace_input_with(index, cast.outputs[0])
            model.graph.insert_before(model.graph[0], cast)
    if wide:
        _cast_results(model, ir.DataType.FLOAT)


def _narrow_constant(model: ir.Model, value: ir.Value, wide: bool) -> None:
    """Give the readers of a float32 constant a float16 one, but for those that want it as it is."""
    narrowed = None
    for node, index in list(value.uses()):
        reads_image = wide and node.op_type == "QuantizeLinear" and node.inputs[0] in model.graph.inputs
        if reads_image or (node.op_type == "Resize" and index > 0):
            continue
        if narrowed is None:
            narrowed = initializer(model, f"{value.name}_float16", _halve(np.asarray(constant(value))))
        node.replace_input_with(index, narrowed)
    if narrowed is not None and not value.uses():
        name = str(value.name)
        del model.graph.initializers[name]
        narrowed.name = name


def _halve(array: np.ndarray) -> np.ndarray:
    """Convert to float16; what is finite stays finite."""
    limit = float(np.finfo(np.float16).max)
    return np.where(np.isfinite(array), np.clip(array, -limit, limit), array).astype(np.float16)


def _cast(value: ir.Value, kind: ir.DataType) -> ir.Node:
    cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", kind)], num_outputs=1)
    cast.outputs[0].shape, cast.outputs[0].type = value.shape, ir.TensorType(kind)
    return cast


def _cast_results(model: ir.Model, kind: ir.DataType) -> None:
    """A Cast behind each output, which takes its name."""
    for i, value in enumerate(list(model.graph.outputs)):
        cast = _cast(value, kind)
        cast.outputs[0].name, value.name = value.name, f"{value.name}_inner"
        model.graph.append(cast)
        model.graph.outputs[i] = cast.outputs[0]


def share_zero_points(model: ir.Model) -> None:
    """Share one tensor of zeros among all Q and DQ that want the same type and shape.

    Weights of convolutions and of linear layers have one each: OpenVINO, in a file whose batch is fixed by
    ``model.reshape``, runs in float both layers that share one.
    """
    shared: dict[tuple[str, tuple[int, ...], str], ir.Value] = {}
    for node in nodes_of(model, *PAIR):
        zero = zero_point(node)
        if zero is None or zero.any():
            continue
        key = (zero.dtype.name, zero.shape, _layer_of_weight(node))
        if key not in shared:
            name = "_".join(["zero", key[0], *map(str, key[1]), *key[2:]]).rstrip("_")
            shared[key] = initializer(model, name, zero)
        node.replace_input_with(2, shared[key])


def _layer_of_weight(node: ir.Node) -> str:
    """What reads a stored weight, behind transpositions: ``"conv"``, ``"linear"``; "" for activations."""
    q = maker(node.inputs[0])
    stored = q.inputs[0] if q is not None and q.op_type == "QuantizeLinear" else node.inputs[0]
    if constant(stored) is None:
        return ""
    nodes = readers(node.outputs[0])
    while len(nodes) == 1 and nodes[0].op_type in ("Transpose", "Reshape", "DequantizeLinear"):
        nodes = readers(nodes[0].outputs[0])
    return "conv" if any(reader.op_type in CONVOLUTIONS for reader in nodes) else "linear"


def drop_defaults(model: ir.Model) -> None:
    """Remove attributes that say what holds without them; they make a fifth of a small file's nodes."""
    opset = model.opset_imports[""]
    for node in model.graph:
        if node.domain != "":
            continue
        known = onnx.defs.get_schema(node.op_type, opset, "").attributes
        for name, attribute in list(node.attributes.items()):
            default = known[name].default_value if name in known else None
            same = default is not None and default.name and ir.to_proto(attribute) == default
            ones = name == "dilations" and set(attribute.as_ints()) == {1}
            if same or ones:
                del node.attributes[name]


def drop_unused(model: ir.Model) -> None:
    """Remove nodes and initializers that nothing reads."""
    common.RemoveUnusedNodesPass()(model)


def drop_shapes(model: ir.Model) -> None:
    """Leave shapes to the reader's own inference, but those of inputs and outputs: 4 % of a small file."""
    outside = {id(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    for value in (*model.graph.initializers.values(), *(v for node in model.graph for v in node.outputs)):
        if id(value) not in outside:
            value.shape = value.type = None
