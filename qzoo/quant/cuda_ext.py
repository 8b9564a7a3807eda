"""The functions of the old toolkit's compiled extension, under its names.

They run on any device, on whichever kernels are there. All compute in float32 and return the dtype of
``inputs``.
"""

from __future__ import annotations

import torch

from qzoo.quant import ops

__all__ = ["fake_e4m3fy", "fake_tensor_quant", "fake_tensor_quant_", "fake_tensor_quant_with_axis"]


def fake_tensor_quant(
    inputs: torch.Tensor,
    amax: torch.Tensor,
    num_bits: int = 8,
    unsigned: bool = False,
    narrow_range: bool = True,
) -> torch.Tensor:
    """Quantize and come back; ``amax`` 0-d or broadcasting to ``inputs``."""
    return ops.fake_quantize(inputs.detach(), amax, num_bits, unsigned, narrow_range)


def fake_tensor_quant_(
    inputs: torch.Tensor,
    amax: torch.Tensor,
    num_bits: int = 8,
    unsigned: bool = False,
    narrow_range: bool = True,
) -> None:
    """The same in place."""
    ops.fake_quantize_out(inputs.detach(), amax, num_bits, unsigned, narrow_range, out=inputs.detach())


def fake_tensor_quant_with_axis(
    inputs: torch.Tensor,
    amax: torch.Tensor,
    axis: int,
    num_bits: int = 8,
    unsigned: bool = False,
    narrow_range: bool = True,
) -> torch.Tensor:
    """One range for each entry along ``axis``; ``amax`` ``[inputs.shape[axis]]``."""
    shape = [1] * inputs.dim()
    shape[axis] = -1
    return ops.fake_quantize(inputs.detach(), amax.reshape(shape), num_bits, unsigned, narrow_range)


def fake_e4m3fy(inputs: torch.Tensor) -> torch.Tensor:
    """Round to the nearest E4M3 value."""
    return ops.fake_quantize_fp8(inputs.detach(), None, "e4m3")
