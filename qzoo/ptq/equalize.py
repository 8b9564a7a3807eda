"""Cross-layer equalization: small channels of an activation are scaled up, the weights that read them down.

Paper: "Data-Free Quantization Through Weight Equalization and Bias Correction" (Nagel et al., 2019,
arXiv:1906.04721), section 4.1: relu(s x) = s relu(x), so a factor per channel can move from the weights of
one layer into those before it without changing the network. Here each weight has a range per output channel
already, so only the reading layer and the activation between, which has one range for all channels, have
something to gain. A channel c is scaled by the factor that makes the noise of its rounded activation (step
d_a) and of the weights that read it (steps d_w) least, s^4 = d_a^2 mean(w_c^2) / (mean(d_w^2) E[x_c^2]);
for a depthwise reader, whose step shrinks with its weight, by all that the range allows.

ReLU6 clips at 6 whatever the scale, so behind it a channel may grow only as far as it stays below 6 on every
image. That leaves little: on EfficientNet-Lite0 channels have tails far beyond what 128 images show, the
scaled float network is 16 to 27 dB away from the original on other images, and with a bound that is safe
nothing moves. So these pairs are left alone unless asked for, and no ReLU6 is replaced by a plain ReLU,
which would be another network. Learned rounding and bias correction do not need equalization.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qzoo.collect import attached, images_of, quantizers_off
from qzoo.errors import CalibrationError, QuantizationError
from qzoo.evaluate import evaluating
from qzoo.progress import track
from qzoo.ptq.calls import calls_of
from qzoo.ptq.layers import Layer, layers_of
from qzoo.ptq.statistics import Channels
from qzoo.quant.nn import TensorQuantizer

TAIL = 10.0
"""Standard deviations above its mean that a channel before ReLU6 is expected to reach."""

_TOLERANCE = 1e-3  # of the largest output, on the first batch


@dataclass(frozen=True)
class Equalized:
    """The factors [channels] that went from the layer ``reader`` into the BatchNorm of ``layer``."""

    layer: str
    reader: str
    factors: Tensor


@dataclass
class _Channels:
    """What the data say about one activation, per channel: largest value, sum of squares, count."""

    largest: Tensor
    squares: Tensor
    count: int

    @classmethod
    def expected(cls, known: Channels) -> _Channels:
        """From moments: the largest value that is likely, and the mean square."""
        return cls(known.high.float(), known.variance + known.mean.square(), 1)

    def add(self, x: Tensor) -> None:
        axes = [d for d in range(x.dim()) if d != 1]
        self.largest = torch.maximum(self.largest, x.amax(axes))
        self.squares += x.double().square().sum(axes)
        self.count += x.numel() // x.shape[1]


@torch.no_grad()
def equalize(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    relu6: bool = False,
    margin: float = 2.0,
    statistics: Mapping[str, Channels] | None = None,
    progress: bool = True,
) -> list[Equalized]:
    """Equalize every pair of quantized layers with BatchNorm and ReLU or ReLU6 between, in place.

    Call it on float weights, before ``calibrate``: ranges change. The float function stays the same; with
    ``relu6`` only on images that drive no scaled channel into the clipping.

    Args:
        model: quantized layers; ranges are not needed.
        loader: batches of images, as for ``calibrate``.
        relu6: take pairs with ReLU6 between too.
        statistics: of each layer's input, by its name (:func:`qzoo.ptq.statistics.batchnorm_statistics`); then
            nothing is measured, and the batches only show that the function stays.
        margin: how far beyond what was seen a channel before ReLU6 is expected to reach, at least.

    Returns:
        The pairs; empty where the model has none.

    Raises:
        CalibrationError: no quantized layers or images.
        QuantizationError: the function would change (an activation is read by something that is no quantized
            layer); the model is as before then.
    """
    batches = [images_of(batch) for batch in loader]
    layers = layers_of(model, batches[0][:1] if batches else None, calibrated=False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with evaluating(model), quantizers_off(model):
        expected = model(batches[0])
        pairs = [pair for pair in _pairs(model, layers, batches[0][:1]) if relu6 or pair[2] == float("inf")]
        if statistics is None:
            channels = _measure(model, pairs, batches, progress)
        else:
            channels = {b.name: _Channels.expected(statistics[b.name]) for _, b, _ in pairs}
        done = [_equalize(a, b, limit, channels[b.name], margin) for a, b, limit in pairs]
        change = (model(batches[0]) - expected).abs().max().item()
    if not change <= _TOLERANCE * expected.abs().max().item():
        model.load_state_dict(state)
        raise QuantizationError(
            f"equalization would change the model's output by {change:.3g}: an activation between two of its "
            "layers is read elsewhere too"
        )
    return done


def some(pairs: list[Equalized]) -> list[Equalized]:
    """The pairs, for who has asked for equalization by name.

    Raises:
        CalibrationError: there are none.
    """
    if not pairs:
        raise CalibrationError(
            "nothing to equalize: no two quantized layers have only a BatchNorm and a ReLU between them. Pairs with "
            "ReLU6 stay as they are, but for qzoo.ptq.equalize(model, images, relu6=True); leave equalization out"
        )
    return pairs


def _pairs(model: nn.Module, layers: list[Layer], example: Tensor) -> list[tuple[Layer, Layer, float]]:
    """Layers a, b where b alone reads relu(norm(a)), and where the activation clips (6 or infinity)."""
    of_norm = {layer.norm: layer for layer in layers if layer.norm is not None}
    of_module: dict[nn.Module, Layer] = {layer.module: layer for layer in layers}
    inner = {q for layer in layers for q in (layer.module._input_quantizer, layer.module._weight_quantizer)}
    between = (_BatchNorm, nn.ReLU, nn.ReLU6)
    watched = [
        m
        for m in model.modules()
        if m in of_module or isinstance(m, between) or (isinstance(m, TensorQuantizer) and m not in inner)
    ]
    source: dict[int, tuple[Layer, float]] = {}
    readers: dict[int, list[nn.Module]] = {}
    for call in calls_of(model, example, watched):
        if not isinstance(call.module, between):
            readers.setdefault(call.reads, []).append(call.module)
        elif isinstance(call.module, _BatchNorm) and call.module in of_norm:
            source[call.gives] = (of_norm[call.module], -1.0)  # not rectified yet
        elif call.reads in source:
            limit = 6.0 if isinstance(call.module, nn.ReLU6) else float("inf")
            source[call.gives] = (source[call.reads][0], limit)
    found = []
    for key, (layer, limit) in source.items():
        reading = [of_module.get(module) for module in readers.get(key, [])]
        if limit > 0 and len(reading) == 1 and reading[0] is not None:
            reader = reading[0]
            if reader.groups in (1, reader.module.weight.shape[0]):
                found.append((layer, reader, limit))
    return found


def _measure(
    model: nn.Module, pairs: list[tuple[Layer, Layer, float]], batches: list[Tensor], progress: bool
) -> dict[str, _Channels]:
    found: dict[str, _Channels] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: Any) -> None:
            x = args[0]
            if name not in found:
                zeros = torch.zeros(x.shape[1], device=x.device)
                found[name] = _Channels(zeros, zeros.double(), 0)
            found[name].add(x)

        return hook

    handles = [b.module.register_forward_pre_hook(watch(b.name)) for _, b, _ in pairs]
    with attached(handles):
        for batch in track(batches, "channel ranges", show=progress):
            model(batch)
    return found


def _equalize(a: Layer, b: Layer, limit: float, channels: _Channels, margin: float) -> Equalized:
    weight = b.module.weight
    top = channels.largest.max()
    # A channel that was never active gives no hint of its range, and stays.
    room = torch.where(channels.largest > 0, top / channels.largest.clamp(min=1e-12), 1.0)
    norm: Any = a.norm
    if limit < float("inf"):
        # What unseen images may reach: a margin beyond the data, and the tail that the BatchNorm tells of.
        reach = torch.maximum(margin * channels.largest, norm.bias + TAIL * norm.weight.abs())
        room = torch.minimum(room, limit / reach.clamp(min=1e-12)).where(channels.largest > 0, 1.0)
    factors = room.clamp(min=1.0, max=64.0)
    if b.groups == 1:
        factors = torch.minimum(factors, _balance(weight, top, channels)).clamp(min=1.0)
    norm.weight *= factors
    norm.bias *= factors
    shape = [-1] + [1] * (weight.dim() - 1) if b.groups > 1 else [1, -1] + [1] * (weight.dim() - 2)
    weight /= factors.reshape(shape)
    return Equalized(a.name, b.name, factors)


def _balance(weight: Tensor, top: Tensor, channels: _Channels) -> Tensor:
    """The factors of least noise for a reader whose channels all share each row's step."""
    rows = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(2)
    step_w = rows.double().abs().amax((1, 2)) / 127
    power_w = rows.double().square().sum(2).mean(0)
    power_x = (channels.squares / channels.count).clamp(min=1e-20)
    fourth = (
        (top.double() / 255) ** 2
        * power_w
        / (step_w.square().mean() * rows.shape[2] * power_x).clamp(min=1e-30)
    )
    return fourth.pow(0.25).float()
