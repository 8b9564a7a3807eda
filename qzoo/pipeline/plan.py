"""How a checkpoint is made: the :class:`qzoo.options.Plan` of a name, and the place that makes it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qzoo.config import Config, read_config
from qzoo.errors import ArgumentError, CheckpointError
from qzoo.options import PROCEDURAL
from qzoo.options import BuildOptions as BuildOptions
from qzoo.options import Plan as Plan
from qzoo.pipeline.recipes import recipes
from qzoo.registry import architecture, parse_name
from qzoo.scheme import Scheme
from qzoo.zoo import hub
from qzoo.zoo.calibrated import recipe_without_data
from qzoo.zoo.store import checkpoint_folder


@dataclass(frozen=True)
class Job:
    """Where the images of a job come from, and where its files go.

    Attributes:
        data: the images, see :func:`qzoo.data.load_data`.
        dataset: what they are, a name of :data:`qzoo.data.sets.DATA_SETS`; "" is what the name or the float weights are
            for.
        workers: processes that decode images.
        runs: what is finished, or the state to resume from, is kept in its subfolder ``<name>``.
        out: the checkpoint folder; in the user's store (:mod:`qzoo.zoo.store`) if None.
        progress: show progress bars.
        skip_broken: calibrate, train and measure without the images that do not decode, and count them.
    """

    data: str | Path | None = None
    dataset: str = ""
    workers: int = 0
    runs: str | Path = "runs"
    out: str | Path | None = None
    progress: bool = True
    skip_broken: bool = False

    def __post_init__(self) -> None:
        if self.out is not None and Path(self.out).exists() and not Path(self.out).is_dir():
            raise ArgumentError(f"out must be a folder, and {self.out} is a file")

    def folder(self, name: str) -> Path:
        """Return where the checkpoint goes."""
        return Path(self.out) if self.out is not None else checkpoint_folder(name)


@dataclass(frozen=True)
class BuildJob(Job):
    """Where :func:`qzoo.build` does its work.

    Attributes:
        device: of the passes in PyTorch, and of a training; ONNX Runtime runs on the CPU.
        onnx: targets whose ONNX files go into the folder, as ``onnx/model_int8.onnx`` (ONNX Runtime) and
            ``onnx/model_int8_<target>.onnx``.
        again: repeat finished steps, too.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    onnx: tuple[str, ...] = ("onnxruntime",)
    again: bool = False


def how_made(name: str, folder: Path) -> tuple[Config | None, str]:
    """Find the config that says how a checkpoint was, or is to be, made; and where it stands.

    Looked up in the folder that it is written to, in the user's store (where a ``config.json`` alone is a recipe of the
    user's own), in the package's checkpoints (without their images: other data have other numbers), in the package's
    recipes. What is nowhere gets the settings of the network's family.

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
            if old.calibration is not None and old.calibration.method == PROCEDURAL and not old.metrics:
                break  # made for want of images: it says nothing of a build with some
            return old, f"{place / 'config.json'}"
    if name in hub.embedded():
        config = read_config(hub.embedded()[name])
        return dataclasses.replace(config, metrics=()), f"qzoo's checkpoint {name}"
    known = {config.name: config for config in recipes()}
    return known.get(name), f"qzoo's recipe {name}" if name in known else "the name alone"


def plan_of(name: str, folder: Path) -> Plan:
    """Find the plan of a checkpoint, as :func:`how_made` does, or by its network's family. Raises as it does."""
    config, _ = how_made(name, folder)
    if config is not None:
        return config.plan
    entry, scheme = architecture(parse_name(name).arch), parse_name(name).scheme
    defaults = entry.family.defaults
    return Plan(recipe=defaults.recipe_for(entry.scheme(scheme)) if scheme else defaults.recipe)


def plan_without_data(config: Config, options: BuildOptions) -> Plan:
    """Plan a build without data: on procedural images, where the options name no other method.

    Args:
        config: of the checkpoint, before it is built.
        options: what to do otherwise.
    """
    if options.get("method") or options.get("recipe"):
        return Plan().changed(options)
    defaults = architecture(config.architecture).family.defaults
    scheme = config.scheme or Scheme()
    values = {**dataclasses.asdict(recipe_without_data(defaults, scheme)), **_given(options)}
    if values["rounding"] != "nearest" and "bias_correction" not in _given(options):
        values["bias_correction"] = "none"  # which learned rounding does itself
    return Plan().changed(values)


def _given(options: BuildOptions) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
