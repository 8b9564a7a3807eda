"""Checkpoints that are calibrated without data, on the user's machine, where none is published; kept in a cache.

The cache is ``calibrated/<name>/<key>`` in the store (``QZOO_HOME``). The key is of all that the result depends on: the
SHA-256 of the file of float weights, scheme, recipe, and :data:`VERSION` of the method.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

from qzoo.analysis.sensitivity import sensitivity
from qzoo.cards.card import write_card
from qzoo.config import CalibrationRecord, Config, Trial, config_of
from qzoo.errors import CheckpointError
from qzoo.fields import encode, finite
from qzoo.files import exclusive
from qzoo.options import AUTO, PROCEDURAL, Recipe
from qzoo.ptq.apply import apply_recipe, best_alpha
from qzoo.ptq.bias_grid import round_biases
from qzoo.ptq.half import compact
from qzoo.ptq.procedural import COMPARED, Comparison, procedural_batches
from qzoo.ptq.ranges import Candidate
from qzoo.quantizers import device_of, set_target
from qzoo.registry import Defaults
from qzoo.scheme import DEFAULT_TARGET, Scheme
from qzoo.zoo.checkpoint import load_pretrained, save_pretrained
from qzoo.zoo.store import home

VERSION = 2
"""Of the method: raise it where the same weights and recipe come to another checkpoint."""

ALPHA_IMAGES = 32
"""Procedural images on which the alpha of SmoothQuant is searched: it is applied four times."""

RELIABLE = 90.0
"""Agreement on procedural images, in percent, below which a checkpoint is warned of."""


def recipe_without_data(defaults: Defaults, scheme: Scheme) -> Recipe:
    """Choose the recipe without data: weights are rounded by learning where that matters, and can be."""
    smooth, alpha = defaults.recipe.smooth, defaults.recipe.alpha
    learned = scheme.weight_bits < 8 or defaults.recipe.rounding != "nearest"
    if learned and scheme.can_round:
        # without BatchNorms, as in transformers, each layer has to make up for the errors of those before it
        rounding = "sequential" if smooth and scheme.weight_bits < 8 else "learned"
        return Recipe(method=PROCEDURAL, rounding=rounding, smooth=smooth, alpha=alpha)
    return Recipe(method=PROCEDURAL, bias_correction="analytic", smooth=smooth, alpha=alpha)


def trials(candidates: Iterable[Candidate]) -> tuple[Trial, ...]:
    """Record what candidates reached."""
    return tuple(Trial(c.method, finite(c.sqnr_db), c.agreement) for c in candidates)


def calibrate_without_data(model: nn.Module, recipe: Recipe, *, progress: bool = False) -> CalibrationRecord:
    """Quantize a model with float weights, in place, without a single image of its data.

    Args:
        model: with quantizers, float weights and a config; afterwards it is on the CPU.
        recipe: one without data. The alpha "auto" is searched on procedural images, too.
        progress: show progress bars.

    Returns:
        What the config is to say of it, with the agreement on procedural images.
    """
    config = config_of(model)
    comparison = Comparison(model, config.preprocessing)
    choice = None
    if recipe.alpha == AUTO:
        few = [batch.to(device_of(model)) for batch in procedural_batches(config.preprocessing, ALPHA_IMAGES)]
        choice = best_alpha(model, few, recipe, progress=progress)
        recipe = choice.recipe
    calibration = apply_recipe(model, (), recipe, preprocessing=config.preprocessing, progress=progress)
    model.to("cpu")
    example = torch.zeros(1, *config.preprocessing.input_size)
    half = compact(model, example) > 0
    round_biases(model, example)
    return CalibrationRecord(
        **{**dataclasses.asdict(recipe), "method": calibration.method},
        data="none",
        subset="",
        images=0,
        recipe="alpha" if choice else "",
        candidates=trials(choice.candidates) if choice else (),
        held_back=choice.held_back if choice else 0,
        half=half,
        target=config.scheme.target if config.scheme else DEFAULT_TARGET,
        agreement=None if config.is_encoder else comparison.fidelity(model).agreement,
    )


def load_calibrated(
    config: Config, recipe: Recipe, known: Sequence[str], start: Callable[[], nn.Module], target: str | None
) -> nn.Module:
    """Load the checkpoint from the cache; where there is none, make it, with a warning, and keep it.

    Args:
        config: of the checkpoint, with its scheme.
        recipe: one without data.
        known: the SHA-256 that the file of float weights can have; what was made of one of these is found without the
            file.
        start: gives the model with quantizers on the float weights; its config says which file they are of.
        target: that the quantizers are to simulate; the scheme's if None.

    Raises:
        HubError, CheckpointError: the float weights can't be had, or are not what they should be.
    """
    folder = home() / "calibrated" / config.name

    def cached(digests: Iterable[str]) -> nn.Module | None:
        models = (_load(folder / _key(config, recipe, digest), target) for digest in digests)
        return next((model for model in models if model is not None), None)

    if (model := cached(known)) is not None:
        return model
    with _alone(folder):
        if (model := cached(known)) is not None:  # another process has made it meanwhile
            return model
        model = start()
        source = config_of(model).float_source
        digest = source.sha256 if source is not None else ""
        if digest not in known and (model_of_file := cached([digest])) is not None:
            return model_of_file
        record = calibrate_without_data(model, recipe)
        model_config = dataclasses.replace(config_of(model), calibration=record)
        place = folder / _key(config, recipe, digest)
        kept, problem = _keep(model, model_config, place)
    _warn(model_config, _costliest(model, model_config) if _doubtful(model_config) else "", problem)
    if kept:
        return load_pretrained(place, target=target)
    model.qzoo_config = model_config  # type: ignore[assignment]
    return set_target(model, target or model_config.target)


def _key(config: Config, recipe: Recipe, digest: str) -> str:
    parts = [VERSION, digest, encode(config.scheme), encode(recipe)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _load(folder: Path, target: str | None) -> nn.Module | None:
    """The checkpoint of the cache; None where there is none. One that is damaged is removed, to be made again."""
    if not (folder / "config.json").is_file():
        return None
    try:
        model = load_pretrained(folder, target=target)
    except CheckpointError:
        shutil.rmtree(folder, ignore_errors=True)
        return None
    if _doubtful(config_of(model)):
        _warn(config_of(model), "", "")
    return model


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time makes the checkpoints of a name; where the cache can't be written to, nothing is held."""
    with ExitStack() as held:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(exclusive(folder))
        yield


def _keep(model: nn.Module, config: Config, folder: Path) -> tuple[bool, str]:
    """Save the checkpoint in the cache; whether that went well, and what went wrong."""
    try:
        save_pretrained(set_target(model, config.target), folder, form="packed", config=config)
        write_card(folder)
    except (CheckpointError, OSError) as error:
        return (folder / "config.json").is_file(), str(error)
    return True, ""


def _doubtful(config: Config) -> bool:
    record = config.calibration
    return record is not None and record.agreement is not None and record.agreement < RELIABLE


def _costliest(model: nn.Module, config: Config) -> str:
    images = Comparison(model, config.preprocessing, images=2).batches
    layers = sensitivity(model, images, images=2, progress=False).layers
    return ", ".join(layer.name for layer in layers[:3])


def _warn(config: Config, costliest: str, problem: str) -> None:
    """The one warning, at the caller of create_model or of an architecture's function."""
    record = config.calibration
    agreement = record.agreement if record is not None else None
    text = (
        f"no published checkpoint of {config.name}: calibrated from its float weights without images; unmeasured; "
        "`qzoo build` with data makes a measured one"
    )
    if agreement is not None:
        text += f". Float and quantized agree on {agreement:.1f} % of {COMPARED} procedural images"
    if _doubtful(config):
        text += f", and should on {RELIABLE:g} % or more: do not rely on it"
        text += (
            f"; its costliest layers are {costliest}"
            if costliest
            else "; `qzoo sensitivity` ranks its layers"
        )
    if problem:
        text += f". It is not kept for the next call: {problem}"
    warnings.warn(text, stacklevel=_outside())


def _outside() -> int:
    """Levels from here up to the first frame outside of the package."""
    import sys

    level, frame, package = 1, sys._getframe(1), str(Path(__file__).parents[1]) + os.sep
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        level, frame = level + 1, frame.f_back
    return level
