"""Cross-layer equalization: small channels of an activation are scaled up, the weights that read them down.

Paper: "Data-Free Quantization Through Weight Equalization and Bias Correction" (Nagel et al., 2019,
arXiv:1906.04721), section 4.1: relu(s x) = s relu(x), so a factor per channel can move from the weights of
one layer into those before it without changing the network. Here each weight has a range per output channel
already, so only the reading layer and the activation between, which has one range for all channels, have
something to gain. A channel c is scaled by the factor that makes the noise of its rounded activation (step
d_a) and of the weights that read it (steps d_w) least, s^4 = d_a^2 mean(w_c^2) / (mean(d_w^2) E[x_c^2]);
for a depthwise reader, whose step shrinks with its weight, by all that the range allows.

ReLU6 clips at 6 whatever the scale: relu6(s x) is not s relu6(x). The paper puts a plain ReLU in its place first, in
the whole network, see :mod:`qzoo.ptq.relu6`. To grow channels only as far as they stay below 6 leaves nothing on
EfficientNet-Lite0, whose channels have tails far beyond what 128 images show.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qzoo.errors import CalibrationError
from qzoo.placement.scope import unseen
from qzoo.progress import track
from qzoo.ptq.calls import calls_of
from qzoo.ptq.collect import images_of
from qzoo.ptq.layers import Layer, layers_of, rescaling
from qzoo.ptq.statistics import Channels
from qzoo.quant.fold import attach, evaluating
from qzoo.quant.nn import TensorQuantizer
from qzoo.quantizers import quantizers_off
from qzoo.zoo.checkpoint import replace_relu6


@dataclass(frozen=True)
class Equalization:
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
        """Derive from moments the largest value that is likely, and the mean square."""
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
    statistics: Mapping[str, Channels] | None = None,
    progress: bool = True,
) -> list[Equalization]:
    """Equalize the channels of every pair of quantized layers with BatchNorm and ReLU between, in place.

    Call it on float weights, before ``calibrate``: ranges change. The float function stays the same. Pairs with
    ReLU6 between stay as they are: :func:`qzoo.ptq.without_relu6` goes first.

    Args:
        model: quantized layers; ranges are not needed.
        loader: batches of images, as for ``calibrate``.
        statistics: of each layer's input, by its name (:func:`qzoo.ptq.statistics.batchnorm_statistics`); then
            nothing is measured, and the batches only show that the function stays.
        progress: show a progress bar.

    Returns:
        The pairs; empty where the model has none.

    Raises:
        CalibrationError: no quantized layers or images.
        QuantizationError: the function would change (an activation is read by something that is no quantized
            layer); the model is as before then.

    Example:
        >>> model = qzoo.create_model("resnet20.fmnist", pretrained="float", quantize="w8a8")
        >>> pairs = equalize(model, loader, progress=False)  # cross-layer equalization
        >>> record = qzoo.calibrate(model, loader, progress=False)
    """
    batches = [images_of(batch) for batch in loader]
    layers = layers_of(model, batches[0][:1] if batches else None, calibrated=False)
    cause = "an activation between two of its layers is read elsewhere too"
    with rescaling(model, batches[0], "equalization", cause):
        pairs = _pairs(model, layers, batches[0][:1])
        if statistics is None:
            channels = _measure(model, pairs, batches, progress)
        else:
            channels = {b.name: _Channels.expected(statistics[b.name]) for _, b in pairs}
        return [_equalize(a, b, channels[b.name]) for a, b in pairs]


def some(pairs: list[Equalization]) -> list[Equalization]:
    """Refuse a model without pairs, where equalization was asked for by name; returns the pairs.

    Raises:
        CalibrationError: there are none.
    """
    if not pairs:
        raise CalibrationError(
            "nothing to equalize: no two quantized layers have only a BatchNorm and a ReLU between them; leave "
            "equalization out"
        )
    return pairs


def can_equalize(model: nn.Module, example: Tensor) -> bool:
    """Check whether a model has pairs to equalize, with every ReLU6 taken as a ReLU; the model stays as it is."""
    model = copy.deepcopy(model)
    replace_relu6(model)
    layers = layers_of(model, example, calibrated=False)
    with torch.no_grad(), evaluating(model), quantizers_off(model):
        return bool(_pairs(model, layers, example))


def _pairs(model: nn.Module, layers: list[Layer], example: Tensor) -> list[tuple[Layer, Layer]]:
    """Layers a, b where b alone reads relu(norm(a))."""
    of_norm = {layer.norm: layer for layer in layers if layer.norm is not None}
    of_module: dict[nn.Module, Layer] = {layer.module: layer for layer in layers}
    inner = {q for layer in layers for q in (layer.module.input_quantizer, layer.module.weight_quantizer)}
    between = (_BatchNorm, nn.ReLU)
    watched = [
        m
        for m in model.modules()
        if m in of_module or isinstance(m, between) or (isinstance(m, TensorQuantizer) and m not in inner)
    ]
    normed: dict[int, Layer] = {}
    rectified: dict[int, Layer] = {}
    readers: dict[int, list[nn.Module]] = {}
    for call in calls_of(model, example, watched):
        if not isinstance(call.module, between):
            readers.setdefault(call.reads, []).append(call.module)
        elif isinstance(call.module, _BatchNorm) and call.module in of_norm:
            normed[call.gives] = of_norm[call.module]
        elif call.reads in normed and isinstance(call.module, nn.ReLU):
            rectified[call.gives] = normed[call.reads]
    pairs = []
    for key, layer in rectified.items():
        reading = [of_module.get(module) for module in readers.get(key, [])]
        if len(reading) == 1 and reading[0] is not None:
            reader = reading[0]
            if reader.groups in (1, reader.module.weight.shape[0]):
                pairs.append((layer, reader))
    return pairs


def _measure(
    model: nn.Module, pairs: list[tuple[Layer, Layer]], batches: list[Tensor], progress: bool
) -> dict[str, _Channels]:
    channels: dict[str, _Channels] = {}

    def watch(name: str) -> Any:
        @unseen
        def hook(_: nn.Module, args: Any) -> None:
            x = args[0]
            if name not in channels:
                zeros = torch.zeros(x.shape[1], device=x.device)
                channels[name] = _Channels(zeros, zeros.double(), 0)
            channels[name].add(x)

        return hook

    handles = [b.module.register_forward_pre_hook(watch(b.name)) for _, b in pairs]
    with attach(handles):
        for batch in track(batches, "channel ranges", show=progress):
            model(batch)
    return channels


def _equalize(a: Layer, b: Layer, channels: _Channels) -> Equalization:
    weight = b.module.weight
    top = channels.largest.max()
    # A channel that was never active gives no hint of its range, and stays.
    room = torch.where(channels.largest > 0, top / channels.largest.clamp(min=1e-12), 1.0)
    norm: Any = a.norm
    factors = room.clamp(min=1.0, max=64.0)
    if b.groups == 1:
        factors = torch.minimum(factors, _balance(weight, top, channels)).clamp(min=1.0)
    norm.weight *= factors
    norm.bias *= factors
    shape = [-1] + [1] * (weight.dim() - 1) if b.groups > 1 else [1, -1] + [1] * (weight.dim() - 2)
    weight /= factors.reshape(shape)
    return Equalization(a.name, b.name, factors)


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
