"""Rewrites for TensorRT only, by its documentation ("Fused attention", "Working with quantized types"): not run there.

Its fused attention wants both operands of a product straight from DequantizeLinear, the query scaled before the
product; NVIDIA's Model Optimizer makes the same moves (github.com/NVIDIA/Model-Optimizer, pull request 1289).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qzoo.export.graph import (
    constant,
    copy_of,
    initializer,
    made_by,
    maker,
    node_like,
    nodes_of,
    readers,
    replace,
)


def transpose_before_quantizing(model: ir.Model) -> None:
    """Move the Transpose of an operand of a product of activations before its Q, DQ: the same values."""
    for product in nodes_of(model, "MatMul"):
        for index, operand in enumerate(product.inputs):
            turned = made_by(operand, "Transpose")
            pair = None if turned is None else _pair_of(turned.inputs[0])
            if turned is None or pair is None or _is_read_elsewhere(turned):
                continue
            q, dq = pair
            first = copy_of(turned, [q.inputs[0]])
            first.outputs[0].type = q.inputs[0].type if q.inputs[0] is not None else None
            levels = copy_of(q, [first.outputs[0], *q.inputs[1:]])
            values = copy_of(dq, [levels.outputs[0], *dq.inputs[1:]])
            for node in (levels, values):
                node.outputs[0].shape = turned.outputs[0].shape
            model.graph.insert_before(q, [first, levels, values])
            product.replace_input_with(index, values.outputs[0])


def scale_before_quantizing(model: ir.Model) -> None:
    """Multiply the first operand before its Q, where a product of two activations is multiplied by a number.

    The range is multiplied by the same number, so that the integers stay.
    """
    for product in nodes_of(model, "MatMul"):
        behind, pair = readers(product.outputs[0]), _pair_of(product.inputs[0])
        if (
            pair is None
            or _pair_of(product.inputs[1]) is None
            or len(behind) != 1
            or _is_read_elsewhere(product)
        ):
            continue
        scaling = behind[0]
        factors = [array for value in scaling.inputs if (array := constant(value)) is not None]
        if (
            scaling.op_type not in ("Mul", "Div")
            or len(factors) != 1
            or constant(scaling.inputs[0]) is not None
        ):
            continue
        factor = factors[0].astype(np.float32)
        if factor.size != 1 or not factor.item() > 0:
            continue
        times = np.float32(factor.item() if scaling.op_type == "Mul" else 1 / factor.item())
        q, dq = pair
        name = str(product.outputs[0].name)
        number = initializer(model, f"{name}_factor", times)
        step = initializer(model, f"{name}_step", (constant(q.inputs[1]) * times).astype(np.float32))
        first = node_like("Mul", [q.inputs[0], number], like=scaling, result=q.inputs[0])
        levels = copy_of(q, [first.outputs[0], step, *q.inputs[2:]])
        values = copy_of(dq, [levels.outputs[0], step, *dq.inputs[2:]])
        model.graph.insert_before(q, [first, levels, values])
        product.replace_input_with(0, values.outputs[0])
        replace(model, scaling, product.outputs[0])


def _pair_of(value: ir.Value | None) -> tuple[ir.Node, ir.Node] | None:
    """Q and DQ of an activation with one range that nothing else reads; None where it is none."""
    dq = made_by(value, "DequantizeLinear")
    q = None if dq is None else made_by(dq.inputs[0], "QuantizeLinear")
    if dq is None or q is None or constant(q.inputs[0]) is not None or maker(q.inputs[0]) is None:
        return None
    step = constant(q.inputs[1])
    alone = not _is_read_elsewhere(q) and not _is_read_elsewhere(dq)
    return (q, dq) if alone and step is not None and step.size == 1 else None


def _is_read_elsewhere(node: ir.Node) -> bool:
    """Whether the node's output has several readers, or is one of the graph's."""
    return len(node.outputs[0].uses()) != 1 or node.outputs[0].is_graph_output()
