"""What the zoo costs on ImageNet: ``python -m benchmarks.plan`` prints the tables of ``docs/scale.md``.

Computed, not measured: from the milliseconds an image of ``results/decoding.json``, and the multiply-adds of each
recipe's network at its own input size, counted by ``torch.utils.flop_counter`` on the meta device.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import qzoo
from qzoo.config import Config
from qzoo.pipeline.recipes import recipes

VALIDATION, CALIBRATION, TRAINING = 50_000, 128, 1_281_167
DOLLARS = 0.05  # a core-hour, assumed
CORES = 64
MEASURED = "resnet50"  # the network of the times


@dataclass(frozen=True)
class Network:
    """A recipe, and what its network costs: multiply-adds of an image, and parameters."""

    recipe: Config
    multiply_adds: int
    parameters: int


@dataclass(frozen=True)
class Times:
    """Core-seconds an image: decoded and resized, and in ResNet-50."""

    image: float
    exact: float
    simulated: float
    runtime: float
    step: float

    @classmethod
    def read(cls, path: Path) -> Times:
        """Read what ``benchmarks.decoding`` measured."""
        results = json.loads(path.read_text())
        network = results[f"{MEASURED}, CPU ms"]
        values = (
            results["pipelines"]["ms"]["qzoo"],
            *(network[key] for key in ("float", "simulated", "ONNX Runtime")),
        )
        return cls(*(value / 1000 for value in (*values, network["training step"])))

    def build(self, size: float) -> float:
        """One image of a build without training: float, simulated twice, the ONNX file; each decodes it."""
        return 4 * self.image + size * (self.exact + 2 * self.simulated + self.runtime)

    def train(self, size: float) -> float:
        """One image in one epoch of a training."""
        return self.image + size * self.step

    def check(self, size: float) -> float:
        """One image that an epoch's result is measured on."""
        return self.image + size * self.simulated


def network_of(recipe: Config) -> Network:
    """Count a recipe's network on the meta device."""
    with torch.device("meta"):
        model = qzoo.create_model(recipe.name.partition("-")[0]).eval()
        image = torch.empty(1, *recipe.preprocessing.input_size)
        with FlopCounterMode(display=False) as counter:
            model(image)
    return Network(recipe, counter.get_total_flops() // 2, sum(p.numel() for p in model.parameters()))


def line(what: str, images: str, seconds: float) -> str:
    """One row of the table."""
    hours = seconds / 3600
    clock = f"{hours / CORES:.1f} h" if hours > CORES else f"{60 * hours / CORES:.0f} min"
    return f"| {what} | {images} | {hours:,.1f} | {clock} | {DOLLARS * hours:,.2f} $ |"


def table(networks: Iterable[Network], times: Times) -> list[str]:
    """All builds without training together, ResNet-50's alone, and each training."""
    networks = list(networks)
    unit = next(n.multiply_adds for n in networks if n.recipe.architecture == MEASURED)
    left = VALIDATION - CALIBRATION
    calibrated = [n for n in networks if n.recipe.training is None]
    one = next(n for n in calibrated if n.recipe.architecture == MEASURED)
    rows = ["| | images | core-hours | 64 cores | at 0.05 $ a core-hour |", "|---|---|---|---|---|"]
    rows.append(line(f"`{one.recipe.name}`", f"4 x {left:,}", left * times.build(1)))
    total = sum(n.multiply_adds for n in calibrated)
    seconds = left * sum(times.build(n.multiply_adds / unit) for n in calibrated)
    what = f"all {len(calibrated)} recipes by calibration, {total / 1e9:,.0f} billion multiply-adds"
    rows.append(line(what, f"{4 * len(calibrated)} x {left:,}", seconds))
    for n in networks:
        if n.recipe.training is not None:
            epochs = int(n.recipe.training["epochs"])
            size = n.multiply_adds / unit
            seconds = epochs * (TRAINING * times.train(size) + VALIDATION * times.check(size))
            rows.append(line(f"`{n.recipe.name}`, {epochs} epochs", f"{epochs} x {TRAINING:,}", seconds))
    return rows


def main() -> None:
    """Print the table, and the numbers of the text below it."""
    times = Times.read(Path(__file__).parent / "results" / "decoding.json")
    networks = [network_of(recipe) for recipe in recipes()]
    print("\n".join(table(networks, times)))
    calibrated = [n for n in networks if n.recipe.training is None]
    epochs = sum(int(n.recipe.training["epochs"]) for n in networks if n.recipe.training is not None)
    unit = next(n.multiply_adds for n in networks if n.recipe.architecture == MEASURED)
    runtime = (
        sum(n.multiply_adds / unit * times.runtime + times.image for n in calibrated) * VALIDATION / 3600
    )
    weights = {n.recipe.float_source.source if n.recipe.float_source else n.recipe.name: n for n in networks}
    print(f"decoding for the trainings: {epochs * TRAINING * times.image / 3600:.0f} core-hours")
    print(f"ONNX Runtime's part of the builds: {runtime:.0f} core-hours")
    print(f"parameters of all float weights: {sum(n.parameters for n in weights.values()) / 1e9:.2f} billion")
    print(f"parameters of all checkpoints: {sum(n.parameters for n in networks) / 1e9:.2f} billion")
    print(f"float logits in --runs: {len(calibrated) * VALIDATION * 1000 * 4 / 1e9:.1f} GB")
    big = sorted(calibrated, key=lambda n: -n.multiply_adds)[:5]
    for n in big:
        print(f"  {n.recipe.name}: {n.multiply_adds / 1e9:.1f} billion")


if __name__ == "__main__":
    main()
