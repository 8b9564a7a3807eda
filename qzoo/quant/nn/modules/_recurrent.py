"""What recurrent layers and cells share: parameters under torch's names, and their quantized concatenations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from qzoo.quant import descriptor as d
from qzoo.quant.nn._functions.quant_rnn import Weights
from qzoo.quant.nn.modules._utils import QuantMixin
from qzoo.quant.nn.modules.tensor_quantizer import TensorQuantizer

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
"""Gates of each mode: rows of its weights by ``hidden_size``."""


class Recurrent(nn.Module, QuantMixin):
    """What layers and cells share: parameters and their concatenations."""

    default_quant_desc_weight = d.QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW
    hidden_size: int

    def _suffixes(self) -> list[str]:
        raise NotImplementedError

    def _pairs(self) -> list[tuple[TensorQuantizer, TensorQuantizer]]:
        raise NotImplementedError

    def _add_parameters(
        self, suffix: str, inputs: int, gates: int, bias: bool, factory: dict[str, Any]
    ) -> None:
        rows = gates * self.hidden_size
        self.register_parameter(f"weight_ih{suffix}", nn.Parameter(torch.empty(rows, inputs, **factory)))
        self.register_parameter(
            f"weight_hh{suffix}", nn.Parameter(torch.empty(rows, self.hidden_size, **factory))
        )
        for name in ("bias_ih", "bias_hh"):
            self.register_parameter(
                f"{name}{suffix}", nn.Parameter(torch.empty(rows, **factory)) if bias else None
            )

    def reset_parameters(self) -> None:
        """Draw the parameters uniformly in ``+-1 / sqrt(hidden_size)``, in torch's order."""
        limit = 1.0 / math.sqrt(self.hidden_size) if self.hidden_size > 0 else 0.0
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -limit, limit)

    def _join(self, suffix: str) -> torch.Tensor:
        return torch.cat((getattr(self, f"weight_ih{suffix}"), getattr(self, f"weight_hh{suffix}")), dim=1)

    def quantized_weights(self) -> Iterator[tuple[torch.Tensor, TensorQuantizer]]:
        """Return each ``[W_ih, W_hh]`` with its quantizer (what ``calibrate_weights`` asks for)."""
        for suffix, (_, quantizer) in zip(self._suffixes(), self._pairs(), strict=True):
            yield self._join(suffix), quantizer

    @torch.no_grad()
    def quantize_weights_(self) -> None:
        """Replace the weights by their quantized values."""
        for suffix, (weight, quantizer) in zip(self._suffixes(), list(self.quantized_weights()), strict=True):
            target = getattr(self, f"weight_ih{suffix}"), getattr(self, f"weight_hh{suffix}")
            for parameter, value in zip(
                target, quantizer(weight).split([t.shape[1] for t in target], dim=1), strict=True
            ):
                parameter.copy_(value)

    def _weights(self) -> list[Weights]:
        return [
            Weights(
                weight_quantizer(self._join(suffix)),
                getattr(self, f"bias_ih{suffix}"),
                getattr(self, f"bias_hh{suffix}"),
                input_quantizer,
            )
            for suffix, (input_quantizer, weight_quantizer) in zip(
                self._suffixes(), self._pairs(), strict=True
            )
        ]
