"""Rewrites for ONNX Runtime only: what its int8 kernels want. All keep the integers, in place on an ``onnx_ir`` model.

A tensor that is quantized in two ways is a matter of its own: below 8 bits a block's input goes to its first
convolution in few bits and to the skip in 8. ONNX Runtime makes an int8 kernel only of an operator whose output goes
into one QuantizeLinear, and would run the add or convolution before in float, which costs more than its int8 kernel
twice; so the file has that operator twice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from qzoo.export.graph import (
    constant,
    copy_of,
    initializer,
    input_of,
    integer,
    integers,
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
from qzoo.export.passes import merge_pairs, use_unsigned, write_average_as_convolution
from qzoo.runtimes.operators import CARRIED_IN_ORT, CLAMPS

_FLOAT8 = (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2)
_FOLLOWS = (*CLAMPS, "MaxPool")  # fused with the operator before, or Q is moved across


def use_unsigned_activations(model: ir.Model) -> None:
    """Turn int8 activations into uint8 with zero point 128, see :func:`qzoo.export.passes.use_unsigned`.

    ONNX Runtime's x86 kernels take uint8 activations. It makes this change itself, but not where a tensor has two
    readers (a block's input that is also the skip), and leaves the convolutions around it in floating point.
    """
    use_unsigned(model, nodes_of(model, "QuantizeLinear"))


def average_by_convolution(model: ir.Model) -> None:
    """Make a depthwise convolution by ones of an AveragePool of integers with a Q behind: the same integers.

    ONNX Runtime's int8 average, which it computes in float, takes more than ten times as long. A padding that does not
    count stays with AveragePool.
    """
    for pool in nodes_of(model, "AveragePool"):
        dq = made_by(pool.inputs[0], "DequantizeLinear")
        zero = None if dq is None else zero_point(dq)
        if zero is None or zero.dtype not in (np.int8, np.uint8) or not _is_quantized_next(pool.outputs[0]):
            continue
        if any(integers(pool, "pads")) and integer(pool, "count_include_pad", 0) == 0:
            continue
        nodes = write_average_as_convolution(model, pool)
        if nodes is not None:
            replace_by(model, pool, nodes)


def _is_quantized_next(value: ir.Value) -> bool:
    """Whether one Q alone reads a value."""
    kinds = [reader.op_type for reader in readers(value)]
    return kinds == ["QuantizeLinear"] and not value.is_graph_output()


def add_parts(model: ir.Model) -> None:
    """Make Split and Add of a ReduceSum over two parts of a dequantized tensor, with a Q behind: the same sums.

    ONNX Runtime sums over an axis in float, and takes ten times as long for it as for its int8 addition (the splits of
    ResNeSt).
    """
    totals = [node for node in nodes_of(model, "ReduceSum") if _is_sum_of_two(node)]
    for total in totals:
        x, where, dq = total.inputs[0], total.inputs[1], _carried_pair(total.inputs[0])
        axes = constant(where)
        if x is None or axes is None or dq is None or dq.inputs[0] is None:
            continue
        new = []
        whole = dq.inputs[0]
        if maker(x) is not dq:  # the runtime carries this Q to the DQ, and both are gone
            new.append(node_like("QuantizeLinear", [x, *dq.inputs[1:]], like=total))
            new[0].outputs[0].type = whole.type
            whole = new[0].outputs[0]
        sizes = initializer(model, f"{total.outputs[0].name}_parts", np.array([1, 1], np.int64))
        split = ir.Node("", "Split", [whole, sizes], [ir.AttrInt64("axis", int(axes.item()))], num_outputs=2)
        split.metadata_props.update(total.metadata_props)
        pairs = [node_like("DequantizeLinear", [part, *dq.inputs[1:]], like=total) for part in split.outputs]
        add = node_like("Add", [pair.outputs[0] for pair in pairs], like=total)
        for part in split.outputs:
            part.type = whole.type
        for node in (*pairs, add):
            node.outputs[0].type = x.type
        squeeze = node_like("Squeeze", [add.outputs[0], where], like=total, result=total.outputs[0])
        replace_by(model, total, [*new, split, *pairs, add, squeeze])
    if totals:
        merge_pairs(model)


def _is_sum_of_two(total: ir.Node) -> bool:
    """Whether it sums the two parts of an axis, which it drops, of integers of one scale; one Q reads the sums."""
    x, axes, dq = total.inputs[0], constant(input_of(total, 1)), _carried_pair(total.inputs[0])
    if dq is None or levels_of(dq) is None or x is None or x.shape is None or integer(total, "keepdims", 1):
        return False
    return (
        axes is not None
        and axes.size == 1
        and x.shape[int(axes.item())] == 2
        and _is_quantized_next(total.outputs[0])
    )


def _carried_pair(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear of a value, maybe behind what ONNX Runtime carries it across."""
    node = maker(value)
    while node is not None and node.op_type in CARRIED_IN_ORT:
        node = maker(node.inputs[0])
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def clip_integers(model: ir.Model) -> None:
    """Turn Clip, Q into Q, Clip of integers where both limits are levels: the same values, since Q is monotone.

    Activations of fewer than 8 bits are clipped to their levels. ONNX Runtime fuses a layer with the Q right behind it
    only, and would compute one with a Clip between in floating point.
    """
    for q in nodes_of(model, "QuantizeLinear"):
        clip = maker(q.inputs[0])
        if clip is None or clip.op_type != "Clip" or len(clip.inputs) < 3 or q.outputs[0].is_graph_output():
            continue
        scale, zero = constant(q.inputs[1]), zero_point(q)
        low, high = constant(clip.inputs[1]), constant(clip.inputs[2])
        if (
            scale is None
            or zero is None
            or low is None
            or high is None
            or zero.size != 1
            or zero.dtype not in (np.int8, np.uint8)  # ONNX Runtime clips no 16-bit integers
        ):
            continue
        levels = np.array([low.item(), high.item()], np.float64) / scale.item()
        if np.abs(levels - np.rint(levels)).max() > 1e-3:
            continue
        info = np.iinfo(zero.dtype)
        ends = np.clip(np.rint(levels) + int(zero.item()), info.min, info.max).astype(zero.dtype)
        if (ends[0], ends[1]) == (info.min, info.max):
            continue  # Q clips there itself: the runtime drops the Clip
        _clip_behind(model, q, ends)
        q.replace_input_with(0, clip.inputs[0])


def clip_signed(model: ir.Model) -> None:
    """Make Q, Clip of integers from the zero point on of ReLU, signed Q: the same values, since Q is monotone.

    ONNX Runtime computes a ReLU with its layer where the Q behind has no level below zero. A ReLU whose values are
    joined with others that may be negative has a Q that does, and would leave the layer in float.
    """
    for q in nodes_of(model, "QuantizeLinear"):
        relu, zero = made_by(q.inputs[0], "Relu"), zero_point(q)
        if relu is None or zero is None or zero.size != 1 or zero.dtype not in (np.int8, np.uint8):
            continue
        if zero.item() == np.iinfo(zero.dtype).min or len(relu.outputs[0].uses()) > 1:
            continue
        if q.outputs[0].is_graph_output() or relu.outputs[0].is_graph_output():
            continue
        _clip_behind(model, q, np.array([zero.item(), np.iinfo(zero.dtype).max], zero.dtype))
        q.replace_input_with(0, relu.inputs[0])
        model.graph.remove(relu, safe=True)


def _clip_behind(model: ir.Model, q: ir.Node, ends: np.ndarray) -> None:
    """Let all that read the integers read them clipped to both ends."""
    name = str(q.outputs[0].name)
    limits = [
        initializer(model, f"{name}_{end}", np.array(level))
        for end, level in zip(("low", "high"), ends, strict=True)
    ]
    uses = list(q.outputs[0].uses())
    new = node_like("Clip", [q.outputs[0], *limits], like=q)
    new.outputs[0].type = q.outputs[0].type
    model.graph.insert_after(q, new)
    for reader, index in uses:
        reader.replace_input_with(index, new.outputs[0])


def keep_activations_before_float8(model: ir.Model) -> None:
    """Turn ReLU and Clip before a Q to 8-bit floating point into Max and Min: the same values.

    ONNX Runtime takes every Q for one that clips as ReLU and Clip do: before float8, which has a sign, it drops the
    ReLU, and fails on the Clip. It looks through operators that only move values, too.
    """
    lowest = initializer(model, "lowest_of_relu", np.array(0, np.float32))
    for q in nodes_of(model, "QuantizeLinear"):
        zero, node = input_of(q, 2), maker(q.inputs[0])
        while node is not None and node.op_type in CARRIED_IN_ORT:
            node = maker(node.inputs[0])
        if node is None or node.op_type not in CLAMPS or zero is None or zero.dtype not in _FLOAT8:
            continue
        limits = [lowest] if node.op_type == "Relu" else node.inputs[1:]
        result: Any = node.inputs[0]
        for op_type, limit in zip(("Max", "Min"), limits, strict=False):
            if limit is None:
                continue
            new = node_like(op_type, [result, limit], like=node, result=node.outputs[0])
            model.graph.insert_before(node, new)
            result = new.outputs[0]
        for reader, index in list(node.outputs[0].uses()):
            reader.replace_input_with(index, result)


def keep_float_layers(model: ir.Model) -> None:
    """Give the DQ before a layer with a float weight a scale for every channel, all alike: the same values.

    ONNX Runtime quantizes the float weight of a layer between DQ and Q itself, to one range for the whole tensor, and
    runs in int8 what was to stay in float. It does so only where the input has one scale.
    """
    for layer in nodes_of(model, "Conv", "ConvTranspose", "Gemm", "MatMul"):
        dq, weight = made_by(layer.inputs[0], "DequantizeLinear"), constant(layer.inputs[1])
        step, zero = (None, None) if dq is None else (constant(dq.inputs[1]), zero_point(dq))
        if dq is None or weight is None or weight.ndim < 2 or step is None or step.size != 1:
            continue
        axis, count = _channels(layer, weight)
        name = str(layer.outputs[0].name)
        inputs = [dq.inputs[0], initializer(model, f"{name}_scales", np.full(count, step.item(), np.float32))]
        if zero is not None:
            zeros = np.full(count, zero.item(), zero.dtype)
            inputs.append(initializer(model, f"{name}_zero_points", zeros))
        pixels = node_like("DequantizeLinear", inputs, like=dq, result=dq.outputs[0], axis=axis)
        model.graph.insert_before(layer, pixels)
        layer.replace_input_with(0, pixels.outputs[0])


def _channels(layer: ir.Node, weight: np.ndarray) -> tuple[int, int]:
    """Axis and number of the channels that a layer reads."""
    if layer.op_type == "Conv":
        return 1, weight.shape[1] * integer(layer, "group", 1)
    if layer.op_type == "ConvTranspose":
        return 1, weight.shape[0]
    turned = layer.op_type == "Gemm" and integer(layer, "transB", 0)
    return -1, weight.shape[-1 if turned else -2]


def multiply_rows(model: ir.Model) -> None:
    """Turn MatMul and Add of a linear layer on tokens into a Gemm on a matrix of all tokens, its bias in int32.

    ONNX Runtime adds the bias of a Gemm within its int8 kernel, that of a MatMul in another pass. In a file with a
    fixed batch it makes the Gemm itself, and then runs it in float for want of an int32 bias.
    """
    for product in nodes_of(model, "MatMul"):
        x, dq = product.inputs[0], maker(product.inputs[0])
        turned, out = maker(product.inputs[1]), product.outputs[0]
        behind = readers(out)
        if x is None or x.shape is None or dq is None or turned is None or len(behind) != 1:
            continue
        weight_dq = maker(turned.inputs[0]) if turned.op_type == "Transpose" else None
        total = behind[0]
        if (
            dq.op_type != "DequantizeLinear"
            or weight_dq is None
            or weight_dq.op_type != "DequantizeLinear"
            or total.op_type != "Add"
            or out.is_graph_output()
        ):
            continue
        bias = next((array for value in total.inputs if (array := constant(value)) is not None), None)
        tokens, weight = list(x.shape)[1:-1], constant(weight_dq.inputs[0])
        step, steps = constant(dq.inputs[1]), constant(weight_dq.inputs[1])
        if bias is None or weight is None or weight.dtype != np.int8 or step is None or steps is None:
            continue
        if not tokens or not all(isinstance(n, int) for n in tokens) or bias.shape != weight.shape[:1]:
            continue
        if step.size != 1 or steps.ndim > 1 or dq.inputs[0] is None:
            continue
        unit = (step.reshape(()) * steps).astype(np.float32)
        levels = np.rint(bias.astype(np.float64) / unit)
        if np.abs(levels).max() >= 2**31:
            continue
        name = str(total.outputs[0].name)
        rows = initializer(model, f"{name}_rows", np.array([-1, weight.shape[1]], np.int64))
        flat = node_like("Reshape", [dq.inputs[0], rows], like=product)
        flat.outputs[0].type = dq.inputs[0].type
        values = copy_of(dq, [flat.outputs[0], *dq.inputs[1:]])
        values.outputs[0].shape = None
        stored = initializer(model, f"{name}_bias", levels.astype(np.int32))
        scale = initializer(model, f"{name}_bias_scale", unit)
        offset = node_like("DequantizeLinear", [stored, scale], like=total)
        if unit.ndim:
            offset.attributes["axis"] = ir.AttrInt64("axis", 0)
        offset.outputs[0].type = out.type
        gemm = node_like(
            "Gemm", [values.outputs[0], weight_dq.outputs[0], offset.outputs[0]], like=product, transB=1
        )
        gemm.outputs[0].type = out.type
        size = initializer(model, f"{name}_size", np.array([-1, *tokens, weight.shape[0]], np.int64))
        whole = node_like("Reshape", [gemm.outputs[0], size], like=product, result=total.outputs[0])
        replace_by(model, total, [flat, values, offset, gemm, whole])


def pad_image_channels(model: ir.Model) -> None:
    """Pad the first convolution with channels of zeros up to four, in its int8 weight and in the quantized image.

    The results are the same integers. ONNX Runtime's x86 kernel reads pixels in groups of four channels; with fewer
    it copies every window of the image first, which costs more than the padding.
    """
    for conv in nodes_of(model, "Conv"):
        dq, weight_dq = map(maker, conv.inputs[:2])
        q = maker(dq.inputs[0]) if dq is not None else None
        if dq is None or weight_dq is None or q is None or q.op_type != "QuantizeLinear":
            continue
        source, stored = q.outputs[0], weight_dq.inputs[0]
        weight, zero = constant(stored), zero_point(q)
        alone = len(source.uses()) == len(dq.outputs[0].uses()) == 1 and not source.is_graph_output()
        if not alone or stored is None or weight is None or weight.dtype != np.int8:
            continue
        if zero is None or zero.dtype not in (np.int8, np.uint8):  # ONNX Runtime pads no 16-bit integers
            continue
        missing = 4 - weight.shape[1]
        if (
            missing <= 0
            or weight.shape[2:] == (1, 1)
            or len(weight.shape) != 4
            or integer(conv, "group", 1) > 1
        ):
            continue
        name, stored.name = str(stored.name), f"{stored.name}_narrow"
        wide = np.pad(weight, [(0, 0), (0, missing), (0, 0), (0, 0)])
        weight_dq.replace_input_with(0, initializer(model, name, wide))
        amounts = initializer(model, f"{name}_padding", np.array([0, 0, 0, 0, 0, missing, 0, 0], np.int64))
        level = initializer(model, f"{name}_zero", zero.reshape(()))
        pad = node_like("Pad", [source, amounts, level], like=q)
        pad.outputs[0].type = source.type
        model.graph.insert_before(dq, pad)
        dq.replace_input_with(0, pad.outputs[0])
        dq.outputs[0].shape = None


def copy_for_each_quantizer(model: ir.Model) -> None:
    """Copy a Conv or Add of int8 operands (then ReLU, max pooling) for the second Q that reads it. Same integers.

    ONNX Runtime merges operators that are written alike, so the copy differs: an Add has its operands exchanged, a
    Conv says the dilations of 1 that are the default.
    """
    for first in nodes_of(model, "Conv", "Add"):
        chain = _chain(first)
        quantizers = readers(chain[-1].outputs[0])
        if [node.op_type for node in quantizers] != ["QuantizeLinear"] * 2 or not runs_in_int8(first):
            continue
        copies: list[ir.Node] = []
        for node in chain:
            before = copies[-1].outputs[0] if copies else None
            copies.append(_copy(node, before))
        model.graph.insert_after(chain[-1], copies)
        quantizers[1].replace_input_with(0, copies[-1].outputs[0])


def _chain(first: ir.Node) -> list[ir.Node]:
    """The operator and those behind it up to the one that is read otherwise than by one ReLU or max pooling."""
    chain = [first]
    while True:
        out = chain[-1].outputs[0]
        uses = readers(out)
        if out.is_graph_output() or len(uses) != 1 or uses[0].op_type not in _FOLLOWS:
            return chain
        chain.append(uses[0])


def _copy(node: ir.Node, source: ir.Value | None) -> ir.Node:
    """The same operator on ``source``; without one on the node's own inputs, and written differently."""
    copy = copy_of(node, node.inputs if source is None else [source, *node.inputs[1:]])
    weight = input_of(node, 1)
    if source is None and node.op_type == "Add":
        return copy_of(node, node.inputs[::-1])
    if (
        source is None
        and "dilations" not in node.attributes
        and weight is not None
        and weight.shape is not None
    ):
        copy.attributes["dilations"] = ir.AttrInt64s("dilations", [1] * (len(weight.shape) - 2))
    return copy
