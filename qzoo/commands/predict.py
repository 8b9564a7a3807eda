"""``qzoo predict``: top labels of photos."""

from __future__ import annotations

import argparse
from pathlib import Path

from qzoo.commands import Add, say
from qzoo.commands.arguments import positive
from qzoo.errors import one_line
from qzoo.runtimes import RUNTIMES


def register(add: Add) -> None:
    """Declare the command."""
    sub = add("predict", _run, "Top labels of photos, by default int8 in ONNX Runtime.")
    sub.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    sub.add_argument(
        "--model",
        default="tf_efficientnet_lite0",
        help="name, folder, or org/name on the Hub (default: tf_efficientnet_lite0)",
    )
    sub.add_argument("--top", type=positive, default=5, help="labels to print (default: 5)")
    sub.add_argument(
        "--runtime",
        choices=RUNTIMES,
        default="onnxruntime",
        metavar="NAME",
        help=f"one of {', '.join(RUNTIMES)}",
    )


def _run(args: argparse.Namespace) -> int:
    from qzoo.prediction import predict

    for image, labels in zip(
        args.images, predict(args.images, args.model, args.runtime, k=args.top), strict=True
    ):
        if len(args.images) > 1:
            say(one_line(str(image)))
        for label, probability in labels:
            say(f"{100 * probability:6.2f} %  {one_line(label)}")
    return 0
