"""``calibrate_weights``: ranges of weights, all channels at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from qzoo.errors import NonFiniteError
from qzoo.quant import block as blocks
from qzoo.quant import ops
from qzoo.quant.calib.histogram import SMALLEST_RANGE, percentile_bin
from qzoo.quant.utils.reduce_amax import normalize_axes

if TYPE_CHECKING:  # the module imports this package
    from qzoo.quant.nn.modules.tensor_quantizer import TensorQuantizer

__all__ = ["calibrate_weights"]


@torch.no_grad()
def calibrate_weights(
    model: nn.Module,
    method: str = "percentile",
    perchannel: bool = True,
    percentile: float = 99.99,
    num_bins: int = 2048,
) -> None:
    """Calibrate the weights of a model: set the range of every weight's quantizer.

    Every module with a ``weight`` and a ``weight_quantizer`` takes part, and recurrent layers with the
    concatenation ``[W_ih, W_hh]`` that they quantize. The ranges equal those of ``HistogramCalibrator`` (or
    the maximum) on each channel alone. A model may be calibrated again with another granularity. A weight
    quantizer with blocks keeps them.

    Args:
        model: with quantized layers.
        method: ``"percentile"``, ``"mse"`` or ``"max"``.
        perchannel: one range per output channel: axis 0, and axis 1 of transposed convolutions. A weight
            ``[C, I, 3, 3]`` gets ``[C, 1, 1, 1]``. Otherwise one 0-d range.
        percentile: for that method.
        num_bins: bins of each channel's histogram over ``[0, its maximum]``.

    Raises:
        TypeError: another method.
        NonFiniteError: NaN or infinity in a weight.

    Example:
        >>> calibrate_weights(model, method="max", perchannel=True)
    """
    if method not in ("percentile", "mse", "max"):
        raise TypeError(f"Unsupported calibration method {method!r}; use percentile, mse or max")
    for name, module in model.named_modules():
        channel = 1 if isinstance(module, _ConvTransposeNd) else 0
        for weight, quantizer in quantized_weights(module):
            axes: list[int] = []
            data = weight.detach()
            if quantizer._block is not None:
                axes = blocks.kept_axes(channel if perchannel else None, quantizer._block, data.dim())
                data = blocks.split(data, quantizer._block)
            elif perchannel:
                axes = [channel]
            amax = _ranges(data, axes, quantizer, method, percentile, num_bins)
            if not torch.isfinite(amax).all():
                raise NonFiniteError(f"NaN or infinity in the weight of module {name!r}")
            if quantizer._block is not None:
                amax = blocks.squeeze(amax, quantizer._block, weight.dim())
            quantizer.reset_amax()
            quantizer._axis = channel if perchannel else None
            quantizer._set_buffer("_amax", amax, None)


def quantized_weights(module: nn.Module) -> Iterator[tuple[torch.Tensor, TensorQuantizer]]:
    """Return the weights that a module quantizes, each with its quantizer; empty for other modules.

    A module may define ``quantized_weights()`` itself (recurrent layers do).
    """
    own = getattr(module, "quantized_weights", None)
    if own is not None:
        yield from own()
        return
    quantizer = getattr(module, "weight_quantizer", None)  # an nn.Identity in a layer that is kept in float
    if getattr(module, "weight", None) is not None and not isinstance(quantizer, nn.Identity | None):
        yield cast(torch.Tensor, module.weight), cast("TensorQuantizer", quantizer)


def _ranges(
    data: torch.Tensor,
    axes: list[int],
    quantizer: TensorQuantizer,
    method: str,
    percentile: float,
    num_bins: int,
) -> torch.Tensor:
    axes = list(normalize_axes(axes, data.dim()))
    others = [d for d in range(data.dim()) if d not in axes]
    sizes = [data.shape[d] if d in axes else 1 for d in range(data.dim())]
    rows = data.permute(*axes, *others).reshape(max(_product(sizes), 1), -1)
    # As everywhere, a single range is 0-d, whatever the axis.
    shape = sizes if _product(sizes) > 1 else []
    if method == "max":
        return ops.reduce_amax_op(rows, [0]).reshape(shape)
    counts, largest = ops.histogram_rows(rows, num_bins)
    if not torch.isfinite(largest).all():
        return largest.reshape(shape)
    edges = torch.arange(num_bins + 1, dtype=torch.float64, device=data.device)
    edges = (edges * (largest.double() / num_bins)[:, None]).float()
    edges[:, -1] = largest
    if method == "percentile":
        ranges = edges.gather(1, percentile_bin(counts, percentile)[:, None])[:, 0]
    else:
        centers = (edges[:, 1:] + edges[:, :-1]) / 2
        best = ops.mse_search(counts, centers, quantizer.num_bits, quantizer.unsigned)
        ranges = centers.gather(1, best[:, None])[:, 0]
    return torch.where(largest < SMALLEST_RANGE, largest, ranges).reshape(shape)


def _product(sizes: list[int]) -> int:
    total = 1
    for n in sizes:
        total *= n
    return total
