"""``tune_checkpoint``: quantization-aware training of a float or calibrated checkpoint, saved packed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from qzoo.config import CalibrationRecord, Config, config_of, fresh
from qzoo.data import parse_subset
from qzoo.data.files import broken_images
from qzoo.data.sets import data_set
from qzoo.distributed import Group
from qzoo.errors import CheckpointError, UnknownModelError
from qzoo.options import TUNING, TrainOptions
from qzoo.pipeline.calibrate import record
from qzoo.pipeline.measure import measure
from qzoo.pipeline.parts import Images, for_data_set, training_images
from qzoo.pipeline.train_job import TrainJob, run_training, weights_of, write_checkpoint
from qzoo.ptq import Recipe, round_biases
from qzoo.ptq.ranges import calibrate
from qzoo.quant.calib import calibrate_weights
from qzoo.quantizers import set_target
from qzoo.registry import architecture, parse_name
from qzoo.scheme import LayerBits
from qzoo.zoo.checkpoint import empty_model, load_pretrained
from qzoo.zoo.floats import quantized_from, reference_of
from qzoo.zoo.tensors import assign_state, is_range

TARGET = "onnxruntime"  # non-negative activations are unsigned: at 4 bits, 15 levels instead of 7


def tune_checkpoint(
    name: str,
    options: TrainOptions | None = None,
    job: TrainJob = TrainJob(),  # noqa: B008 - immutable
    *,
    float_weights: str | Path | None = None,
    start: str | Path | None = None,
    layers: LayerBits = (),
    group: Group | None = None,
) -> Path:
    """Tune ``arch.tag-scheme_qat``: from float weights, its teacher too, or from a calibrated checkpoint.

    From float weights the ranges start as the mean-squared-error ones of up to 2,048 training images. The last
    epoch's weights are the result, whatever their accuracy. Killed and called again with the same arguments, it goes
    on where its state was saved.

    Args:
        name: such as ``"resnet20.fmnist-w4a4_qat"``.
        options: of the training; :data:`qzoo.options.TUNING` if None.
        job: images and places.
        float_weights: a folder with float weights of the architecture; None: what the name's tag means.
        start: a calibrated checkpoint of the architecture, folder or name. Of the same scheme, its weights and ranges
            are the start. Of another, its weights are, with ranges calibrated anew: from more bits to fewer, as in
            progressive quantization (Zhuang et al. 2018, arXiv:1711.00205, section 3.2).
        layers: bits of single layers, by name; see :class:`qzoo.scheme.Scheme`.
        group: the processes that train together; rank 0 alone writes.

    Returns:
        The checkpoint folder: config.json with options and metrics, packed weights, card.

    Raises:
        UnknownModelError: no name of a tuned checkpoint.
        CheckpointError: float weights or start of another architecture.
        DataError: another data set than the weights', or its images can't be had.
    """
    options, group = options or TUNING, group or Group()
    with group.first_alone():
        model, teacher, began = _start(name, float_weights, start, layers)
    config = for_data_set(config_of(model), job.dataset)
    if config.calibration is None:
        config = dataclasses.replace(config, calibration=_calibrate(model, config, job, group))
    teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    bits = " ".join(f"{layer}={bits}" for layer, bits in layers)
    begun = {"start": began, "float": weights_of(config_of(teacher)), "layer bits": bits or "none"}
    done = run_training(model, config, options, job, group, teacher, begun)
    round_biases(model, next(iter(done.test))[0], target=TARGET)
    checks, progress = done.checks, job.progress
    metrics = measure(model, teacher, lambda: done.test, checks, progress, (TARGET,), group=group)
    if not group.first:
        return job.folder(config.name)
    set_target(model, TARGET)
    origin = {"target": TARGET}
    if float_weights is not None:
        origin["float"] = config_of(teacher).name
    if start is not None:
        origin["start"] = Path(start).name
    if layers:
        origin["layer_bits"] = bits
    return write_checkpoint(model, config, metrics, done, options, job, group.world, origin)


def _start(
    name: str,
    float_weights: str | Path | None,
    start: str | Path | None,
    layers: LayerBits,
) -> tuple[nn.Module, nn.Module, str]:
    """The model to tune, its teacher, and which weights it starts from."""
    parsed = parse_name(name)
    if parsed.scheme is None or not parsed.qat:
        raise UnknownModelError(
            f"{name!r} is not the name of a tuned checkpoint, such as resnet20.fmnist-w4a4_qat"
        )
    name = str(dataclasses.replace(parsed, tag=parsed.tag or architecture(parsed.arch).default_tag))
    scheme = dataclasses.replace(architecture(parsed.arch).scheme(parsed.scheme, TARGET), layers=layers)
    if start is None:
        model, teacher = quantized_from(name, float_weights, scheme)
        named = dataclasses.replace(config_of(model), name=name)
        return _named(model, named), teacher, weights_of(config_of(teacher))
    model = load_pretrained(start, target=TARGET)
    config, began = config_of(model), weights_of(config_of(model))
    if config.architecture != parsed.arch or config.scheme is None:
        raise CheckpointError(
            f"{start} holds {config.name}; {name} starts from a quantized checkpoint of {parsed.arch}"
        )
    teacher = reference_of(config, float_weights)
    if str(config.scheme) == parsed.scheme and not layers:
        named = dataclasses.replace(fresh(config, name), calibration=config.calibration)
        return _named(model, named), teacher, began
    config = dataclasses.replace(fresh(config, name), scheme=scheme)
    other = empty_model(config, scheme)
    weights = ((key, value) for key, value in model.state_dict().items() if not is_range(key))
    assign_state(other, weights, str(start))
    return other, teacher, began


def _named(model: nn.Module, config: Config) -> nn.Module:
    model.qzoo_config = config  # type: ignore[assignment]
    return model


def _calibrate(model: nn.Module, config: Config, job: TrainJob, group: Group) -> CalibrationRecord:
    """Ranges from the first training images."""
    images, known = training_images(config, job.data, job.subset), data_set(config.labels)
    first, stop = parse_subset(images.subset, 1 << 62)
    count = min(stop - first, known.tuning_calibration)
    chosen = Images(images.text, images.split, f"{first}:{first + count}", count)
    size = 32 if known.in_folders else 256
    loader = chosen.load(config, job.data, batch_size=size, workers=job.workers, skip_broken=job.skip_broken)
    calibration = calibrate(model, loader, method="mse", progress=job.progress and group.first, group=group)
    if config.scheme is not None and config.scheme.weight_bits < 8:
        calibrate_weights(model, "mse")
    entry = record(calibration, chosen, Recipe(method="mse"), None)
    return dataclasses.replace(entry, skipped=sum(group.gather(broken_images(loader))))
