"""``train_checkpoint``: a model trained from scratch on Fashion-MNIST, evaluated, saved as a checkpoint folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from qzoo.cards import write_card
from qzoo.checkpoint import save_pretrained
from qzoo.config import Config, config_of
from qzoo.data import load_data
from qzoo.data.fashion_mnist import fashion_mnist
from qzoo.data.tensors import TensorLoader, crop_flip_erase
from qzoo.distributed import Group
from qzoo.errors import DataError
from qzoo.evaluate import evaluate
from qzoo.measurements import measurement
from qzoo.parts import Images
from qzoo.train import TrainOptions, train
from qzoo.train_state import plot_log
from qzoo.zoo import create_model


def train_checkpoint(
    name: str,
    options: TrainOptions | None = None,
    *,
    data: str | Path | None = None,
    batch_size: int = 128,
    runs: str | Path = "runs",
    out: str | Path | None = None,
    tensorboard: bool = False,
    plot: bool = False,
    progress: bool = True,
    group: Group | None = None,
) -> Path:
    """Train ``arch.fmnist`` from random weights; the last epoch's weights are the result, whatever their accuracy.

    Killed and called again with the same arguments, it goes on with the epoch it was in.

    Args:
        name: such as ``"resnet20.fmnist"``.
        options: of the training; the defaults if None.
        data: folder with the training set's idx files (default: found, or downloaded).
        batch_size: images a step.
        runs: folder whose subfolder ``name`` holds the state to resume from and ``log.csv``.
        out: checkpoint folder; ``model_cards/<name>`` by default.
        tensorboard: write the log for TensorBoard, too, beside ``log.csv``.
        plot: draw the learning curve, ``log.png`` beside ``log.csv``.
        group: the processes that train together; rank 0 alone measures the result and writes.

    Returns:
        The checkpoint folder: config.json with options and metrics, master weights, card.

    Raises:
        DataError: the model is not one for Fashion-MNIST, or the training set can't be had.
    """
    options, group = options or TrainOptions(), group or Group()
    torch.manual_seed(options.seed)
    model = create_model(name)
    config = config_of(model)
    if config.labels != "fashion-mnist":
        raise DataError(f"{name} is not trained on Fashion-MNIST; give a name such as 'resnet20.fmnist'")
    with group.first_alone():
        loader = training_images(config, data, batch_size, options)
    test = load_data(config.preprocessing, config.labels, batch_size=500)
    run = Path(runs) / name
    log = train(
        model,
        loader,
        options,
        out=run,
        eval_loader=test,
        tensorboard=tensorboard,
        progress=progress,
        group=group,
    )
    folder = Path(out) if out is not None else Path("model_cards") / name
    if not group.first:
        return folder
    if plot:
        plot_log(run / "log.png", log, name)
    model.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    result = evaluate(model, test, progress=progress)
    images_tested = Images("Fashion-MNIST test", "test", f"0:{result.images}", result.images)
    measured = measurement(result, images_tested, "torch", "float", None)
    config = dataclasses.replace(
        config,
        metrics=(measured,),
        training=training_record(options, batch_size, len(loader.labels), log, group.world),
    )
    save_pretrained(model, folder, form="master", config=config)
    write_card(folder)
    return folder


def training_images(
    config: Config, data: str | Path | None, batch_size: int, options: TrainOptions
) -> TensorLoader:
    """The 60,000 training images, shuffled and augmented anew in each epoch.

    Raises:
        DataError: the training set can't be had.
    """
    images, labels = fashion_mnist("train", data)
    return TensorLoader(
        images,
        labels,
        config.preprocessing,
        batch_size,
        shuffle=True,
        augment=crop_flip_erase,
        seed=options.seed,
    )


def training_record(
    options: TrainOptions, batch_size: int, images: int, log: list[dict[str, float]], processes: int = 1
) -> dict[str, Any]:
    """What the training needs to be repeated, and what it cost; threads are those of each process."""
    return {
        "data": "Fashion-MNIST train",
        "images": images,
        "augmentation": "shift by up to 2 pixels, mirror, random erasing with probability 0.5",
        "batch_size": batch_size,
        **dataclasses.asdict(options),
        **({"processes": processes} if processes > 1 else {}),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "loss": log[-1]["loss"],
        "seconds": round(sum(row["seconds"] for row in log)),
    }
