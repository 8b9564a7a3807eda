"""``qzoo quantize``: a checkpoint of any network of torchvision or timm, or of one's own."""

from __future__ import annotations

import argparse
from pathlib import Path

from qzoo.commands import Add, say
from qzoo.commands.arguments import (
    broken_argument,
    data_argument,
    given_fields,
    given_options,
    option_arguments,
    positive,
    workers_argument,
)
from qzoo.options import Plan, build_options
from qzoo.scheme import DEFAULT_TARGET, TARGETS, Scheme

_NAMES = ("method", "percentile", "affine", "layer_bits")
_OPTIONS = {n: option for n, option in build_options().items() if n in _NAMES}


def register(add: Add) -> None:
    """Declare the command."""
    sub = add("quantize", _run, "Quantize any network: place quantizers, calibrate, save.")
    sub.add_argument("network", metavar="NETWORK", help="timm:NAME, torchvision:NAME or FILE.py:FACTORY")
    sub.add_argument("--scheme", default="w8a8", help="bits (default: w8a8)")
    sub.add_argument(
        "--target", choices=list(TARGETS), default=DEFAULT_TARGET, help=f"default: {DEFAULT_TARGET}"
    )
    data_argument(sub, "images", required=True)
    broken_argument(sub)
    sub.add_argument("--subset", metavar="START:STOP", help="images to calibrate on (default: as qzoo build)")
    sub.add_argument("--size", type=positive, help="of the images (default: the network's, else 224)")
    sub.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help="modules that stay in float")
    sub.add_argument("--random", action="store_true", help="random weights in place of the package's own")
    option_arguments(sub, _OPTIONS)
    workers_argument(sub)
    sub.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    sub.add_argument("--onnx", type=Path, help="also write this ONNX file, for the target")


def _run(args: argparse.Namespace) -> int:
    import torch

    from qzoo.config import config_of
    from qzoo.distributed import Group
    from qzoo.export.onnx import export_onnx
    from qzoo.pipeline.calibrate import calibrate_to
    from qzoo.pipeline.parts import calibration_images
    from qzoo.pipeline.plan import Job
    from qzoo.placement.factory import build_float, preprocessing_of
    from qzoo.placement.model import quantize_as

    network = build_float(args.network, pretrained=not args.random, size=args.size)
    example = torch.zeros(1, *preprocessing_of(network, args.size).input_size)
    plan = Plan(calibration_subset=args.subset).changed(
        {**given_options(args, _OPTIONS), "target": args.target}
    )
    scheme = plan.scheme(Scheme.parse(args.scheme))
    chooses = args.affine is None
    model = quantize_as(network, example, scheme, tuple(args.exclude), args.network, choose_affine=chooses)
    config = config_of(model)
    images = calibration_images(config, args.data, args.subset)
    calibrate_to(args.out, model, plan, images, Job(**given_fields(args, Job)), Group())
    placed = str(model.qzoo_placement)
    say(f"{config.name} is in {args.out}" + (f"\n{placed}" if placed else ""))
    if args.onnx:
        export_onnx(model, args.onnx, target=args.target)
        say(f"wrote {args.onnx}")
    return 0
