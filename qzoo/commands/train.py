"""``qzoo train``: train, float or quantized."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qzoo.commands import Add
from qzoo.commands.arguments import (
    checkpoint_folder,
    dataset_argument,
    layer_argument,
    layer_bits,
    process_arguments,
)
from qzoo.errors import ArgumentError

if TYPE_CHECKING:
    from qzoo.options import TrainOptions


def register(add: Add) -> None:
    """Declare the command."""
    sub = add(
        "train",
        _run,
        "Train a float model, from scratch or from other weights, or tune a quantized one (..._qat).",
    )
    sub.add_argument("name", metavar="NAME", help="resnet20.fmnist or resnet20.fmnist-w4a4_qat")
    dataset_argument(sub, "what the name's tag says")
    sub.add_argument("--data", type=Path, help="folder of the images (Fashion-MNIST: found or downloaded)")
    sub.add_argument("--subset", metavar="START:STOP", help="part of the training images")
    sub.add_argument("--evaluation-subset", metavar="START:STOP", help="part of the images to measure on")
    sub.add_argument("--workers", type=int, default=0, help="processes that decode images (default: 0)")
    sub.add_argument("--float", dest="float_weights", help="_qat: folder or name of your float checkpoint")
    sub.add_argument(
        "--start",
        help="weights to start from, folder or name: float ones to fine-tune; _qat: quantized, bits may differ",
    )
    layer_argument(sub)
    sub.add_argument("--epochs", type=int, help="default: 36, fine-tuning 10, tuning 4")
    sub.add_argument("--batch-size", type=int, default=128, help="of all processes together (default: 128)")
    sub.add_argument("--lr", type=float, help="default: 0.1, fine-tuning 0.01, tuning 0.001")
    sub.add_argument("--weight-decay", type=float, default=5e-4)
    sub.add_argument("--label-smoothing", type=float, default=0.0)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    sub.add_argument("--fp16", action="store_true", help="float16 autocast and a scaled loss, on a GPU")
    sub.add_argument("--method", choices=["ste", "lsq", "pact"], default="ste", help="ranges (default: ste)")
    sub.add_argument("--range-lr", type=float, default=1.0, help="of learned ranges, times lr (default: 1)")
    sub.add_argument("--range-decay", type=float, default=0.0, help="weight decay of learned ranges")
    sub.add_argument("--distill", type=float, default=0.0, help="weight of the float model's probabilities")
    sub.add_argument("--temperature", type=float, default=4.0, help="of the distillation (default: 4)")
    sub.add_argument("--freeze-bn", type=float, default=0.0, help="last share of epochs with fixed BatchNorm")
    sub.add_argument("--ema", type=float, default=0.0, help="decay of averaged weights (default: none)")
    sub.add_argument("--accumulate", type=int, default=1, help="batches a step (default: 1)")
    sub.add_argument("--warmup", type=float, default=0.05, help="share of rising rate (default: 0.05)")
    sub.add_argument("--tensorboard", action="store_true", help="write events beside log.csv")
    sub.add_argument("--plot", action="store_true", help="draw the learning curve beside log.csv")
    sub.add_argument("--save-every", type=int, default=0, metavar="STEPS", help="save within epochs, too")
    process_arguments(sub)
    sub.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the state to resume from")
    sub.add_argument("--out", type=Path, help="folder of the checkpoint (default: NAME in the store)")


def _run(args: argparse.Namespace) -> int:
    from qzoo.distributed import joined
    from qzoo.options import TrainOptions
    from qzoo.pipeline.summary import summary
    from qzoo.pipeline.train import FINE_TUNING, train_checkpoint
    from qzoo.pipeline.train_job import TrainJob
    from qzoo.pipeline.tune import DEFAULTS, tune_checkpoint
    from qzoo.registry import parse_name

    tuned = parse_name(args.name).qat
    if not tuned and (args.float_weights or args.layer_bits):
        raise ArgumentError("--float and --layer-bits are for tuning: give a name in _qat")
    job = TrainJob(
        data=args.data,
        dataset=args.dataset,
        subset=args.subset,
        evaluation_subset=args.evaluation_subset,
        batch_size=args.batch_size,
        workers=args.workers,
        save_every=args.save_every,
        runs=args.runs,
        out=args.out,
        tensorboard=args.tensorboard,
        plot=args.plot,
        progress=not args.quiet,
    )
    default = DEFAULTS if tuned else FINE_TUNING if args.start else TrainOptions(epochs=36)
    options = _options(args, default.epochs, default.lr)
    with joined(args.timeout, args.device) as group:
        if tuned:
            folder = tune_checkpoint(
                args.name,
                options,
                job,
                float_weights=checkpoint_folder(args.float_weights),
                start=args.start,
                layers=layer_bits(args.layer_bits) or (),
                group=group,
            )
        else:
            folder = train_checkpoint(args.name, options, job, start=args.start, group=group)
    if group.first:
        if not args.quiet:
            print(summary(folder))
        print(folder)
    return 0


def _options(args: argparse.Namespace, epochs: int, lr: float) -> TrainOptions:
    from qzoo.options import TrainOptions

    return TrainOptions(
        epochs=epochs if args.epochs is None else args.epochs,
        lr=lr if args.lr is None else args.lr,
        weight_decay=args.weight_decay,
        label_smoothing=args.label_smoothing,
        seed=args.seed,
        bf16=args.bf16,
        fp16=args.fp16,
        warmup=args.warmup,
        method=args.method,
        range_lr=args.range_lr,
        range_decay=args.range_decay,
        distill=args.distill,
        temperature=args.temperature,
        freeze_bn=args.freeze_bn,
        ema=args.ema,
        accumulate=args.accumulate,
    )
