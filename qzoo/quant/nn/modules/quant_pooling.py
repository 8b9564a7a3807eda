"""Quantized poolings: torch's own pooling of a quantized input.

Arguments as in torch, then by keyword ``quant_desc_input`` (default 8 bits per tensor).
"""

from __future__ import annotations

from typing import Any

from torch.nn.modules import pooling

from qzoo.quant.nn.modules._utils import InputQuantized, pop_quant_desc_in_kwargs


class _QuantMaxPool(InputQuantized, pooling._MaxPoolNd):
    def __init__(
        self,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        descriptor = pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs)
        super().__init__(kernel_size, stride, padding, dilation, return_indices, ceil_mode)
        self.init_quantizer(descriptor)


class QuantMaxPool1d(_QuantMaxPool, pooling.MaxPool1d):
    """Quantized 1-d max pooling: ``nn.MaxPool1d`` of a quantized input.

    Args:
        kernel_size, ...: as of ``nn.MaxPool1d``.
        quant_desc_input: descriptor of the input's quantizer, by keyword; 8 bits per tensor by default.

    Example:
        >>> QuantMaxPool1d(2)(torch.randn(1, 3, 8)).shape
        torch.Size([1, 3, 4])
    """


class QuantMaxPool2d(_QuantMaxPool, pooling.MaxPool2d):
    """Quantized 2-d max pooling: ``nn.MaxPool2d`` of a quantized input.

    Args:
        kernel_size, ...: as of ``nn.MaxPool2d``.
        quant_desc_input: descriptor of the input's quantizer, by keyword; 8 bits per tensor by default.

    Example:
        >>> QuantMaxPool2d(2)(torch.randn(1, 3, 8, 8)).shape
        torch.Size([1, 3, 4, 4])
    """


class QuantMaxPool3d(_QuantMaxPool, pooling.MaxPool3d):
    """Quantized 3-d max pooling: ``nn.MaxPool3d`` of a quantized input.

    Args:
        kernel_size, ...: as of ``nn.MaxPool3d``.
        quant_desc_input: descriptor of the input's quantizer, by keyword; 8 bits per tensor by default.

    Example:
        >>> QuantMaxPool3d(2)(torch.randn(1, 3, 8, 8, 8)).shape
        torch.Size([1, 3, 4, 4, 4])
    """


class QuantAvgPool1d(InputQuantized, pooling.AvgPool1d):
    """Quantized 1-d average pooling: ``nn.AvgPool1d`` of a quantized input.

    Args:
        kernel_size, ...: as of ``nn.AvgPool1d``.
        quant_desc_input: descriptor of the input's quantizer, by keyword; 8 bits per tensor by default.

    Example:
        >>> QuantAvgPool1d(2)(torch.randn(1, 3, 8)).shape
        torch.Size([1, 3, 4])
    """

    def __init__(
        self,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        **kwargs: Any,
    ) -> None:
        descriptor = pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs)
        super().__init__(kernel_size, stride, padding, ceil_mode, count_include_pad)
        self.init_quantizer(descriptor)


class _QuantAvgPool(InputQuantized, pooling._AvgPoolNd):
    def __init__(
        self,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
        **kwargs: Any,
    ) -> None:
        descriptor = pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs)
        super().__init__(kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
        self.init_quantizer(descriptor)


class QuantAvgPool2d(_QuantAvgPool, pooling.AvgPool2d):
    """Quantized 2-d average pooling: ``nn.AvgPool2d`` of a quantized input.

    Args:
        kernel_size, ...: as of ``nn.AvgPool2d``.
        quant_desc_input: descriptor of the input's quantizer, by keyword; 8 bits per tensor by default.

    Example:
        >>> QuantAvgPool2d(2)(torch.randn(1, 3, 8, 8)).shape
        torch.Size([1, 3, 4, 4])
    """


class QuantAvgPool3d(_QuantAvgPool, pooling.AvgPool3d):
    """Quantized 3-d average pooling: ``nn.AvgPool3d`` of a quantized input.

    Args:
        kernel_size, ...: as of ``nn.AvgPool3d``.
        quant_desc_input: descriptor of the input's quantizer, by keyword; 8 bits per tensor by default.

    Example:
        >>> QuantAvgPool3d(2)(torch.randn(1, 3, 8, 8, 8)).shape
        torch.Size([1, 3, 4, 4, 4])
    """


class _QuantAdaptiveAvgPool(InputQuantized, pooling._AdaptiveAvgPoolNd):
    def __init__(self, output_size: Any, **kwargs: Any) -> None:
        descriptor = pop_quant_desc_in_kwargs(type(self), input_only=True, **kwargs)
        super().__init__(output_size)
        self.init_quantizer(descriptor)


class QuantAdaptiveAvgPool1d(_QuantAdaptiveAvgPool, pooling.AdaptiveAvgPool1d):
    """Quantized 1-d adaptive average pooling: ``nn.AdaptiveAvgPool1d`` of a quantized input.

    Args:
        output_size: as of ``nn.AdaptiveAvgPool1d``.
        quant_desc_input: descriptor of the input's quantizer, by keyword; 8 bits per tensor by default.

    Example:
        >>> QuantAdaptiveAvgPool1d(4)(torch.randn(1, 3, 8)).shape
        torch.Size([1, 3, 4])
    """


class QuantAdaptiveAvgPool2d(_QuantAdaptiveAvgPool, pooling.AdaptiveAvgPool2d):
    """Quantized 2-d adaptive average pooling: ``nn.AdaptiveAvgPool2d`` of a quantized input.

    Args:
        output_size: as of ``nn.AdaptiveAvgPool2d``.
        quant_desc_input: descriptor of the input's quantizer, by keyword; 8 bits per tensor by default.

    Example:
        >>> QuantAdaptiveAvgPool2d(4)(torch.randn(1, 3, 8, 8)).shape
        torch.Size([1, 3, 4, 4])
    """


class QuantAdaptiveAvgPool3d(_QuantAdaptiveAvgPool, pooling.AdaptiveAvgPool3d):
    """Quantized 3-d adaptive average pooling: ``nn.AdaptiveAvgPool3d`` of a quantized input.

    Args:
        output_size: as of ``nn.AdaptiveAvgPool3d``.
        quant_desc_input: descriptor of the input's quantizer, by keyword; 8 bits per tensor by default.

    Example:
        >>> QuantAdaptiveAvgPool3d(4)(torch.randn(1, 3, 8, 8, 8)).shape
        torch.Size([1, 3, 4, 4, 4])
    """


MaxPool1d = QuantMaxPool1d
MaxPool2d = QuantMaxPool2d
MaxPool3d = QuantMaxPool3d
AvgPool1d = QuantAvgPool1d
AvgPool2d = QuantAvgPool2d
AvgPool3d = QuantAvgPool3d
AdaptiveAvgPool1d = QuantAdaptiveAvgPool1d
AdaptiveAvgPool2d = QuantAdaptiveAvgPool2d
AdaptiveAvgPool3d = QuantAdaptiveAvgPool3d

__all__ = [
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "QuantMaxPool1d",
    "QuantMaxPool2d",
    "QuantMaxPool3d",
    "QuantAvgPool1d",
    "QuantAvgPool2d",
    "QuantAvgPool3d",
    "QuantAdaptiveAvgPool1d",
    "QuantAdaptiveAvgPool2d",
    "QuantAdaptiveAvgPool3d",
]
