"""What training from scratch and tuning have in common: the images, the loop, the folder that comes out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qzoo.cards.card import write_card
from qzoo.config import WEIGHTS, Config, Measurement
from qzoo.data import ImageFolder, Loader, load_training_data
from qzoo.data.folders import split_folder
from qzoo.data.sets import DATA_SETS, data_set, is_stream
from qzoo.distributed import Group
from qzoo.errors import ArgumentError, DataError
from qzoo.options import TrainOptions
from qzoo.pipeline.parts import Images, evaluation_images, made_on, training_images
from qzoo.pipeline.plan import Job
from qzoo.training.loop import train
from qzoo.training.state import Log, plot_log, require_tools
from qzoo.zoo.checkpoint import save_pretrained


@dataclass(frozen=True)
class TrainJob(Job):
    """Where a training's images come from, and where its files go.

    ``data`` is a folder with ``train`` and ``val`` in it, or one that is cut in two, or a stream; it is not needed for
    Fashion-MNIST where its training set is found or can be downloaded. ``workers`` are those of each process that
    trains.

    Attributes:
        subset: ``"start:stop"`` of the training images; by default all, or four fifths of a folder that is one split.
        evaluation_subset: of the images that top-1 is measured on; by default all, or the rest of the folder.
        batch_size: images a step, of all processes together.
        save_every: steps after which the state is saved within an epoch; 0 saves after each epoch only.
        tensorboard: write the log for TensorBoard, too, beside ``log.csv``.
        plot: draw the learning curve, ``log.png`` beside ``log.csv``.
    """

    subset: str | None = None
    evaluation_subset: str | None = None
    batch_size: int = 128
    save_every: int = 0
    tensorboard: bool = False
    plot: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset and self.dataset not in DATA_SETS:
            raise ArgumentError(f"dataset must be one of {', '.join(DATA_SETS)}, not {self.dataset!r}")
        require_tools(tensorboard=self.tensorboard, plot=self.plot)
        if self.batch_size < 1 or self.workers < 0 or self.save_every < 0:
            raise ArgumentError(
                f"batch_size must be 1 or more, workers and save_every 0 or more, not {self.batch_size}, "
                f"{self.workers} and {self.save_every}"
            )


@dataclass(frozen=True)
class TrainingResult:
    """A finished training: its log, its images, and those to measure on."""

    log: Log
    images: Images
    checks: Images
    test: Loader


def run_training(
    model: nn.Module,
    config: Config,
    options: TrainOptions,
    job: TrainJob,
    group: Group,
    teacher: nn.Module | None = None,
    origin: dict[str, str] | None = None,
) -> TrainingResult:
    """Train ``model`` in place on the job's images, resumed where a run was stopped; afterwards it is on the CPU.

    Args:
        origin: what it starts from, with hashes; a run from elsewhere, or on other images, is not gone on with.

    Raises:
        DataError: the images can't be had, or are of other classes than the model's.
        QzooError: the folder of the run holds another one.
    """
    with group.first_alone():
        _check_classes(config, job.data)
        images = training_images(config, job.data, job.subset)
        checks = evaluation_images(config, job.data, job.evaluation_subset, images)
        loader = load_training_data(
            config.preprocessing,
            config.labels,
            job.data,
            subset=images.subset,
            batch_size=job.batch_size,
            seed=options.seed,
            workers=job.workers,
            classes=config.classes or config.arguments.num_classes,
            skip_broken=job.skip_broken,
        )
        known = data_set(config.labels)
        place = None if known.embedded and not is_stream(job.data) else job.data
        test = checks.load(
            config, place, batch_size=known.batch, workers=job.workers, skip_broken=job.skip_broken
        )
    run = Path(job.runs) / config.name
    log = train(
        model,
        loader,
        options,
        out=run,
        eval_loader=test,
        teacher=teacher,
        tensorboard=job.tensorboard,
        progress=job.progress,
        group=group,
        save_every=job.save_every,
        origin={**(origin or {}), "images": f"{images.subset} of {images.text}"},
    )
    if group.first and job.plot:
        plot_log(run / "log.png", log, config.name)
    for module in (model, teacher):
        if module is not None:
            module.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return TrainingResult(log, images, checks, test)


def weights_of(config: Config) -> str:
    """Name the weights that a model was loaded with or made from, with the start of their SHA-256."""
    source = config.float_source
    if WEIGHTS in config.files:
        return f"{config.name} {config.files[WEIGHTS][:16]}"
    return f"{source.source} {source.sha256[:16]}" if source is not None else "random"


def write_checkpoint(
    model: nn.Module,
    config: Config,
    metrics: tuple[Measurement, ...],
    done: TrainingResult,
    options: TrainOptions,
    job: TrainJob,
    processes: int,
    origin: dict[str, str] | None = None,
) -> Path:
    """Write the checkpoint folder of a finished training, with its card; returns it.

    Args:
        origin: of a tuned model: its target, and what it started from.
    """
    training = {**(origin or {}), **training_record(options, job, done, config.labels, processes)}
    config = made_on(config, job.data, done.images, "training")
    config = dataclasses.replace(config, metrics=metrics, training=training)
    folder = job.folder(config.name)
    save_pretrained(model, folder, form="packed" if config.scheme else "master", config=config)
    write_card(folder)
    return folder


def training_record(
    options: TrainOptions, job: TrainJob, done: TrainingResult, labels: str, processes: int = 1
) -> dict[str, Any]:
    """Record what repeats a training, and what it cost; threads are those of each process."""
    subset = done.images.subset if is_stream(job.data) else job.subset
    choices = {"dataset": job.dataset, "subset": subset, "evaluation_subset": job.evaluation_subset}
    return {
        "data": done.images.text,
        **{key: value for key, value in choices.items() if value},
        "images": done.images.count,
        **({"skipped": skipped} if (skipped := int(max(row.get("skipped", 0) for row in done.log))) else {}),
        "augmentation": data_set(labels).augmentation,
        "batch_size": job.batch_size,
        **dataclasses.asdict(options),
        **({"processes": processes} if processes > 1 else {}),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "loss": done.log[-1]["loss"],
        "seconds": round(sum(row["seconds"] for row in done.log)),
    }


def _check_classes(config: Config, data: str | Path | None) -> None:
    """A folder's classes are numbered by its own names: both splits must have the same. Those of a stream are compared
    with the model's."""
    if data is None or is_stream(data) or data_set(config.labels).classes is not None:
        return
    splits = [
        ImageFolder(split_folder(data, split), config.preprocessing).classes for split in ("train", "test")
    ]
    if splits[0] != splits[1]:
        other = sorted(set(splits[0]) ^ set(splits[1]))
        raise DataError(f"{data}: its splits have different classes ({', '.join(other[:5])} in one only)")
