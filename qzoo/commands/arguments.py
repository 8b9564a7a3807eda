"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path


def process_arguments(sub: argparse.ArgumentParser, device: str = "cpu") -> None:
    """``--device``, and ``--timeout`` of the processes that torchrun starts."""
    sub.add_argument(
        "--device",
        choices=["cpu", "cuda", "auto"],
        default=device,
        help=f"auto: a GPU for each process where there are enough (default: {device})",
    )
    sub.add_argument(
        "--timeout",
        type=float,
        default=1800.0,
        metavar="SECONDS",
        help="under torchrun: how long a process waits for the others (default: 1800)",
    )


def data_arguments(sub: argparse.ArgumentParser) -> None:
    """``--data`` and ``--subset``."""
    sub.add_argument("--data", type=Path, help="folder of labelled images (not needed for Fashion-MNIST)")
    sub.add_argument("--subset", metavar="START:STOP", help="part of the images, in a fixed shuffled order")
