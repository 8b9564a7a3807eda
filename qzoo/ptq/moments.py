"""Measure the means and covariances of each layer's inputs, as its weights are multiplied with them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.errors import CalibrationError
from qzoo.placement.scope import unseen
from qzoo.progress import track
from qzoo.ptq.collect import images_of
from qzoo.ptq.layers import Layer
from qzoo.quant.fold import attach, evaluating
from qzoo.quantizers import quantizers_off


@dataclass
class Moments:
    """Means and covariances of one layer's input patches, in float64.

    Attributes:
        count: number of patches.
        total: their sum, [groups, n].
        quantized: the sum of what the layer's input quantizer makes of them, [groups, n].
        outer: the sum of their outer products, [groups, n, n].
    """

    count: int
    total: Tensor
    quantized: Tensor
    outer: Tensor

    def mean(self) -> Tensor:
        """Compute the mean of the inputs, [groups, n]."""
        return self.total / self.count

    def error_of_mean(self, inexact: Tensor, exact: Tensor) -> Tensor:
        """Compute the mean error of the layer's output, [groups, rows], before any bias.

        Args:
            inexact: the weights that will meet quantized inputs, [groups, rows, n].
            exact: the float weights.
        """
        quantized, mean = self.quantized / self.count, self.mean()
        return torch.einsum("grn,gn->gr", inexact.double(), quantized) - torch.einsum(
            "grn,gn->gr", exact.double(), mean
        )

    def covariance(self) -> Tensor:
        """Compute the covariance of the inputs, [groups, n, n]."""
        mean = self.mean()
        return self.outer / self.count - mean.unsqueeze(2) * mean.unsqueeze(1)


@torch.no_grad()
def input_moments(
    model: nn.Module,
    layers: list[Layer],
    loader: Iterable[Any],
    *,
    positions: int = 128,
    seed: int = 0,
    covariance: bool = True,
    progress: bool = True,
) -> dict[str, Moments]:
    """Run the float model (its quantizers off) over the data once.

    Args:
        positions: output positions an image that count for a convolution.
        covariance: False leaves the outer products out (they are zeros then).

    Returns:
        The moments by layer name.
    """
    generator = torch.Generator().manual_seed(seed)
    moments: dict[str, Moments] = {}

    def watch(layer: Layer) -> Any:
        @unseen
        def hook(_: nn.Module, args: Any) -> None:
            x = layer.patches(args[0], positions, generator)
            total, quantized = x.sum(1).double(), _input_quantized(layer, x).sum(1).double()
            outer = (x.transpose(1, 2) @ x).double() if covariance else total.new_zeros(0)
            if layer.name in moments:
                sums = moments[layer.name]
                sums.count += x.shape[1]
                sums.total += total
                sums.quantized += quantized
                sums.outer += outer
            else:
                moments[layer.name] = Moments(x.shape[1], total, quantized, outer)

        return layer.module.register_forward_pre_hook(hook)

    handles = [watch(layer) for layer in layers]
    device = next(model.parameters()).device
    with attach(handles), evaluating(model), quantizers_off(model):
        for batch in track(loader, "input moments", show=progress):
            model(images_of(batch).to(device))
    if len(moments) < len(layers):
        raise CalibrationError("the loader gave no images; pass calibration images")
    return moments


def _input_quantized(layer: Layer, x: Tensor) -> Tensor:
    """Patches as the layer sees them when its input quantizer is on; zeros of the padding stay zeros."""
    quantizer = layer.module.input_quantizer
    return x if quantizer.switches.disabled or quantizer.axis is not None else quantizer.quantize(x)
