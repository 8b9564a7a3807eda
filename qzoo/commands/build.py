"""``qzoo build``: a checkpoint folder from float weights, in one command that goes on where it was."""

from __future__ import annotations

import argparse
from pathlib import Path

from qzoo.commands import Add
from qzoo.commands.recipe_arguments import recipe_arguments
from qzoo.scheme import TARGETS


def register(add: Add) -> None:
    """Declare the command."""
    sub = add(
        "build", _run, "Make a checkpoint: float weights, calibration (or training), ONNX, figures, card."
    )
    sub.add_argument("name", nargs="?", metavar="NAME", help="such as tf_efficientnet_lite0.in1k-w8a8")
    sub.add_argument("--all", action="store_true", help="every recipe that is not complete in --out")
    sub.add_argument("--data", type=Path, help="folder of images, one folder a class")
    sub.add_argument("--calibration-subset", metavar="START:STOP", help="images to calibrate on")
    sub.add_argument("--evaluation-subset", metavar="START:STOP", help="images to evaluate on")
    recipe_arguments(sub)
    sub.add_argument(
        "--edge-bits", type=int, help="bits of the first and the last layer (default: the scheme's)"
    )
    sub.add_argument(
        "--layer-bits", nargs="+", metavar="LAYER=BITS", help="bits of single layers, such as fc=4"
    )
    sub.add_argument(
        "--onnx",
        nargs="+",
        choices=list(TARGETS),
        default=["onnxruntime"],
        help="targets of the ONNX files in the folder (default: onnxruntime)",
    )
    sub.add_argument("--no-onnx", action="store_true", help="no ONNX files in the folder")
    sub.add_argument("--out", type=Path, help="folder (default: model_cards/NAME)")
    sub.add_argument("--runs", type=Path, default=Path("runs"), help="folder of what is finished")
    sub.add_argument("--again", action="store_true", help="repeat finished steps, too")
    sub.epilog = (
        "What no option says, the recipe says: config.json in the folder, in recipes/NAME, or in qzoo. Interrupted "
        "and started again, it goes on with the step it was in. A name in _qat is trained with its recipe's options."
    )


def _run(args: argparse.Namespace) -> int:
    from qzoo.build import build

    if args.all == (args.name is not None):
        raise ValueError("give a NAME or --all, one of them")
    if args.all:
        from qzoo.build_all import build_all

        failed = build_all(
            args.data, out=args.out or Path("model_cards"), runs=args.runs, progress=not args.quiet
        )
        return 1 if failed else 0
    folder = build(
        args.name,
        data=args.data,
        calibration_subset=args.calibration_subset,
        evaluation_subset=args.evaluation_subset,
        method=args.method,
        rounding=args.rounding,
        equalize=args.equalize,
        bias_correction=args.bias_correction,
        smooth=args.smooth,
        recipe=args.recipe,
        edge_bits=args.edge_bits,
        drop=args.mixed_precision,
        layer_bits=_layer_bits(args.layer_bits),
        float_weights=args.float_weights,
        onnx=() if args.no_onnx else args.onnx,
        out=args.out,
        runs=args.runs,
        again=args.again,
        report=None if args.quiet else print,
        progress=not args.quiet,
    )
    print(folder)
    return 0


def _layer_bits(texts: list[str] | None) -> dict[str, int] | None:
    if texts is None:
        return None
    pairs = [text.rpartition("=") for text in texts]
    wrong = [
        text for text, (name, _, bits) in zip(texts, pairs, strict=True) if not name or not bits.isdigit()
    ]
    if wrong:
        raise ValueError(f"--layer-bits takes LAYER=BITS, such as fc=4, not {wrong[0]!r}")
    return {name: int(bits) for name, _, bits in pairs}
