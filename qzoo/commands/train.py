"""``qzoo train``: train, float or quantized."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from qzoo.commands import Add, say
from qzoo.commands.arguments import (
    broken_argument,
    checkpoint_folder,
    data_source,
    dataset_argument,
    from_zero,
    given_fields,
    given_options,
    option_arguments,
    positive,
    process_arguments,
    workers_argument,
)
from qzoo.errors import ArgumentError
from qzoo.options import FINE_TUNING, TRAINING, TUNING, build_options, plain, train_options

_LAYERS = {"layer_bits": build_options()["layer_bits"]}


def register(add: Add) -> None:
    """Declare the command."""
    sub = add(
        "train",
        _run,
        "Train a float model, from scratch or from other weights, or tune a quantized one (..._qat).",
    )
    sub.add_argument("name", metavar="NAME", help="resnet20.fmnist or resnet20.fmnist-w4a4_qat")
    dataset_argument(sub, "what the name's tag says")
    sub.add_argument(
        "--data",
        type=data_source,
        metavar="FOLDER",
        help="the images: folder, hfds:NAME, wds:PATTERN, parquet:PATH or npz:FILE (Fashion-MNIST: found or loaded)",
    )
    sub.add_argument("--subset", metavar="START:STOP", help="part of the training images")
    sub.add_argument("--evaluation-subset", metavar="START:STOP", help="part of the images to measure on")
    broken_argument(sub)
    workers_argument(sub)
    sub.add_argument("--float", dest="float_weights", help="_qat: folder or name of your float checkpoint")
    sub.add_argument(
        "--start",
        help="weights to start from, folder or name: float ones to fine-tune; _qat: quantized, bits may differ",
    )
    option_arguments(sub, _LAYERS)
    sub.add_argument(
        "--batch-size", type=positive, default=128, help="of all processes together (default: 128)"
    )
    option_arguments(
        sub,
        train_options(),
        {name: _defaults(name) for name in ("epochs", "lr")},
    )
    sub.add_argument("--tensorboard", action="store_true", help="write events beside log.csv")
    sub.add_argument("--plot", action="store_true", help="draw the learning curve beside log.csv")
    sub.add_argument(
        "--save-every", type=from_zero, default=0, metavar="STEPS", help="save within epochs, too"
    )
    process_arguments(sub)
    sub.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the state to resume from")
    sub.add_argument("--out", type=Path, help="folder of the checkpoint (default: NAME in the store)")


def _defaults(name: str) -> str:
    start, again, tuned = (plain(getattr(options, name)) for options in (TRAINING, FINE_TUNING, TUNING))
    return f"{start}, fine-tuning {again}, tuning {tuned}"


def _run(args: argparse.Namespace) -> int:
    from qzoo.distributed import joined
    from qzoo.pipeline.summary import summary
    from qzoo.pipeline.train import train_checkpoint
    from qzoo.pipeline.train_job import TrainJob
    from qzoo.pipeline.tune import tune_checkpoint
    from qzoo.registry import parse_name

    tuned = parse_name(args.name).qat
    if not tuned and (args.float_weights or args.layer_bits):
        raise ArgumentError("--float and --layer-bits are for tuning: give a name in _qat")
    job = TrainJob(**given_fields(args, TrainJob))
    default = TUNING if tuned else FINE_TUNING if args.start else TRAINING
    options = replace(default, **given_options(args, train_options()))
    with joined(args.timeout, args.device) as group:
        if tuned:
            folder = tune_checkpoint(
                args.name,
                options,
                job,
                float_weights=checkpoint_folder(args.float_weights),
                start=args.start,
                layers=given_options(args, _LAYERS).get("layer_bits", ()),
                group=group,
            )
        else:
            folder = train_checkpoint(args.name, options, job, start=args.start, group=group)
    if group.first:
        if not args.quiet:
            say(summary(folder))
        say(folder)
    return 0
