"""Weights with a range per block: stored integers and a DequantizeLinear with ``block_size`` (opset 21)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qzoo.errors import ExportError
from qzoo.quant import block as blocks
from qzoo.quant.nn import TensorQuantizer
from qzoo.quant.nn.modules._utils import replace_weight_quantizer
from qzoo.quant.utils.reduce_amax import normalize_axes


class StoredBlocks(nn.Module):
    """Stands for a weight quantizer while a model is exported: gives the dequantized weight, whatever it is given.

    Attributes:
        integers: int8, in the shape of the weight.
        scale: float32 in the shape of the weight, the blocked axis divided by the block size.
    """

    integers: Tensor
    scale: Tensor

    def __init__(self, integers: Tensor, scale: Tensor, axis: int, size: int) -> None:
        super().__init__()
        self.register_buffer("integers", integers)
        self.register_buffer("scale", scale)
        self.axis, self.size = axis, size

    def forward(self, weight: Tensor) -> Tensor:
        if not torch.onnx.is_in_onnx_export():
            return self.integers * self.scale.repeat_interleave(self.size, self.axis)
        attrs: Any = {"axis": self.axis, "block_size": self.size}
        return torch.onnx.ops.symbolic(
            "DequantizeLinear",
            (self.integers, self.scale),
            attrs,
            dtype=torch.float32,
            shape=self.integers.shape,
            version=21,
        )


@torch.no_grad()
def store_blocks_(layer: Any, quantizer: TensorQuantizer) -> None:
    """Replace a layer's weight quantizer with ranges per block by :class:`StoredBlocks`.

    Raises:
        ExportError: no range, another format than integers of at most 8 bits, or several ranges beside the blocks'
            that do not make a scale for every channel.
    """
    bits, amax, block = quantizer.num_bits, quantizer.amax, quantizer.block
    place = quantizer.name or f"the weight quantizer of {type(layer).__name__}"
    if amax is None or block is None or not isinstance(bits, int) or bits > 8 or quantizer.unsigned:
        raise ExportError(
            f"{place}: ranges per block export for signed integers of at most 8 bits with a fixed range"
        )
    rank = layer.weight.dim()
    (axis,) = normalize_axes(block[0], rank)
    shape = [n // block[1] if d == axis else n for d, n in enumerate(layer.weight.shape)]
    scale = amax / quantizer.maxbound
    scale = torch.where(scale == 0, torch.ones_like(scale), scale).expand(shape).contiguous()
    values = blocks.split(quantizer(layer.weight), block)
    integers = (values / blocks.spread(scale, block, rank)).round().to(torch.int8).reshape(layer.weight.shape)
    replace_weight_quantizer(layer, StoredBlocks(integers, scale, axis, block[1]))
