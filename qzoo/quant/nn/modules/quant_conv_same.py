"""Quantized 2-d convolution with TensorFlow's "same" padding, as timm's ``tf_*`` models use it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qzoo.quant.nn.modules.quant_conv import QuantConv2d

__all__ = ["QuantConv2dSame"]


def pad_same(
    x: torch.Tensor,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...] = (1, 1),
) -> torch.Tensor:
    """Put zeros around [N, C, H, W], so that a convolution gives [N, C, ceil(H / stride), ceil(W / stride)].

    That is TensorFlow's "SAME" rule. An odd number of zeros has the larger half at the bottom and on the
    right, so the padding of a stride of 2 depends on the input's size.
    """
    sides: list[int] = []
    for axis in (1, 0):
        size, step = x.shape[2 + axis], stride[axis]
        reach = ((size + step - 1) // step - 1) * step + (kernel_size[axis] - 1) * dilation[axis] + 1
        missing = max(reach - size, 0)
        sides += [missing // 2, missing - missing // 2]
    return F.pad(x, sides)


class QuantConv2dSame(QuantConv2d):
    """Quantized 2-d convolution with TensorFlow's "same" padding, in place of ``timm.layers.Conv2dSame``.

    The input is padded behind its quantizer, so an exported graph reads Q, DQ, Pad, Conv: zero is exact in every
    symmetric type, and the Pad merges into the Conv, which then follows its DQ directly, as the int8 kernels of the
    runtimes demand.

    Args:
        in_channels, ..., dtype: as of ``nn.Conv2d``; the padding is not used.
        quant_desc_input, quant_desc_weight: descriptors of the quantizers, by keyword; see :class:`QuantConv2d`.

    Example:
        >>> QuantConv2dSame(3, 16, 3, stride=2)(torch.randn(1, 3, 15, 15)).shape
        torch.Size([1, 16, 8, 8])
    """

    def _conv_forward(
        self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        padded = pad_same(input, self.kernel_size, self.stride, self.dilation)
        return F.conv2d(padded, weight, bias, self.stride, 0, self.dilation, self.groups)
