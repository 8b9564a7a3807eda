"""Arguments of the post-training methods, of ``build`` and ``calibrate``."""

from __future__ import annotations

import argparse
from typing import Any

from qzoo.commands.arguments import layer_argument
from qzoo.scheme import DEFAULT_TARGET, TARGETS

_METHODS = ("equalize", "method", "rounding", "bias_correction", "smooth", "percentile", "alpha")


def recipe_arguments(sub: argparse.ArgumentParser) -> None:
    """``--recipe``, the methods one by one, and bits of layers; all None when not given."""
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
        "--percentile", type=float, metavar="P", help="of the methods percentile and auto (default: 99.99)"
    )
    sub.add_argument(
        "--equalize",
        action="store_const",
        const=True,
        help="cross-layer equalization before the ranges; a ReLU takes the place of every ReLU6 if the images allow it",
    )
    sub.add_argument("--smooth", action="store_const", const=True, help="SmoothQuant before the ranges")
    sub.add_argument("--alpha", type=float, help="of SmoothQuant, 0 to 1 (default: 0.5)")
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
    sub.add_argument(
        "--target",
        choices=list(TARGETS),
        help=f"runtime whose quantizers the methods see (default: {DEFAULT_TARGET})",
    )
    sub.add_argument("--float", dest="float_weights", help="folder or name of your own float checkpoint")
    sub.add_argument(
        "--edge-bits", type=int, help="bits of the first and the last layer (default: the scheme's)"
    )
    layer_argument(sub)


def given_methods(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a :class:`qzoo.ptq.Recipe` that were given."""
    return {name: getattr(args, name) for name in _METHODS if getattr(args, name) is not None}
