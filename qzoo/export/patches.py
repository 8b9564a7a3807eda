"""Rewrite a convolution of patches, whose stride is its size, as a product of matrices."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qzoo.export.graph import (
    constant,
    copy_of,
    initializer,
    input_of,
    integer,
    integers,
    maker,
    node_like,
    nodes_of,
    readers,
    replace_by,
    runs_in_int8,
)


def multiply_patches(model: ir.Model, least: int = 1) -> None:
    """Make a product of matrices of a convolution whose stride is its size (patch embedding, ConvNeXt's stem).

    The same integers. ONNX Runtime runs a convolution in int8 only where a Q stands right behind it, but a product of
    matrices also where its sums go on in float, as before a position embedding or a LayerNorm. In OpenVINO the product
    saves a Transpose of the result, and is faster where rows of patches are copied whole.

    Args:
        least: width of the narrowest patches that are taken.
    """
    for conv in nodes_of(model, "Conv"):
        dq, weight_dq, out = maker(conv.inputs[0]), maker(conv.inputs[1]), conv.outputs[0]
        if dq is None or weight_dq is None or not runs_in_int8(conv) or out.is_graph_output():
            continue
        q, weight = maker(dq.inputs[0]), constant(weight_dq.inputs[0])
        image, bias = dq.inputs[0], input_of(conv, 2)
        if q is None or q.op_type != "QuantizeLinear" or image is None or weight is None:
            continue
        grid = _patches(conv, image, weight)
        behind = readers(out)
        if grid is None or {node.op_type for node in behind} == {"QuantizeLinear"}:
            continue
        rows, columns = grid
        channels, depth, height, width = weight.shape
        if width < least:
            continue
        name = str(out.name)
        cut = initializer(model, f"{name}_cut", np.array([-1, depth, rows, height, columns, width], np.int64))
        joined = initializer(
            model, f"{name}_patches", np.array([-1, rows * columns, weight[0].size], np.int64)
        )
        blocks = node_like("Reshape", [image, cut], like=q)
        moved = node_like("Transpose", [blocks.outputs[0]], like=q, perm=[0, 2, 4, 1, 3, 5])
        patches = node_like("Reshape", [moved.outputs[0], joined], like=q)
        for node in (blocks, moved, patches):
            node.outputs[0].type = image.type
        pixels = copy_of(dq, [patches.outputs[0], *dq.inputs[1:]])
        first = None if image.shape is None else image.shape[0]
        blocks.outputs[0].shape = ir.Shape([first, depth, rows, height, columns, width])
        moved.outputs[0].shape = ir.Shape([first, rows, columns, depth, height, width])
        pixels.outputs[0].shape = ir.Shape([first, rows * columns, weight[0].size])
        stored = initializer(model, f"{name}_matrix", weight.reshape(channels, -1))
        matrix = copy_of(weight_dq, [stored, *weight_dq.inputs[1:]])
        matrix.outputs[0].shape = stored.shape
        turned = node_like("Transpose", [matrix.outputs[0]], like=conv, perm=[1, 0])
        product = node_like("MatMul", [pixels.outputs[0], turned.outputs[0]], like=conv)
        offset = bias or initializer(model, f"{name}_offset", np.zeros(channels, np.float32))
        total = node_like("Add", [product.outputs[0], offset], like=conv)
        for node in (product, total):
            node.outputs[0].type = out.type
            node.outputs[0].shape = ir.Shape([first, rows * columns, channels])
        new = [blocks, moved, patches, pixels, matrix, turned, product, total]
        tokens = _tokens(conv)
        if tokens is not None:
            replace_by(model, tokens, new)
            continue
        size = initializer(model, f"{name}_size", np.array([-1, rows, columns, channels], np.int64))
        whole = node_like("Reshape", [total.outputs[0], size], like=conv)
        whole.outputs[0].type = out.type
        replace_by(
            model,
            conv,
            [
                *new,
                whole,
                node_like("Transpose", [whole.outputs[0]], like=conv, result=out, perm=[0, 3, 1, 2]),
            ],
        )


def _patches(conv: ir.Node, image: ir.Value, weight: np.ndarray) -> tuple[int, int] | None:
    """Rows and columns of patches where the convolution takes each pixel once; else None."""
    kernel = list(weight.shape[2:])
    if weight.dtype != np.int8 or len(kernel) != 2 or image.shape is None or len(image.shape) != 4:
        return None
    plain = integer(conv, "group", 1) == 1 and not any(integers(conv, "pads")) and kernel != [1, 1]
    if not plain or integers(conv, "strides") != kernel or set(integers(conv, "dilations")) - {1}:
        return None
    sizes = [size for size in list(image.shape)[2:] if isinstance(size, int)]
    if len(sizes) < 2 or any(size % step for size, step in zip(sizes, kernel, strict=True)):
        return None
    return sizes[0] // kernel[0], sizes[1] // kernel[1]


def _tokens(conv: ir.Node) -> ir.Node | None:
    """The Transpose that makes tokens [batch, rows x columns, channels] of the result, with nothing else reading it."""
    node = conv
    for op_type in ("Reshape", "Transpose"):
        behind = readers(node.outputs[0])
        if len(behind) != 1 or behind[0].op_type != op_type or behind[0].outputs[0].is_graph_output():
            return None
        node = behind[0]
    flat = node.inputs[0]
    three = flat is not None and flat.shape is not None and len(flat.shape) == 3
    return node if three and integers(node, "perm") == [0, 2, 1] else None
