"""Rewrites of the exported graph, each of which keeps the results and makes runtimes find their int8 kernels.

All work in place on an ``onnx_ir`` model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

_INT8_LIMIT = {np.dtype(np.int8): (-127, 127), np.dtype(np.uint8): (0, 255)}


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The value as an array when it is an initializer or a constant, else None."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def store_integer_weights(model: ir.Model) -> None:
    """QuantizeLinear of a constant becomes an int8 initializer; its DequantizeLinear stays.

    The weights are on their levels already, so rounding is exact; without this the file stays as large as float.
    """
    for node in _nodes(model, "QuantizeLinear"):
        weight, scale, zero = (constant(value) for value in node.inputs[:3])
        if weight is None or scale is None or zero is None:
            continue
        shape = [1] * weight.ndim
        if scale.size > 1:
            axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
            shape[axis] = -1
        low, high = _INT8_LIMIT[zero.dtype]
        q = np.clip(np.rint(weight / scale.reshape(shape)), low, high).astype(zero.dtype)
        source = node.inputs[0]
        assert source is not None
        _replace(model, node, initializer(model, f"{source.name}_quantized", q))


def use_global_pooling(model: ir.Model) -> None:
    """ReduceMean over height and width becomes GlobalAveragePool, which has an int8 kernel in ONNX Runtime."""
    for node in _nodes(model, "ReduceMean"):
        x, axes = node.inputs[0], constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if x is None or x.shape is None or len(x.shape) != 4 or axes is None:
            continue
        if sorted(int(a) % 4 for a in axes) != [2, 3]:
            continue
        keep = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1
        out = node.outputs[0]
        pool = _node("GlobalAveragePool", [x], like=node, outputs=1)
        pool.outputs[0].type, pool.outputs[0].shape = out.type, ir.Shape([x.shape[0], x.shape[1], 1, 1])
        new = [pool]
        if not keep:
            flat = _node("Flatten", [pool.outputs[0]], like=node, outputs=1, axis=1)
            flat.outputs[0].type, flat.outputs[0].shape = out.type, out.shape
            new.append(flat)
        model.graph.insert_before(node, new)
        _replace(model, node, new[-1].outputs[0])


def merge_padding(model: ir.Model) -> None:
    """An explicit zero Pad before a convolution moves into its ``pads``; Q and DQ may stand between the two.

    Zero quantizes to zero, so padding before or after Q/DQ is the same; but a Pad between DQ and Conv keeps the
    convolution in floating point.
    """
    for conv in _nodes(model, "Conv"):
        path, pad = _find_pad(conv)
        if (
            pad is None
            or conv.attributes.get("auto_pad", ir.AttrString("", "NOTSET")).as_string() != "NOTSET"
        ):
            continue
        amounts = _zero_padding(pad)
        if amounts is None:
            continue
        rank = len(amounts) // 2
        start, end = amounts[2:rank], amounts[rank + 2 :]
        old = list(conv.attributes["pads"].as_ints()) if "pads" in conv.attributes else [0] * (2 * (rank - 2))
        pads = [a + b for a, b in zip(old, [*start, *end], strict=True)]
        conv.attributes["pads"] = ir.AttrInt64s("pads", pads)
        source = pad.inputs[0]
        assert source is not None
        for node in path:
            for value in node.outputs:
                value.shape = source.shape
        _replace(model, pad, source)


def _find_pad(conv: ir.Node) -> tuple[list[ir.Node], ir.Node | None]:
    """The Pad from which the convolution's data comes through Q and DQ only, each read by nobody else."""
    path: list[ir.Node] = []
    value = conv.inputs[0]
    while value is not None:
        node = value.producer()
        if node is None or len(value.uses()) != 1 or value.is_graph_output():
            return [], None
        if node.op_type == "Pad":
            return path, node
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            return [], None
        path.append(node)
        value = node.inputs[0]
    return [], None


def _zero_padding(pad: ir.Node) -> list[int] | None:
    """Amounts of a Pad that appends zeros to the spatial dimensions only, else None."""
    mode = pad.attributes["mode"].as_string() if "mode" in pad.attributes else "constant"
    amounts = constant(pad.inputs[1])
    fill = constant(pad.inputs[2]) if len(pad.inputs) > 2 and pad.inputs[2] is not None else np.zeros(())
    if mode != "constant" or amounts is None or fill is None or fill.any():
        return None
    if len(pad.inputs) > 3 and pad.inputs[3] is not None:
        return None
    values = [int(a) for a in amounts]
    rank = len(values) // 2
    if rank < 3 or any(values[:2]) or any(values[rank : rank + 2]) or min(values) < 0:
        return None
    return values


def merge_pairs(model: ir.Model) -> None:
    """Q (and DQ) of one tensor with the same scale, zero point and axis become one.

    A block's input that also feeds the projection and the skip is quantized by three quantizers of equal range; one
    Q/DQ pair keeps the tensor int8 for all readers.
    """
    for op_type in ("QuantizeLinear", "DequantizeLinear"):
        seen: dict[Any, ir.Node] = {}
        for node in _nodes(model, op_type):
            key = _pair_key(node)
            if key is None:
                continue
            first = seen.setdefault(key, node)
            if first is not node and not node.outputs[0].is_graph_output():
                _replace(model, node, first.outputs[0])


def _pair_key(node: ir.Node) -> tuple[Any, ...] | None:
    scale, zero = constant(node.inputs[1]), constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if scale is None or zero is None:
        return None
    axis = node.attributes["axis"].as_int() if scale.size > 1 and "axis" in node.attributes else None
    return id(node.inputs[0]), scale.tobytes(), scale.shape, zero.tobytes(), str(zero.dtype), axis


def use_unsigned_activations(model: ir.Model) -> None:
    """int8 activations with zero point 0 become uint8 with zero point 128: the same levels, 128 higher.

    ONNX Runtime's x86 kernels take uint8 activations. It makes this change itself, but not where a tensor has two
    readers (a block's input that is also the skip), and leaves the convolutions around it in floating point.
    """
    shifted = initializer(model, "zero_point_128", np.array(128, np.uint8))
    for node in _nodes(model, "QuantizeLinear"):
        zero, q = constant(node.inputs[2]), node.outputs[0]
        if (
            zero is None
            or zero.dtype != np.int8
            or zero.size != 1
            or zero.any()
            or constant(node.inputs[0]) is not None
        ):
            continue
        readers = [use.node for use in q.uses()]
        if q.is_graph_output() or any(reader.op_type != "DequantizeLinear" for reader in readers):
            continue
        for pair_node in [node, *readers]:
            pair_node.replace_input_with(2, shifted)
        q.type = ir.TensorType(ir.DataType.UINT8)


def initializer(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """Add a constant to the model."""
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
    model.graph.register_initializer(value)
    return value


def drop_unused(model: ir.Model) -> None:
    """Remove nodes and initializers that nothing reads."""
    for node in reversed(list(model.graph)):
        if all(not value.uses() and not value.is_graph_output() for value in node.outputs):
            model.graph.remove(node, safe=True)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]


def _nodes(model: ir.Model, op_type: str) -> Iterator[ir.Node]:
    yield from [node for node in model.graph if node.op_type == op_type and node.domain == ""]


def _node(op_type: str, inputs: list[ir.Value], *, like: ir.Node, outputs: int, **attributes: int) -> ir.Node:
    node = ir.Node(
        "", op_type, inputs, [ir.AttrInt64(k, v) for k, v in attributes.items()], num_outputs=outputs
    )
    node.metadata_props.update(like.metadata_props)
    return node


def _replace(model: ir.Model, node: ir.Node, value: ir.Value) -> None:
    """Let everything that reads the node's output read ``value``; remove the node."""
    node.outputs[0].replace_all_uses_with(value, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
