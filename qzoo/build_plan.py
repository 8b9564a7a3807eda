"""What ``build`` is to do: the recipe of a name, and what its caller wants otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qzoo.config import Config
from qzoo.data import load_data
from qzoo.parts import Images, calibration_images, evaluation_images
from qzoo.ptq import Recipe
from qzoo.recipes import Made
from qzoo.registry import ModelName
from qzoo.scheme import Scheme

BATCH = 32


@dataclass(frozen=True)
class Overrides:
    """Arguments of :func:`qzoo.build` that say more than the recipe of the name; None says nothing.

    Raises:
        ValueError: an unknown recipe, or one that chooses what is given, too.
    """

    calibration_subset: str | None = None
    evaluation_subset: str | None = None
    edge_bits: int | None = None
    recipe: str | None = None
    method: str | None = None
    rounding: str | None = None
    equalize: bool | None = None
    bias_correction: str | None = None
    smooth: bool | None = None
    drop: float | None = None
    float_weights: str | Path | None = None
    layer_bits: tuple[tuple[str, int], ...] | None = None

    def __post_init__(self) -> None:
        if self.recipe not in (None, "best"):
            raise ValueError(f"recipe must be 'best', not {self.recipe!r}")
        if self.recipe and self.methods:
            raise ValueError(
                f"recipe={self.recipe!r} chooses {', '.join(self.methods)} itself; leave them out"
            )
        if self.drop and self.layer_bits:
            raise ValueError("drop chooses the bits of layers itself; leave layer_bits out")

    @property
    def methods(self) -> dict[str, Any]:
        """The post-training methods that are given."""
        names = ("method", "rounding", "equalize", "bias_correction", "smooth")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def refuse(self, name: str) -> None:
        """A trained checkpoint takes none of them. Raises ValueError where one is given."""
        given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None]
        wrong = [name for name in given if name != "float_weights"]
        if wrong:
            raise ValueError(
                f"{name} is trained by its recipe, where {', '.join(wrong)} does not apply; "
                f"`qzoo train {name}` takes the options of a training"
            )


@dataclass(frozen=True)
class Plan:
    """What is to be built.

    Attributes:
        scheme: with the bits of the first and the last layer.
        recipe: the post-training methods; with ``best`` they are still to be found.
        images, checks: to calibrate on, and to measure on.
        drop: of mixed precision (:func:`qzoo.ptq.mix_precision`), 0 without it.
        float_weights: a folder with float weights; None: what the name's tag means.
    """

    name: str
    scheme: Scheme
    recipe: Recipe
    best: bool
    data: str | Path | None
    images: Images
    checks: Images
    progress: bool
    drop: float = 0.0
    float_weights: str | Path | None = None

    def load(self, config: Config, part: Images) -> Iterable[tuple[Tensor, Tensor]]:
        """Batches of one part."""
        return load_data(
            config.preprocessing,
            config.labels,
            self.data,
            split=part.split,
            subset=part.subset,
            batch_size=BATCH,
        )


def make_plan(
    name: ModelName,
    config: Config,
    made: Made,
    overrides: Overrides,
    data: str | Path | None,
    progress: bool,
) -> Plan:
    """The plan for a name with its tag and a scheme.

    Raises:
        DataError: the images are not there, or calibration and evaluation share some.
        ValueError: methods that contradict each other.
    """
    scheme = Scheme.parse(name.scheme or "")
    edge_bits = made.edge_bits if overrides.edge_bits is None else overrides.edge_bits
    if edge_bits:
        scheme = dataclasses.replace(scheme, edge_bits=edge_bits)
    drop = overrides.drop
    if drop is None:
        drop = 0.0 if overrides.layer_bits else made.drop
    layers = made.layers if overrides.layer_bits is None else overrides.layer_bits
    if layers and not drop:
        scheme = dataclasses.replace(scheme, layers=layers)
    images = calibration_images(config, data, overrides.calibration_subset or made.calibration)
    checks = evaluation_images(config, data, overrides.evaluation_subset or made.evaluation, images)
    recipe = dataclasses.replace(made.recipe, **overrides.methods)
    best = overrides.recipe == "best" or (made.best and not overrides.methods)
    if drop and recipe.data_free and not best:
        raise ValueError("mixed precision chooses layers on images; choose another method than batchnorm")
    weights = overrides.float_weights
    return Plan(str(name), scheme, recipe, best, data, images, checks, progress, drop, weights)
