"""``qzoo train``: train, float or quantized."""

from __future__ import annotations

import argparse
from pathlib import Path

from qzoo.commands import Add


def register(add: Add) -> None:
    """Declare the command."""
    sub = add("train", _run, "Train a float model from scratch and save it as a checkpoint.")
    sub.add_argument("name", metavar="NAME", help="such as resnet20.fmnist")
    sub.add_argument("--data", type=Path, help="folder with the training set (default: found or downloaded)")
    sub.add_argument("--epochs", type=int, default=36)
    sub.add_argument("--batch-size", type=int, default=128)
    sub.add_argument("--lr", type=float, default=0.1)
    sub.add_argument("--weight-decay", type=float, default=5e-4)
    sub.add_argument("--label-smoothing", type=float, default=0.0)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    sub.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the state to resume from")
    sub.add_argument("--out", type=Path, help="folder of the checkpoint (default: model_cards/NAME)")


def _run(args: argparse.Namespace) -> int:
    from qzoo.train import TrainOptions
    from qzoo.train_checkpoint import train_checkpoint

    options = TrainOptions(
        epochs=args.epochs,
        lr=args.lr,
        weight_decay=args.weight_decay,
        label_smoothing=args.label_smoothing,
        seed=args.seed,
        bf16=args.bf16,
    )
    folder = train_checkpoint(
        args.name,
        options,
        data=args.data,
        batch_size=args.batch_size,
        runs=args.runs,
        out=args.out,
        progress=not args.quiet,
    )
    print(folder)
    return 0
