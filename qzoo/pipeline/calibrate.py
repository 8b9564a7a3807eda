"""``calibrate_checkpoint``: float weights to a quantized checkpoint folder, by a recipe."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qzoo.config import CalibrationRecord, Tried, config_of
from qzoo.data import load_data
from qzoo.distributed import Group
from qzoo.errors import ArgumentError, UnknownModelError
from qzoo.pipeline.measure import finite
from qzoo.pipeline.parts import NONE, Images, calibration_images, for_data_set, made_on
from qzoo.ptq import Choice, Raised, Recipe, apply_recipe, best_recipe, mix_precision, round_biases
from qzoo.ptq.half import compact
from qzoo.ptq.ranges import Calibration, Candidate
from qzoo.quantizers import set_target
from qzoo.registry import parse_name
from qzoo.scheme import DEFAULT_TARGET, Scheme
from qzoo.zoo.checkpoint import save_pretrained
from qzoo.zoo.floats import quantized_from


@dataclass(frozen=True)
class Calibrated:
    """What was done.

    Attributes:
        recipe: the recipe.
        candidates: what it was chosen from, best first; empty when it was given.
        images: number of images that the checkpoint was calibrated on.
        held_back: how many of these the candidates were compared on: held back from recipes, the same ones for
            methods of the ranges ("auto").
        raised: what mixed precision came to, None without it.
    """

    recipe: Recipe
    candidates: tuple[Candidate, ...]
    images: int
    held_back: int
    raised: Raised | None = None


def calibrate_checkpoint(
    name: str,
    *,
    out: str | Path,
    recipe: Recipe | None = None,
    data: str | Path | None = None,
    dataset: str = "",
    subset: str | None = None,
    target: str = DEFAULT_TARGET,
    float_weights: str | Path | None = None,
    drop: float = 0.0,
    edge_bits: int | None = None,
    layer_bits: tuple[tuple[str, int], ...] | None = None,
    progress: bool = True,
    group: Group | None = None,
) -> Calibrated:
    """Make a quantized checkpoint from float weights; ``qzoo.build`` also measures it and writes a card.

    Args:
        name: ``arch.tag-scheme``.
        out: the folder; config.json and packed weights are put there.
        recipe: None chooses the best one on part of the images, see :func:`qzoo.ptq.best_recipe`.
        data: the images, see :func:`qzoo.data.load_data`; not needed by a recipe without data.
        dataset: what the images are, a name of :data:`qzoo.data.sets.DATA_SETS`; "" is what the float weights are for.
        subset: ``"start:stop"``; by default what ``qzoo.build`` calibrates on.
        target: the runtime whose quantizers the recipe sees.
        float_weights: a folder with float weights of the architecture; None: what the name's tag means.
        drop: mixed precision: share of held-back images, in percent, whose top-1 may change
            (:func:`qzoo.ptq.mix_precision`); 0 without it.
        edge_bits, layer_bits: of the first and the last layer, and of single ones; see :class:`qzoo.scheme.Scheme`.
        group: processes that share the pass for the ranges; each does all the rest, and rank 0 writes.

    Raises:
        UnknownModelError: not the name of a quantized model that can be calibrated.
        DataError: the data are not there.
        HubError: the float weights can't be had.
    """
    parsed = parse_name(name)
    if parsed.scheme is None or parsed.qat:
        raise UnknownModelError(f"{name!r} is not made by calibration; give a scheme, such as -w8a8")
    if drop and layer_bits:
        raise ArgumentError("mixed precision chooses the bits of layers itself; leave layer_bits out")
    group = group or Group()
    scheme = dataclasses.replace(
        Scheme.parse(parsed.scheme, target), edge_bits=edge_bits or 0, layers=layer_bits or ()
    )
    with group.first_alone():
        model, _ = quantized_from(name, float_weights, scheme)
    model.to(group.device)
    config = for_data_set(config_of(model), dataset)
    model.qzoo_config = config  # type: ignore[assignment]
    batches, images = [], NONE
    if recipe is not None and recipe.data_free and drop:
        raise ArgumentError("mixed precision chooses layers on images; choose another method than batchnorm")
    if recipe is None or not recipe.data_free:
        images = calibration_images(config, data, subset)
        with group.first_alone():
            loader = load_data(
                config.preprocessing, config.labels, data, split=images.split, subset=images.subset
            )
        batches = [batch.to(group.device) for batch, _ in loader]
    return quantize_to(
        out, model, batches, images, recipe, data=data, drop=drop, progress=progress, group=group
    )


def quantize_to(
    folder: str | Path,
    model: nn.Module,
    batches: list[Tensor],
    images: Images,
    recipe: Recipe | None,
    *,
    data: str | Path | None = None,
    drop: float = 0.0,
    progress: bool = True,
    group: Group | None = None,
) -> Calibrated:
    """Quantize a model with float weights, in place, and save it.

    Args:
        model: of :func:`qzoo.zoo.floats.quantized_from`, where the batches are; afterwards it is on the CPU.
        batches: calibration images [B, C, H, W]; none for a recipe without data.
        images: what they are called.
        data: the folder that they lie in.
        recipe, drop, group: see :func:`calibrate_checkpoint`.
    """
    group = group or Group()
    raised = mix_precision(model, batches, drop, progress=progress) if drop else None
    preprocessing, scheme, choice = config_of(model).preprocessing, config_of(model).scheme, None
    if recipe is None:
        choice = best_recipe(model, batches, progress=progress)
        recipe = choice.recipe
    found = apply_recipe(model, batches, recipe, preprocessing=preprocessing, progress=progress, group=group)
    model.to("cpu")
    example = torch.zeros(1, *preprocessing.input_size)
    half = compact(model, example) > 0
    round_biases(model, example)
    calibration = dataclasses.replace(record(found, images, recipe, choice), half=half, drop=drop)
    if scheme is not None:
        calibration = dataclasses.replace(calibration, target=scheme.target)
    config = made_on(config_of(model), data, images if found.images else NONE, "calibration")
    config = dataclasses.replace(config, calibration=calibration)
    if group.first:
        save_pretrained(set_target(model, config.target), folder, form="packed", config=config)
    candidates = choice.candidates if choice else found.candidates
    compared = choice.held_back if choice else found.select_images
    return Calibrated(recipe, candidates, found.images, compared, raised)


def record(found: Calibration, images: Images, recipe: Recipe, choice: Choice | None) -> CalibrationRecord:
    """What the config says of a calibration."""
    tried: tuple[Candidate, ...] = choice.candidates if choice else found.candidates
    return CalibrationRecord(
        method=found.method,
        data=images.text if found.images else "none",
        subset=images.subset if found.images else "",
        images=found.images,
        percentile=recipe.percentile if found.percentile is None else found.percentile,
        candidates=tuple(Tried(c.method, finite(c.sqnr_db), c.agreement) for c in tried),
        rounding=recipe.rounding,
        equalize=recipe.equalize,
        bias_correction=recipe.bias_correction,
        smooth=recipe.smooth,
        recipe="best" if choice else "",
        held_back=choice.held_back if choice else 0,
        alpha=recipe.alpha,
    )
