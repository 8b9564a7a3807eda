"""``qzoo.sensitivity``: what each layer's quantization costs, alone and among all the others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.accuracy import Fidelity
from qzoo.analysis.replay import Replay
from qzoo.errors import ArgumentError, CalibrationError, DataError
from qzoo.fields import finite
from qzoo.progress import track
from qzoo.ptq.collect import images_of
from qzoo.quant.fold import evaluating
from qzoo.quant.nn import TensorQuantizer
from qzoo.quant.nn.modules._utils import QuantInputMixin
from qzoo.quantizers import device_of, quantizers_off, require_quantizers


@dataclass(frozen=True)
class LayerLoss:
    """The cost of quantizing one layer. SQNR in dB and agreement in percent, of the logits against the float model's.

    Attributes:
        name: the layer, or the quantizer of an activation that belongs to none (residual, pooling, output).
        quantizers: what is quantized, such as ``("input 8 bit", "weight 8 bit")``.
        sqnr_db, agreement: with only this layer quantized.
        sqnr_without_db, agreement_without: with every layer but this one quantized.
    """

    name: str
    quantizers: tuple[str, ...]
    sqnr_db: float
    agreement: float
    sqnr_without_db: float
    agreement_without: float


@dataclass(frozen=True)
class Sensitivity:
    """The layers of a model, the one that costs most first.

    Attributes:
        images: number of images measured.
        sqnr_db, agreement: with everything quantized.
        layers: by SQNR alone, lowest first.
    """

    images: int
    sqnr_db: float
    agreement: float
    layers: tuple[LayerLoss, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; an infinite SQNR becomes None."""
        values: dict[str, Any] = finite(asdict(self))
        return values

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        lines = [
            f"{self.images} images; all quantized: SQNR {self.sqnr_db:.2f} dB, agreement {self.agreement:.2f} %",
            f"{'':{width}}   only this one quantized   all but this one",
            f"{'layer':{width}}   {'SQNR, dB':>9}  agree, %   {'SQNR, dB':>9}  agree, %   gain, dB",
        ]
        for x in self.layers:
            gain = 0.0 if x.sqnr_without_db == self.sqnr_db else x.sqnr_without_db - self.sqnr_db
            alone = f"{x.sqnr_db:9.2f}  {x.agreement:8.2f}"
            lines.append(
                f"{x.name:{width}}   {alone}   {x.sqnr_without_db:9.2f}  {x.agreement_without:8.2f}   {gain:+8.2f}"
            )
        return "\n".join(lines)


class _Unit:
    """A layer with its quantizers, or a quantizer of its own; remembers the switches it was found with."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.quantizers = [m for m in module.modules() if isinstance(m, TensorQuantizer)]
        self._found = [(q, q.switches) for q in self.quantizers]

    @property
    def active(self) -> bool:
        return any(not on.disabled and (on.quant or on.clip) for _, on in self._found)

    def describe(self) -> tuple[str, ...]:
        return tuple(
            f"{q.role or 'quantizer'} {q.num_bits} bit" if isinstance(q.num_bits, int) else f"{q.role} fp8"
            for q, on in self._found
            if on.quantizes
        )

    def switch(self, on: bool) -> None:
        for quantizer, switches in self._found:
            quantizer.switches = switches if on else switches._replace(quant=False, clip=False)


@torch.no_grad()
def sensitivity(
    model: nn.Module, loader: Iterable[Any], *, images: int = 64, progress: bool = True
) -> Sensitivity:
    """Rank the layers by what their quantization costs: one layer at a time, and all but one.

    Of a checkpoint the weights are those that are stored, rounded already, so that a layer costs what its activations
    do; of float weights (``create_model(name, pretrained="float", quantize="w8a8")``, calibrated) both count.

    Exact, and cheaper than a pass for each: the part of the network before a layer is computed once (float, and
    quantized) and kept, so that only what follows the layer runs again. Memory: the outputs of the blocks of one batch.

    Args:
        model: calibrated, with the target set whose placement is of interest; left as it is.
        loader: batches of preprocessed images [B, C, H, W], alone or first in a tuple; no labels needed.
        images: stop after this many.
        progress: show a progress bar.

    Returns:
        A row for each layer, the most sensitive first; ``str()`` is a table.

    Raises:
        CalibrationError: no quantizer is on.
        MissingRangeError: one has no range.
        DataError: no images.

    Example:
        >>> print(qzoo.sensitivity(model, loader, images=2, progress=False))
        2 images; all quantized: SQNR 30.86 dB, agreement 100.00 %
                                 only this one quantized   all but this one
        layer                    SQNR, dB  agree, %   SQNR, dB  agree, %   gain, dB
        conv1                       36.24    100.00      39.25    100.00      +8.39
        ...
    """
    if images < 1:
        raise ArgumentError(f"images must be at least 1, not {images}")
    units = _units(model)
    device = device_of(model)
    replay = Replay(model, {unit.module for unit in units})
    alone: dict[str, list[Fidelity]] = {u.name: [] for u in units}
    without: dict[str, list[Fidelity]] = {u.name: [] for u in units}
    together: list[Fidelity] = []
    with evaluating(model), quantizers_off(model):
        for x in _batches(loader, images):
            x = x.to(device)
            with replay.attached():
                for unit in units:  # attention and SiLU call theirs only where one is on
                    unit.switch(True)
                places = {m: i for i, m in enumerate(replay.order(x))}
                for unit in units:
                    unit.switch(False)
                reached = sorted((u for u in units if u.module in places), key=lambda u: places[u.module])
                expected = replay.run(x)
                _sweep(replay, reached, x, expected, alone, True, progress)
            with replay.attached():
                for unit in units:
                    unit.switch(True)
                together.append(Fidelity.of(replay.run(x), expected))
                _sweep(replay, reached, x, expected, without, False, progress)
                for unit in units:
                    unit.switch(False)
    if not together:
        raise DataError("the loader gave no images; check the folder, the split and the subset")
    layers = [_loss(unit, alone[unit.name], without[unit.name]) for unit in units if alone[unit.name]]
    layers.sort(key=lambda layer: (layer.sqnr_db, layer.agreement))
    total = Fidelity.total(together)
    return Sensitivity(total.images, total.sqnr_db, total.agreement, tuple(layers))


def _loss(unit: _Unit, alone: list[Fidelity], without: list[Fidelity]) -> LayerLoss:
    only, others = Fidelity.total(alone), Fidelity.total(without)
    return LayerLoss(
        unit.name, unit.describe(), only.sqnr_db, only.agreement, others.sqnr_db, others.agreement
    )


def _sweep(
    replay: Replay,
    units: list[_Unit],
    x: Tensor,
    expected: Tensor,
    fidelities: dict[str, list[Fidelity]],
    on: bool,
    progress: bool,
) -> None:
    """Switch each unit (``on``: in the float model; else off, in the quantized one) and run what follows it."""
    title = "layers, one quantized" if on else "layers, one left out"
    for unit in track(units, title, show=progress):
        unit.switch(True)
        replay.advance(x, unit.module)
        unit.switch(on)
        fidelities[unit.name].append(Fidelity.of(replay.run(x), expected))
        unit.switch(not on)


def _units(model: nn.Module) -> list[_Unit]:
    require_quantizers(model)  # raises where there are none
    units: list[_Unit] = []
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        is_unit = isinstance(module, QuantInputMixin) or isinstance(module, TensorQuantizer)  # noqa: SIM101 - mypy
        if is_unit and module not in inside:
            units.append(_Unit(name, module))
            inside.update(module.modules())
    units = [unit for unit in units if unit.active]
    if not units:
        raise CalibrationError(
            f"every quantizer of {type(model).__name__} is off; enable them, or set a target"
        )
    return units


def _batches(loader: Iterable[Any], images: int) -> Iterable[Tensor]:
    left = images
    for batch in loader:
        x = images_of(batch)[:left]
        left -= len(x)
        if len(x):
            yield x
        if left <= 0:
            return
