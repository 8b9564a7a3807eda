"""Quantized instance norm: torch's own norm of a quantized input.

Arguments as in torch, ``device`` and ``dtype`` too; then by keyword ``quant_desc_input`` (default 8 bits per
tensor).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules import instancenorm

from qzoo.quant.nn.modules._utils import InputQuantized, pop_quant_desc_in_kwargs

__all__ = ["QuantInstanceNorm1d", "QuantInstanceNorm2d", "QuantInstanceNorm3d"]


class _QuantInstanceNorm(InputQuantized, instancenorm._InstanceNorm):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        descriptor = pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.init_quantizer(descriptor)


class QuantInstanceNorm1d(_QuantInstanceNorm, instancenorm.InstanceNorm1d):
    """Quantized 1-d instance norm, ``[N, C, L]``: ``nn.InstanceNorm1d`` of a quantized input.

    Args:
        num_features, ..., dtype: as of ``nn.InstanceNorm1d``.
        quant_desc_input: descriptor of the input's quantizer, by keyword; 8 bits per tensor by default.

    Example:
        >>> QuantInstanceNorm1d(3)(torch.randn(1, 3, 8)).shape
        torch.Size([1, 3, 8])
    """


class QuantInstanceNorm2d(_QuantInstanceNorm, instancenorm.InstanceNorm2d):
    """Quantized 2-d instance norm, ``[N, C, H, W]``: ``nn.InstanceNorm2d`` of a quantized input.

    Args:
        num_features, ..., dtype: as of ``nn.InstanceNorm2d``.
        quant_desc_input: descriptor of the input's quantizer, by keyword; 8 bits per tensor by default.

    Example:
        >>> QuantInstanceNorm2d(3)(torch.randn(1, 3, 8, 8)).shape
        torch.Size([1, 3, 8, 8])
    """


class QuantInstanceNorm3d(_QuantInstanceNorm, instancenorm.InstanceNorm3d):
    """Quantized 3-d instance norm, ``[N, C, D, H, W]``: ``nn.InstanceNorm3d`` of a quantized input.

    Args:
        num_features, ..., dtype: as of ``nn.InstanceNorm3d``.
        quant_desc_input: descriptor of the input's quantizer, by keyword; 8 bits per tensor by default.

    Example:
        >>> QuantInstanceNorm3d(3)(torch.randn(1, 3, 8, 8, 8)).shape
        torch.Size([1, 3, 8, 8, 8])
    """
