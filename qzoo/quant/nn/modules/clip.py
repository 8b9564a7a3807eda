"""``Clip``: clamp to bounds that are fixed or learned."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from qzoo.errors import ArgumentError
from qzoo.quant.nn.functional import clip

__all__ = ["Clip"]


class Clip(nn.Module):
    """Clamp with fixed or learned bounds, ``max(min(x, clip_value_max), clip_value_min)``, as a module.

    Args:
        clip_value_min, clip_value_max: the bounds. Fixed bounds are kept as given (float or tensor that
            broadcasts); a learnable one starts from a float or a one-element numpy array.
        learn_min, learn_max: make the bound a ``Parameter`` of that name.

    Raises:
        ValueError: a learnable bound that starts from anything else.

    Example:
        >>> Clip(-1.0, 1.0)(torch.tensor([-3.0, 0.5, 3.0]))
        tensor([-1.0000,  0.5000,  1.0000])
    """

    clip_value_min: Any
    clip_value_max: Any

    def __init__(
        self, clip_value_min: Any, clip_value_max: Any, learn_min: bool = False, learn_max: bool = False
    ) -> None:
        super().__init__()
        self.clip_value_min = _learnable("clip_value_min", clip_value_min) if learn_min else clip_value_min
        self.clip_value_max = _learnable("clip_value_max", clip_value_max) if learn_max else clip_value_max

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return clip(inputs, self.clip_value_min, self.clip_value_max)


def _learnable(name: str, value: Any) -> nn.Parameter:
    single = isinstance(value, (float, int)) or (isinstance(value, np.ndarray) and value.size == 1)
    if not single or isinstance(value, bool):
        raise ArgumentError(
            f"{name} must be scalar (a float or a one-element array) to be learned, not {value!r}"
        )
    return nn.Parameter(torch.tensor(float(np.asarray(value).reshape(())), dtype=torch.float32))
