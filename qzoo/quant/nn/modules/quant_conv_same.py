"""Quantized 2-d convolution with TensorFlow's "same" padding, as timm's ``tf_*`` models use it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qzoo.quant.nn.modules.quant_conv import QuantConv2d

__all__ = ["QuantConv2dSame"]


class QuantConv2dSame(QuantConv2d):
    """Pads so that the output has ``ceil(size / stride)`` positions; the odd one goes right and down.

    Stands in for ``timm.layers.Conv2dSame``; the padding argument is ignored. The input is quantized before
    it is padded: zero is always a level.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[N, in, H, W]`` to ``[N, out, ceil(H / stride), ceil(W / stride)]``."""
        x = self._input_quantizer(input)
        sides: list[int] = []
        for size, kernel, stride, dilation in zip(
            (x.shape[-1], x.shape[-2]),
            reversed(self.kernel_size),
            reversed(self.stride),
            reversed(self.dilation),
            strict=True,
        ):
            reach = ((size + stride - 1) // stride - 1) * stride + (kernel - 1) * dilation + 1
            missing = max(reach - size, 0)
            sides += [missing // 2, missing - missing // 2]
        weight = self._weight_quantizer(self.weight)
        return F.conv2d(F.pad(x, sides), weight, self.bias, self.stride, 0, self.dilation, self.groups)
