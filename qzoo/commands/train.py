"""``qzoo train``: train, float or quantized."""

from __future__ import annotations

import argparse
from pathlib import Path

from qzoo.commands import Add
from qzoo.commands.arguments import process_arguments


def register(add: Add) -> None:
    """Declare the command."""
    sub = add(
        "train",
        _run,
        "Train a float model from scratch, or tune a quantized one (..._qat), and save the checkpoint.",
    )
    sub.add_argument("name", metavar="NAME", help="resnet20.fmnist or resnet20.fmnist-w4a4_qat")
    sub.add_argument("--data", type=Path, help="folder with the training set (default: found or downloaded)")
    sub.add_argument("--epochs", type=int, default=36)
    sub.add_argument("--batch-size", type=int, default=128, help="of all processes together (default: 128)")
    sub.add_argument("--lr", type=float, default=0.1)
    sub.add_argument("--weight-decay", type=float, default=5e-4)
    sub.add_argument("--label-smoothing", type=float, default=0.0)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
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
    process_arguments(sub)
    sub.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the state to resume from")
    sub.add_argument("--out", type=Path, help="folder of the checkpoint (default: model_cards/NAME)")


def _run(args: argparse.Namespace) -> int:
    from qzoo.distributed import joined
    from qzoo.registry import parse_name
    from qzoo.train import TrainOptions
    from qzoo.train_checkpoint import train_checkpoint
    from qzoo.tune_checkpoint import tune_checkpoint

    options = TrainOptions(
        epochs=args.epochs,
        lr=args.lr,
        weight_decay=args.weight_decay,
        label_smoothing=args.label_smoothing,
        seed=args.seed,
        bf16=args.bf16,
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
    make = tune_checkpoint if parse_name(args.name).qat else train_checkpoint
    with joined(args.timeout, args.device) as group:
        folder = make(
            args.name,
            options,
            data=args.data,
            batch_size=args.batch_size,
            runs=args.runs,
            out=args.out,
            tensorboard=args.tensorboard,
            plot=args.plot,
            progress=not args.quiet,
            group=group,
        )
    if group.first:
        print(folder)
    return 0
