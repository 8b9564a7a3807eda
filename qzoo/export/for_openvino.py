"""Rewrites for OpenVINO only: forms that its CPU plugin computes as the file says. All keep the values.

OpenVINO moves the scale of a DequantizeLinear behind the operators that follow, and chooses the integer type of a
tensor by what reads it. In a few forms, found by comparing with ONNX Runtime on graphs of a few nodes (OpenVINO
2026.4), it loses a zero point or a scale on the way; lint names them in any file
(:mod:`qzoo.export.lint.openvino`), and here each is written in another way.
"""

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
    is_dequantized,
    levels_of,
    made_by,
    maker,
    node_like,
    nodes_of,
    readers,
    replace_by,
    runs_in_int8,
    zero_point,
)
from qzoo.export.lint.openvino import gathers_rows, readers_that_round
from qzoo.export.moves_for_openvino import takes_all_rows
from qzoo.export.passes import use_unsigned, write_average_as_convolution
from qzoo.runtimes.operators import ARITHMETIC, CLAMPS, CONVOLUTIONS, EXTREMA, MOVES, NORMS, POOLS

_BIAS = 1e-30
"""What a sum of float32 does not see, but a pass that drops zeros does."""

_SCALED = (*ARITHMETIC, "BatchNormalization")
_CARRIED = (*MOVES, *CLAMPS, *POOLS, *EXTREMA, "Resize", "Concat")


def pool_maxima(model: ir.Model) -> None:
    """Turn ReduceMax over height and width, and GlobalMaxPool, into MaxPool of the whole image.

    OpenVINO fuses ReduceMax with the Q behind, and then computes it wrongly.
    """
    for node in nodes_of(model, "ReduceMax", "GlobalMaxPool"):
        x, out = node.inputs[0], node.outputs[0]
        if x is None or x.shape is None or len(x.shape) != 4:
            continue
        sizes = [size for size in list(x.shape)[2:] if isinstance(size, int)]
        if len(sizes) < 2 or (node.op_type == "ReduceMax" and _reduced_axes(node) != [2, 3]):
            continue
        pool = node_like("MaxPool", [x], like=node, result=out, kernel_shape=sizes)
        pool.outputs[0].shape = ir.Shape([x.shape[0], x.shape[1], 1, 1])
        flat = node_like("Flatten", [pool.outputs[0]], like=node, result=out, axis=1)
        keeps = node.op_type == "GlobalMaxPool" or integer(node, "keepdims", 1)
        replace_by(model, node, [pool] if keeps else [pool, flat])


def _reduced_axes(node: ir.Node) -> list[int]:
    axes = constant(input_of(node, 1))
    return [] if axes is None else sorted(int(axis) % 4 for axis in axes)


def normalize_rows(model: ir.Model) -> None:
    """Write a LayerNormalization over the channels of [N, H, W, C] as one of [N, H W, C], between two Reshape.

    OpenVINO has a kernel for the latter, and fuses the Q behind with it. The former it computes by four operators,
    for which it turns the tensor twice: a fifth of the time of a ConvNeXt.
    """
    for norm in nodes_of(model, "LayerNormalization"):
        x, out = norm.inputs[0], norm.outputs[0]
        if x is None or x.shape is None or len(x.shape) != 4 or integer(norm, "axis", -1) not in (-1, 3):
            continue
        sizes = [size for size in list(x.shape)[1:] if isinstance(size, int)]
        if len(sizes) < 3 or len(norm.outputs) > 1:
            continue
        height, width, channels = sizes
        name, flat = str(out.name), [x.shape[0], height * width, channels]
        rows = initializer(model, f"{name}_rows", np.array([-1, *flat[1:]], np.int64))
        whole = initializer(model, f"{name}_size", np.array([-1, *sizes], np.int64))
        before = node_like("Reshape", [x, rows], like=norm)
        inner = copy_of(norm, [before.outputs[0], *norm.inputs[1:]])
        after = node_like("Reshape", [inner.outputs[0], whole], like=norm, result=out)
        for value in (before.outputs[0], inner.outputs[0]):
            value.type, value.shape = x.type, ir.Shape(flat)
        replace_by(model, norm, [before, inner, after])


def quantize_before_moves(model: ir.Model) -> None:
    """Move Q, DQ before a MaxPool, a Reshape or a Gather of all rows: the same values, since Q is monotone.

    OpenVINO leaves a max pooling before a Q in float, and fuses an average pooling with the Q right behind it only;
    the three nodes of a channel shuffle it runs as one only where no Q is among them. ONNX Runtime moves the Q itself.
    Where what is moved was quantized in the same way already, the Q behind goes.
    """
    moves = [
        n
        for n in model.graph
        if n.op_type in ("MaxPool", "Reshape", "Flatten") or _is_shuffle(n) or takes_all_rows(n)
    ]
    for move in reversed(moves):
        out = move.outputs[0]
        if len(move.outputs) > 1 or out.is_graph_output() or len(out.uses()) != 1:
            continue
        (q,) = readers(out)
        pairs = readers(q.outputs[0])
        if q.op_type != "QuantizeLinear" or {node.op_type for node in pairs} != {"DequantizeLinear"}:
            continue
        if any(node.outputs[0].is_graph_output() for node in pairs):
            continue
        for node in pairs:
            node.outputs[0].replace_all_uses_with(out)
        before, own = made_by(move.inputs[0], "DequantizeLinear"), levels_of(q)
        if before is not None and own is not None and levels_of(before) == own:
            continue
        q.replace_input_with(0, move.inputs[0])
        move.replace_input_with(0, pairs[0].outputs[0])
        for node in (q, *pairs):
            source = node.inputs[0]
            node.outputs[0].shape = None if source is None else source.shape
    model.graph.sort()


def _is_shuffle(node: ir.Node) -> bool:
    """Whether a node is the Transpose of a channel shuffle, between two Reshape."""
    if node.op_type != "Transpose" or made_by(node.inputs[0], "Reshape") is None:
        return False
    behind = {reader.op_type for reader in readers(node.outputs[0])}
    return behind == {"Reshape"} and integers(node, "perm") == [0, 2, 1, 3, 4]


def stride_before_layers(model: ir.Model) -> None:
    """Give the strides of a 1x1 convolution to a MaxPool over single pixels in front of it, where only it reads its Q.

    OpenVINO moves such strides to the front as far as it can: before the Q, if something else reads the tensor that is
    quantized (the shortcuts of Xception), and does not see then that the convolution has integers.
    """
    for conv in nodes_of(model, "Conv"):
        strides, weight = integers(conv, "strides"), conv.inputs[1]
        dq = made_by(conv.inputs[0], "DequantizeLinear")
        q = None if dq is None else made_by(dq.inputs[0], "QuantizeLinear")
        if q is None or dq is None or q.inputs[0] is None or weight is None or weight.shape is None:
            continue
        alone = len(readers(dq.outputs[0])) == len(readers(q.outputs[0])) == 1 < len(readers(q.inputs[0]))
        one = [1] * len(strides)
        if not alone or list(weight.shape)[2:] != one or strides == one or any(integers(conv, "pads")):
            continue
        pool = node_like("MaxPool", [dq.outputs[0]], like=conv, kernel_shape=one, strides=strides)
        pool.outputs[0].type = dq.outputs[0].type
        model.graph.insert_before(conv, pool)
        conv.replace_input_with(0, pool.outputs[0])
        conv.attributes["strides"] = ir.AttrInt64s("strides", one)


def use_unsigned_where_misread(model: ir.Model) -> None:
    """Turn int8 activations whose bytes OpenVINO reads as uint8 into uint8 with zero point 128.

    Those are what a Concat joins, or is quantized behind one; and, in a graph with a Concat anywhere, what an operator
    such as MaxPool moves before a convolution. OpenVINO writes a Concat of its own for some operators (the shape of a
    Flatten), so that the latter are changed in every graph.

    What only a BatchNorm reads behind a Concat, as in DenseNet, stays signed: OpenVINO computes the BatchNorm and the Q
    behind it on integers only where there is no zero point, and else makes float of what is joined first.
    """
    quantizers: dict[ir.Node, None] = {}
    normed: list[list[ir.Node]] = []
    for concat in nodes_of(model, "Concat"):
        before = _quantizers_before(concat)
        if {reader.op_type for reader in readers(concat.outputs[0])} == {"BatchNormalization"}:
            normed.append(before)
        else:
            quantizers |= dict.fromkeys(before)
        quantizers |= dict.fromkeys(_quantizers_behind(concat))
    for conv in nodes_of(model, "Conv"):
        source = maker(conv.inputs[0])
        if source is None or source.op_type not in _CARRIED or integer(conv, "group", 1) != 1:
            continue
        if is_dequantized(conv.inputs[1]):
            quantizers |= dict.fromkeys(_quantizers_before(conv))
    while mixed := [before for before in normed if not quantizers.keys().isdisjoint(before)]:
        normed = [before for before in normed if before not in mixed]
        quantizers |= dict.fromkeys(node for before in mixed for node in before)
    use_unsigned(model, quantizers)


def _quantizers_before(node: ir.Node) -> list[ir.Node]:
    """The Q whose integers enter the node, behind operators across which OpenVINO carries a DQ."""
    quantizers: list[ir.Node] = []
    seen, waiting = {node}, [node]
    while waiting:
        for source in map(maker, waiting.pop().inputs):
            if source is None or source in seen:
                continue
            seen.add(source)
            if source.op_type == "QuantizeLinear":
                quantizers.append(source)
            elif source.op_type in ("DequantizeLinear", *_CARRIED, *_SCALED):
                waiting.append(source)
    return quantizers


def _quantizers_behind(concat: ir.Node) -> list[ir.Node]:
    """The Q that OpenVINO fuses with the Concat, behind operators that it fuses too."""
    quantizers: list[ir.Node] = []
    seen, waiting = {concat}, [concat]
    while waiting:
        for reader in [node for value in waiting.pop().outputs for node in readers(value)]:
            if reader in seen:
                continue
            seen.add(reader)
            if reader.op_type == "QuantizeLinear":
                quantizers.append(reader)
            elif reader.op_type in (*MOVES, *CLAMPS) or (reader.op_type in _SCALED and _has_constant(reader)):
                waiting.append(reader)
    return quantizers


def _has_constant(node: ir.Node) -> bool:
    return any(constant(value) is not None for value in node.inputs)


def average_by_convolution(model: ir.Model) -> None:
    """Make a depthwise convolution by ones of an AveragePool of integers that OpenVINO computes wrongly.

    OpenVINO pads the pooling with the integer 0 where it has given the tensor a zero point of 128, as it does for every
    signed tensor that a convolution reads; a convolution it pads with the zero point. And before a BatchNorm or
    arithmetic it rounds the average to the steps of its input, see
    :func:`qzoo.export.lint.openvino.readers_that_round`. Where padding does not count, the average over the whole
    kernel is multiplied by kernel size over counted pixels, a constant for each place.
    """
    dynamic = any(value.shape and not isinstance(value.shape[0], int) for value in model.graph.inputs)
    for pool in nodes_of(model, "AveragePool"):
        x = pool.inputs[0]
        dq = maker(x)
        if x is None or x.shape is None or dq is None or dq.op_type != "DequantizeLinear":
            continue
        zero = zero_point(dq)
        padded, counted = any(integers(pool, "pads")), integer(pool, "count_include_pad", 0) == 1
        wrong = zero is not None and padded and counted and _is_signed(zero)
        if zero is None or not (wrong or readers_that_round(pool, dynamic)):
            continue
        shares = _counted_shares(pool) if padded and not counted else None
        if padded and not counted and shares is None:
            continue
        nodes = write_average_as_convolution(model, pool)
        if nodes is None:
            continue
        result = pool.outputs[0]
        if shares is not None:
            factor = initializer(model, f"{result.name}_factor", (1 / shares).astype(np.float32))
            nodes.append(node_like("Mul", [nodes[-1].outputs[0], factor], like=pool, result=result))
        replace_by(model, pool, nodes)


def _counted_shares(pool: ir.Node) -> np.ndarray | None:
    """Part of the kernel that lies on the image, [1, 1, H, W] of the result; None where the size is open."""
    x = pool.inputs[0]
    known = [] if x is None or x.shape is None else list(x.shape)[2:]
    sizes = [size for size in known if isinstance(size, int)]
    kernel, pads = integers(pool, "kernel_shape"), integers(pool, "pads")
    if len(sizes) != len(kernel):
        return None
    shares = np.ones(())
    for axis, size in enumerate(sizes):
        stride, dilation = (
            (integers(pool, name) or [1] * len(kernel))[axis] for name in ("strides", "dilations")
        )
        reach = (kernel[axis] - 1) * dilation
        starts = np.arange(-pads[axis], size + pads[axis + len(kernel)] - reach, stride)
        taken = starts[:, None] + dilation * np.arange(kernel[axis])
        part = ((taken >= 0) & (taken < size)).mean(1)
        shares = shares[..., None] * part
    return shares[None, None]


def keep_epsilon(model: ir.Model) -> None:
    """Put a Max with the lowest number before a normalization of what was dequantized.

    A normalization does not depend on the scale of its input but for epsilon: OpenVINO moves a scale of the whole
    tensor behind it, and adds epsilon to the variance of the integers, where it is next to nothing. No scale is moved
    across a Max.
    """
    lowest = np.array(np.finfo(np.float32).min, np.float32)
    for norm in nodes_of(model, *NORMS):
        x = norm.inputs[0]
        if x is None or not _is_scaled(x):
            continue
        bound = initializer(model, f"{norm.outputs[0].name}_lowest", lowest)
        kept = node_like("Max", [x, bound], like=norm)
        kept.outputs[0].type, kept.outputs[0].shape = x.type, x.shape
        model.graph.insert_before(norm, kept)
        norm.replace_input_with(0, kept.outputs[0])


def _is_scaled(value: ir.Value | None) -> bool:
    """Whether a value is dequantized by one scale, maybe moved, joined, or added to something since."""
    node = maker(value)
    if node is None:
        return False
    if node.op_type == "DequantizeLinear":
        scale = constant(node.inputs[1])
        return scale is not None and scale.size == 1
    sources = node.inputs if node.op_type in ("Concat", *ARITHMETIC) else node.inputs[:1]
    return node.op_type in ("Concat", *ARITHMETIC, *MOVES) and any(map(_is_scaled, sources))


def _is_signed(zero: np.ndarray) -> bool:
    return zero.dtype == np.int8 or bool(zero.any())


def give_shared_convolutions_a_bias(model: ir.Model) -> None:
    """Give an int8 convolution with several readers and no bias one of 1e-30, which no sum of float32 sees.

    With a dynamic batch OpenVINO gives only one of the readers the sums in their scale, the others the integers
    themselves. With a bias it does not, if not all of it is zero.
    """
    for conv in nodes_of(model, *CONVOLUTIONS):
        out, given = conv.outputs[0], input_of(conv, 2)
        if len(out.uses()) + out.is_graph_output() < 2 or not runs_in_int8(conv):
            continue
        bias, channels = constant(given), _output_channels(conv)
        if channels is None or (given is not None and (bias is None or bias.any())):
            continue
        value = initializer(model, f"{out.name}_bias", np.full(channels, _BIAS, np.float32))
        biased = copy_of(conv, [*conv.inputs[:2], value])
        biased.outputs[0].name = out.name
        replace_by(model, conv, [biased])


def _output_channels(conv: ir.Node) -> int | None:
    dq = maker(conv.inputs[1])
    stored = dq.inputs[0] if dq is not None else None
    if stored is None or stored.shape is None:
        return None
    groups = integer(conv, "group", 1)
    size = stored.shape[1] if conv.op_type == "ConvTranspose" else stored.shape[0]
    return size * (groups if conv.op_type == "ConvTranspose" else 1) if isinstance(size, int) else None


def keep_rows_apart(model: ir.Model) -> None:
    """Put an Unsqueeze before a Reshape that gathers rows of a matrix, [rows, C] to [batch, N, ...] with N >= C.

    With a dynamic batch OpenVINO reshapes the scale per channel of a linear layer along with the sums, and takes N
    of its values for N rows (or does not load the file).
    """
    for reshape in nodes_of(model, "Reshape"):
        x, shape = reshape.inputs[0], constant(reshape.inputs[1])
        if x is None or x.shape is None or len(x.shape) != 2 or shape is None:
            continue
        width, sizes = x.shape[1], [int(n) for n in shape]
        if not isinstance(width, int) or not gathers_rows(width, sizes) or isinstance(x.shape[0], int):
            continue
        axis = initializer(model, f"{reshape.outputs[0].name}_axis", np.array([0], np.int64))
        unsqueeze = node_like("Unsqueeze", [x, axis], like=reshape)
        unsqueeze.outputs[0].type, unsqueeze.outputs[0].shape = x.type, ir.Shape([1, *x.shape])
        model.graph.insert_before(reshape, unsqueeze)
        reshape.replace_input_with(0, unsqueeze.outputs[0])


def expand_without_sizes(model: ir.Model) -> None:
    """Let an Expand to the number of images ask for no size: leave it to broadcasting, or write Pad and Add.

    With a dynamic batch OpenVINO takes that number from the output of the first int8 convolution, and loses its bias
    there. Concat of a class token and patches becomes the sum of the padded patches and the padded token.
    """
    image = model.graph.inputs[0].shape
    if image is None or isinstance(image[0], int):
        return
    for expand in nodes_of(model, "Expand"):
        x, result, sizes = expand.inputs[0], expand.outputs[0], _sizes_behind_batch(expand)
        if (
            x is None
            or x.shape is None
            or result.shape is None
            or sizes is None
            or result.shape[0] != image[0]
        ):
            continue
        counted = len(x.shape) == len(result.shape) and x.shape[0] == image[0]
        shape = initializer(model, f"{result.name}_sizes", np.array([1, *sizes], np.int64))
        once = node_like("Expand", [x, shape], like=expand, result=result)
        once.outputs[0].shape = ir.Shape([image[0] if counted else 1, *list(result.shape)[1:]])
        model.graph.insert_before(expand, once)
        for reader in readers(result):
            if counted or _broadcasts(reader, result):
                reader.replace_input_with(reader.inputs.index(result), once.outputs[0])
            elif (new := _padded_sum(model, reader, result, once.outputs[0])) is not None:
                replace_by(model, reader, new)


def _sizes_behind_batch(expand: ir.Node) -> list[int] | None:
    """The sizes that an Expand to ``[batch, ...]`` has behind the batch, which is read from a Shape; else None."""
    concat = made_by(expand.inputs[1], "Concat")
    if concat is None or constant(concat.inputs[0]) is not None:
        return None
    source = maker(concat.inputs[0])
    while source is not None and source.op_type in ("Squeeze", "Unsqueeze", "Gather", "Slice", "Cast"):
        source = maker(source.inputs[0])
    rest = [constant(size) for size in concat.inputs[1:]]
    if source is None or source.op_type != "Shape" or any(size is None for size in rest):
        return None
    return [int(number) for size in rest if size is not None for number in size.reshape(-1)]


def _broadcasts(reader: ir.Node, value: ir.Value) -> bool:
    """Whether the other operand has the number of images, so that ``value`` need not."""
    others = [x for x in reader.inputs if x is not value]
    if reader.op_type not in ARITHMETIC or len(others) != 1 or others[0] is None:
        return False
    shape, own = others[0].shape, value.shape
    return shape is not None and own is not None and len(shape) == len(own) and shape[0] == own[0]


def _padded_sum(model: ir.Model, concat: ir.Node, value: ir.Value, once: ir.Value) -> list[ir.Node] | None:
    """Nodes for a Concat of ``value``, which is the same for all images, and one other tensor."""
    if concat.op_type != "Concat" or len(concat.inputs) != 2 or value.shape is None:
        return None
    axis = integer(concat, "axis", 0) % len(value.shape)
    shapes = [x.shape[axis] for x in concat.inputs if x is not None and x.shape is not None]
    lengths = [length for length in shapes if isinstance(length, int)]
    if axis == 0 or len(lengths) < 2:
        return None
    nodes, padded = [], []
    for i, x in enumerate(concat.inputs):
        pads = np.zeros(2 * len(value.shape), np.int64)
        pads[axis if i == 1 else len(value.shape) + axis] = lengths[1 - i]
        name = f"{concat.outputs[0].name}_pads_{i}"
        pad = node_like(
            "Pad",
            [once if x is value else x, initializer(model, name, pads)],
            like=concat,
            result=concat.outputs[0],
        )
        nodes.append(pad)
        padded.append(pad.outputs[0])
    return [*nodes, node_like("Add", padded, like=concat, result=concat.outputs[0])]
