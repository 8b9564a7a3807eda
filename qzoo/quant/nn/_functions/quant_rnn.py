"""Recurrent cells on quantized operands, and the recurrence over time, layers and directions.

A cell sees the concatenation ``[x_t, h]`` ``[N, in + hidden]``, quantized by one quantizer, and the
concatenated weight ``[W_ih, W_hh]`` ``[gates * hidden, in + hidden]``, which the caller has quantized once.
Biases, gates and the cell state aren't quantized. The state is a tuple: ``(h, c)`` for LSTM, ``(h,)``
otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

State = tuple[torch.Tensor, ...]
Quantizer = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Weights:
    """One layer and direction: the quantized weight, the biases or None, the quantizer of ``[x_t, h]``."""

    weight: torch.Tensor
    bias_ih: torch.Tensor | None
    bias_hh: torch.Tensor | None
    input_quantizer: Quantizer

    def join(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """Join and quantize ``[x, h]`` along features."""
        return self.input_quantizer(torch.cat((x, h), dim=1))

    def gates(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """Compute ``[x, h] @ weight.T + biases``."""
        bias = None
        if self.bias_ih is not None and self.bias_hh is not None:
            bias = self.bias_ih + self.bias_hh
        return F.linear(self.join(x, h), self.weight, bias)


def LSTMCell(x: torch.Tensor, state: State, weights: Weights) -> State:
    """Take one step of an LSTM: ``[N, in]`` and ``(h, c)`` to the next ``(h, c)``."""
    h, c = state
    i, f, g, o = weights.gates(x, h).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def RNNTanhCell(x: torch.Tensor, state: State, weights: Weights) -> State:
    """Take one step of an Elman RNN with tanh."""
    return (torch.tanh(weights.gates(x, state[0])),)


def RNNReLUCell(x: torch.Tensor, state: State, weights: Weights) -> State:
    """Take one step of an Elman RNN with ReLU."""
    return (torch.relu(weights.gates(x, state[0])),)


def GRUCell(x: torch.Tensor, state: State, weights: Weights) -> State:
    """Take one step of a GRU. The candidate gate keeps its two products apart, on one joint quantization."""
    (h,) = state
    joined = weights.join(x, h)
    n = x.shape[1]
    from_x = F.linear(joined[:, :n], weights.weight[:, :n], weights.bias_ih)
    from_h = F.linear(joined[:, n:], weights.weight[:, n:], weights.bias_hh)
    x_r, x_z, x_n = from_x.chunk(3, 1)
    h_r, h_z, h_n = from_h.chunk(3, 1)
    z = torch.sigmoid(x_z + h_z)
    new = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return (new + z * (h - new),)


Cell = Callable[[torch.Tensor, State, Weights], State]

CELLS: dict[str, Cell] = {
    "LSTM": LSTMCell,
    "GRU": GRUCell,
    "RNN_TANH": RNNTanhCell,
    "RNN_RELU": RNNReLUCell,
}


def RNN(
    mode: str,
    steps: Sequence[torch.Tensor],
    state: State,
    weights: Sequence[Weights],
    directions: int = 1,
    dropout: float = 0.0,
    training: bool = False,
) -> tuple[list[torch.Tensor], State]:
    """Run all layers and directions.

    Args:
        mode: a key of :data:`CELLS`.
        steps: one ``[n_t, in]`` per time step; ``n_t`` never grows (a packed batch sorted by length).
        state: each ``[layers * directions, N, hidden]``.
        weights: layer-major, one per layer and direction.
        directions: 1 or 2.
        dropout, training: dropout between layers while training.

    Returns:
        One ``[n_t, directions * hidden]`` per time step, and the last state, shaped as ``state``.
    """
    cell = CELLS[mode]
    finals: list[State] = []
    layers = len(weights) // directions
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            run = _backward_in_time if direction else _forward_in_time
            output, final = run(cell, steps, tuple(s[index] for s in state), weights[index])
            outputs.append(output)
            finals.append(final)
        steps = (
            outputs[0] if directions == 1 else [torch.cat(pair, dim=1) for pair in zip(*outputs, strict=True)]
        )
        if dropout and training and layer < layers - 1:
            sizes = [len(step) for step in steps]
            steps = F.dropout(torch.cat(list(steps)), dropout, True).split(sizes)
    return list(steps), tuple(torch.stack(parts) for parts in zip(*finals, strict=True))


def _forward_in_time(
    cell: Cell, steps: Sequence[torch.Tensor], state: State, weights: Weights
) -> tuple[list[torch.Tensor], State]:
    outputs = []
    finished: list[State] = []
    for x in steps:
        n = x.shape[0]
        if n < state[0].shape[0]:  # the shortest sequences of a packed batch end here
            finished.append(tuple(s[n:] for s in state))
            state = tuple(s[:n] for s in state)
        state = cell(x, state, weights)
        outputs.append(state[0])
    finished.append(state)
    if len(finished) > 1:
        state = tuple(torch.cat(parts[::-1]) for parts in zip(*finished, strict=True))
    return outputs, state


def _backward_in_time(
    cell: Cell, steps: Sequence[torch.Tensor], initial: State, weights: Weights
) -> tuple[list[torch.Tensor], State]:
    outputs = []
    state = tuple(s[: steps[-1].shape[0]] for s in initial)
    for x in reversed(steps):
        n, running = x.shape[0], state[0].shape[0]
        if n > running:  # shorter sequences start here, from their own initial state
            state = tuple(torch.cat((s, first[running:n])) for s, first in zip(state, initial, strict=True))
        state = cell(x, state, weights)
        outputs.append(state[0])
    return outputs[::-1], state
