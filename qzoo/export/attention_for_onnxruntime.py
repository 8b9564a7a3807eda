"""Rewrites of attention for ONNX Runtime, whose integer products want a uint8 on the left and an int8 on the right.

With a uint8 on the right its kernel for x86 takes twice as long, which is as long as in float. Measured on DeiT, Swin
and others, see docs/export.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qzoo.export.graph import (
    constant,
    copy_of,
    initializer,
    integer,
    integers,
    is_dequantized,
    made_by,
    node_like,
    nodes_of,
    only_reader,
    readers,
    replace,
    third_taken,
    zero_point,
)


def part_projections(model: ir.Model) -> None:
    """Part the Gemm of query, key and value, whose rows the attention takes apart, into three: the same values.

    Each then has its heads moved by one Transpose, in place of a Transpose of all three, a Split and three Squeeze
    that copy every value: 2 to 3 % of a small transformer. All three read one QuantizeLinear.
    """
    for moved in nodes_of(model, "Transpose"):
        cut = made_by(moved.inputs[0], "Reshape")
        whole = None if cut is None else made_by(cut.inputs[0], "Reshape")
        gemm = None if whole is None else made_by(whole.inputs[0], "Gemm")
        if cut is None or whole is None or gemm is None or integers(moved, "perm") != [2, 0, 3, 1, 4]:
            continue
        shape, taken = constant(cut.inputs[1]), [third_taken(node) for node in readers(moved.outputs[0])]
        between = [cut.outputs[0], whole.outputs[0], gemm.outputs[0]]
        if shape is None or shape.size != 5 or shape[2] != 3 or 0 in shape or None in taken:
            continue
        if any(len(value.uses()) > 1 for value in between) or moved.outputs[0].is_graph_output():
            continue
        operands = [node for value in gemm.inputs if (node := made_by(value, "DequantizeLinear")) is not None]
        if len(operands) != 3 or any(
            constant(value) is None for node in operands[1:] for value in node.inputs
        ):
            continue
        if integer(gemm, "transB", 0) != 1:
            continue
        images, tokens, _, heads, size = shape.tolist()
        name = str(gemm.outputs[0].name)
        rows = initializer(model, f"{name}_heads", np.array([images, tokens, heads, size], np.int64))
        thirds = []
        for part in range(3):
            new = _third_of_gemm(model, gemm, operands, part)
            split = node_like("Reshape", [new[-1].outputs[0], rows], like=cut)
            split.outputs[0].type = cut.outputs[0].type
            turned = node_like("Transpose", [split.outputs[0]], like=moved, perm=[0, 2, 1, 3])
            model.graph.insert_before(moved, [*new, split, turned])
            thirds.append(turned.outputs[0])
        for last, part in [pair for pair in taken if pair is not None]:
            turned_like = last.outputs[0]
            thirds[part].type, thirds[part].shape = turned_like.type, turned_like.shape
            turned_like.replace_all_uses_with(thirds[part], replace_graph_outputs=True)


def _third_of_gemm(model: ir.Model, gemm: ir.Node, operands: Sequence[ir.Node], part: int) -> list[ir.Node]:
    """The Gemm on a third of its weight's rows and of its bias, behind the DequantizeLinear of its operands."""
    pairs = [copy_of(operands[0], operands[0].inputs)]
    for dq in operands[1:]:
        inputs = list(dq.inputs)
        for i, source in enumerate(inputs):
            array = constant(source)
            if source is not None and array is not None and array.ndim:
                name = f"{source.name}_{('query', 'key', 'value')[part]}"  # a zero point may be there already
                known = model.graph.initializers.get(name)
                inputs[i] = known or initializer(model, name, np.split(array, 3)[part])
        pairs.append(copy_of(dq, inputs))
    new = copy_of(gemm, [dq.outputs[0] for dq in pairs])
    for node in (*pairs[1:], new):
        node.outputs[0].shape = None
    return [*pairs, new]


def scale_queries(model: ir.Model) -> None:
    """Fold a power of two that multiplies the queries before their Q into the scales of their linear layer.

    Integers and results stay to the bit (with another number, products would be rounded in another place). The layer
    then writes the integers of the queries itself, and they are moved as such.
    """
    for multiply in nodes_of(model, "Mul"):
        queries, factor, q = (
            multiply.inputs[0],
            constant(multiply.inputs[1]),
            only_reader(multiply.outputs[0]),
        )
        if factor is None or factor.size != 1 or q is None or q.op_type != "QuantizeLinear":
            continue
        if np.frexp(factor.item())[0] != 0.5:
            continue
        gemm = _gemm_before(queries)
        pairs = [] if gemm is None else [made_by(value, "DequantizeLinear") for value in gemm.inputs[1:]]
        scales = [None if pair is None else constant(pair.inputs[1]) for pair in pairs]
        if queries is None or gemm is None or any(scale is None for scale in scales):
            continue
        for index, (pair, scale) in enumerate(zip(pairs, scales, strict=True), 1):
            if pair is None or scale is None:
                continue
            steps = initializer(
                model, f"{pair.outputs[0].name}_scaled", (scale * factor.item()).astype(scale.dtype)
            )
            new = copy_of(pair, [pair.inputs[0], steps, *pair.inputs[2:]])
            model.graph.insert_before(gemm, new)
            gemm.replace_input_with(index, new.outputs[0])
        replace(model, multiply, queries)


def multiply_by_int8(model: ir.Model) -> None:
    """Quantize the right operand of a product of two activations to int8, and move its integers: the same levels.

    ONNX Runtime makes uint8 of every int8 that a DequantizeLinear reads right behind its QuantizeLinear, so the
    Transpose goes between them. A layer before writes float: its kernel gives integers of its input's type only. A
    Flatten, across which the runtime moves no QuantizeLinear, keeps them apart.
    """
    for product in nodes_of(model, "MatMul"):
        turned = made_by(product.inputs[1], "Transpose")
        dq = made_by(product.inputs[1] if turned is None else turned.inputs[0], "DequantizeLinear")
        q = None if dq is None else made_by(dq.inputs[0], "QuantizeLinear")
        if dq is None or q is None or not is_dequantized(_before_moves(product.inputs[0])):
            continue
        zero, alone = zero_point(q), (only_reader(q.outputs[0]), only_reader(dq.outputs[0]))
        if zero is None or zero.size != 1 or zero.dtype != np.uint8 or alone != (dq, turned or product):
            continue
        x, order = q.inputs[0], [] if turned is None else integers(turned, "perm")
        moved = made_by(x, "Transpose")
        if moved is not None and only_reader(moved.outputs[0]) is q:
            before = integers(moved, "perm")
            x, order = moved.inputs[0], [before[axis] for axis in order] if order else before
        if not order or order == sorted(order) or x is None:
            continue
        level = initializer(model, f"{q.outputs[0].name}_zero", (zero.astype(np.int16) - 128).astype(np.int8))
        integers_of_x = _quantize(model, x, [q.inputs[1], level], q)
        last = node_like("Transpose", [integers_of_x[-1].outputs[0]], like=q, perm=order)
        values = node_like("DequantizeLinear", [last.outputs[0], dq.inputs[1], level], like=dq)
        for node in (*integers_of_x, last):
            if node.op_type != "Flatten":
                node.outputs[0].type = ir.TensorType(ir.DataType.INT8)
        values.outputs[0].type = dq.outputs[0].type
        model.graph.insert_before(product, [*integers_of_x, last, values])
        product.replace_input_with(1, values.outputs[0])


def _quantize(
    model: ir.Model, x: ir.Value, levels: Sequence[ir.Value | None], like: ir.Node
) -> list[ir.Node]:
    """Nodes that quantize a value; what a Gemm gives is quantized before it is cut into heads."""
    cut = made_by(x, "Reshape")
    gemm = None if cut is None else made_by(cut.inputs[0], "Gemm")
    if (
        cut is None
        or gemm is None
        or only_reader(cut.outputs[0]) is None
        or only_reader(gemm.outputs[0]) is None
    ):
        return [node_like("QuantizeLinear", [x, *levels], like=like)]
    rows = node_like("Flatten", [gemm.outputs[0]], like=cut, result=gemm.outputs[0])
    new = node_like("QuantizeLinear", [rows.outputs[0], *levels], like=like)
    return [rows, new, node_like("Reshape", [new.outputs[0], cut.inputs[1]], like=cut)]


def _gemm_before(value: ir.Value | None) -> ir.Node | None:
    """The Gemm that a value is of, moved or not; None where anything else reads what is between."""
    node = made_by(value, "Transpose", "Reshape", "Gemm")
    while node is not None and only_reader(node.outputs[0]) is not None:
        if node.op_type == "Gemm":
            return node
        node = made_by(node.inputs[0], "Transpose", "Reshape", "Gemm")
    return None


def _before_moves(value: ir.Value | None) -> ir.Value | None:
    while (node := made_by(value, "Transpose", "Reshape")) is not None:
        value = node.inputs[0]
    return value
