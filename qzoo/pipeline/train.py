"""``train_checkpoint``: a float model trained, from random or from trained weights, and saved as a checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from qzoo.accuracy import evaluate
from qzoo.config import WEIGHTS, Config, FloatSource, config_of, fresh
from qzoo.data import ImageFolder
from qzoo.data.folders import split_folder
from qzoo.data.sets import DATA_SETS, data_set, is_stream
from qzoo.data.sources import open_source
from qzoo.distributed import Group
from qzoo.errors import CheckpointError, DataError, UnknownModelError
from qzoo.options import FINE_TUNING, TRAINING, TrainOptions
from qzoo.pipeline.measure import measurement
from qzoo.pipeline.train_job import TrainJob, run_training, weights_of, write_checkpoint
from qzoo.preprocessing import Preprocessing
from qzoo.registry import ModelName, architecture, parse_name
from qzoo.zoo.create import create_model, open_model
from qzoo.zoo.floats import filled


def train_checkpoint(
    name: str,
    options: TrainOptions | None = None,
    job: TrainJob = TrainJob(),  # noqa: B008 - immutable
    *,
    start: str | Path | None = None,
    group: Group | None = None,
) -> Path:
    """Train a float model; the last epoch's weights are the result, whatever their accuracy.

    Killed and called again with the same arguments, it goes on where its state was saved.

    Args:
        name: ``arch.tag``. A tag of the zoo's (``"resnet20.fmnist"``) says what it is trained on; with one of your
            own (``"resnet20.pets"``) ``job.dataset`` does.
        options: of the training; if None :data:`qzoo.options.TRAINING`, with ``start`` ``FINE_TUNING``.
        job: images and places.
        start: float weights to fine-tune, by name or folder, in place of random ones. Where the images have another
            number of classes, the classifier is new.
        group: the processes that train together; rank 0 alone writes.

    Returns:
        The checkpoint folder: config.json with options and metrics, master weights, card.

    Raises:
        UnknownModelError: the name of a quantized model, or of no architecture.
        CheckpointError: ``start`` holds a quantized model, or another architecture.
        DataError: no data set, or its images can't be had.
    """
    group = group or Group()
    options = options or (TRAINING if start is None else FINE_TUNING)
    with group.first_alone():
        torch.manual_seed(options.seed)
        model = untrained(name, job) if start is None else _start(name, job, start)
    config = config_of(model)
    done = run_training(model, config, options, job, group, origin={"start": weights_of(config)})
    result = evaluate(model, done.test, progress=job.progress, group=group)
    if not group.first:
        return job.folder(config.name)
    metrics = (measurement(result, done.checks, "torch", "float", None),)
    origin = None if start is None else {"start": Path(start).name}
    return write_checkpoint(model, config, metrics, done, options, job, group.world, origin)


def untrained(name: str, job: TrainJob) -> nn.Module:
    """Build the float model ``name`` with random weights, and a config that names the data set.

    Raises:
        UnknownModelError: the name of a quantized model, or of no architecture.
        DataError: no data set is named, or another one than the tag's.
    """
    parsed = _float_name(name)
    known = architecture(parsed.arch).weights.get(parsed.tag or "")
    if known is not None:
        if job.dataset not in ("", known.labels):
            raise DataError(
                f"{name} means weights for {known.labels}; for {job.dataset} choose a tag of your own, such as "
                f"{parsed.arch}.mine"
            )
        return create_model(name)
    if not job.dataset:
        raise DataError(f"say what {name} is trained on: --dataset {'|'.join(DATA_SETS)}")
    classes, names = _classes(job)
    base = create_model(
        parsed.arch,
        num_classes=classes,
        in_channels=data_set(job.dataset).channels,
    )
    config = dataclasses.replace(config_of(base), name=name, labels=job.dataset, classes=names)
    preprocessing = data_set(job.dataset).preprocessing
    if preprocessing is not None:
        config = dataclasses.replace(config, preprocessing=preprocessing)
    return _with_config(base, config)


def _float_name(name: str) -> ModelName:
    parsed = parse_name(name)
    if parsed.scheme is not None:
        raise UnknownModelError(f"{name!r} is quantized; {name}_qat is tuned, {parsed.arch} trained")
    return parsed


def _start(name: str, job: TrainJob, start: str | Path) -> nn.Module:
    """The float model ``name`` with the weights of another, and a classifier for the job's images.

    Raises:
        UnknownModelError: the name of a quantized model, or of weights that exist.
        CheckpointError: the other is quantized, or of another architecture.
        DataError: no data set is named, or one with other channels than the weights'.
    """
    parsed = _float_name(name)
    if parsed.tag is None or parsed.tag in architecture(parsed.arch).weights:
        raise UnknownModelError(
            f"{name} is not a name for weights of your own; choose a tag, such as {parsed.arch}.mine"
        )
    exact = open_model(str(start))
    config = config_of(exact)
    if config.scheme is not None:
        raise CheckpointError(f"{start} holds the quantized {config.name}; {name} starts from float weights")
    if config.architecture != parsed.arch:
        raise CheckpointError(
            f"{start} holds {config.name}; {name} starts from float weights of {parsed.arch}"
        )
    dataset = data_set(job.dataset or config.labels)
    if not dataset.in_folders and dataset.channels != config.arguments.in_channels:
        raise DataError(
            f"{config.name} takes images of {config.arguments.in_channels} channels, and {dataset.title} has "
            f"{dataset.channels}; start from other weights"
        )
    classes, names = _classes(dataclasses.replace(job, dataset=dataset.name))
    source = config.float_source
    if WEIGHTS in config.files:
        source = FloatSource(f"folder:{config.name}", "", config.files[WEIGHTS], config.license)
    new = dataclasses.replace(fresh(config, name), float_source=source)
    state = {key: value.clone() for key, value in exact.state_dict().items()}
    model = filled(new, state, classes)
    return _with_config(model, dataclasses.replace(config_of(model), labels=dataset.name, classes=names))


def _with_config(model: nn.Module, config: Config) -> nn.Module:
    model.qzoo_config = config  # type: ignore[assignment]
    return model


def _classes(job: TrainJob) -> tuple[int, tuple[str, ...]]:
    """How many classes the images have, and the names that a folder or a stream gives them."""
    classes = data_set(job.dataset).classes
    if classes is not None:
        return classes, ()
    if job.data is None:
        raise DataError("--dataset folders needs --data FOLDER, with one folder of images a class")
    if is_stream(job.data):
        names = open_source(str(job.data), "train").names
        if not names:
            raise DataError(
                f"{job.data} doesn't say what its classes are called; give --dataset, or a folder"
            )
        return len(names), names
    names = ImageFolder(split_folder(job.data, "train"), Preprocessing()).classes
    return len(names), names
