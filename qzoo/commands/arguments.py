"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path


def data_arguments(sub: argparse.ArgumentParser) -> None:
    """``--data`` and ``--subset``."""
    sub.add_argument("--data", type=Path, help="folder of labelled images (not needed for Fashion-MNIST)")
    sub.add_argument("--subset", metavar="START:STOP", help="part of the images, in a fixed shuffled order")
