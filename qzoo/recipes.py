"""Recipes: checkpoints that ``qzoo build`` makes from public float weights, and that nobody has made yet.

A recipe is a ``config.json`` without weights and figures. It is never listed as pretrained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qzoo import hub
from qzoo.build import build
from qzoo.config import WEIGHTS, CalibrationRecord, Config, FloatSource, read_config
from qzoo.errors import QzooError
from qzoo.registry import architecture, list_architectures, natural_key, parse_name
from qzoo.zoo import new_config

_TUNED = ("resnet18", "resnet50", "mobilenet_v2")
# What the old toolkit documents for ResNet-50 (float 76.13 %): one epoch above 76.4 %, fifteen with a cosine above
# 76.7 %, calibration alone 76.1 %.
_TUNING: dict[str, Any] = {
    "status": "planned, not run",
    "data": "ImageNet-1k train",
    "epochs": 15,
    "batch_size": 256,
    "lr": 0.01,
    "schedule": "cosine",
    "momentum": 0.9,
    "weight_decay": 1e-4,
}


def recipes() -> list[Config]:
    """A W8A8 recipe for every architecture whose float weights are public, and tuning for three of them."""
    found = []
    for arch in list_architectures():
        for tag, weights in architecture(arch).weights.items():
            if all(source.startswith("qzoo:") for source in weights.sources):
                continue  # weights that the zoo trains itself
            found.append(_recipe(f"{arch}.{tag}-w8a8"))
            if arch in _TUNED:
                found.append(dataclasses.replace(_recipe(f"{arch}.{tag}-w8a8_qat"), training=dict(_TUNING)))
    return sorted(found, key=lambda config: natural_key(config.name))


def _recipe(name: str) -> Config:
    parsed = parse_name(name)
    weights = architecture(parsed.arch).weights[parsed.tag or ""]
    source, digest = weights.sources[0], weights.sha256[0] if weights.sha256 else ""
    revision = weights.revision if source.startswith("hf:") else ""
    return dataclasses.replace(
        new_config(name),
        form="packed",
        float_source=FloatSource(source, revision, digest, weights.license),
        calibration=CalibrationRecord("auto", "ImageNet-1k", "0:128", 128),
    )


def write_recipes(folder: str | Path) -> list[Path]:
    """Write ``<folder>/<name>/config.json`` for every recipe; returns the paths."""
    paths = []
    for config in recipes():
        path = Path(folder) / config.name / "config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(config.to_json(), encoding="utf-8")
        paths.append(path)
    return paths


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a checkpoint with its weights, whole, and with figures."""
    try:
        config = read_config(folder)
    except QzooError:
        return False
    weights = folder / WEIGHTS
    return bool(config.metrics) and weights.is_file() and hub.sha256_of(weights) == config.files.get(WEIGHTS)


def build_all(
    data: str | Path | None,
    *,
    out: str | Path = "model_cards",
    report: Callable[[str], None] = print,
    progress: bool = True,
) -> dict[str, str]:
    """Build every recipe that is not complete in ``out``; called again, it goes on with what is left.

    Recipes of tuning are left to ``qzoo train``. A recipe that fails does not stop the others.

    Returns:
        Name -> what went wrong, of those that failed.
    """
    failed = {}
    for config in recipes():
        folder = Path(out) / config.name
        if parse_name(config.name).qat:
            continue
        if is_complete(folder):
            report(f"{config.name}: complete")
            continue
        try:
            report(str(build(config.name, data=data, out=folder, progress=progress)))
        except (QzooError, OSError) as error:
            failed[config.name] = str(error)
            report(f"{config.name}: {error}")
    return failed
