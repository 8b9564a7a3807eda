"""What ``build`` is to do: the recipe of a name, what its caller wants otherwise, and where things are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qzoo.config import Config
from qzoo.data import load_data
from qzoo.errors import ArgumentError
from qzoo.pipeline.parts import Images, calibration_images, evaluation_images
from qzoo.pipeline.recipes import Made
from qzoo.ptq import Recipe
from qzoo.registry import ModelName
from qzoo.scheme import Scheme
from qzoo.zoo.store import checkpoint_folder

BATCH = 32


@dataclass(frozen=True)
class BuildOptions:
    """What :func:`qzoo.build` is to do otherwise than the recipe of the name says; None says nothing.

    Attributes:
        calibration_subset, evaluation_subset: ``"start:stop"``; the defaults are in :mod:`qzoo.pipeline.parts`.
        edge_bits: of the first and the last layer, see :class:`qzoo.scheme.Scheme`.
        recipe: ``"best"`` tries :data:`qzoo.ptq.RECIPES` on the calibration images and takes the best.
        method: of :func:`qzoo.calibrate`, ``"auto"`` by default; or ``"batchnorm"``, without calibration images.
        rounding: of the weights: ``"nearest"`` (the default), ``"learned"`` or ``"sequential"``.
        equalize, bias_correction, smooth: see :class:`qzoo.ptq.Recipe`; by default none of them.
        percentile, alpha: of the method "percentile" and of ``smooth``, as there.
        drop: mixed precision: at most this share of held-back calibration images, in percent, changes its top-1; see
            :func:`qzoo.ptq.mix_precision`.
        float_weights: a folder with float weights of your own; what the name's tag means if None.
        layer_bits: bits of single layers, by name: ``(("fc", 4),)``; see :class:`qzoo.scheme.Scheme`.
        target: the runtime whose quantizers the methods see, ``"onnxruntime"`` by default.

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
    percentile: float | None = None
    alpha: float | None = None
    drop: float | None = None
    float_weights: str | Path | None = None
    layer_bits: tuple[tuple[str, int], ...] | None = None
    target: str | None = None

    def __post_init__(self) -> None:
        if self.recipe not in (None, "best"):
            raise ArgumentError(f"recipe must be 'best', not {self.recipe!r}")
        if self.recipe and self.methods:
            raise ArgumentError(
                f"recipe={self.recipe!r} chooses {', '.join(self.methods)} itself; leave them out"
            )
        if self.drop and self.layer_bits:
            raise ArgumentError("drop chooses the bits of layers itself; leave layer_bits out")

    @property
    def methods(self) -> dict[str, Any]:
        """The post-training methods that are given."""
        names = [f.name for f in dataclasses.fields(Recipe)]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def given(self) -> list[str]:
        """Names of the options that say something."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None]

    def refuse(self, name: str) -> None:
        """A trained checkpoint takes none of them. Raises ValueError where one is given."""
        wrong = [given for given in self.given if given != "float_weights"]
        if wrong:
            raise ArgumentError(
                f"{name} is trained by its recipe, where {', '.join(wrong)} does not apply; "
                f"`qzoo train {name}` takes the options of a training"
            )


@dataclass(frozen=True)
class BuildJob:
    """Where the images of :func:`qzoo.build` come from, what computes, and where its files go.

    Attributes:
        data: the images, see :func:`qzoo.data.load_data`.
        dataset: what they are, a name of :data:`qzoo.data.sets.DATA_SETS`; "" is what the float weights are for.
        workers: processes that decode images.
        device: of the passes in PyTorch, and of a training; ONNX Runtime runs on the CPU.
        onnx: targets whose ONNX files go into the folder, as ``onnx/model_int8.onnx`` (ONNX Runtime) and
            ``onnx/model_int8_<target>.onnx``.
        out: the folder; in the user's store (:mod:`qzoo.zoo.store`) if None.
        runs: what is finished is kept in its subfolder ``<name>``.
        again: repeat finished steps, too.
        progress: show progress bars.
    """

    data: str | Path | None = None
    dataset: str = ""
    workers: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    onnx: tuple[str, ...] = ("onnxruntime",)
    out: str | Path | None = None
    runs: str | Path = "runs"
    again: bool = False
    progress: bool = True

    def folder(self, name: str) -> Path:
        """Where the checkpoint goes."""
        return Path(self.out) if self.out is not None else checkpoint_folder(name)


@dataclass(frozen=True)
class Plan:
    """What is to be built.

    Attributes:
        job: images, device and places.
        scheme: with the bits of the first and the last layer, and the target that the methods see.
        recipe: the post-training methods; with ``best`` they are still to be found.
        images, checks: to calibrate on, and to measure on.
        drop: of mixed precision (:func:`qzoo.ptq.mix_precision`), 0 without it.
        float_weights: a folder with float weights; None: what the name's tag means.
    """

    name: str
    job: BuildJob
    scheme: Scheme
    recipe: Recipe
    best: bool
    images: Images
    checks: Images
    drop: float = 0.0
    float_weights: str | Path | None = None

    def load(self, config: Config, part: Images) -> Iterable[tuple[Tensor, Tensor]]:
        """Batches of one part."""
        return load_data(
            config.preprocessing,
            config.labels,
            self.job.data,
            split=part.split,
            subset=part.subset,
            batch_size=BATCH,
            workers=self.job.workers,
        )


def make_plan(name: ModelName, config: Config, made: Made, options: BuildOptions, job: BuildJob) -> Plan:
    """The plan for a name with its tag and a scheme.

    Raises:
        DataError: the images are not there, or calibration and evaluation share some.
        ValueError: methods that contradict each other.
    """
    scheme = Scheme.parse(name.scheme or "", options.target or made.target)
    edge_bits = made.edge_bits if options.edge_bits is None else options.edge_bits
    if edge_bits:
        scheme = dataclasses.replace(scheme, edge_bits=edge_bits)
    drop = options.drop
    if drop is None:
        drop = 0.0 if options.layer_bits else made.drop
    layers = made.layers if options.layer_bits is None else options.layer_bits
    if layers and not drop:
        scheme = dataclasses.replace(scheme, layers=layers)
    images = calibration_images(config, job.data, options.calibration_subset or made.calibration)
    checks = evaluation_images(config, job.data, options.evaluation_subset or made.evaluation, images)
    recipe = made.recipe.changed(options.methods)
    best = options.recipe == "best" or (made.best and not options.methods)
    if drop and recipe.data_free and not best:
        raise ArgumentError("mixed precision chooses layers on images; choose another method than batchnorm")
    return Plan(str(name), job, scheme, recipe, best, images, checks, drop, options.float_weights)
