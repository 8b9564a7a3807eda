"""``build``: one call from a name to a checkpoint folder, in steps that are not repeated when it is called again."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from qzoo.cards.card import write_card
from qzoo.config import WEIGHTS, Measurement, config_of, read_config
from qzoo.errors import UnknownModelError
from qzoo.fields import encode
from qzoo.files import exclusive, is_inside, place, scratch_beside
from qzoo.pipeline.calibrate import quantize_to
from qzoo.pipeline.measure import can_run_onnx, measure, require_onnx
from qzoo.pipeline.onnx_files import export_files, onnx_name, with_files
from qzoo.pipeline.parts import for_data_set
from qzoo.pipeline.plan import BuildJob, BuildOptions, Plan, make_plan
from qzoo.pipeline.recipes import Made, how_made
from qzoo.pipeline.steps import Steps
from qzoo.registry import architecture, parse_name
from qzoo.scheme import TARGETS
from qzoo.zoo.checkpoint import load_pretrained
from qzoo.zoo.floats import planned_config, quantized_from

CHECKPOINT = "checkpoint"
_FILES = (f"{CHECKPOINT}/config.json", f"{CHECKPOINT}/{WEIGHTS}")


def build(
    name: str,
    options: BuildOptions = BuildOptions(),  # noqa: B008 - immutable
    job: BuildJob = BuildJob(),  # noqa: B008 - immutable
    *,
    report: Callable[[str], None] | None = None,
) -> Path:
    """Build the quantized checkpoint ``name``: float weights, calibration, ONNX, figures, card.

    The same call makes the same files. Interrupted and called again it goes on: a finished step whose inputs are
    the same is not repeated. What the options don't say, the recipe of the name says
    (:func:`qzoo.pipeline.recipes.how_made`): ``build(name)`` on a checkpoint makes it again. A
    name in ``_qat`` is trained with its recipe's options.

    Args:
        name: ``arch.tag-scheme``, or ``arch-scheme`` for the default tag.
        options: what to do otherwise than the recipe says.
        job: images, device, and places of files.
        report: gets a line for each step.

    Returns:
        The folder: config.json, packed weights, ONNX files, card.

    Raises:
        ValueError: an unknown or contradictory method or target.
        UnknownModelError: not the name of a quantized model.
        DataError: the data are not there, or the two subsets have images in common.
        HubError: the float weights can't be had.
        MissingDependencyError: ONNX is asked for, and its packages are not installed.

    Example:
        >>> folder = qzoo.build("resnet20.fmnist-w8a8")  # doctest: +SKIP
    """
    parsed = parse_name(name)
    if parsed.scheme is None:
        raise UnknownModelError(f"{name!r} is not quantized; give a scheme, such as {name}-w8a8")
    parsed = dataclasses.replace(parsed, tag=parsed.tag or architecture(parsed.arch).default_tag)
    full = str(parsed)
    config = for_data_set(planned_config(full, options.float_weights), job.dataset)
    for target in job.onnx:
        onnx_name(config, target)  # refuses an unknown one
    if job.onnx:
        require_onnx("a checkpoint with ONNX files")
    folder, state = job.folder(full), Path(job.runs) / full
    made = how_made(full, folder)
    make: Callable[[Path, Steps], tuple[Measurement, ...] | None]
    if parsed.qat:
        options.refuse(name)
        make = partial(_tuned, full, made, options.float_weights, job)
    else:
        make = partial(_calibrated, make_plan(parsed, config, made, options, job))
    state.mkdir(parents=True, exist_ok=True)
    with exclusive(state):
        metrics = make(state, Steps(state, report, job.again))
        return _assemble(state, job.onnx, metrics, folder)


# ---- steps ----


def _calibrated(plan: Plan, state: Path, steps: Steps) -> tuple[Measurement, ...]:
    """A checkpoint without training, in the steps' folder; returns its figures."""
    job = plan.job
    model, exact = quantized_from(plan.name, plan.float_weights, plan.scheme)
    model.qzoo_config = for_data_set(config_of(model), job.dataset)  # type: ignore[assignment]
    common = {
        "float": encode(config_of(model).float_source),
        "data": str(job.data or ""),
        "device": job.device.type,
    }
    inputs = {
        **common,
        "scheme": encode(plan.scheme),
        "target": plan.scheme.target,
        "recipe": "best" if plan.best else encode(plan.recipe),
        "drop": plan.drop,
        "images": encode(plan.images),
        "labels": config_of(model).labels,
    }
    steps.run("calibrate", inputs, lambda: _calibrate(model, plan, state / CHECKPOINT), _FILES)
    made = load_pretrained(state / CHECKPOINT)
    config = config_of(made)
    _export(made, job.onnx, steps, state)
    return measure(
        made,
        exact,
        lambda: plan.load(config, plan.checks),
        plan.checks,
        job.progress,
        onnx=state / onnx_name(config, "onnxruntime") if can_run_onnx() else None,
        steps=steps,
        inputs={**common, "weights": config.files[WEIGHTS]},
        device=job.device,
    )


def _calibrate(model: nn.Module, plan: Plan, folder: Path) -> None:
    """Float weights to a checkpoint without figures."""
    device = plan.job.device
    needed = plan.best or bool(plan.drop) or not plan.recipe.data_free
    loader = plan.load(config_of(model), plan.images) if needed else ()
    quantize_to(
        folder,
        model.to(device),
        [images.to(device) for images, _ in loader],
        plan.images,
        None if plan.best else plan.recipe,
        data=plan.job.data,
        drop=plan.drop,
        progress=plan.job.progress,
    )


def _export(model: nn.Module, targets: tuple[str, ...], steps: Steps, state: Path) -> None:
    """ONNX files into the steps' folder: those asked for, and the one that is measured."""
    config = config_of(model)
    measured = ("onnxruntime",) if can_run_onnx() else ()
    for target in dict.fromkeys((*measured, *targets)):
        inputs = {"weights": config.files[WEIGHTS], "metadata": encode(config.preprocessing)}

        def action(target: str = target) -> Any:
            return export_files(model, config, state, [target])

        steps.run(f"export for {target}", inputs, action, [onnx_name(config, target)])


def _assemble(
    state: Path, targets: tuple[str, ...], metrics: tuple[Measurement, ...] | None, out: Path
) -> Path:
    """The checkpoint folder from the steps' files; what an older one had and this one has not goes."""
    out = out.absolute()
    old = read_config(out).files if (out / "config.json").is_file() else {}
    config = read_config(state / CHECKPOINT)
    with scratch_beside(out) as scratch:
        shutil.copy2(state / CHECKPOINT / WEIGHTS, scratch / WEIGHTS)
        names = []
        for target in targets:
            name = onnx_name(config, target)
            (scratch / name).parent.mkdir(exist_ok=True)
            shutil.copy2(state / name, scratch / name)
            names.append(name)
        names.append(WEIGHTS)
        config = dataclasses.replace(config, metrics=config.metrics if metrics is None else metrics)
        config = with_files(config, scratch, names)
        (scratch / "config.json").write_text(config.to_json(), encoding="utf-8")
        place(scratch, out, [*names, "config.json"])
    own = {WEIGHTS, *(onnx_name(config, target) for target in TARGETS)}
    for name in (old.keys() & own) - config.files.keys():
        if is_inside(out / name, out):  # the old config.json may be anybody's
            (out / name).unlink(missing_ok=True)
    write_card(out)
    return out


def _tuned(
    name: str, made: Made, float_weights: str | Path | None, job: BuildJob, state: Path, steps: Steps
) -> None:
    """A checkpoint whose weights are trained, in the steps' folder; the training keeps its own state, epoch by epoch,
    and measures."""
    from qzoo.distributed import Group
    from qzoo.pipeline.train_job import TrainJob
    from qzoo.pipeline.tune import tune_checkpoint

    options, batch_size = made.options()
    folder = state / CHECKPOINT

    def action() -> None:
        training = TrainJob(
            data=job.data,
            dataset=job.dataset,
            batch_size=batch_size,
            workers=job.workers,
            runs=job.runs,
            out=folder,
            progress=job.progress,
        )
        group = Group(device=job.device)
        tune_checkpoint(name, options, training, float_weights=float_weights, group=group)

    inputs = {
        "options": encode(options),
        "batch_size": batch_size,
        "data": str(job.data or ""),
        "device": job.device.type,
        "float": None if float_weights is None else read_config(float_weights).files,
    }
    steps.run("train and measure", inputs, action, _FILES)
    _export(load_pretrained(folder), job.onnx, steps, state)
