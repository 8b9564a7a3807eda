"""Learned rounding of weights: up or down, whichever keeps the layer's output, not the nearest.

Paper: "Up or Down? Adaptive Rounding for Post-Training Quantization" (Nagel et al., 2020,
arXiv:2004.10568). For an output channel with weights w [n] and inputs x [n] the rounding error d = w_q - w
costs E[(d x)^2] = d H d with H = E[x x^T], a quadratic problem over up and down for every weight (the
paper's section 3.2). The paper relaxes it to a smooth one and trains that for 10,000 steps a layer. Here H
is measured once, for all layers in one pass of the float model, and the problem itself is solved by
coordinate descent, one input of all output channels at a time, as in "CDQuant" (Nair and Suggala, 2024,
arXiv:2406.17542): seconds instead of minutes, and the same each time.

The mean of the error, d E[x], goes into the BatchNorm or bias that follows, so H is the covariance.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.progress import track
from qzoo.ptq.collect import images_of
from qzoo.ptq.layers import Layer, layers_of, rows_only
from qzoo.ptq.moments import Moments, input_moments
from qzoo.ptq.regression import CrossMoments
from qzoo.quant import ops

SHRINK = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
"""Ranges that are tried for each output channel, as shares of its largest weight."""


@dataclass(frozen=True)
class RoundingGain:
    """What rounding one layer gained.

    Attributes:
        layer: its name.
        nearest: error power of the layer's output with the nearest levels of the calibrated range, over the
            power of the output (both without their means).
        learned: the same after learned rounding.
    """

    layer: str
    nearest: float
    learned: float


def adaround(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    positions: int = 128,
    passes: int = 8,
    damping: float = 0.01,
    seed: int = 0,
    progress: bool = True,
) -> list[RoundingGain]:
    """Round the weights of every quantized layer so that the layer's output stays close (AdaRound), in place.

    The weights are fixed points of their quantizers afterwards (they pack without loss), so the float model
    is gone: keep another one to compare with. Ranges are chosen anew for each output channel; ranges of
    activations stay.

    Args:
        model: calibrated, with float weights.
        loader: batches of images, as for ``calibrate``; 100 to 500 images are enough. Gone through once.
        positions: output positions an image that count for a convolution.
        passes: sweeps of coordinate descent at most; it ends when nothing changes.
        damping: added to the diagonal of H, as a share of its mean.
        seed: of the draw of the positions.
        progress: show a progress bar.

    Returns:
        The gain of each layer, in the order in which they run.

    Raises:
        CalibrationError: no quantized layers, ranges or images; ranges per group of inputs.

    Example:
        >>> gains = adaround(model, loader, positions=8, passes=1, progress=False)
        >>> gains[0].layer, gains[0].learned < gains[0].nearest
        ('conv1', True)
    """
    batches = loader if isinstance(loader, list) else list(loader)
    layers = rows_only(layers_of(model, images_of(batches[0])[:1] if batches else None))
    moments = input_moments(model, layers, batches, positions=positions, seed=seed, progress=progress)
    return [
        _round_layer(layer, moments[layer.name], passes, damping)
        for layer in track(layers, "round weights", show=progress)
    ]


@torch.no_grad()
def _round_layer(layer: Layer, moments: Moments, passes: int, damping: float) -> RoundingGain:
    quantizer, weight = layer.module.weight_quantizer, layer.module.weight
    bound = 2 ** (layer.bits - 1) - 1
    h = regularized(moments, damping)
    groups, n = h.shape[:2]
    rows = weight.reshape(groups, -1, n)

    def per_row(amax: Tensor) -> Tensor:
        return amax.reshape(-1, 1).expand(len(weight), 1).reshape(groups, -1, 1)

    before = per_row(layer.amax)
    if layer.amax.numel() == len(weight):
        amax = _best_range(rows, per_row(quantizer.range_of(weight)), bound, h)
        quantizer.set_range(amax.reshape(layer.amax.shape))
    step, old_step = step_of(per_row(layer.amax), bound), step_of(before, bound)
    integers = solve(rows / step, bound, h, passes)
    levels = integers.reshape(weight.shape).to(ops.integer_dtype(layer.bits))
    chosen = ops.dequantize(levels, layer.amax, layer.bits).reshape(rows.shape)
    layer.shift(moments.error_of_mean(chosen, rows).flatten())

    covariance = moments.covariance().to(h)
    power = max(cost_of(rows, covariance).sum().item(), 1e-30)
    nearest = (rows / old_step).round().clamp(-bound, bound) * old_step
    gain = [cost_of(used - rows, covariance).sum().item() / power for used in (nearest, chosen)]
    weight.copy_(chosen.reshape(weight.shape))
    return RoundingGain(layer.name, *gain)


def regularized(moments: Moments | CrossMoments, damping: float) -> Tensor:
    """Return the covariance [groups, n, n], float32, shrunk towards its diagonal where samples are few, and damped.

    With fewer samples than weights, rounding could else fit the samples exactly and harm all other images.
    """
    h = moments.covariance()
    n = h.shape[1]
    share = n / (n + moments.count)
    diagonal = h.diagonal(dim1=1, dim2=2).clamp(min=0)
    level = damping * diagonal.mean(1, keepdim=True)
    return ((1 - share) * h + torch.diag_embed(share * diagonal + level)).float()


def solve(target: Tensor, bound: int, h: Tensor, passes: int) -> Tensor:
    """Find integers near ``target`` that make ``d H d`` of each row small, with d = integers - target.

    Args:
        target: weights in units of their step, [groups, rows, n].
        bound: the largest integer; -bound is the lowest.
        h: positive definite, [groups, n, n].
        passes: sweeps over the n coordinates at most.

    Returns:
        [groups, rows, n], each entry of ``target`` rounded up or down (and clipped to the bound). No row's
        cost exceeds that of rounding to nearest.
    """
    nearest = target.round().clamp(-bound, bound)
    gradient = torch.matmul(nearest - target, h)
    diagonal = h.diagonal(dim1=1, dim2=2).clamp(min=1e-12)
    # Coordinates first, so that one of them is contiguous.
    q = nearest.permute(2, 0, 1).contiguous()
    low = target.floor().clamp(-bound, bound).permute(2, 0, 1).contiguous()
    high = target.ceil().clamp(-bound, bound).permute(2, 0, 1).contiguous()
    order = torch.argsort(diagonal.sum(0), descending=True, stable=True).tolist()
    for _ in range(passes):
        changed = False
        for j in order:
            best = (q[j] - gradient[:, :, j] / diagonal[:, j, None]).round_()
            delta = torch.maximum(torch.minimum(best, high[j]), low[j]) - q[j]
            moved = delta.nonzero()
            if not len(moved):
                continue
            changed = True
            if len(target) == 1:  # few rows move: touch these only
                rows = moved[:, 1]
                gradient[0].index_add_(0, rows, delta[0, rows, None] * h[0, j])
            else:
                gradient += delta.unsqueeze(2) * h[:, None, j]
            q[j] += delta
        if not changed:
            break
    return q.permute(1, 2, 0).contiguous()


def _best_range(rows: Tensor, largest: Tensor, bound: int, h: Tensor) -> Tensor:
    """The range [groups, rows, 1] of each output channel that costs least with nearest rounding."""
    best, amax = torch.full_like(largest, torch.inf), largest.clone()
    for share in SHRINK:
        step = step_of(share * largest, bound)
        cost = cost_of((rows / step).round().clamp(-bound, bound) * step - rows, h).unsqueeze(2)
        amax = torch.where(cost < best, share * largest, amax)
        best = torch.minimum(cost, best)
    return amax


def step_of(amax: Tensor, bound: int) -> Tensor:
    """Compute the step of integers up to ``bound``; 1 where the range is too small to divide by."""
    return torch.where(amax > ops.TINY, amax / bound, torch.ones_like(amax))


def cost_of(d: Tensor, h: Tensor) -> Tensor:
    """Compute ``d H d`` of each row of [groups, rows, n]."""
    return (torch.matmul(d, h) * d).sum(2)
