"""``build``: one call from a name to a checkpoint folder, in steps that are not repeated when it is called again."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qzoo.build_plan import Overrides, Plan, make_plan
from qzoo.calibrate import Calibration, Candidate
from qzoo.cards import write_card
from qzoo.checkpoint import load_pretrained, save_pretrained
from qzoo.compact import compact
from qzoo.config import WEIGHTS, CalibrationRecord, Measurement, Tried, config_of, read_config
from qzoo.errors import UnknownModelError
from qzoo.fields import encode
from qzoo.folders import exclusive, place, scratch_beside
from qzoo.measurements import can_run_onnx, finite, measure, require_onnx
from qzoo.onnx_files import export_files, onnx_name, with_files
from qzoo.own_weights import planned_config, quantized_from
from qzoo.parts import Images
from qzoo.ptq import Choice, Recipe, apply_recipe, best_recipe, mix_precision, round_biases
from qzoo.recipes import Made, how_made
from qzoo.registry import ModelName, architecture, parse_name
from qzoo.scheme import set_target, with_target
from qzoo.steps import Steps

CHECKPOINT = "checkpoint"
ONNX = ("onnxruntime",)
_FILES = (f"{CHECKPOINT}/config.json", f"{CHECKPOINT}/{WEIGHTS}")


def build(
    name: str,
    *,
    data: str | Path | None = None,
    calibration_subset: str | None = None,
    evaluation_subset: str | None = None,
    method: str | None = None,
    rounding: str | None = None,
    equalize: bool | None = None,
    bias_correction: str | None = None,
    smooth: bool | None = None,
    recipe: str | None = None,
    edge_bits: int | None = None,
    drop: float | None = None,
    layer_bits: Mapping[str, int] | None = None,
    float_weights: str | Path | None = None,
    onnx: Sequence[str] = ONNX,
    out: str | Path | None = None,
    runs: str | Path = "runs",
    again: bool = False,
    report: Callable[[str], None] | None = None,
    progress: bool = True,
) -> Path:
    """Make the quantized checkpoint ``name``: float weights, calibration, ONNX, figures, card.

    The same call makes the same files. Interrupted and called again it goes on: a finished step whose inputs are
    the same is not repeated. What no argument says, the recipe of the name says (:func:`qzoo.recipes.how_made`):
    ``build(name)`` on a checkpoint makes it again. A name in ``_qat`` is trained with its recipe's options.

    Args:
        name: ``arch.tag-scheme``, or ``arch-scheme`` for the default tag.
        data: the images, see :func:`qzoo.data.load_data`.
        calibration_subset, evaluation_subset: ``"start:stop"``; the defaults are in :mod:`qzoo.parts`.
        method: of :func:`qzoo.calibrate`, ``"auto"`` by default; or ``"batchnorm"``, without calibration images.
        rounding: of the weights: ``"nearest"`` (the default), ``"learned"`` or ``"sequential"``.
        equalize, bias_correction, smooth: see :class:`qzoo.ptq.Recipe`; by default none of them.
        edge_bits: of the first and the last layer, see :class:`qzoo.scheme.Scheme`.
        drop: mixed precision: at most this share of held-back calibration images, in percent, changes its top-1; see
            :func:`qzoo.ptq.mix_precision`.
        layer_bits: bits of single layers, by name: ``{"fc": 4}``; see :class:`qzoo.scheme.Scheme`.
        float_weights: a folder with float weights of your own; what the name's tag means if None.
        recipe: ``"best"`` tries :data:`qzoo.ptq.RECIPES` on the calibration images and takes the best.
        onnx: targets whose ONNX files go into the folder, as ``onnx/model_int8.onnx`` (ONNX Runtime) and
            ``onnx/model_int8_<target>.onnx``.
        out: the folder, ``model_cards/<name>`` by default.
        runs: what is finished is kept in its subfolder ``<name>``.
        again: repeat finished steps, too.
        report: gets a line for each step.
        progress: show progress bars.

    Returns:
        The folder: config.json, packed weights, ONNX files, card.

    Raises:
        ValueError: an unknown or contradictory method or target.
        UnknownModelError: not the name of a quantized model.
        DataError: the data are not there, or the two subsets have images in common.
        HubError: the float weights can't be had.
        MissingDependencyError: ONNX is asked for, and its packages are not installed.
    """
    overrides = Overrides(
        calibration_subset,
        evaluation_subset,
        edge_bits,
        recipe,
        method,
        rounding,
        equalize,
        bias_correction,
        smooth,
        drop,
        float_weights,
        None if layer_bits is None else tuple(layer_bits.items()),
    )
    parsed = parse_name(name)
    if parsed.scheme is None:
        raise UnknownModelError(f"{name!r} is not quantized; give a scheme, such as {name}-w8a8")
    parsed = dataclasses.replace(parsed, tag=parsed.tag or architecture(parsed.arch).default_tag)
    config = planned_config(str(parsed), float_weights)
    for target in onnx:
        onnx_name(config, target)
    if onnx:
        require_onnx("a checkpoint with ONNX files")
    folder, state = Path(out or Path("model_cards") / str(parsed)), Path(runs) / str(parsed)
    made = how_made(str(parsed), folder)
    if parsed.qat:
        overrides.refuse(name)
        state.mkdir(parents=True, exist_ok=True)
        with exclusive(state):
            return _tuned(
                parsed,
                made,
                data,
                tuple(onnx),
                Steps(state, report, again),
                runs,
                folder,
                progress,
                float_weights,
            )
    plan = make_plan(parsed, config, made, overrides, data, progress)
    state.mkdir(parents=True, exist_ok=True)
    with exclusive(state):
        return _calibrated(plan, tuple(onnx), Steps(state, report, again), state, folder)


# ---- steps ----


def _calibrated(plan: Plan, targets: tuple[str, ...], steps: Steps, state: Path, out: Path) -> Path:
    """A checkpoint without training."""
    model, exact = quantized_from(plan.name, plan.float_weights, with_target(plan.scheme, "onnxruntime"))
    inputs = {
        "float": encode(config_of(model).float_source),
        "scheme": encode(plan.scheme),
        "recipe": "best" if plan.best else encode(plan.recipe),
        "drop": plan.drop,
        "images": encode(plan.images),
        "data": str(plan.data or ""),
    }
    steps.run("calibrate", inputs, lambda: _calibrate(model, plan, state / CHECKPOINT), _FILES)
    made = load_pretrained(state / CHECKPOINT)
    config = config_of(made)
    _export(made, targets, steps, state)
    metrics = measure(
        made,
        exact,
        lambda: plan.load(config, plan.checks),
        plan.checks,
        plan.progress,
        onnx=state / onnx_name(config, "onnxruntime") if can_run_onnx() else None,
        steps=steps,
        inputs={"weights": config.files[WEIGHTS], "float": inputs["float"], "data": inputs["data"]},
    )
    return _assemble(state, targets, metrics, out)


def _calibrate(model: nn.Module, plan: Plan, folder: Path) -> None:
    """Float weights to a checkpoint without figures."""
    config, chosen, choice = config_of(model), plan.recipe, None
    if plan.drop:
        mix_precision(model, plan.load(config, plan.images), plan.drop, progress=plan.progress)
        config = config_of(model)
    if plan.best:
        choice = best_recipe(model, plan.load(config, plan.images), progress=plan.progress)
        chosen = choice.recipe
    batches = [] if chosen.data_free else plan.load(config, plan.images)
    found = apply_recipe(model, batches, chosen, preprocessing=config.preprocessing, progress=plan.progress)
    example = torch.zeros(1, *config.preprocessing.input_size)
    half = compact(model, example) > 0
    round_biases(model, example)
    calibration = dataclasses.replace(record(found, plan.images, chosen, choice), half=half, drop=plan.drop)
    config = dataclasses.replace(config, calibration=calibration)
    save_pretrained(set_target(model, "tensorrt"), folder, form="packed", config=config)


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
        names = [WEIGHTS]
        for target in targets:
            name = onnx_name(config, target)
            (scratch / name).parent.mkdir(exist_ok=True)
            shutil.copy2(state / name, scratch / name)
            names.append(name)
        config = dataclasses.replace(config, metrics=config.metrics if metrics is None else metrics)
        config = with_files(config, scratch, names)
        (scratch / "config.json").write_text(config.to_json(), encoding="utf-8")
        place(scratch, out, [*names, "config.json"])
    for name in old.keys() - config.files.keys():
        (out / name).unlink(missing_ok=True)
    write_card(out)
    return out


def _tuned(
    parsed: ModelName,
    made: Made,
    data: str | Path | None,
    targets: tuple[str, ...],
    steps: Steps,
    runs: str | Path,
    out: Path,
    progress: bool,
    float_weights: str | Path | None,
) -> Path:
    """A checkpoint whose weights are trained; the training keeps its own state, epoch by epoch."""
    from qzoo.train_job import TrainJob
    from qzoo.tune_checkpoint import tune_checkpoint

    options, batch_size = made.options()
    state = Path(runs) / str(parsed)
    folder = state / CHECKPOINT

    def action() -> None:
        job = TrainJob(data=data, batch_size=batch_size, runs=runs, out=folder, progress=progress)
        tune_checkpoint(str(parsed), options, job, float_weights=float_weights)

    inputs = {"options": encode(options), "batch_size": batch_size, "data": str(data or "")}
    steps.run("train and measure", inputs, action, _FILES)
    _export(load_pretrained(folder), targets, steps, state)
    return _assemble(state, targets, None, out)


def record(found: Calibration, images: Images, recipe: Recipe, choice: Choice | None) -> CalibrationRecord:
    """What the config says of a calibration."""
    tried: tuple[Candidate, ...] = choice.candidates if choice else found.candidates
    return CalibrationRecord(
        method=found.method,
        data=images.text if found.images else "none",
        subset=images.subset if found.images else "",
        images=found.images,
        percentile=found.percentile,
        candidates=tuple(Tried(c.method, finite(c.sqnr_db), c.agreement) for c in tried),
        rounding=recipe.rounding,
        equalize=recipe.equalize,
        bias_correction=recipe.bias_correction,
        smooth=recipe.smooth,
        recipe="best" if choice else "",
        held_back=choice.held_back if choice else 0,
    )
