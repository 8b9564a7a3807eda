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
    """Quantize and dequantize a tensor with one range, or with ranges that broadcast.

    Args:
        inputs: any shape, floating point; never modified.
        amax: range, 0-d or broadcasting to ``inputs``.
        num_bits, unsigned, narrow_range: as of :func:`qzoo.quant.tensor_quant.tensor_quant`.

    Returns:
        Values on the integer grid.

    Example:
        >>> fake_tensor_quant(torch.tensor([0.5, 2.0]), torch.tensor(1.0))
        tensor([0.5039, 1.0000])
    """
    return ops.fake_quantize(inputs.detach(), amax, num_bits, unsigned, narrow_range)


def fake_tensor_quant_(
    inputs: torch.Tensor,
    amax: torch.Tensor,
    num_bits: int = 8,
    unsigned: bool = False,
    narrow_range: bool = True,
) -> None:
    """Quantize and dequantize a tensor in place.

    Args:
        inputs: any shape, floating point; overwritten.
        amax, num_bits, unsigned, narrow_range: as of :func:`fake_tensor_quant`.

    Example:
        >>> values = torch.tensor([0.5, 2.0])
        >>> fake_tensor_quant_(values, torch.tensor(1.0))
        >>> values
        tensor([0.5039, 1.0000])
    """
    ops.fake_quantize_out(inputs.detach(), amax, num_bits, unsigned, narrow_range, out=inputs.detach())


def fake_tensor_quant_with_axis(
    inputs: torch.Tensor,
    amax: torch.Tensor,
    axis: int,
    num_bits: int = 8,
    unsigned: bool = False,
    narrow_range: bool = True,
) -> torch.Tensor:
    """Quantize and dequantize a tensor with one range for each entry along an axis.

    Args:
        inputs: any shape, floating point; never modified.
        amax: ranges, ``[inputs.shape[axis]]``.
        axis: the axis.
        num_bits, unsigned, narrow_range: as of :func:`fake_tensor_quant`.

    Returns:
        Values on the integer grid.

    Example:
        >>> fake_tensor_quant_with_axis(torch.tensor([[0.5, 2.0], [0.5, 2.0]]), torch.tensor([1.0, 2.0]), axis=0)
        tensor([[0.5039, 1.0000],
                [0.5039, 2.0000]])
    """
    shape = [1] * inputs.dim()
    shape[axis] = -1
    return ops.fake_quantize(inputs.detach(), amax.reshape(shape), num_bits, unsigned, narrow_range)


def fake_e4m3fy(inputs: torch.Tensor) -> torch.Tensor:
    """Round a tensor to the nearest 8-bit floats (E4M3).

    Args:
        inputs: any shape, floating point; never modified.

    Returns:
        The rounded values.

    Example:
        >>> fake_e4m3fy(torch.tensor([1.03, 500.0]))
        tensor([  1., 448.])
    """
    return ops.fake_quantize_fp8(inputs.detach(), None, "e4m3")
