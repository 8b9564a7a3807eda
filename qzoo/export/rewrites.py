"""List the rewrites of an exported graph, by stage and target, each finding what the one before made.

A new runtime is a row in :data:`FOR`, one in :data:`qzoo.scheme.TARGETS` and a file in :mod:`qzoo.runtimes`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import onnx_ir as ir
import torch

from qzoo.export import (
    attention_for_onnxruntime,
    for_onnxruntime,
    for_openvino,
    for_tensorrt,
    moves_for_openvino,
    passes,
    patches,
)

Rewrite = Callable[[ir.Model], None]

START: tuple[Rewrite, ...] = (
    passes.use_global_pooling,
    passes.drop_pooling_of_one,
    passes.limit_by_clips,
    passes.merge_padding,
    passes.merge_pairs,
    passes.split_weights,
)
# A product of a uint8 and an int8 is exact on processors with VNNI only.
WITH_VNNI = (attention_for_onnxruntime.multiply_by_int8,)
# TensorRT computes them with the layer as they are.
SCALE: dict[str, tuple[Rewrite, ...]] = dict.fromkeys(("onnxruntime", "openvino"), (passes.fold_scales,))
STORE: dict[str, tuple[Rewrite, ...]] = {
    "int8": (passes.store_integer_weights,),
    "int4": (passes.store_integer_weights, passes.store_4_bits),
    "float": (),
}
FOR: dict[str, tuple[Rewrite, ...]] = {
    "onnxruntime": (
        for_onnxruntime.use_unsigned_activations,
        for_onnxruntime.average_by_convolution,
        for_onnxruntime.add_parts,
        for_onnxruntime.clip_integers,
        for_onnxruntime.keep_activations_before_float8,
        patches.multiply_patches,
        for_onnxruntime.multiply_rows,
        attention_for_onnxruntime.part_projections,
        attention_for_onnxruntime.scale_queries,
        attention_for_onnxruntime.multiply_by_int8,
        for_onnxruntime.pad_image_channels,
        for_onnxruntime.keep_float_layers,
    ),
    "openvino": (
        for_openvino.pool_maxima,
        for_openvino.normalize_rows,
        moves_for_openvino.multiply_wide_patches,
        moves_for_openvino.turn_rows,
        moves_for_openvino.gather_windows,
        moves_for_openvino.add_mask_at_once,
        for_openvino.quantize_before_moves,
        for_openvino.average_by_convolution,
        for_openvino.keep_epsilon,
        for_openvino.stride_before_layers,
        for_openvino.use_unsigned_where_misread,
        moves_for_openvino.quantize_projections,
        moves_for_openvino.gather_heads,
        for_openvino.give_shared_convolutions_a_bias,
        for_openvino.keep_rows_apart,
        for_openvino.expand_without_sizes,
    ),
    "tensorrt": (for_tensorrt.scale_before_quantizing, for_tensorrt.transpose_before_quantizing),
}
TIDY: tuple[Rewrite, ...] = (passes.share_zero_points, passes.drop_defaults, passes.drop_unused)
LAST: dict[str, tuple[Rewrite, ...]] = {
    "onnxruntime": (for_onnxruntime.copy_for_each_quantizer, for_onnxruntime.clip_signed),
}


def rewrites(
    target: str, weights: str, dtype: torch.dtype, half: bool = False, reduce_range: bool = False
) -> tuple[Rewrite, ...]:
    """List the rewrites of a file for a target.

    Args:
        weights: as in :func:`qzoo.export_onnx`.
        dtype: of the images.
        half: what is not quantized becomes float16.
        reduce_range: leave out what wants a processor with VNNI.
    """
    ends = partial(passes.narrow if half else passes.widen, dtype=dtype)
    return (
        *START,
        *SCALE.get(target, ()),
        *STORE[weights],
        *(rewrite for rewrite in FOR[target] if not (reduce_range and rewrite in WITH_VNNI)),
        *TIDY,
        *LAST.get(target, ()),
        ends,
        passes.drop_shapes,
    )
