"""Quantized recurrent layers: LSTM, GRU and Elman RNN, and their cells.

Parameters have torch's names and order, so state dicts can be exchanged with the float layers. Quantization
is on the concatenations ``[x_t, h]`` and ``[W_ih, W_hh]``, with a pair of quantizers for every layer and
direction (``_input_quantizers``, ``_weight_quantizers``, layer-major); the weights are quantized once a call.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from qzoo.errors import ArgumentError
from qzoo.quant.nn._functions.quant_rnn import CELLS, RNN, State
from qzoo.quant.nn.modules._recurrent import GATES, Recurrent
from qzoo.quant.nn.modules._recurrent_cells import QuantGRUCell, QuantLSTMCell, QuantRNNCell
from qzoo.quant.nn.modules._recurrent_cells import QuantRNNCellBase as QuantRNNCellBase  # a public name
from qzoo.quant.nn.modules._utils import pop_quant_desc_in_kwargs
from qzoo.quant.nn.modules.tensor_quantizer import TensorQuantizer

__all__ = [
    "LSTM",
    "LSTMCell",
    "QuantGRU",
    "QuantGRUCell",
    "QuantLSTM",
    "QuantLSTMCell",
    "QuantRNN",
    "QuantRNNCell",
]


class QuantRNNBase(Recurrent):
    """Base of the layers. Arguments as in torch, then the descriptors by keyword.

    Raises:
        ValueError: a projection (``proj_size``), dropout outside 0..1, an unknown mode.
    """

    def __init__(
        self,
        mode: str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        descriptors = pop_quant_desc_in_kwargs(type(self), **kwargs)
        if mode not in CELLS:
            raise ArgumentError(f"mode must be one of {', '.join(CELLS)}, not {mode!r}")
        if proj_size != 0:
            raise ArgumentError(f"proj_size={proj_size} isn't supported by quantized recurrent layers; use 0")
        if isinstance(dropout, bool) or not 0 <= dropout <= 1:
            raise ArgumentError(f"dropout should be a number in the range 0 to 1, not {dropout}")
        if dropout > 0 and num_layers == 1:
            warnings.warn("dropout is between layers and does nothing with num_layers=1", stacklevel=3)
        self.mode = mode
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.proj_size = proj_size
        for layer in range(num_layers):
            inputs = input_size if layer == 0 else hidden_size * self._directions
            for suffix in (f"_l{layer}", f"_l{layer}_reverse")[: self._directions]:
                self._add_parameters(suffix, inputs, GATES[mode], bias, {"device": device, "dtype": dtype})
        self.reset_parameters()
        self.init_quantizer(descriptors[0], descriptors[1], num_layers * self._directions)

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _suffixes(self) -> list[str]:
        ends = ("", "_reverse")[: self._directions]
        return [f"_l{layer}{end}" for layer in range(self.num_layers) for end in ends]

    def _pairs(self) -> list[tuple[TensorQuantizer, TensorQuantizer]]:
        pairs = zip(self._input_quantizers, self._weight_quantizers, strict=True)
        return list(pairs)  # type: ignore[arg-type]

    @property
    def input_quantizer(self) -> nn.ModuleList:  # type: ignore[override]
        """The input quantizers, one per layer and direction."""
        return self._input_quantizers

    @property
    def weight_quantizer(self) -> nn.ModuleList:  # type: ignore[override]
        """The weight quantizers, one per layer and direction."""
        return self._weight_quantizers

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """The parameters of each layer and direction."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if self.bias else ("weight_ih", "weight_hh")
        return [[getattr(self, f"{name}{suffix}") for name in names] for suffix in self._suffixes()]

    def flatten_parameters(self) -> None:
        """Do nothing: there is no fused kernel that wants the weights in one piece."""

    def _initial(self, hx: Any, batch: int, like: torch.Tensor, batched: bool) -> State:
        """The state as a tuple of ``[layers * directions, N, hidden]``, checked."""
        count = 2 if self.mode == "LSTM" else 1
        shape = (self.num_layers * self._directions, batch, self.hidden_size)
        if hx is None:
            zeros = like.new_zeros(shape)
            return (zeros,) * count
        parts = tuple(hx) if count == 2 else (hx,)
        if len(parts) != count:
            raise RuntimeError(f"the initial state of {self.mode} has {count} parts, got {len(parts)}")
        parts = parts if batched else tuple(p.unsqueeze(1) if p.dim() == 2 else p for p in parts)
        for part in parts:
            if tuple(part.shape) != shape:
                raise RuntimeError(f"Expected hidden size {shape}, got {tuple(part.shape)}")
        return parts

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        """Run ``[T, N, in]`` (``[N, T, in]`` with ``batch_first``), ``[T, in]`` or a PackedSequence.

        Returns:
            ``(output, state)`` as torch does: ``output`` ``[T, N, directions * hidden]`` or a PackedSequence;
            ``state`` is ``(h, c)`` for LSTM and ``h`` otherwise, each ``[layers * directions, N, hidden]``.

        Raises:
            RuntimeError: sizes that don't fit.
        """
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        if input.dim() not in (2, 3):
            raise RuntimeError(f"input must have 2 or 3 dimensions, got shape {tuple(input.shape)}")
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        if batched and self.batch_first:
            x = x.transpose(0, 1)
        self._check_features(x)
        state = self._initial(hx, x.shape[1], x, batched)
        outputs, state = self._run(x.unbind(0), state)
        output = torch.stack(outputs)
        if not batched:
            return output.squeeze(1), self._as_torch(tuple(s.squeeze(1) for s in state))
        return (output.transpose(0, 1) if self.batch_first else output), self._as_torch(state)

    def _forward_packed(self, packed: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        data, sizes, sorted_indices, unsorted_indices = packed
        self._check_features(data)
        state = self._initial(hx, int(sizes[0]), data, True)
        if sorted_indices is not None:
            state = tuple(s.index_select(1, sorted_indices) for s in state)
        outputs, state = self._run(data.split(sizes.tolist()), state)
        if unsorted_indices is not None:
            state = tuple(s.index_select(1, unsorted_indices) for s in state)
        output = PackedSequence(torch.cat(outputs), sizes, sorted_indices, unsorted_indices)
        return output, self._as_torch(state)

    def _run(self, steps: Any, state: State) -> tuple[list[torch.Tensor], State]:
        return RNN(self.mode, steps, state, self._weights(), self._directions, self.dropout, self.training)

    def _check_features(self, x: torch.Tensor) -> None:
        if x.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {x.shape[-1]}"
            )

    def _as_torch(self, state: State) -> Any:
        return state if self.mode == "LSTM" else state[0]

    def extra_repr(self) -> str:
        """Return the sizes, as torch prints them, then what differs from the default."""
        text = f"{self.input_size}, {self.hidden_size}"
        defaults = (
            ("num_layers", 1),
            ("bias", True),
            ("batch_first", False),
            ("dropout", 0),
            ("bidirectional", False),
        )
        return text + "".join(f", {k}={getattr(self, k)}" for k, v in defaults if getattr(self, k) != v)


class _GatedLayer(QuantRNNBase):
    _layer_mode: ClassVar[str]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        options = (num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype)
        super().__init__(self._layer_mode, input_size, hidden_size, *options, **kwargs)


class QuantLSTM(_GatedLayer):
    """Quantized LSTM; parameters are interchangeable with ``nn.LSTM``. See :class:`QuantRNNBase`.

    Args:
        input_size, hidden_size, ...: as of ``nn.LSTM``.
        quant_desc_input, quant_desc_weight: descriptors of the quantizers, by keyword; 8 bits by default.

    Example:
        >>> output, (hidden, cell) = QuantLSTM(8, 16)(torch.randn(5, 2, 8))
        >>> output.shape
        torch.Size([5, 2, 16])
    """

    _layer_mode = "LSTM"


class QuantGRU(_GatedLayer):
    """Quantized GRU; parameters are interchangeable with ``nn.GRU``. See :class:`QuantRNNBase`.

    Args:
        input_size, hidden_size, ...: as of ``nn.GRU``.
        quant_desc_input, quant_desc_weight: descriptors of the quantizers, by keyword; 8 bits by default.

    Example:
        >>> output, hidden = QuantGRU(8, 16)(torch.randn(5, 2, 8))
        >>> output.shape
        torch.Size([5, 2, 16])
    """

    _layer_mode = "GRU"


class QuantRNN(QuantRNNBase):
    """Quantized Elman RNN; parameters are interchangeable with ``nn.RNN``. See :class:`QuantRNNBase`.

    Args:
        input_size, hidden_size, ...: as of ``nn.RNN``.
        quant_desc_input, quant_desc_weight: descriptors of the quantizers, by keyword; 8 bits by default.

    Example:
        >>> output, hidden = QuantRNN(8, 16)(torch.randn(5, 2, 8))
        >>> output.shape
        torch.Size([5, 2, 16])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        options = (num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype)
        super().__init__(f"RNN_{nonlinearity.upper()}", input_size, hidden_size, *options, **kwargs)
        self.nonlinearity = nonlinearity


LSTM = QuantLSTM
LSTMCell = QuantLSTMCell
GRU = QuantGRU
GRUCell = QuantGRUCell
