"""Find the blocks with a skip: the last layer before the add, and the skip in that layer's units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.ptq.calls import calls_of
from qzoo.ptq.layers import Layer
from qzoo.quant.fold import evaluating
from qzoo.quant.nn import TensorQuantizer
from qzoo.quantizers import quantizers_off

_SMALLEST_GAIN = (
    0.01  # of the block's median; a channel that the BatchNorm all but removes can't make up anything
)


@dataclass(frozen=True)
class Block:
    """A module that returns ``norm(layer(..)) + x``, x being its own input.

    Attributes:
        module: the block, with a ``residual_quantizer`` on x.
        layer: the last layer before the add.
    """

    module: nn.Module
    layer: Layer

    def scaled_skip(self, x: Tensor, quantized: bool) -> Tensor:
        """Return the skip [N, C, ...] over the gain of the BatchNorm, as if it were part of the layer's output.

        Zero in channels whose gain is too small to matter.

        Args:
            x: the block's input.
            quantized: as the block's quantizer of the skip makes it.
        """
        if quantized:
            x = self.module.residual_quantizer(x)  # type: ignore[operator]
        norm = self.layer.norm
        if norm is None or norm.running_var is None:
            return x
        gain = norm.weight * (norm.running_var + norm.eps).rsqrt()
        usable = gain.abs() > _SMALLEST_GAIN * gain.abs().median()
        factor = torch.where(usable, 1 / gain, torch.zeros_like(gain))
        return x * factor.reshape([1, -1] + [1] * (x.dim() - 2))


@torch.no_grad()
def tails_of(model: nn.Module, layers: list[Layer], example: Tensor) -> dict[str, Block]:
    """Find the blocks whose skip is their unchanged input, by the name of their last layer."""
    modules = [
        module
        for module in model.modules()
        if isinstance(getattr(module, "residual_quantizer", None), TensorQuantizer)
        and isinstance(getattr(module, "branch_quantizer", None), TensorQuantizer)
    ]
    ends: dict[nn.Module, Layer] = {layer.norm or layer.module: layer for layer in layers}
    quantizers: list[Any] = [q for m in modules for q in (m.residual_quantizer, m.branch_quantizer)]
    with evaluating(model), quantizers_off(model):
        calls = calls_of(model, example, [*ends, *modules, *quantizers])
    makers = {call.gives: ends[call.module] for call in calls if call.module in ends}
    reads = {call.module: call.reads for call in calls if call.module not in ends}
    blocks = {}
    for module in modules:
        residual: Any = module.residual_quantizer
        branch: Any = module.branch_quantizer
        layer = makers.get(reads.get(branch, 0))
        if layer is None or layer.module not in module.modules():
            continue  # an add in a module of its own, which does not see the skip before the layer runs
        if residual in reads and reads[residual] == reads[module]:
            blocks[layer.name] = Block(module, layer)
    return blocks
