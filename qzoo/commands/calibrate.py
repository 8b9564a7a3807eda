"""``qzoo calibrate``: a quantized checkpoint from float weights, without measuring it."""

from __future__ import annotations

import argparse
from pathlib import Path

from qzoo.commands import Add, say
from qzoo.commands.arguments import checkpoint_folder, dataset_argument, layer_bits, process_arguments
from qzoo.commands.recipe_arguments import given_methods, recipe_arguments
from qzoo.errors import ArgumentError
from qzoo.scheme import DEFAULT_TARGET


def register(add: Add) -> None:
    """Declare the command."""
    sub = add(
        "calibrate", _run, "Quantize float weights by a post-training recipe; qzoo build also measures."
    )
    sub.add_argument("name", metavar="NAME", help="such as tf_efficientnet_lite0.in1k-w8a8")
    dataset_argument(sub)
    sub.add_argument("--data", type=Path, help="folder of images, one folder a class")
    sub.add_argument("--subset", metavar="START:STOP", help="images to calibrate on (default: as qzoo build)")
    recipe_arguments(sub)
    process_arguments(sub)
    sub.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")


def _run(args: argparse.Namespace) -> int:
    from qzoo.distributed import joined
    from qzoo.pipeline.calibrate import calibrate_checkpoint
    from qzoo.pipeline.summary import summary
    from qzoo.ptq import Recipe

    given = given_methods(args)
    if args.recipe and given:
        raise ArgumentError(f"--recipe {args.recipe} chooses {', '.join(given)} itself; leave them out")
    with joined(args.timeout, args.device) as group:
        done = calibrate_checkpoint(
            args.name,
            out=args.out,
            recipe=None if args.recipe else Recipe(**given),
            data=args.data,
            dataset=args.dataset,
            subset=args.subset,
            target=args.target or DEFAULT_TARGET,
            float_weights=checkpoint_folder(args.float_weights),
            drop=args.mixed_precision or 0.0,
            edge_bits=args.edge_bits,
            layer_bits=layer_bits(args.layer_bits),
            progress=not args.quiet and group.first,
            group=group,
        )
    if not group.first:
        return 0
    if done.held_back:
        seen = "that no recipe had seen" if args.recipe else "that the ranges come from"
        say(f"compared on {done.held_back} images {seen}; applied with {done.images}")
    if done.raised is not None:
        layers = ", ".join(done.raised.order) or "none is needed"
        say(f"raised to 8 bits: {layers}")
        bits = f"{done.raised.average_bits:.2f} bits a weight"
        say(f"agreement {done.raised.agreement:.2f} % on held-back images, {bits}")
    say(summary(args.out))
    return 0
