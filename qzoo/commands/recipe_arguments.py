"""Arguments of the post-training methods, of ``build`` and ``calibrate``."""

from __future__ import annotations

import argparse
from pathlib import Path


def recipe_arguments(sub: argparse.ArgumentParser) -> None:
    """``--recipe`` and the methods one by one; all None when not given."""
    sub.add_argument(
        "--recipe",
        choices=["best"],
        help="try all recipes on the calibration images, part of them held back, and take the best",
    )
    sub.add_argument(
        "--method",
        choices=["auto", "max", "percentile", "mse", "entropy", "batchnorm"],
        help="of the ranges (default: auto); batchnorm needs no images",
    )
    sub.add_argument(
        "--equalize", action="store_const", const=True, help="cross-layer equalization before the ranges"
    )
    sub.add_argument("--smooth", action="store_const", const=True, help="SmoothQuant before the ranges")
    sub.add_argument(
        "--rounding", choices=["nearest", "learned", "sequential"], help="of weights (default: nearest)"
    )
    sub.add_argument(
        "--bias-correction",
        choices=["none", "analytic", "empirical"],
        help="of what rounding to nearest shifts (default: none)",
    )
    sub.add_argument(
        "--mixed-precision",
        type=float,
        metavar="DROP",
        help="8 bits for the layers that need them, until at most DROP %% of held-back images change their top-1",
    )
    sub.add_argument("--float", type=Path, dest="float_weights", help="folder of your own float checkpoint")
