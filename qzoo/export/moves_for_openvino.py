"""Rewrites for OpenVINO of what moves tensors: images that are turned, windows and their shifts, heads. Same values.

OpenVINO (2026.4, x86) copies rows with a Gather as fast as memory allows, with any batch. It is slow to turn what a
convolution wrote when the batch is open, and where rows are shorter than 64 bytes, which its Transpose moves value by
value: a head of 32 columns in int8. Measured on Swin-T and ConvNeXt-T, see docs/export.md.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qzoo.export.graph import (
    constant,
    initializer,
    input_of,
    integer,
    integers,
    made_by,
    maker,
    node_like,
    nodes_of,
    only_reader,
    readers,
    replace,
    replace_by,
    third_taken,
    zero_point,
)
from qzoo.export.patches import multiply_patches

_NARROW = 64
"""Columns below which a Transpose moves an int8 head more slowly than a Gather."""

_SHORT = 16
"""Columns below which copies of rows do not pay."""


def multiply_wide_patches(model: ir.Model) -> None:
    """Make a product of matrices of a convolution of wide patches, where the batch is open.

    With an open batch OpenVINO turns the image before such a convolution, and twice what it gives.
    """
    if not isinstance(_batch(model), int):
        multiply_patches(model, _SHORT, floats=True)


def turn_rows(model: ir.Model) -> None:
    """Write the Transpose that puts an image's channels last as one of a matrix, [C, H W], where the batch is open.

    OpenVINO leaves it out where the batch is fixed and a convolution comes before. With an open one it takes the
    order of the convolution's memory, and turns the tensor once more behind the Transpose: eight times as long.
    """
    if isinstance(_batch(model), int):
        return
    for turn in nodes_of(model, "Transpose"):
        x, out = turn.inputs[0], turn.outputs[0]
        sizes = _sizes_behind_batch(x)
        if x is None or x.shape is None or len(sizes) != 3 or integers(turn, "perm") != [0, 2, 3, 1]:
            continue
        channels, height, width = sizes
        flat = _reshape(model, x, [channels, 1, height * width], turn)
        rows = node_like("Transpose", [flat.outputs[0]], like=turn, perm=[0, 3, 1, 2])
        rows.outputs[0].type = x.type
        rows.outputs[0].shape = ir.Shape([x.shape[0], height * width, channels, 1])
        last = _reshape(model, rows.outputs[0], [height, width, channels], turn, result=out)
        replace_by(model, turn, [flat, rows, last])


def gather_windows(model: ir.Model) -> None:
    """Write a Transpose between rows and windows, and a roll of an image, as one Gather of rows.

    That is [N, H, W, C] in windows of [h, w], there and back, with a shift. A roll is two Concat of two Slices each. A
    Pad by nothing before them is left out.
    """
    for pad in nodes_of(model, "Pad"):
        amounts, x = constant(input_of(pad, 1)), pad.inputs[0]
        if x is not None and amounts is not None and not amounts.any():
            replace(model, pad, x)
    for node in [node for node in model.graph if node.op_type in ("Transpose", "Concat")]:
        found = _window_order(node) if node.op_type == "Transpose" else _roll_order(node)
        whole = _sizes_behind_batch(node.outputs[0])
        if found is None or not whole or whole[-1] < _SHORT:
            continue
        width, out = whole[-1], node.outputs[0]
        x, order = _without_gathers(*found, width)
        rows = _reshape(model, x, [len(order), width], node)
        taken = _gather(model, rows.outputs[0], order, node)
        replace_by(model, node, [rows, taken, _reshape(model, taken.outputs[0], whole, node, result=out)])


def takes_all_rows(node: ir.Node) -> bool:
    """Check whether a node is a Gather of as many rows as there are, in another order."""
    order, x = constant(input_of(node, 1)), node.inputs[0]
    if (
        node.op_type != "Gather"
        or integer(node, "axis", 0) != 1
        or order is None
        or x is None
        or x.shape is None
    ):
        return False
    return len(x.shape) == 3 and order.shape == (x.shape[1],)


def _window_order(turn: ir.Node) -> tuple[ir.Value, np.ndarray] | None:
    """What a Transpose of [N, a, b, c, d, C] reads, and its order of rows."""
    x, perm = turn.inputs[0], integers(turn, "perm")
    sizes = _sizes_behind_batch(x)
    if x is None or len(sizes) != 5 or perm[:1] + perm[-1:] != [0, 5]:
        return None
    rows = np.arange(int(np.prod(sizes[:-1]))).reshape(sizes[:-1])
    return x, rows.transpose([axis - 1 for axis in perm[1:-1]]).reshape(-1)


def _roll_order(concat: ir.Node) -> tuple[ir.Value, np.ndarray] | None:
    """What is rolled by a Concat of the end and the start of [N, H, W, C], and its order of rows."""
    axis, parts = integer(concat, "axis", 0), [_slice(x) for x in concat.inputs]
    if len(parts) != 2 or parts[0] is None or parts[1] is None:
        return None
    (x, *end), (other, *start) = parts[0], parts[1]
    sizes = _sizes_behind_batch(x)
    if x is not other or len(sizes) != 3 or axis not in (1, 2) or end[2] != axis or start[2] != axis:
        return None
    cut = end[0]
    if start[:2] != [0, cut] or not 0 < cut < sizes[axis - 1] <= end[1]:
        return None
    rows = np.arange(sizes[0] * sizes[1]).reshape(sizes[:2])
    return x, np.roll(rows, -cut, axis - 1).reshape(-1)


def _slice(value: ir.Value | None) -> tuple[ir.Value, int, int, int] | None:
    """What a Slice along one axis reads, its start, end and axis."""
    node = made_by(value, "Slice")
    if node is None or node.inputs[0] is None:
        return None
    numbers = [constant(input_of(node, i)) for i in (1, 2, 3)]
    step = constant(input_of(node, 4))
    if any(number is None or number.size != 1 for number in numbers) or (
        step is not None and (step != 1).any()
    ):
        return None
    start, end, axis = (int(number.item()) for number in numbers if number is not None)
    return node.inputs[0], start, end, axis


def _without_gathers(x: ir.Value, order: np.ndarray, width: int) -> tuple[ir.Value, np.ndarray]:
    """What a Gather of all rows read that alone is read here, with both orders in one."""
    source = maker(x)
    while source is not None and source.op_type == "Reshape":
        source = maker(source.inputs[0])
    if source is None or not takes_all_rows(source) or _sizes_behind_batch(source.outputs[0])[1:] != [width]:
        return x, order
    before, first = source.inputs[0], constant(source.inputs[1])
    return (x, order) if before is None or first is None else (before, first[order])


def add_mask_at_once(model: ir.Model) -> None:
    """Put the heads of an image's windows side by side, and add position bias and mask in one sum.

    As it is, the bias is added to scores of [N windows, heads, T, T], the mask to ones of [N, windows, heads, T, T].
    With [N, windows heads, T, T] and one constant OpenVINO computes products, sum, softmax and Q in one kernel.
    """
    for softmax in nodes_of(model, "Softmax"):
        narrow = made_by(softmax.inputs[0], "Reshape")
        masked = None if narrow is None else made_by(narrow.inputs[0], "Add")
        wide = None if masked is None else made_by(masked.inputs[0], "Reshape")
        biased = None if wide is None else made_by(wide.inputs[0], "Add")
        product = None if biased is None else made_by(biased.inputs[0], "MatMul")
        value = _product_behind(softmax)
        if masked is None or wide is None or biased is None or product is None or value is None:
            continue
        sizes, scores = _sizes_behind_batch(wide.outputs[0]), _sizes_behind_batch(product.outputs[0])
        if len(sizes) != 4 or sizes[1:] != scores or not _is_constant(masked.inputs[1], biased.inputs[1]):
            continue
        windows, heads = sizes[:2]
        both = node_like("Add", [masked.inputs[1], biased.inputs[1]], like=masked)
        both.outputs[0].type = masked.outputs[0].type
        added = _reshape(model, both.outputs[0], [windows * heads, *sizes[2:]], masked, batch=1)
        model.graph.insert_before(product, [both, added])
        back = _reshape(model, value.outputs[0], _sizes_behind_batch(value.outputs[0]), value)
        for use in list(value.outputs[0].uses()):
            if use.node is not back:
                use.node.replace_input_with(use.idx, back.outputs[0])
        model.graph.insert_after(value, back)
        for node, index in ((product, 0), (product, 1), (value, 1)):
            turned = made_by(node.inputs[index], "Transpose")
            if turned is not None and integers(turned, "perm") == [0, 1, 3, 2]:
                node, index = turned, 0
            operand = node.inputs[index]
            if operand is not None:
                joined = _reshape(model, operand, [windows * heads, *_sizes_behind_batch(operand)[1:]], node)
                model.graph.insert_before(node, joined)
                node.replace_input_with(index, joined.outputs[0])
            node.outputs[0].shape = None
        biased.replace_input_with(1, added.outputs[0])
        softmax.replace_input_with(0, biased.outputs[0])
        for node in (product, biased, softmax, *_pair_behind(softmax), value):
            node.outputs[0].shape = None


def _pair_behind(node: ir.Node) -> list[ir.Node]:
    """The Q and DQ that alone read a node's output; or none."""
    q = only_reader(node.outputs[0])
    dq = None if q is None or q.op_type != "QuantizeLinear" else only_reader(q.outputs[0])
    return [] if q is None or dq is None or dq.op_type != "DequantizeLinear" else [q, dq]


def _product_behind(softmax: ir.Node) -> ir.Node | None:
    """The MatMul that alone reads a softmax, as its first operand, maybe quantized; of known sizes."""
    last = [softmax, *_pair_behind(softmax)][-1].outputs[0]
    product = only_reader(last)
    known = product is not None and product.op_type == "MatMul" and product.inputs[0] is last
    return product if product is not None and known and _sizes_behind_batch(product.outputs[0]) else None


def _is_constant(*values: ir.Value | None) -> bool:
    """Whether nothing that is read depends on an input of the graph."""
    seen: set[ir.Value] = set()
    waiting = [value for value in values if value is not None]
    while waiting:
        value = waiting.pop()
        if value.is_graph_input():
            return False
        seen.add(value)
        source = maker(value)
        waiting += [x for x in (() if source is None else source.inputs) if x is not None and x not in seen]
    return True


def quantize_projections(model: ir.Model) -> None:
    """Quantize query, key and value before the attention takes their rows apart, with a scale for each column.

    The same values. OpenVINO then quantizes within the linear layer, and moves integers in place of floats. Heads of
    fewer than 64 columns are put in order by a Gather of rows each, for which its Transpose takes ten times as long.
    """
    for moved in nodes_of(model, "Transpose"):
        cut, thirds = made_by(moved.inputs[0], "Reshape"), _thirds(moved)
        shape = None if cut is None else constant(cut.inputs[1])
        x = None if cut is None else cut.inputs[0]
        if cut is None or x is None or x.shape is None or shape is None or len(thirds) != 3:
            continue
        if shape.size != 5 or shape[2] != 3 or shape[1] < 1 or shape[3] < 1 or len(cut.outputs[0].uses()) > 1:
            continue
        ends = [end for node in thirds if (end := _quantized(node.outputs[0])) is not None]
        points = [zero for q, _ in ends if (zero := zero_point(q)) is not None]
        if len(ends) < 3 or len({zero.dtype for zero in points}) > 1:
            continue
        name = str(x.name)
        scales = np.repeat([scale for _, scale in ends], int(np.prod(shape[3:]))).astype(np.float32)
        scale = initializer(model, f"{name}_scales", scales)
        zeros = initializer(model, f"{name}_zero_points", np.zeros(len(scales), points[0].dtype))
        whole = node_like("QuantizeLinear", [x, scale, zeros], like=cut, axis=len(x.shape) - 1)
        whole.outputs[0].shape, whole.outputs[0].type = x.shape, ends[0][0].outputs[0].type
        model.graph.insert_before(cut, whole)
        cut.replace_input_with(0, whole.outputs[0])
        for node in (cut, moved, *readers(moved.outputs[0]), *thirds):
            node.outputs[0].type = whole.outputs[0].type
        parts = [node.outputs[0] for node in thirds]
        if shape[4] < _NARROW:
            parts = _gathered(model, whole.outputs[0], [int(n) for n in shape[1:]], cut)
        for (q, _), part in zip(ends, parts, strict=True):
            part.shape = q.outputs[0].shape
            q.outputs[0].replace_all_uses_with(part)


def _gathered(model: ir.Model, x: ir.Value, sizes: Sequence[int], like: ir.Node) -> list[ir.Value]:
    """Query, key and value, [N, heads, T, columns], from the rows of [N, T, 3, heads, columns]."""
    tokens, _, heads, columns = sizes
    rows = _reshape(model, x, [tokens * 3 * heads, columns], like)
    model.graph.insert_before(like, rows)
    numbers = np.arange(tokens * 3 * heads).reshape(tokens, 3, heads).transpose(1, 2, 0)
    parts = []
    for order in numbers:
        taken = _gather(model, rows.outputs[0], order.reshape(-1), like)
        part = _reshape(model, taken.outputs[0], [heads, tokens, columns], like)
        model.graph.insert_before(like, [taken, part])
        parts.append(part.outputs[0])
    return parts


def gather_heads(model: ir.Model) -> None:
    """Quantize what an attention gives before its narrow heads are put side by side, by a Gather of rows."""
    for turn in nodes_of(model, "Transpose"):
        x, pair = turn.inputs[0], _pair_behind(turn)
        sizes = _sizes_behind_batch(x)
        if x is None or len(sizes) != 3 or integers(turn, "perm") != [0, 2, 1, 3] or sizes[2] >= _NARROW:
            continue
        if not pair or _is_constant(x):
            continue
        heads, tokens, columns = sizes
        joined = made_by(x, "Reshape")
        if joined is not None and only_reader(x) is not None and joined.inputs[0] is not None:
            x = joined.inputs[0]  # what is quantized is what the product gives
        q, dq = pair
        result = dq.outputs[0]
        uses = list(result.uses())
        q.replace_input_with(0, x)
        q.outputs[0].shape = result.shape = x.shape
        rows = _reshape(model, result, [heads * tokens, columns], turn)
        order = np.arange(heads * tokens).reshape(heads, tokens).T.reshape(-1)
        taken = _gather(model, rows.outputs[0], order, turn)
        whole = _reshape(model, taken.outputs[0], [tokens, heads, columns], turn)
        model.graph.insert_after(dq, [rows, taken, whole])
        for use in uses:
            use.node.replace_input_with(use.idx, whole.outputs[0])


def _thirds(moved: ir.Node) -> list[ir.Node]:
    """The nodes that take query, key and value from what a Transpose put first, in this order; or none."""
    taken = [third_taken(node) for node in readers(moved.outputs[0])]
    found = {third[1]: third[0] for third in taken if third is not None}
    plain = integers(moved, "perm") == [2, 0, 3, 1, 4] and not moved.outputs[0].is_graph_output()
    return [found[part] for part in range(3)] if plain and len(taken) == 3 and len(found) == 3 else []


def _quantized(value: ir.Value) -> tuple[ir.Node, float] | None:
    """The Q without zero point that alone reads a value, maybe times a constant, and its scale for the value itself."""
    node, factor = only_reader(value), 1.0
    if node is not None and node.op_type == "Mul":
        numbers = [float(x.item()) for x in map(constant, node.inputs) if x is not None and x.size == 1]
        if len(numbers) != 1 or numbers[0] <= 0:
            return None
        node, factor = only_reader(node.outputs[0]), numbers[0]
    if node is None or node.op_type != "QuantizeLinear":
        return None
    scale, zero = constant(node.inputs[1]), zero_point(node)
    if scale is None or scale.size > 1 or zero is None or zero.any():
        return None
    return node, float(scale.item()) / factor


def _batch(model: ir.Model) -> int | ir.SymbolicDim | None:
    shape = model.graph.inputs[0].shape
    return None if shape is None else shape[0]


def _sizes_behind_batch(value: ir.Value | None) -> list[int]:
    """The sizes behind the first one; [] where one is open."""
    known = [] if value is None or value.shape is None else list(value.shape)[1:]
    sizes = [size for size in known if isinstance(size, int)]
    return sizes if len(sizes) == len(known) else []


def _reshape(
    model: ir.Model,
    x: ir.Value,
    sizes: Sequence[int],
    like: ir.Node,
    result: ir.Value | None = None,
    batch: int = -1,
) -> ir.Node:
    """A Reshape to a size for each image, whatever their number."""
    name = "rows_" + "_".join(map(str, [*sizes, *([] if batch < 0 else [batch])]))
    shape = model.graph.initializers.get(name) or initializer(
        model, name, np.array([batch, *sizes], np.int64)
    )
    node = node_like("Reshape", [x, shape], like=like, result=result)
    node.outputs[0].type = x.type
    if result is None:
        node.outputs[0].shape = ir.Shape([None if batch < 0 else batch, *sizes])
    return node


def _gather(model: ir.Model, x: ir.Value, order: np.ndarray, like: ir.Node) -> ir.Node:
    """A Gather of rows, [N, rows, columns], in an order."""
    name = f"order_{zlib.crc32(order.tobytes()):08x}"
    known = model.graph.initializers.get(name)
    rows = known if known is not None else initializer(model, name, order.astype(np.int64))
    node = node_like("Gather", [x, rows], like=like, axis=1)
    node.outputs[0].type = x.type
    node.outputs[0].shape = ir.Shape([None, len(order), *list(x.shape or ())[2:]])
    return node
