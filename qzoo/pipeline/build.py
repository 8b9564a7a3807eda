"""``build``: one call from a name to a checkpoint folder, in steps that are not repeated when it is called again."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from qzoo.cards.card import write_card
from qzoo.config import WEIGHTS, Config, Measurement, config_of, read_config
from qzoo.data.sets import DATA_SETS
from qzoo.distributed import Group
from qzoo.errors import ArgumentError, CheckpointError, UnknownModelError
from qzoo.fields import encode
from qzoo.files import exclusive, is_inside, place, scratch_beside
from qzoo.options import TrainOptions, train_options
from qzoo.pipeline.calibrate import calibrate_to, start_of
from qzoo.pipeline.measure import can_run_onnx, measure, require_onnx
from qzoo.pipeline.onnx_files import export_files, onnx_name, with_files
from qzoo.pipeline.parts import NONE, Images, calibration_images, evaluation_images, for_data_set
from qzoo.pipeline.plan import BuildJob, BuildOptions, Plan, how_made, plan_of, plan_without_data
from qzoo.pipeline.steps import Steps
from qzoo.pipeline.train_job import TrainJob
from qzoo.pipeline.tune import tune_checkpoint
from qzoo.registry import architecture, parse_name
from qzoo.scheme import TARGETS
from qzoo.zoo.checkpoint import load_pretrained
from qzoo.zoo.floats import planned_config

CHECKPOINT = "checkpoint"
_FILES = (f"{CHECKPOINT}/config.json", f"{CHECKPOINT}/{WEIGHTS}")


def build(
    name: str,
    options: BuildOptions | None = None,
    job: BuildJob = BuildJob(),  # noqa: B008 - immutable
    *,
    report: Callable[[str], None] | None = None,
    group: Group | None = None,
) -> Path:
    """Build the quantized checkpoint ``name``: float weights, calibration, ONNX, figures, card.

    The same call makes the same files. Interrupted and called again it goes on: a finished step whose inputs are
    the same is not repeated. What the options don't say, the plan of the name says
    (:func:`qzoo.pipeline.plan.how_made`): ``build(name)`` on a checkpoint makes it again. A name in ``_qat`` is trained
    with the options that are recorded. Without images, of a name that needs some, it is calibrated on procedural ones
    and not measured.

    Args:
        name: ``arch.tag-scheme``, or ``arch-scheme`` for the default tag.
        options: what to do otherwise than the plan of the name says, see :class:`qzoo.options.Plan`.
        job: images, device, and places of files.
        report: gets a line for each step.
        group: the processes that share the pass for the ranges, a training, and the images that are measured on; by
            default this one, on the job's device. All see ``job.runs``; rank 0 exports and writes.

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
    options, group = options or BuildOptions(), group or Group(device=job.device)
    config = for_data_set(planned_config(full, options.get("float_weights")), job.dataset)
    for target in job.onnx:
        onnx_name(config, target)  # refuses an unknown one
    if job.onnx:
        require_onnx("a checkpoint with ONNX files")
    folder, state = job.folder(full), Path(job.runs) / full
    make: Callable[[Path, Steps], tuple[Measurement, ...] | None]
    if parsed.qat:
        training = _training(full, folder, options)
        make = partial(_tune, full, *training, options.get("float_weights"), job, group)
    else:
        plan, images, checks = _prepare(full, folder, config, options, job)
        make = partial(_calibrate, full, plan, images, checks, job, group)
    state.mkdir(parents=True, exist_ok=True)
    with exclusive(state) if group.first else nullcontext():
        metrics = make(state, Steps(state, report, job.again, group))
        if group.first:
            _assemble(state, job.onnx, metrics, folder)
        group.broadcast(None)  # all return when it is whole
    return folder.absolute()


def _prepare(
    name: str, folder: Path, config: Config, options: BuildOptions, job: BuildJob
) -> tuple[Plan, Images, Images]:
    """The plan of a calibration, and the images to calibrate and to measure on: none of both where none are given."""
    known = DATA_SETS.get(config.labels)
    if job.data is None and (known is None or not known.at_hand):
        plan = plan_without_data(config, options)
        if not plan.needs_images:
            return plan, NONE, NONE
    else:
        plan = plan_of(name, folder).changed(options)
    images = calibration_images(config, job.data, plan.calibration_subset)
    return plan, images, evaluation_images(config, job.data, plan.evaluation_subset, images)


# ---- steps ----


def _calibrate(
    name: str,
    plan: Plan,
    images: Images,
    checks: Images,
    job: BuildJob,
    group: Group,
    state: Path,
    steps: Steps,
) -> tuple[Measurement, ...]:
    """A checkpoint without training, in the steps' folder; returns its figures, none where there are no images."""
    with group.first_alone():
        model, exact = start_of(name, plan, job)
    start = config_of(model)
    common = {
        "float": encode(start.float_source),
        "data": str(job.data or ""),
        "device": job.device.type,
        **_broken(job),
    }
    inputs = {
        **common,
        "scheme": encode(start.scheme),
        "target": plan.target,
        "recipe": "best" if plan.best else encode(plan.recipe),
        "drop": plan.drop,
        "images": encode(images),
        "labels": start.labels,
    }

    def calibrate() -> None:
        calibrate_to(state / CHECKPOINT, model, plan, images, job, group)

    steps.run("calibrate", inputs, calibrate, _FILES)
    checkpoint = load_pretrained(state / CHECKPOINT)
    config = config_of(checkpoint)
    _export(checkpoint, job.onnx, steps, state, measured=bool(checks.count))
    if not checks.count:
        return ()
    return measure(
        checkpoint,
        exact,
        lambda: checks.load(config, job.data, workers=job.workers, skip_broken=job.skip_broken),
        checks,
        job.progress,
        onnx=state / onnx_name(config, "onnxruntime") if can_run_onnx() else None,
        steps=steps,
        inputs={**common, "weights": config.files[WEIGHTS]},
        group=group,
    )


def _broken(job: BuildJob) -> dict[str, bool]:
    """What a step's inputs say of images that do not decode: nothing where they are an error."""
    return {"skip_broken": True} if job.skip_broken else {}


def _export(
    model: nn.Module, targets: tuple[str, ...], steps: Steps, state: Path, measured: bool = True
) -> None:
    """ONNX files into the steps' folder: those asked for, and the one that is measured."""
    config = config_of(model)
    first = ("onnxruntime",) if measured and can_run_onnx() else ()
    for target in dict.fromkeys((*first, *targets)):
        inputs = {"weights": config.files[WEIGHTS], "metadata": encode(config.preprocessing)}

        def action(target: str = target) -> Any:
            return export_files(model, config, state, [target]) if steps.group.first else None

        steps.run(f"export for {target}", inputs, action, [onnx_name(config, target)])


def _assemble(
    state: Path, targets: tuple[str, ...], metrics: tuple[Measurement, ...] | None, out: Path
) -> None:
    """The checkpoint folder from the steps' files."""
    config = read_config(state / CHECKPOINT)
    with scratch_beside(out.absolute()) as scratch:
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
        install(scratch, out.absolute())


def install(folder: Path, out: Path) -> None:
    """Move a checkpoint's files into its folder, and write the card; what an older one had and this one has not goes.

    Args:
        folder: config.json and the files that it lists, on the same file system.
        out: the folder.
    """
    old = read_config(out).files if (out / "config.json").is_file() else {}
    config = read_config(folder)
    names = [name for name in config.files if name != WEIGHTS]
    place(folder, out, [*names, WEIGHTS, "config.json"])
    own = {WEIGHTS, *(onnx_name(config, target) for target in TARGETS)}
    for name in (old.keys() & own) - config.files.keys():
        if is_inside(out / name, out):  # the old config.json may be anybody's
            (out / name).unlink(missing_ok=True)
    write_card(out)


def _training(name: str, folder: Path, options: BuildOptions) -> tuple[TrainOptions, int]:
    """Options and batch size that are recorded of a training.

    Raises:
        ValueError: options that are of a calibration.
        CheckpointError: no training is recorded, or with values that make no sense.
    """
    wrong = [key for key, value in options.items() if value is not None and key != "float_weights"]
    if wrong:
        raise ArgumentError(
            f"{name} is trained by its recipe, where {', '.join(wrong)} does not apply; "
            f"`qzoo train {name}` takes the options of a training"
        )
    config, source = how_made(name, folder)
    recorded = config.training if config is not None else None
    if not recorded:
        raise CheckpointError(f"{source} does not say how to train; `qzoo train NAME` takes options")
    try:
        known = {key: recorded[key] for key in train_options() if key in recorded}
        return TrainOptions(**known), int(recorded.get("batch_size", TrainJob.batch_size))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: training: {error}") from error


def _tune(
    name: str,
    options: TrainOptions,
    batch_size: int,
    float_weights: str | Path | None,
    job: BuildJob,
    group: Group,
    state: Path,
    steps: Steps,
) -> None:
    """A checkpoint whose weights are trained, in the steps' folder; the training keeps its own state, epoch by epoch,
    and measures."""
    folder = state / CHECKPOINT

    def tune() -> None:
        training = TrainJob(
            data=job.data,
            dataset=job.dataset,
            batch_size=batch_size,
            workers=job.workers,
            runs=job.runs,
            out=folder,
            progress=job.progress,
            skip_broken=job.skip_broken,
        )
        tune_checkpoint(name, options, training, float_weights=float_weights, group=group)

    inputs = {
        "options": encode(options),
        "batch_size": batch_size,
        "data": str(job.data or ""),
        "device": job.device.type,
        "float": None if float_weights is None else read_config(float_weights).files,
        **_broken(job),
    }
    steps.run("train and measure", inputs, tune, _FILES)
    _export(load_pretrained(folder), job.onnx, steps, state)
