"""``calibrate_checkpoint``: float weights to a quantized checkpoint folder, by a plan: the first step of a build."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qzoo.config import CalibrationRecord, config_of
from qzoo.data.files import broken_images
from qzoo.distributed import Group
from qzoo.errors import DataError, UnknownModelError
from qzoo.options import AUTO
from qzoo.pipeline.parts import NONE, Images, calibration_images, for_data_set, made_on
from qzoo.pipeline.plan import Job, Plan
from qzoo.ptq import (
    Choice,
    MixedPrecision,
    Recipe,
    apply_recipe,
    best_alpha,
    best_recipe,
    mix_precision,
    round_biases,
)
from qzoo.ptq.half import compact
from qzoo.ptq.ranges import Calibration, Candidate
from qzoo.quantizers import set_target
from qzoo.registry import architecture, parse_name
from qzoo.zoo.calibrated import calibrate_without_data, trials
from qzoo.zoo.checkpoint import save_pretrained
from qzoo.zoo.floats import quantized_from


@dataclass(frozen=True)
class CalibrationResult:
    """Recipe of a calibration, what it was chosen from, and the images it saw.

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
    raised: MixedPrecision | None = None


def calibrate_checkpoint(
    name: str,
    plan: Plan = Plan(),  # noqa: B008 - immutable
    job: Job = Job(),  # noqa: B008 - immutable
    *,
    group: Group | None = None,
) -> CalibrationResult:
    """Make a quantized checkpoint from float weights; ``qzoo.build`` also measures it and writes a card.

    Args:
        name: ``arch.tag-scheme``.
        plan: how; images are needed where its recipe looks at them.
        job: where the images are, and where config.json and packed weights go.
        group: processes that share the pass for the ranges; each does all the rest, and rank 0 writes.

    Raises:
        UnknownModelError: not the name of a quantized model that can be calibrated.
        DataError: the data are not there.
        HubError: the float weights can't be had.
    """
    parsed = parse_name(name)
    if parsed.scheme is None or parsed.qat:
        raise UnknownModelError(f"{name!r} is not made by calibration; give a scheme, such as -w8a8")
    group = group or Group()
    with group.first_alone():
        model, _ = start_of(name, plan, job)
    images = NONE
    if plan.needs_images:
        images = calibration_images(config_of(model), job.data, plan.calibration_subset)
    return calibrate_to(job.folder(name), model, plan, images, job, group)


def start_of(name: str, plan: Plan, job: Job) -> tuple[nn.Module, nn.Module]:
    """Load the model to calibrate, on the plan's float weights, and the float model beside it.

    Raises:
        CheckpointError, UnknownModelError, HubError: the float weights can't be had, or are of another architecture.
        DataError: the weights are for other images than the job's.
    """
    parsed = parse_name(name)
    scheme = plan.scheme(architecture(parsed.arch).scheme(parsed.scheme or ""))
    model, exact = quantized_from(name, plan.float_weights, scheme)
    model.qzoo_config = for_data_set(config_of(model), job.dataset)  # type: ignore[assignment]
    return model, exact


def calibrate_to(
    folder: Path, model: nn.Module, plan: Plan, images: Images, job: Job, group: Group
) -> CalibrationResult:
    """Calibrate what :func:`start_of` gives, in place, on images of the job, and save it into the folder."""
    model.to(group.device)
    batches, loader = [], None
    if plan.needs_images:
        with group.first_alone():
            loader = images.load(config_of(model), job.data, workers=job.workers, skip_broken=job.skip_broken)
        batches = [batch.to(group.device) for batch, _ in loader]
    show = job.progress and group.first
    skipped = broken_images(loader)
    if skipped and not batches:
        raise DataError(f"none of the images of {images.text} decodes: {loader.broken[0]}")  # type: ignore[union-attr]
    return quantize_to(
        folder, model, batches, images, plan, data=job.data, skipped=skipped, progress=show, group=group
    )


def quantize_to(
    folder: str | Path,
    model: nn.Module,
    batches: list[Tensor],
    images: Images,
    plan: Plan,
    *,
    data: str | Path | None = None,
    skipped: int = 0,
    progress: bool = True,
    group: Group | None = None,
) -> CalibrationResult:
    """Quantize a model with float weights, in place, and save it.

    Args:
        model: of :func:`start_of`, where the batches are; afterwards it is on the CPU.
        batches: calibration images [B, C, H, W]; none for a recipe without data.
        images: what they are called.
        data: the folder that they lie in.
        skipped: how many of them do not decode and are not in the batches.
        group: see :func:`calibrate_checkpoint`.
    """
    group = group or Group()
    if not plan.needs_images:
        calibration = calibrate_without_data(model, plan.recipe, progress=progress)
        config = dataclasses.replace(config_of(model), calibration=calibration)
        if group.first:
            save_pretrained(set_target(model, config.target), folder, form="packed", config=config)
        return CalibrationResult(calibration.applied(), (), 0, 0)
    raised = mix_precision(model, batches, plan.drop, progress=progress) if plan.drop else None
    choice = None
    if plan.best:
        choice = best_recipe(model, batches, progress=progress)
    elif plan.recipe.alpha == AUTO:
        choice = best_alpha(model, batches, plan.recipe, progress=progress)
    recipe = choice.recipe if choice else plan.recipe
    preprocessing = config_of(model).preprocessing
    ranges = apply_recipe(model, batches, recipe, preprocessing=preprocessing, progress=progress, group=group)
    model.to("cpu")
    example = torch.zeros(1, *preprocessing.input_size)
    half = compact(model, example) > 0
    round_biases(model, example)
    calibration = record(ranges, images, recipe, choice)
    chosen = "best" if plan.best else "alpha" if choice else ""
    calibration = dataclasses.replace(
        calibration, recipe=chosen, half=half, drop=plan.drop, target=plan.target, skipped=skipped
    )
    config = made_on(config_of(model), data, images if ranges.images else NONE, "calibration")
    config = dataclasses.replace(config, calibration=calibration)
    if group.first:
        save_pretrained(set_target(model, config.target), folder, form="packed", config=config)
    candidates = choice.candidates if choice else ranges.candidates
    compared = choice.held_back if choice else ranges.select_images
    return CalibrationResult(recipe, candidates, ranges.images, compared, raised)


def record(
    calibration: Calibration, images: Images, recipe: Recipe, choice: Choice | None
) -> CalibrationRecord:
    """Make the config's record of a calibration."""
    candidates: tuple[Candidate, ...] = choice.candidates if choice else calibration.candidates
    methods = {**dataclasses.asdict(recipe), "method": calibration.method}
    if calibration.percentile is not None:
        methods["percentile"] = calibration.percentile
    return CalibrationRecord(
        **methods,
        data=images.text if calibration.images else "none",
        subset=images.subset if calibration.images else "",
        images=calibration.images,
        candidates=trials(candidates),
        held_back=choice.held_back if choice else 0,
    )
