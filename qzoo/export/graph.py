"""Read and change a graph, an ``onnx_ir`` model: values, constants, attributes, the nodes around a value.

What every rewrite and every rule of lint is made of. The generic passes are ``onnx_ir``'s own
(``onnx_ir.passes.common``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

# Reading


def nodes_of(model: ir.Model, *op_types: str) -> Iterator[ir.Node]:
    """List the nodes of these types, type by type; the caller may change the graph meanwhile."""
    for op_type in op_types:
        yield from [node for node in model.graph if node.op_type == op_type and node.domain == ""]


def nodes_within(node: ir.Node) -> list[ir.Node]:
    """List the nodes in the bodies of an If, Loop or Scan, at any depth."""
    bodies = [
        body
        for attribute in node.attributes.values()
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for body in ([attribute.value] if attribute.type == ir.AttributeType.GRAPH else attribute.value)
    ]
    return [deep for body in bodies for deep in ir.traversal.RecursiveGraphIterator(body)]


def is_stored(value: ir.Value | None) -> bool:
    """Check whether the value is stored in the file, as an initializer or in a Constant."""
    if value is None or value.is_graph_input():
        return False
    node = value.producer()
    return value.const_value is not None if node is None else node.op_type == "Constant"


def stored(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Get the stored tensor of a value, not yet read; None where it is computed, or no tensor."""
    if value is None or not is_stored(value):
        return None
    try:
        return ir.convenience.get_const_tensor(value)
    except (ValueError, TypeError):
        return None


def constant(value: ir.Value | None) -> np.ndarray | None:
    """Read a stored value as an array; None where it is computed."""
    tensor = stored(value)
    return None if tensor is None else tensor.numpy()


def stored_type(value: ir.Value | None) -> str:
    """Name the type of a stored value, such as ``"int8"``; "" where it is computed."""
    tensor = stored(value)
    return "" if tensor is None else tensor.dtype.name.lower()


def stored_shape(value: ir.Value | None) -> tuple[int, ...]:
    """Get the shape of a stored value; () where it is computed."""
    tensor = stored(value)
    return () if tensor is None else tuple(tensor.shape.numpy())


def maker(value: ir.Value | None) -> ir.Node | None:
    """Find the node that computes a value; None for inputs, constants and a missing value."""
    node = None if value is None else value.producer()
    return None if node is None or node.op_type == "Constant" else node


def made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """Find the node that computes a value, if it has one of these types; else None."""
    node = maker(value)
    return node if node is not None and node.op_type in op_types else None


def readers(value: ir.Value) -> list[ir.Node]:
    """List the nodes that read a value; one that reads it twice is there twice."""
    return [use.node for use in value.uses()]


def only_reader(value: ir.Value) -> ir.Node | None:
    """Find the node that alone reads a value, once; None where the value is an output of the graph."""
    alone = len(value.uses()) == 1 and not value.is_graph_output()
    return readers(value)[0] if alone else None


def input_of(node: ir.Node, index: int) -> ir.Value | None:
    """Get an input of a node; None where it is left out."""
    return node.inputs[index] if len(node.inputs) > index else None


def is_output(node: ir.Node) -> bool:
    """Check whether an output of the node is an output of the graph."""
    return any(value.is_graph_output() for value in node.outputs)


def zero_point(node: ir.Node) -> np.ndarray | None:
    """Get the stored zero point of a Q or DQ; None where it is left out or computed."""
    return constant(input_of(node, 2))


def _attribute(node: ir.Node, name: str, kind: ir.AttributeType, default: Any) -> Any:
    attribute = node.attributes.get(name)
    return attribute.value if attribute is not None and attribute.type == kind else default


def integer(node: ir.Node, name: str, default: int) -> int:
    """Read an integer attribute."""
    return _attribute(node, name, ir.AttributeType.INT, default)


def number(node: ir.Node, name: str, default: float) -> float:
    """Read a floating-point attribute."""
    return _attribute(node, name, ir.AttributeType.FLOAT, default)


def integers(node: ir.Node, name: str) -> list[int]:
    """Read an attribute of several integers; [] where it is left out."""
    return list(_attribute(node, name, ir.AttributeType.INTS, ()))


def text(node: ir.Node, name: str, default: str) -> str:
    """Read a text attribute."""
    return _attribute(node, name, ir.AttributeType.STRING, default)


def levels_of(node: ir.Node) -> tuple[bytes, bytes, str] | None:
    """What tells one Q or DQ of a whole tensor from another; None where it is not stored, or is of channels."""
    scale, zero = constant(node.inputs[1]), zero_point(node)
    if scale is None or zero is None or scale.size > 1:
        return None
    return scale.tobytes(), zero.tobytes(), str(zero.dtype)


def is_dequantized(value: ir.Value | None) -> bool:
    """Check whether the value is the output of a DequantizeLinear."""
    return made_by(value, "DequantizeLinear") is not None


def runs_in_int8(node: ir.Node) -> bool:
    """Check whether the first two operands are outputs of a DequantizeLinear."""
    return all(map(is_dequantized, node.inputs[:2]))


def third_taken(node: ir.Node) -> tuple[ir.Node, int] | None:
    """The node whose output is one index of the first axis, and the index; None for another reader."""
    index = constant(input_of(node, 1))
    if node.op_type == "Gather" and integer(node, "axis", 0) == 0 and index is not None and index.shape == ():
        return node, int(index) % 3
    behind = readers(node.outputs[0])
    if node.op_type != "Slice" or len(behind) != 1 or behind[0].op_type != "Squeeze":
        return None
    start, end, axis = (constant(input_of(node, i)) for i in (1, 2, 3))
    dropped = constant(input_of(behind[0], 1))
    if start is None or end is None or axis is None or dropped is None or input_of(node, 4) is not None:
        return None
    if [*axis] != [0] or [*dropped] != [0] or [*end] != [*(start + 1)] or start.size != 1:
        return None
    return behind[0], int(start.item())


# Changing


def initializer(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """Add a constant to the model."""
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.from_numpy(array.dtype))
    model.graph.register_initializer(value)
    return value


def node_like(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    *,
    like: ir.Node,
    result: ir.Value | None = None,
    **attributes: int | Sequence[int],
) -> ir.Node:
    """Make a node with the module path of another, and with the type and shape of ``result`` for its output."""
    given = [ir.AttrInt64(k, v) if isinstance(v, int) else ir.AttrInt64s(k, v) for k, v in attributes.items()]
    node = ir.Node("", op_type, inputs, given, num_outputs=1)
    node.metadata_props.update(like.metadata_props)
    if result is not None:
        node.outputs[0].type, node.outputs[0].shape = result.type, result.shape
    return node


def copy_of(node: ir.Node, inputs: Sequence[ir.Value | None]) -> ir.Node:
    """Copy a node, an operator with its attributes, to other inputs."""
    copy = node_like(node.op_type, inputs, like=node, result=node.outputs[0])
    copy.attributes.update(node.attributes)
    return copy


def replace(model: ir.Model, node: ir.Node, value: ir.Value) -> None:
    """Replace a node by ``value`` in everything that reads its output, and remove it."""
    node.outputs[0].replace_all_uses_with(value, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)


def replace_by(model: ir.Model, node: ir.Node, new: Sequence[ir.Node]) -> None:
    """Put nodes in the place of one; the output of the last stands for its output."""
    model.graph.insert_before(node, new)
    replace(model, node, new[-1].outputs[0])
