"""Learned rounding, layer after layer: each layer also corrects the errors of the layers before it.

Papers: "Up or Down? Adaptive Rounding for Post-Training Quantization" (Nagel et al., 2020, arXiv:2004.10568),
section 3.3, asymmetric reconstruction: the layer's inputs are those of the quantized prefix, its wanted outputs
those of the float model. As in "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration" (Li et
al., 2025, arXiv:2504.02692) the problem splits. With quantized inputs x, float outputs y, H = cov(x) and the
regression W* = cov(y, x) H^-1,

    E |W_q x + b - y|^2 = (W_q - W*) H (W_q - W*)' + const,

so the weights are first moved to W*, then rounded as :mod:`qzoo.ptq.adaround` does. Few images would fit W* to
themselves; it is shrunk towards W by a ridge whose strength each output channel chooses by cross-validation over
parts of the images (none at all, where nothing helps).

The last layer of a block with a skip is asked for the block's output: what the skip brings wrong is part of what
the layer makes up for. Else the error would pass every block of a stage untouched.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.errors import ArgumentError
from qzoo.placement.scope import unseen
from qzoo.progress import track
from qzoo.ptq.adaround import SHRINK, RoundingGain, cost_of, regularized, solve, step_of
from qzoo.ptq.blocks import Block, tails_of
from qzoo.ptq.collect import images_of
from qzoo.ptq.layers import Layer, draw, layers_of, rows_only
from qzoo.ptq.regression import CrossMoments, wanted_weights
from qzoo.quant import ops
from qzoo.quant.fold import attach, evaluating
from qzoo.quantizers import quantizers_off


def adaround_sequential(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    positions: int = 128,
    passes: int = 8,
    damping: float = 0.01,
    folds: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> list[RoundingGain]:
    """Round the weights of the quantized layers one after the other, each on the quantized layers before it, in place.

    For the target that is switched on. The float model is gone afterwards, as with ``adaround``. All images run
    as one batch: 128 of 224 pixels take some 3 GB with EfficientNet-Lite0.

    Args:
        model: calibrated, with float weights.
        loader: batches of images, as for ``calibrate``; 100 to 500 images.
        positions: output positions an image that count for a convolution.
        passes: sweeps of coordinate descent at most.
        damping: added to the diagonal of H, as a share of its mean.
        folds: parts of the images that the cross-validation sets aside, one at a time.
        seed: of the draw of the positions.
        progress: show a progress bar.

    Returns:
        Error of each layer's output over its power, in the order in which they run: ``nearest`` for the float
        weights rounded to nearest on the quantized prefix, ``learned`` for those that it has now.

    Raises:
        CalibrationError: no quantized layers, ranges or images; ranges per group of inputs.
        ValueError: fewer than two folds.

    Example:
        >>> gains = adaround_sequential(model, loader, positions=4, passes=1, folds=2, progress=False)
        >>> gains[0].layer
        'conv1'
    """
    if folds < 2:
        raise ArgumentError(f"folds must be at least 2, not {folds}")
    batches = [images_of(batch) for batch in loader]
    layers = rows_only(layers_of(model, batches[0][:1] if batches else None))
    sampler = _Sampler(model, layers, batches[0][:1], positions, seed)
    goals = sampler.float_outputs(model, batches, progress)
    images, done = torch.cat(batches), []
    bar = iter(track(layers, "round weights", show=progress))

    def watch(layer: Layer) -> Any:
        @unseen
        def hook(_: nn.Module, args: Any) -> None:
            next(bar)
            parts = sampler.moments(layer, args[0], goals.pop(layer.name), folds)
            done.append(_round(layer, parts, passes, damping))

        return layer.module.register_forward_pre_hook(hook)

    handles = [watch(layer) for layer in layers] + sampler.watch_blocks()
    with attach(handles):
        with evaluating(model), torch.no_grad():
            model(images)
        sampler.skips.clear()
    next(bar, None)
    return done


class _Sampler:
    """Inputs and outputs of layers at positions that are the same in the float and in the quantized pass."""

    def __init__(
        self, model: nn.Module, layers: list[Layer], example: Tensor, positions: int, seed: int
    ) -> None:
        self.layers, self.positions, self.seed = layers, positions, seed
        self.blocks: dict[str, Block] = tails_of(model, layers, example)
        self.skips: dict[nn.Module, Tensor] = {}

    def generator(self, layer: Layer) -> torch.Generator:
        """Make the generator of a layer's draws, which are the same each time."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.layers.index(layer))

    def watch_blocks(self) -> list[Any]:
        """Hook the blocks with a skip, so that the input of each is remembered while it runs."""

        def hook(module: nn.Module, args: Any) -> None:
            self.skips[module] = args[0]

        return [block.module.register_forward_pre_hook(hook) for block in self.blocks.values()]

    def at_positions(self, layer: Layer, output: Tensor) -> Tensor:
        """Pick outputs where ``Layer.patches`` looks, [N, out, H, W] or [..., out] -> [samples, out]."""
        if not hasattr(layer.module, "kernel_size"):
            return output.reshape(-1, output.shape[-1])
        height, width = output.shape[2:]
        chosen = draw(height * width, self.positions, self.generator(layer))
        picked = output.flatten(2)[:, :, chosen.to(output.device)]
        return picked.transpose(1, 2).flatten(0, 1)

    @torch.no_grad()
    def float_outputs(self, model: nn.Module, batches: list[Tensor], progress: bool) -> dict[str, Tensor]:
        """Compute what each layer should give, [samples, out]; with the skip, in its units, at the end of a block."""
        outputs: dict[str, list[Tensor]] = {layer.name: [] for layer in self.layers}

        def watch(layer: Layer) -> Any:
            @unseen
            def hook(_: nn.Module, args: Any, output: Tensor) -> None:
                outputs[layer.name].append(self.at_positions(layer, self._with_skip(layer, output, False)))

            return layer.module.register_forward_hook(hook)

        handles = [watch(layer) for layer in self.layers] + self.watch_blocks()
        with attach(handles), evaluating(model), quantizers_off(model):
            for batch in track(batches, "float outputs", show=progress):
                model(batch)
        return {name: torch.cat(parts) for name, parts in outputs.items()}

    def _with_skip(self, layer: Layer, output: Tensor, quantized: bool) -> Tensor:
        block = self.blocks.get(layer.name)
        if block is None:
            return output
        return output + block.scaled_skip(self.skips[block.module], quantized)

    def moments(self, layer: Layer, x: Tensor, goal: Tensor, folds: int) -> list[CrossMoments]:
        """Compute the moments of the quantized inputs and the wanted outputs, for each fold of the images."""
        quantizer, block = layer.module.input_quantizer, self.blocks.get(layer.name)
        plain = not quantizer.is_on
        per_image = len(goal) // len(x)
        parts, first = [], 0
        for part in x.tensor_split(min(folds, len(x))):
            sums: CrossMoments | None = None
            for piece in part.split(16):
                patches = layer.patches(piece, self.positions, self.generator(layer))
                patches = patches if plain else quantizer(patches)
                y = goal[first * per_image : (first + len(piece)) * per_image]
                if block is not None:
                    skip = self.skips[block.module][first : first + len(piece)]
                    y = y - self.at_positions(layer, block.scaled_skip(skip, True))
                own = CrossMoments.of(patches, y.reshape(len(y), layer.groups, -1).transpose(0, 1))
                sums = own if sums is None else sums + own
                first += len(piece)
            if sums is not None:
                parts.append(sums)
        return parts


@torch.no_grad()
def _round(layer: Layer, parts: list[CrossMoments], passes: int, damping: float) -> RoundingGain:
    quantizer, weight = layer.module.weight_quantizer, layer.module.weight
    bound = 2 ** (layer.bits - 1) - 1
    total = sum(parts[1:], start=parts[0])
    rows = weight.reshape(total.groups, -1, total.n)
    before = quantizer(weight).reshape(rows.shape)
    target = wanted_weights(rows, parts)
    h = regularized(total, damping)

    if layer.amax.numel() == len(weight):
        largest = quantizer.range_of(target.reshape(weight.shape)).reshape(rows.shape[0], -1, 1)
        amax = _best_ranges(target, largest, bound, h)
        quantizer.set_range(amax.reshape(layer.amax.shape))
    amax = layer.amax.reshape(-1, 1).expand(len(weight), 1).reshape(rows.shape[0], -1, 1)
    integers = solve(target / step_of(amax, bound), bound, h, passes)
    levels = integers.reshape(weight.shape).to(ops.integer_dtype(layer.bits))
    chosen = ops.dequantize(levels, layer.amax, layer.bits).reshape(rows.shape)

    bias = 0.0 if layer.module.bias is None else layer.module.bias.double()
    layer.shift(total.error_of_mean(chosen).flatten() + bias)
    power = max(total.power().sum().item(), 1e-30)
    gain = [total.error(used).sum().item() / power for used in (before, chosen)]
    weight.copy_(chosen.reshape(weight.shape))
    return RoundingGain(layer.name, *gain)


def _best_ranges(target: Tensor, largest: Tensor, bound: int, h: Tensor) -> Tensor:
    """The range [groups, rows, 1] of each output channel that costs least after rounding."""
    groups, rows, _ = target.shape
    amax = torch.stack([share * largest for share in SHRINK], 1).reshape(groups, -1, 1)
    scaled = target.repeat(1, len(SHRINK), 1)
    step = step_of(amax, bound)
    d = solve(scaled / step, bound, h, passes=2) * step - scaled
    cost = cost_of(d, h).reshape(groups, len(SHRINK), rows)
    best = cost.argmin(1, keepdim=True)
    return amax.reshape(groups, len(SHRINK), rows).gather(1, best).transpose(1, 2)
