"""Plan the checkpoints that ``qzoo build`` makes from public float weights, by what the registry says of each network.

A recipe is a config without weights and figures. It is never listed as pretrained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qzoo.config import CalibrationRecord, Config, FloatSource, read_config
from qzoo.errors import CheckpointError
from qzoo.options import TrainOptions
from qzoo.ptq import Recipe
from qzoo.ptq.apply import WITH_PERCENTILE
from qzoo.registry import architecture, list_architectures, natural_key, parse_name
from qzoo.scheme import DEFAULT_TARGET
from qzoo.zoo import hub
from qzoo.zoo.create import new_config
from qzoo.zoo.store import checkpoint_folder

# Tuning: a tenth of the float model's schedule at a hundredth of its learning rate, with a cosine, from the calibrated
# model, batches of 256. The schedules are those of torchvision's weights: ResNets 90 epochs at 0.1, MobileNetV2 300 at
# 0.045. For ResNet-50 (float 76.13 %) the old toolkit documents 15 epochs from 0.001 with a cosine: above 76.7 %; one
# epoch: above 76.4 %; calibration alone: 76.1 %. MobileNetV2's BatchNorm is fixed in the second half, as Krishnamoorthi
# (2018, arXiv:1806.08342) advises.


def _tuning(schedule: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "status": "planned, not run",
        "data": "ImageNet-1k train",
        "batch_size": 256,
        "momentum": 0.9,
        "warmup": 0.0,
        "method": "ste",
        "target": DEFAULT_TARGET,
        **schedule,
    }


def recipes() -> list[Config]:
    """A W8A8 recipe for every architecture whose float weights are public, and tuning for three of them.

    Transformers are smoothed first: a few channels of what their LayerNorms give are far larger than the others
    (:mod:`qzoo.ptq.smoothquant`). Networks of depthwise convolutions lose most by rounding to nearest (Nagel et al.,
    2019, arXiv:1906.04721; here 5 dB on EfficientNet-Lite0): their weights are rounded by learning.
    """
    found = []
    for arch in list_architectures():
        for tag, weights in architecture(arch).weights.items():
            if all(source.startswith("qzoo:") for source in weights.sources):
                continue  # weights that the zoo trains itself
            found.append(_recipe(f"{arch}.{tag}-w8a8"))
            schedule = architecture(arch).tuning
            if schedule is not None:
                tuned = _recipe(f"{arch}.{tag}-w8a8_qat")
                found.append(dataclasses.replace(tuned, training=_tuning(schedule)))
    return sorted(found, key=lambda config: natural_key(config.name))


def _recipe(name: str) -> Config:
    parsed = parse_name(name)
    weights = architecture(parsed.arch).weights[parsed.tag or ""]
    source, digest = weights.sources[0], weights.sha256[0] if weights.sha256 else ""
    revision = weights.revision if source.startswith("hf:") else ""
    family = architecture(parsed.arch).family
    rounding = "nearest" if parsed.qat else family.rounding
    return dataclasses.replace(
        new_config(name),
        form="packed",
        float_source=FloatSource(source, revision, digest, weights.license),
        calibration=CalibrationRecord(
            "mse" if rounding == "learned" else "auto",
            "ImageNet-1k",
            "0:128",
            128,
            rounding=rounding,
            smooth=family.smooth,
        ),
    )


# ---- how a name is made ----


@dataclass(frozen=True)
class Made:
    """How a checkpoint is made; None and "" where nothing is said.

    Attributes:
        source: where this is said.
        recipe, best: post-training methods, or that the best ones are to be found.
        calibration, evaluation: subsets of the images.
        edge_bits: of the first and the last layer; layers: of single ones.
        drop: of mixed precision.
        target: whose quantizers the methods see.
        training: options of a training, as a config records them.
    """

    source: str = ""
    recipe: Recipe = Recipe()  # noqa: RUF009 - immutable
    best: bool = False
    calibration: str | None = None
    evaluation: str | None = None
    edge_bits: int = 0
    layers: tuple[tuple[str, int], ...] = ()
    drop: float = 0.0
    target: str = DEFAULT_TARGET
    training: dict[str, Any] | None = None

    def options(self) -> tuple[TrainOptions, int]:
        """Options and batch size of the training.

        Raises:
            CheckpointError: no training is recorded, or with values that make no sense.
        """
        if not self.training:
            raise CheckpointError(
                f"{self.source or 'the name alone'} does not say how to train; `qzoo train NAME` takes options"
            )
        known = {f.name for f in fields(TrainOptions)}
        try:
            options = TrainOptions(**{k: v for k, v in self.training.items() if k in known})
            return options, int(self.training.get("batch_size", 128))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{self.source}: training: {error}") from error


def how_made(name: str, folder: Path) -> Made:
    """How a checkpoint was, or is to be, made.

    Looked up in the folder that it is written to, in the user's store (where a ``config.json`` alone is a recipe of the
    user's own), in the package's checkpoints (without their images: other data have other numbers), in the package's
    recipes; what is nowhere is made with defaults.

    Args:
        name: with its tag.

    Raises:
        CheckpointError: the folder holds another checkpoint, or a config is not valid.
    """
    for place in (folder, checkpoint_folder(name)):
        if (place / "config.json").is_file():
            old = read_config(place)
            if old.name != name:
                raise CheckpointError(f"{place} holds {old.name}; choose another folder for {name}")
            return _made(old, f"{place / 'config.json'}")
    if name in hub.embedded():
        made = _made(read_config(hub.embedded()[name]), f"qzoo's checkpoint {name}")
        return dataclasses.replace(made, evaluation=None)
    known = {config.name: config for config in recipes()}
    return _made(known[name], f"qzoo's recipe {name}") if name in known else Made()


def _made(config: Config, source: str) -> Made:
    edge_bits = config.scheme.edge_bits if config.scheme else 0
    layers = config.scheme.layers if config.scheme else ()
    evaluation = config.metrics[0].subset if config.metrics else None
    made = Made(source, evaluation=evaluation, edge_bits=edge_bits, layers=layers, training=config.training)
    record = config.calibration
    if record is None:
        return made
    method = "auto" if record.candidates and not record.recipe else record.method
    return dataclasses.replace(
        made,
        recipe=recipe_of(record, method),
        best=bool(record.recipe),
        calibration=record.subset or None,
        drop=record.drop,
        target=record.target,
    )


def recipe_of(record: CalibrationRecord, method: str = "") -> Recipe:
    """The recipe that a calibration followed.

    Args:
        method: of the ranges, in place of the one that was used.
    """
    method = method or record.method
    return Recipe(
        equalize=record.equalize,
        method=method,
        rounding=record.rounding,
        bias_correction=record.bias_correction,
        smooth=record.smooth,
        percentile=record.percentile if method in WITH_PERCENTILE else None,
        alpha=record.alpha,
    )
