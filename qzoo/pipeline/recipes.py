"""Plan the checkpoints that ``qzoo build`` makes from public float weights, by what the registry says of each network.

A recipe is a config without weights and figures. It is never listed as pretrained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qzoo.config import CalibrationRecord, Config, FloatSource
from qzoo.data.sets import data_set
from qzoo.options import AUTO, Recipe
from qzoo.registry import architecture, list_architectures, natural_key, parse_name
from qzoo.scheme import DEFAULT_TARGET
from qzoo.zoo.request import new_config

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
    """List the recipes: W8A8 for all public float weights, and a tuning where the schedule is known.

    The methods, and whether activations have zero points, are the family's (:class:`qzoo.registry.Defaults`, which
    names the papers).
    """
    configs = []
    for arch in list_architectures():
        for tag, weights in architecture(arch).weights.items():
            if all(source.startswith("qzoo:") for source in weights.sources):
                continue  # weights that the zoo trains itself
            if not weights.labels:
                continue  # of an image encoder, whose checkpoint has no top-1 to measure
            configs.append(_recipe(f"{arch}.{tag}-w8a8"))
            schedule = architecture(arch).tuning
            if schedule is not None:
                tuned = _recipe(f"{arch}.{tag}-w8a8_qat")
                configs.append(dataclasses.replace(tuned, training=_tuning(schedule)))
    return sorted(configs, key=lambda config: natural_key(config.name))


def _recipe(name: str) -> Config:
    parsed = parse_name(name)
    weights = architecture(parsed.arch).weights[parsed.tag or ""]
    source, digest = weights.sources[0], weights.sha256[0] if weights.sha256 else ""
    revision = weights.revision if source.startswith("hf:") else ""
    # A training starts from ranges alone, and moves the weights itself.
    recipe = Recipe() if parsed.qat else architecture(parsed.arch).family.defaults.recipe
    searched = recipe.alpha == AUTO
    applied = dataclasses.replace(recipe, alpha=None) if searched else recipe
    return dataclasses.replace(
        new_config(name),
        form="packed",
        float_source=FloatSource(source, revision, digest, weights.license),
        calibration=CalibrationRecord(
            **dataclasses.asdict(applied),
            data=data_set(weights.labels).title,
            subset="0:128",
            images=128,
            recipe="alpha" if searched else "",
        ),
    )
