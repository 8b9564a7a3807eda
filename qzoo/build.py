"""``build``: one call from a name to a checkpoint folder: float weights, calibrate, evaluate, save, card."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.calibrate import Calibration, Candidate
from qzoo.cards import write_card
from qzoo.checkpoint import save_pretrained
from qzoo.compact import compact
from qzoo.config import CalibrationRecord, Config, Measurement, config_of, read_config
from qzoo.data import load_data, parse_subset
from qzoo.errors import CheckpointError, DataError, UnknownModelError
from qzoo.evaluate import Evaluation, evaluate
from qzoo.export.onnx import export_onnx
from qzoo.ptq import Choice, Recipe, apply_recipe, best_recipe, round_biases
from qzoo.registry import ModelName, architecture, parse_name
from qzoo.scheme import Scheme, set_target
from qzoo.zoo import create_model, float_model

TARGETS = ("onnxruntime", "tensorrt")
BATCH = 32


@dataclass(frozen=True)
class Images:
    """Part of a data set: what to load, and what to call it."""

    text: str
    split: str
    subset: str
    count: int


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
    out: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """Make the quantized checkpoint ``name``; the same call makes the same files.

    Where ``out`` holds a config already (a recipe, or an older checkpoint), its subsets and methods are the
    defaults: ``build(name)`` on a checkpoint makes it again.

    Args:
        name: ``arch.tag-scheme``, or ``arch-scheme`` for the default tag.
        data: the images, see :func:`qzoo.data.load_data`.
        calibration_subset: ``"start:stop"``; by default the first 512 training images of Fashion-MNIST, the
            first 128 of an ImageNet folder.
        evaluation_subset: by default all test images of Fashion-MNIST, and the images of the folder that
            follow the calibration's.
        method: of :func:`qzoo.calibrate`, ``"auto"`` by default; or ``"batchnorm"``, without calibration images.
        rounding: of the weights: ``"nearest"`` (the default), ``"learned"`` or ``"sequential"``.
        equalize, bias_correction, smooth: see :class:`qzoo.ptq.Recipe`; by default none of them.
        edge_bits: of the first and the last layer, see :class:`qzoo.scheme.Scheme`.
        recipe: ``"best"`` tries :data:`qzoo.ptq.RECIPES` on the calibration images and takes the best.
        out: the folder, ``model_cards/<name>`` by default.
        progress: show progress bars.

    Returns:
        The folder: config.json, packed weights, card.

    Raises:
        ValueError: an unknown or contradictory method.
        UnknownModelError: not the name of a quantized model that can be calibrated.
        DataError: the data are not there, or the two subsets have images in common.
        HubError: the float weights can't be had.
    """
    options = {
        "method": method,
        "rounding": rounding,
        "equalize": equalize,
        "bias_correction": bias_correction,
        "smooth": smooth,
    }
    given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    if recipe not in (None, "best"):
        raise ValueError(f"recipe must be 'best', not {recipe!r}")
    if recipe and given:
        raise ValueError(f"recipe={recipe!r} chooses {', '.join(given)} itself; leave them out")
    parsed = parse_name(name)
    if parsed.scheme is None or parsed.qat:
        how = "qzoo train tunes weights" if parsed.qat else "give a scheme, such as -w8a8"
        raise UnknownModelError(f"{name!r} is not made by calibration; {how}")
    folder = Path(out) if out is not None else Path("model_cards") / str(_with_tag(parsed))
    made = _made(folder, str(_with_tag(parsed)))
    edge_bits = made.edge_bits if edge_bits is None else edge_bits
    scheme = Scheme.parse(parsed.scheme)
    if edge_bits:
        scheme = dataclasses.replace(scheme, edge_bits=edge_bits)
    model = create_model(name, pretrained="float", quantize=scheme, target=TARGETS[0])
    config = config_of(model)
    images, checks = _parts(
        config, data, calibration_subset or made.calibration, evaluation_subset or made.evaluation
    )
    chosen = dataclasses.replace(made.recipe, **given)
    best = recipe or (made.best and not given)

    def loader(part: Images) -> Iterable[tuple[Tensor, Tensor]]:
        return load_data(
            config.preprocessing, config.labels, data, split=part.split, subset=part.subset, batch_size=BATCH
        )

    choice = None
    if best:
        choice = best_recipe(model, loader(images), progress=progress)
        chosen = choice.recipe
    found = apply_recipe(model, loader(images), chosen, preprocessing=config.preprocessing, progress=progress)
    example = next(iter(loader(images)))[0]
    half = compact(model, example) > 0
    round_biases(model, example)
    metrics = measure(model, float_model(config), lambda: loader(checks), checks, progress)
    calibration = dataclasses.replace(record(found, images, chosen, choice), half=half)
    config = dataclasses.replace(config, calibration=calibration, metrics=metrics)
    save_pretrained(set_target(model, "tensorrt"), folder, form="packed", config=config)
    write_card(folder)
    return folder


@dataclass(frozen=True)
class Made:
    """How a folder's checkpoint is made; subsets are None where nothing is said."""

    recipe: Recipe = Recipe()  # noqa: RUF009 - immutable
    best: bool = False
    calibration: str | None = None
    evaluation: str | None = None
    edge_bits: int = 0


def _with_tag(parsed: ModelName) -> ModelName:
    """The name with its tag, also where the default one is meant."""
    return dataclasses.replace(parsed, tag=parsed.tag or architecture(parsed.arch).default_tag)


def _made(folder: Path, name: str) -> Made:
    """How the folder's checkpoint was, or is to be, made."""
    if not (folder / "config.json").is_file():
        return Made()
    old = read_config(folder)
    if old.name != name:
        raise CheckpointError(f"{folder} holds {old.name}; choose another folder for {name}")
    if old.calibration is None:
        return Made()
    made = old.calibration
    method = "auto" if made.candidates and not made.recipe else made.method
    recipe = Recipe(made.equalize, method, made.rounding, made.bias_correction, made.smooth)
    evaluation = old.metrics[0].subset if old.metrics else None
    edge_bits = old.scheme.edge_bits if old.scheme else 0
    return Made(recipe, bool(made.recipe), made.subset or None, evaluation, edge_bits)


def _parts(
    config: Config,
    data: str | Path | None,
    calibration: str | None,
    evaluation: str | None,
) -> tuple[Images, Images]:
    """The images to calibrate on, and others to evaluate on."""
    images = calibration_images(config, data, calibration)
    if config.labels == "fashion-mnist":
        return images, _part("Fashion-MNIST test", "test", evaluation or ":", 10_000)
    count = _imagenet_count(config, data)
    checks = _part(images.text, "test", evaluation or f"{images.subset.partition(':')[2]}:", count)
    first, second = parse_subset(images.subset, count), parse_subset(checks.subset, count)
    if max(first[0], second[0]) < min(first[1], second[1]):
        raise DataError(
            f"calibration {images.subset} and evaluation {checks.subset} share images; a figure measured on "
            "calibration images says little"
        )
    return images, checks


def calibration_images(config: Config, data: str | Path | None, subset: str | None) -> Images:
    """The images to calibrate a model on, by default the first ones."""
    if config.labels == "fashion-mnist":
        return _part("Fashion-MNIST train", "train", subset or "0:512", 60_000)
    count = _imagenet_count(config, data)
    text = f"ImageNet-1k, {Path(data or '').name} ({count} images)"
    return _part(text, "test", subset or f"0:{min(128, count // 4)}", count)


def _imagenet_count(config: Config, data: str | Path | None) -> int:
    if config.labels != "imagenet-1k":
        raise DataError(f"no data set is known for the labels {config.labels!r} of {config.name}")
    if data is None:
        raise DataError(f"{config.name} is calibrated on ImageNet images: pass data=FOLDER (--data FOLDER)")
    from qzoo.data.imagenet import ImageNetFolder

    return len(ImageNetFolder(data, config.preprocessing))


def _part(text: str, split: str, subset: str, count: int) -> Images:
    start, stop = parse_subset(subset, count)
    return Images(text, split, f"{start}:{stop}", stop - start)


def record(found: Calibration, images: Images, recipe: Recipe, choice: Choice | None) -> CalibrationRecord:
    """What the config says of a calibration."""
    tried: tuple[Candidate, ...] = choice.candidates if choice else found.candidates
    return CalibrationRecord(
        method=found.method,
        data=images.text if found.images else "none",
        subset=images.subset if found.images else "",
        images=found.images,
        percentile=found.percentile,
        candidates=tuple(
            {"method": c.method, "sqnr_db": _finite(c.sqnr_db), "agreement": c.agreement} for c in tried
        ),
        rounding=recipe.rounding,
        equalize=recipe.equalize,
        bias_correction=recipe.bias_correction,
        smooth=recipe.smooth,
        recipe="best" if choice else "",
        held_back=choice.held_back if choice else 0,
    )


def measure(
    model: nn.Module,
    reference: nn.Module,
    loader: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    images: Images,
    progress: bool,
    targets: tuple[str, ...] = TARGETS,
) -> tuple[Measurement, ...]:
    """Float and quantized on the same images: simulated for each target, and the ONNX file if it can run."""
    remembered = _Remembered(reference)
    rows: list[Measurement] = []
    scheme = str(config_of(model).scheme)
    for target in targets:
        set_target(model, target)
        result = evaluate(model, loader(), reference=remembered.again(), progress=progress)
        assert result.reference is not None
        if not rows:
            rows.append(measurement(result.reference, images, "torch", "float", None))
        rows.append(measurement(result, images, "torch", scheme, target))
    if all(importlib.util.find_spec(package) for package in ("onnxruntime", "onnxscript")):
        from qzoo.runtimes import load

        with tempfile.TemporaryDirectory() as scratch:
            path = export_onnx(model, Path(scratch) / "model.onnx", target="onnxruntime")
            session = load(path, runtime="onnxruntime", threads=torch.get_num_threads())
            result = evaluate(session, loader(), reference=remembered.again(), progress=progress)
        rows.append(measurement(result, images, "onnxruntime", scheme, "onnxruntime"))
    return tuple(rows)


class _Remembered:
    """The reference's logits, computed in the first pass and given again in the others, batch by batch."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.logits, self.next = model, [], 0  # type: ignore[var-annotated]

    def again(self) -> Callable[[Tensor], Tensor]:
        """The callable of one more pass over the same images."""
        self.next = 0
        return self

    def __call__(self, images: Tensor) -> Tensor:
        if self.next == len(self.logits):
            self.logits.append(self.model(images))
        self.next += 1
        return self.logits[self.next - 1]


def measurement(
    result: Evaluation, images: Images, runtime: str, precision: str, target: str | None
) -> Measurement:
    """An evaluation as a row of the config."""
    return Measurement(
        runtime=runtime,
        precision=precision,
        target=target,
        data=images.text,
        subset=images.subset,
        images=result.images,
        top1=result.top1,
        top1_interval=result.top1_interval,
        top5=result.top5,
        top5_interval=result.top5_interval,
        loss=result.loss,
        agreement=result.agreement,
        sqnr_db=_finite(result.sqnr_db),
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
