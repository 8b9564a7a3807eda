"""``build``: one call from a name to a checkpoint folder: float weights, calibrate, evaluate, save, card."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qzoo.calibrate import Calibration, calibrate
from qzoo.cards import write_card
from qzoo.checkpoint import save_pretrained
from qzoo.config import CalibrationRecord, Config, Measurement, config_of, read_config
from qzoo.data import load_data, parse_subset
from qzoo.errors import CheckpointError, DataError, UnknownModelError
from qzoo.evaluate import Evaluation, evaluate
from qzoo.export.onnx import export_onnx
from qzoo.ptq import adaround, round_biases
from qzoo.registry import parse_name
from qzoo.scheme import set_target
from qzoo.zoo import create_model, float_model

TARGETS = ("onnxruntime", "tensorrt")
ROUNDINGS = ("nearest", "learned")
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
    out: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """Make the quantized checkpoint ``name``; the same call makes the same files.

    Where ``out`` holds a config already (a recipe, or an older checkpoint), its subsets, method and rounding
    are the defaults: ``build(name)`` on a checkpoint makes it again.

    Args:
        name: ``arch.tag-scheme``, or ``arch-scheme`` for the default tag.
        data: the images, see :func:`qzoo.data.load_data`.
        calibration_subset: ``"start:stop"``; by default the first 512 training images of Fashion-MNIST, the
            first 128 of an ImageNet folder.
        evaluation_subset: by default all test images of Fashion-MNIST, and the images of the folder that
            follow the calibration's.
        method: of :func:`qzoo.calibrate`, ``"auto"`` by default.
        rounding: of the weights: ``"nearest"`` (the default), or ``"learned"`` on the calibration images, see
            :func:`qzoo.ptq.adaround`.
        out: the folder, ``model_cards/<name>`` by default.
        progress: show progress bars.

    Returns:
        The folder: config.json, packed weights, card.

    Raises:
        ValueError: an unknown method or rounding.
        UnknownModelError: not the name of a quantized model that can be calibrated.
        DataError: the data are not there, or the two subsets have images in common.
        HubError: the float weights can't be had.
    """
    if rounding not in (None, *ROUNDINGS):
        raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, not {rounding!r}")
    parsed = parse_name(name)
    if parsed.scheme is None or parsed.qat:
        how = "qzoo train tunes weights" if parsed.qat else "give a scheme, such as -w8a8"
        raise UnknownModelError(f"{name!r} is not made by calibration; {how}")
    model = create_model(name, pretrained="float", target=TARGETS[0])
    config = config_of(model)
    folder = Path(out) if out is not None else Path("model_cards") / config.name
    recipe = _recipe(folder, config)
    images, checks = _parts(
        config, data, calibration_subset or recipe.calibration, evaluation_subset or recipe.evaluation
    )

    def loader(part: Images) -> Iterable[tuple[Tensor, Tensor]]:
        return load_data(
            config.preprocessing, config.labels, data, split=part.split, subset=part.subset, batch_size=BATCH
        )

    found = calibrate(model, loader(images), method=method or recipe.method, progress=progress)
    rounding = rounding or recipe.rounding
    if rounding == "learned":
        adaround(model, loader(images), progress=progress)
    round_biases(model, next(iter(loader(images)))[0])
    metrics = _measure(model, float_model(config), lambda: loader(checks), checks, progress)
    config = dataclasses.replace(config, calibration=_record(found, images, rounding), metrics=metrics)
    save_pretrained(set_target(model, "tensorrt"), folder, form="packed", config=config)
    write_card(folder)
    return folder


@dataclass(frozen=True)
class Recipe:
    """Method, rounding and subsets, None where nothing is said."""

    method: str = "auto"
    rounding: str = "nearest"
    calibration: str | None = None
    evaluation: str | None = None


def _recipe(folder: Path, config: Config) -> Recipe:
    """How the folder's checkpoint was, or is to be, made."""
    if not (folder / "config.json").is_file():
        return Recipe()
    old = read_config(folder)
    if old.name != config.name:
        raise CheckpointError(f"{folder} holds {old.name}; choose another folder for {config.name}")
    if old.calibration is None:
        return Recipe()
    made = old.calibration
    method = "auto" if made.candidates else made.method
    return Recipe(method, made.rounding, made.subset, old.metrics[0].subset if old.metrics else None)


def _parts(
    config: Config,
    data: str | Path | None,
    calibration: str | None,
    evaluation: str | None,
) -> tuple[Images, Images]:
    """The images to calibrate on, and others to evaluate on."""
    if config.labels == "fashion-mnist":
        images = _part("Fashion-MNIST train", "train", calibration or "0:512", 60_000)
        return images, _part("Fashion-MNIST test", "test", evaluation or ":", 10_000)
    if config.labels != "imagenet-1k":
        raise DataError(f"no data set is known for the labels {config.labels!r} of {config.name}")
    if data is None:
        raise DataError(f"{config.name} is calibrated on ImageNet images: pass data=FOLDER (--data FOLDER)")
    from qzoo.data.imagenet import ImageNetFolder

    count = len(ImageNetFolder(data, config.preprocessing))
    text = f"ImageNet-1k, {Path(data).name} ({count} images)"
    images = _part(text, "test", calibration or f"0:{min(128, count // 4)}", count)
    checks = _part(text, "test", evaluation or f"{images.subset.partition(':')[2]}:", count)
    first, second = parse_subset(images.subset, count), parse_subset(checks.subset, count)
    if max(first[0], second[0]) < min(first[1], second[1]):
        raise DataError(
            f"calibration {images.subset} and evaluation {checks.subset} share images; a figure measured on "
            "calibration images says little"
        )
    return images, checks


def _part(text: str, split: str, subset: str, count: int) -> Images:
    start, stop = parse_subset(subset, count)
    return Images(text, split, f"{start}:{stop}", stop - start)


def _record(found: Calibration, images: Images, rounding: str) -> CalibrationRecord:
    candidates = tuple(
        {"method": c.method, "sqnr_db": _finite(c.sqnr_db), "agreement": c.agreement}
        for c in found.candidates
    )
    return CalibrationRecord(
        found.method, images.text, images.subset, found.images, found.percentile, candidates, rounding
    )


def _measure(
    model: nn.Module,
    reference: nn.Module,
    loader: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    images: Images,
    progress: bool,
) -> tuple[Measurement, ...]:
    """Float and quantized on the same images: simulated for each target, and the ONNX file if it can run."""
    remembered = _Remembered(reference)
    rows: list[Measurement] = []
    scheme = str(config_of(model).scheme)
    for target in TARGETS:
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
