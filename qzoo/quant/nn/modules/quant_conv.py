"""Quantized convolutions: torch's own forward on a quantized input and a quantized weight."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch.nn.modules import conv
from torch.nn.modules.utils import _pair, _single, _triple

from qzoo.quant import descriptor as d
from qzoo.quant.nn.modules._utils import QuantMixin, pop_quant_desc_in_kwargs

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
]

# Remembered here because quant_modules.initialize() may replace the names in torch.nn.
_FLOAT = {1: conv.Conv1d, 2: conv.Conv2d, 3: conv.Conv3d}
_TO_TUPLE = {1: _single, 2: _pair, 3: _triple}


class _QuantConvNd(conv._ConvNd, QuantMixin):
    """Base of the quantized convolutions.

    Arguments as in torch, ``device`` and ``dtype`` too; then by keyword ``quant_desc_input`` (default 8 bits
    per tensor) and ``quant_desc_weight`` (default 8 bits, one range per output channel). The bias isn't
    quantized. Parameters, their names and their initial values are those of the float layer.
    """

    _dims: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        descriptors = pop_quant_desc_in_kwargs(type(self), **kwargs)
        n = _TO_TUPLE[self._dims]
        super().__init__(
            in_channels,
            out_channels,
            n(kernel_size),
            n(stride),
            padding if isinstance(padding, str) else n(padding),
            n(dilation),
            False,
            n(0),
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        self.init_quantizer(*descriptors)

    def _conv_forward(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return _FLOAT[self._dims]._conv_forward(self, input, weight, bias)  # type: ignore[arg-type]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[N, in, ...]`` or ``[in, ...]`` to ``[N, out, ...]`` or ``[out, ...]``."""
        return self._conv_forward(
            self._input_quantizer(input), self._weight_quantizer(self.weight), self.bias
        )


_ConvNd = _QuantConvNd


class QuantConv1d(_QuantConvNd):
    """Quantized 1-d convolution: ``nn.Conv1d`` on a quantized input and a quantized weight.

    Args:
        in_channels, ..., dtype: as of ``nn.Conv1d``.
        quant_desc_input: descriptor of the input's quantizer, by keyword; 8 bits per tensor by default.
        quant_desc_weight: of the weight's quantizer, by keyword; 8 bits, one range per output channel by default.

    Example:
        >>> QuantConv1d(3, 16, 3, padding=1)(torch.randn(1, 3, 8)).shape
        torch.Size([1, 16, 8])
    """

    _dims = 1
    default_quant_desc_weight = d.QUANT_DESC_8BIT_CONV1D_WEIGHT_PER_CHANNEL


class QuantConv2d(_QuantConvNd):
    """Quantized 2-d convolution: ``nn.Conv2d`` on a quantized input and a quantized weight.

    Args:
        in_channels, ..., dtype: as of ``nn.Conv2d``.
        quant_desc_input: descriptor of the input's quantizer, by keyword; 8 bits per tensor by default.
        quant_desc_weight: of the weight's quantizer, by keyword; 8 bits, one range per output channel by default.

    Example:
        >>> QuantConv2d(3, 16, 3, padding=1)(torch.randn(1, 3, 8, 8)).shape
        torch.Size([1, 16, 8, 8])
    """

    _dims = 2
    default_quant_desc_weight = d.QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL


class QuantConv3d(_QuantConvNd):
    """Quantized 3-d convolution: ``nn.Conv3d`` on a quantized input and a quantized weight.

    Args:
        in_channels, ..., dtype: as of ``nn.Conv3d``.
        quant_desc_input: descriptor of the input's quantizer, by keyword; 8 bits per tensor by default.
        quant_desc_weight: of the weight's quantizer, by keyword; 8 bits, one range per output channel by default.

    Example:
        >>> QuantConv3d(3, 16, 3, padding=1)(torch.randn(1, 3, 8, 8, 8)).shape
        torch.Size([1, 16, 8, 8, 8])
    """

    _dims = 3
    default_quant_desc_weight = d.QUANT_DESC_8BIT_CONV3D_WEIGHT_PER_CHANNEL


class _QuantConvTransposeNd(conv._ConvTransposeNd, QuantMixin):
    """Base of the quantized transposed convolutions; arguments as in torch, see :class:`_QuantConvNd`.

    The weight is ``[in, out / groups, ...]`` and its ranges lie along axis 1: with ``groups > 1`` one range
    serves the channels at the same place of every group.
    """

    _dims: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Any = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        descriptors = pop_quant_desc_in_kwargs(type(self), **kwargs)
        n = _TO_TUPLE[self._dims]
        super().__init__(
            in_channels,
            out_channels,
            n(kernel_size),
            n(stride),
            n(padding),
            n(dilation),
            True,
            n(output_padding),
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.init_quantizer(*descriptors)
        self._input_quantizer.symmetric = True

    def forward(self, input: torch.Tensor, output_size: Any = None) -> torch.Tensor:
        """``[N, in, ...]`` to ``[N, out, ...]``; ``output_size`` picks one of the sizes the stride allows."""
        padding = self._output_padding(
            input,
            output_size,
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            self.kernel_size,  # type: ignore[arg-type]
            self._dims,
            self.dilation,  # type: ignore[arg-type]
        )
        op = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[self._dims - 1]
        return op(
            self._input_quantizer(input),
            self._weight_quantizer(self.weight),
            self.bias,
            self.stride,
            self.padding,  # type: ignore[arg-type]
            padding,
            self.groups,
            self.dilation,
        )


class QuantConvTranspose1d(_QuantConvTransposeNd):
    """Quantized 1-d transposed convolution: ``nn.ConvTranspose1d`` on a quantized input and weight.

    Args:
        in_channels, ..., dtype: as of ``nn.ConvTranspose1d``.
        quant_desc_input: descriptor of the input's quantizer, by keyword; 8 bits per tensor by default.
        quant_desc_weight: of the weight's quantizer, by keyword; 8 bits, one range per channel of axis 1 by default.

    Example:
        >>> QuantConvTranspose1d(3, 16, 2, stride=2)(torch.randn(1, 3, 4)).shape
        torch.Size([1, 16, 8])
    """

    _dims = 1
    default_quant_desc_weight = d.QUANT_DESC_8BIT_CONVTRANSPOSE1D_WEIGHT_PER_CHANNEL


class QuantConvTranspose2d(_QuantConvTransposeNd):
    """Quantized 2-d transposed convolution: ``nn.ConvTranspose2d`` on a quantized input and weight.

    Args:
        in_channels, ..., dtype: as of ``nn.ConvTranspose2d``.
        quant_desc_input: descriptor of the input's quantizer, by keyword; 8 bits per tensor by default.
        quant_desc_weight: of the weight's quantizer, by keyword; 8 bits, one range per channel of axis 1 by default.

    Example:
        >>> QuantConvTranspose2d(3, 16, 2, stride=2)(torch.randn(1, 3, 4, 4)).shape
        torch.Size([1, 16, 8, 8])
    """

    _dims = 2
    default_quant_desc_weight = d.QUANT_DESC_8BIT_CONVTRANSPOSE2D_WEIGHT_PER_CHANNEL


class QuantConvTranspose3d(_QuantConvTransposeNd):
    """Quantized 3-d transposed convolution: ``nn.ConvTranspose3d`` on a quantized input and weight.

    Args:
        in_channels, ..., dtype: as of ``nn.ConvTranspose3d``.
        quant_desc_input: descriptor of the input's quantizer, by keyword; 8 bits per tensor by default.
        quant_desc_weight: of the weight's quantizer, by keyword; 8 bits, one range per channel of axis 1 by default.

    Example:
        >>> QuantConvTranspose3d(3, 16, 2, stride=2)(torch.randn(1, 3, 4, 4, 4)).shape
        torch.Size([1, 16, 8, 8, 8])
    """

    _dims = 3
    default_quant_desc_weight = d.QUANT_DESC_8BIT_CONVTRANSPOSE3D_WEIGHT_PER_CHANNEL


Conv1d = QuantConv1d
Conv2d = QuantConv2d
Conv3d = QuantConv3d
ConvTranspose1d = QuantConvTranspose1d
ConvTranspose2d = QuantConvTranspose2d
ConvTranspose3d = QuantConvTranspose3d
