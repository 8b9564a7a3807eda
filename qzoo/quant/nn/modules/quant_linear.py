"""Quantized linear layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.modules import linear

from qzoo.quant import descriptor as d
from qzoo.quant.nn.modules._utils import QuantMixin, pop_quant_desc_in_kwargs

__all__ = ["Linear", "QuantLinear"]


class QuantLinear(linear.Linear, QuantMixin):
    """Quantized linear layer: ``F.linear`` on a quantized input ``[..., in]`` and weight ``[out, in]``.

    The bias isn't quantized. Parameters, their names and their initial values are those of ``nn.Linear``.

    Args:
        in_features, ..., dtype: as of ``nn.Linear``.
        quant_desc_input: descriptor of the input's quantizer, by keyword; 8 bits per tensor by default.
        quant_desc_weight: of the weight's quantizer, by keyword; 8 bits, one range per row by default.

    Example:
        >>> layer = QuantLinear(8, 4)
        >>> layer(torch.randn(2, 8)).shape
        torch.Size([2, 4])
    """

    default_quant_desc_weight = d.QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        descriptors = pop_quant_desc_in_kwargs(type(self), **kwargs)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.init_quantizer(*descriptors)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        return F.linear(self._input_quantizer(input), self._weight_quantizer(self.weight), self.bias)


Linear = QuantLinear
