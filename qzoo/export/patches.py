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
    made_by,
    maker,
    node_like,
    nodes_of,
    readers,
    replace_by,
    runs_in_int8,
)


def multiply_patches(model: ir.Model, least: int = 1, floats: bool = False) -> None:
    """Make a product of matrices of a convolution whose stride is its size (patch embedding, ConvNeXt's stem).

    The same integers. ONNX Runtime runs a convolution in int8 only where a Q stands right behind it, but a product of
    matrices also where its sums go on in float, as before a position embedding or a LayerNorm. In OpenVINO the product
    saves a Transpose of the result, and is faster where rows of patches are copied whole.

    Args:
        least: width of the narrowest patches that are taken.
        floats: convolutions of float, too.
    """
    for conv in nodes_of(model, "Conv"):
        out, bias = conv.outputs[0], input_of(conv, 2)
        found = _quantized(conv) if runs_in_int8(conv) else (conv, None, None)
        if found is None or out.is_graph_output() or (found[1] is None and not floats):
            continue
        q, dq, weight_dq = found
        image = conv.inputs[0] if dq is None else dq.inputs[0]
        weight = constant(conv.inputs[1] if weight_dq is None else weight_dq.inputs[0])
        grid = None if image is None or weight is None else _patches(conv, image, weight)
        behind = readers(out)
        if image is None or weight is None or grid is None or weight.shape[-1] < least:
            continue
        if {node.op_type for node in behind} == {"QuantizeLinear"}:
            continue
        rows, columns = grid
        channels, depth, height, width = weight.shape
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
        pixels = patches if dq is None else copy_of(dq, [patches.outputs[0], *dq.inputs[1:]])
        first = None if image.shape is None else image.shape[0]
        blocks.outputs[0].shape = ir.Shape([first, depth, rows, height, columns, width])
        moved.outputs[0].shape = ir.Shape([first, rows, columns, depth, height, width])
        pixels.outputs[0].shape = ir.Shape([first, rows * columns, weight[0].size])
        stored = initializer(model, f"{name}_matrix", weight.reshape(channels, -1))
        matrix = None if weight_dq is None else copy_of(weight_dq, [stored, *weight_dq.inputs[1:]])
        if matrix is not None:
            matrix.outputs[0].shape = stored.shape
        factors = stored if matrix is None else matrix.outputs[0]
        turned = node_like("Transpose", [factors], like=conv, perm=[1, 0])
        product = node_like("MatMul", [pixels.outputs[0], turned.outputs[0]], like=conv)
        offset = bias or initializer(model, f"{name}_offset", np.zeros(channels, np.float32))
        total = node_like("Add", [product.outputs[0], offset], like=conv)
        for node in (product, total):
            node.outputs[0].type = out.type
            node.outputs[0].shape = ir.Shape([first, rows * columns, channels])
        operands = [node for node in (pixels, matrix) if node is not None and node is not patches]
        new = [blocks, moved, patches, *operands, turned, product, total]
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


def _quantized(conv: ir.Node) -> tuple[ir.Node, ir.Node, ir.Node] | None:
    """The Q and the DQ before an int8 convolution, and the DQ of its int8 weight."""
    dq, weight = maker(conv.inputs[0]), maker(conv.inputs[1])
    q = None if dq is None else made_by(dq.inputs[0], "QuantizeLinear")
    integer_weight = None if weight is None else constant(weight.inputs[0])
    if q is None or dq is None or weight is None or integer_weight is None or integer_weight.dtype != np.int8:
        return None
    return q, dq, weight


def _patches(conv: ir.Node, image: ir.Value, weight: np.ndarray) -> tuple[int, int] | None:
    """Rows and columns of patches where the convolution takes each pixel once; else None."""
    kernel = list(weight.shape[2:])
    if len(kernel) != 2 or image.shape is None or len(image.shape) != 4:
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
