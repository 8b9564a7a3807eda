"""``tune_checkpoint``: quantization-aware training of a float checkpoint on Fashion-MNIST, saved packed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from qzoo.build import record
from qzoo.calibrate import calibrate
from qzoo.cards import write_card
from qzoo.checkpoint import save_pretrained
from qzoo.config import config_of
from qzoo.data import load_data
from qzoo.distributed import Group
from qzoo.errors import DataError, UnknownModelError
from qzoo.measurements import measure
from qzoo.parts import Images, calibration_images
from qzoo.ptq import Recipe, round_biases
from qzoo.quant.calib import calibrate_weights
from qzoo.registry import parse_name
from qzoo.scheme import set_target
from qzoo.train import TrainOptions, train
from qzoo.train_checkpoint import training_images, training_record
from qzoo.train_state import plot_log
from qzoo.zoo import create_model, float_model

TARGET = "onnxruntime"  # non-negative activations are unsigned: at 4 bits, 15 levels instead of 7
CALIBRATION = "0:2048"


def tune_checkpoint(
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
    """Tune ``arch.fmnist-<scheme>_qat`` from the float checkpoint ``arch.fmnist``, its teacher too.

    The ranges start as the mean-squared-error ones of 2,048 training images. The last epoch's weights are the result,
    whatever their accuracy. Killed and called again with the same arguments, it goes on with the epoch it was in.

    Args:
        name: such as ``"resnet20.fmnist-w4a4_qat"``.
        options, data, batch_size, runs, out, tensorboard, plot, group: as of
            :func:`qzoo.train_checkpoint.train_checkpoint`.

    Returns:
        The checkpoint folder: config.json with options and metrics, packed weights, card.

    Raises:
        UnknownModelError: no name of a tuned checkpoint.
        DataError: the model is not one for Fashion-MNIST, or the training set can't be had.
    """
    options, group = options or TrainOptions(epochs=4, lr=0.001), group or Group()
    parsed = parse_name(name)
    if parsed.scheme is None or not parsed.qat:
        raise UnknownModelError(
            f"{name!r} is not the name of a tuned checkpoint, such as resnet20.fmnist-w4a4_qat"
        )
    with group.first_alone():
        model = create_model(name, pretrained="float", target=TARGET)
    config = config_of(model)
    if config.labels != "fashion-mnist":
        raise DataError(
            f"{name} is not trained on Fashion-MNIST; give a name such as resnet20.fmnist-w4a4_qat"
        )
    chosen = calibration_images(config, data, CALIBRATION)
    with group.first_alone():
        loader = training_images(config, data, batch_size, options)
    images = load_data(
        config.preprocessing, config.labels, data, split="train", subset=chosen.subset, batch_size=256
    )
    found = calibrate(model, images, method="mse", progress=progress, group=group)
    if config.scheme is not None and config.scheme.weight_bits < 8:
        calibrate_weights(model, "mse")
    teacher = float_model(config)
    test = load_data(config.preprocessing, config.labels, batch_size=500)
    teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    run = Path(runs) / name
    log = train(
        model,
        loader,
        options,
        out=run,
        eval_loader=test,
        teacher=teacher,
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
    teacher.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    round_biases(model, next(iter(test))[0], target=TARGET)
    checks = Images("Fashion-MNIST test", "test", "0:10000", 10_000)
    metrics = measure(model, teacher, lambda: test, checks, progress, (TARGET,))
    config = dataclasses.replace(
        config,
        metrics=metrics,
        calibration=record(found, chosen, Recipe(method="mse"), None),
        training={
            "target": TARGET,
            **training_record(options, batch_size, len(loader.labels), log, group.world),
        },
    )
    save_pretrained(set_target(model, "tensorrt"), folder, form="packed", config=config)
    write_card(folder)
    return folder
