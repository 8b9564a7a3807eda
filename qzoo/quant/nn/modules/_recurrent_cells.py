"""Quantized recurrent cells: one step of an LSTM, a GRU or an Elman RNN. Public home: ``quant_rnn``."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from qzoo.errors import ArgumentError
from qzoo.quant.nn._functions.quant_rnn import CELLS, State
from qzoo.quant.nn.modules._recurrent import GATES, Recurrent
from qzoo.quant.nn.modules._utils import pop_quant_desc_in_kwargs
from qzoo.quant.nn.modules.tensor_quantizer import TensorQuantizer


class QuantRNNCellBase(Recurrent):
    """Base of the cells: a quantizer for ``[x, h]`` and one for ``[W_ih, W_hh]``."""

    mode: ClassVar[str] = "RNN_TANH"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        descriptors = pop_quant_desc_in_kwargs(type(self), **kwargs)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias
        self._add_parameters("", input_size, GATES[self.mode], bias, {"device": device, "dtype": dtype})
        self.reset_parameters()
        self.init_quantizer(*descriptors)

    def _suffixes(self) -> list[str]:
        return [""]

    def _pairs(self) -> list[tuple[TensorQuantizer, TensorQuantizer]]:
        return [(self._input_quantizer, self._weight_quantizer)]

    def _mode(self) -> str:
        return self.mode

    def forward(self, input: torch.Tensor, hx: Any = None) -> Any:
        """Map ``[N, in]`` or ``[in]`` and a state to the next state: ``(h, c)`` for LSTM, ``h`` otherwise.

        Raises:
            RuntimeError: sizes that don't fit.
        """
        batched = input.dim() == 2
        x = input if batched else input.unsqueeze(0)
        if x.dim() != 2 or x.shape[1] != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {tuple(input.shape)}, expected {self.input_size}"
            )
        lstm = self.mode == "LSTM"
        if hx is None:
            state: State = (x.new_zeros(x.shape[0], self.hidden_size),) * (2 if lstm else 1)
        else:
            state = tuple(part if batched else part.unsqueeze(0) for part in (hx if lstm else (hx,)))
        for part in state:
            if tuple(part.shape) != (x.shape[0], self.hidden_size):
                raise RuntimeError(
                    f"hidden has inconsistent size: got {tuple(part.shape)}, expected {self.hidden_size}"
                )
        state = CELLS[self._mode()](x, state, self._weights()[0])
        state = state if batched else tuple(part.squeeze(0) for part in state)
        return state if lstm else state[0]

    def extra_repr(self) -> str:
        """Return the sizes, as torch prints them."""
        return f"{self.input_size}, {self.hidden_size}{'' if self.bias else ', bias=False'}"


class QuantLSTMCell(QuantRNNCellBase):
    """Quantized LSTM cell; parameters are interchangeable with ``nn.LSTMCell``.

    Args:
        input_size, hidden_size, ...: as of ``nn.LSTMCell``.
        quant_desc_input, quant_desc_weight: descriptors of the quantizers, by keyword; 8 bits by default.

    Example:
        >>> hidden, cell = QuantLSTMCell(8, 16)(torch.randn(2, 8))
        >>> hidden.shape
        torch.Size([2, 16])
    """

    mode = "LSTM"


class QuantGRUCell(QuantRNNCellBase):
    """Quantized GRU cell; parameters are interchangeable with ``nn.GRUCell``.

    Args:
        input_size, hidden_size, ...: as of ``nn.GRUCell``.
        quant_desc_input, quant_desc_weight: descriptors of the quantizers, by keyword; 8 bits by default.

    Example:
        >>> hidden = QuantGRUCell(8, 16)(torch.randn(2, 8))
        >>> hidden.shape
        torch.Size([2, 16])
    """

    mode = "GRU"


class QuantRNNCell(QuantRNNCellBase):
    """Quantized Elman cell; parameters are interchangeable with ``nn.RNNCell``.

    Args:
        input_size, hidden_size, ...: as of ``nn.RNNCell``.
        quant_desc_input, quant_desc_weight: descriptors of the quantizers, by keyword; 8 bits by default.

    Example:
        >>> hidden = QuantRNNCell(8, 16)(torch.randn(2, 8))
        >>> hidden.shape
        torch.Size([2, 16])
    """

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, nonlinearity: str = "tanh", **kwargs: Any
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ArgumentError(f"nonlinearity must be tanh or relu, not {nonlinearity!r}")
        super().__init__(input_size, hidden_size, bias, **kwargs)
        self.nonlinearity = nonlinearity

    def _mode(self) -> str:
        return f"RNN_{self.nonlinearity.upper()}"
