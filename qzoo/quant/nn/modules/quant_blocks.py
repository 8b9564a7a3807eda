"""Quantized operations that have no weight: add, matmul, concatenation.

Their quantizers carry the roles by which the zoo's targets switch them (``qzoo.scheme``). All take the
descriptor of their inputs by keyword, ``quant_desc_input`` (default 8 bits per tensor).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qzoo.quant.descriptor import QuantDescriptor
from qzoo.quant.nn.modules._utils import QuantInputMixin, pop_quant_desc_in_kwargs
from qzoo.quant.nn.modules.tensor_quantizer import TensorQuantizer

__all__ = ["QuantAdd", "QuantConcat", "QuantMatMul"]


def quantizer_with_role(
    descriptor: QuantDescriptor, role: str, nonnegative: bool = False, symmetric: bool = False
) -> TensorQuantizer:
    """Make a quantizer that says what it is for."""
    quantizer = TensorQuantizer(descriptor)
    quantizer.role, quantizer.nonnegative, quantizer.symmetric = role, nonnegative, symmetric
    return quantizer


class QuantAdd(nn.Module, QuantInputMixin):
    """Quantized addition, ``branch + residual``: both inputs are quantized; shapes as ``torch.add``.

    TensorRT and OpenVINO want the branch (the output of a convolution) unquantized, ONNX Runtime wants it quantized:
    disable ``_branch_quantizer`` for the former.

    Args:
        quant_desc_input: descriptor of both inputs' quantizers, by keyword; 8 bits per tensor by default.

    Example:
        >>> QuantAdd()(torch.tensor([1.0]), torch.tensor([0.5]))
        tensor([1.5000])
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        descriptor = pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs)
        self._residual_quantizer = quantizer_with_role(descriptor, "residual")
        self._branch_quantizer = quantizer_with_role(descriptor, "branch")

    def forward(self, branch: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self._branch_quantizer(branch) + self._residual_quantizer(residual)


class QuantMatMul(nn.Module, QuantInputMixin):
    """Quantized matrix product, ``input @ other``: both operands are quantized; shapes as ``torch.matmul``.

    Args:
        quant_desc_input: descriptor of the input's quantizer, by keyword; 8 bits per tensor by default.

    Example:
        >>> QuantMatMul()(torch.randn(2, 3), torch.randn(3, 4)).shape
        torch.Size([2, 4])
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        descriptor = pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs)
        self._input_quantizer = quantizer_with_role(descriptor, "input", symmetric=True)
        self._other_quantizer = quantizer_with_role(descriptor, "input", symmetric=True)

    def forward(self, input: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.matmul(self._input_quantizer(input), self._other_quantizer(other))


class QuantConcat(nn.Module, QuantInputMixin):
    """Quantized concatenation: ``torch.cat`` with one range for all inputs.

    An integer runtime then concatenates without rescaling.

    Args:
        dim: the axis to join along.
        quant_desc_input: descriptor of the inputs' quantizer, by keyword; 8 bits per tensor by default.

    Example:
        >>> QuantConcat(dim=1)([torch.zeros(1, 2), torch.ones(1, 3)]).shape
        torch.Size([1, 5])
    """

    def __init__(self, dim: int = 1, **kwargs: Any) -> None:
        super().__init__()
        self.dim = dim
        self.init_quantizer(pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs))
        self._input_quantizer.role = "input"

    def forward(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        quantizer = self._input_quantizer
        if quantizer.amax is None:  # the inputs' common range is only known once they are together
            return quantizer(torch.cat(list(tensors), self.dim))
        return torch.cat([quantizer(t) for t in tensors], self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
