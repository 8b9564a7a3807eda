"""``qzoo calibrate``: a quantized checkpoint from float weights, without measuring it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from qzoo.commands import Add, say
from qzoo.commands.arguments import (
    broken_argument,
    checkpoint_folder,
    data_argument,
    dataset_argument,
    given_fields,
    given_options,
    option_arguments,
    process_arguments,
)
from qzoo.options import Plan, build_options

_OPTIONS = {name: option for name, option in build_options().items() if not name.endswith("_subset")}


def register(add: Add) -> None:
    """Declare the command."""
    sub = add(
        "calibrate", _run, "Quantize float weights by a post-training recipe; qzoo build also measures."
    )
    sub.add_argument("name", metavar="NAME", help="such as tf_efficientnet_lite0.in1k-w8a8")
    dataset_argument(sub)
    data_argument(sub, "images")
    broken_argument(sub)
    sub.add_argument("--subset", metavar="START:STOP", help="images to calibrate on (default: as qzoo build)")
    option_arguments(sub, _OPTIONS)
    process_arguments(sub)
    sub.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")


def _run(args: argparse.Namespace) -> int:
    from qzoo.distributed import joined
    from qzoo.pipeline.calibrate import calibrate_checkpoint
    from qzoo.pipeline.plan import Job
    from qzoo.pipeline.summary import summary

    plan = Plan(calibration_subset=args.subset).changed(given_options(args, _OPTIONS))
    job = Job(**given_fields(args, Job))
    with joined(args.timeout, args.device) as group:
        plan = replace(plan, float_weights=checkpoint_folder(args.float_weights))
        done = calibrate_checkpoint(args.name, plan, job, group=group)
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
