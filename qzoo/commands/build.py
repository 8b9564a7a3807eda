"""``qzoo build``: a checkpoint folder from float weights, in one command that goes on where it was."""

from __future__ import annotations

import argparse
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
    workers_argument,
)
from qzoo.errors import ArgumentError
from qzoo.options import BuildOptions, build_options
from qzoo.scheme import TARGETS


def register(add: Add) -> None:
    """Declare the command."""
    sub = add(
        "build", _run, "Make a checkpoint: float weights, calibration (or training), ONNX, figures, card."
    )
    sub.add_argument("name", nargs="?", metavar="NAME", help="such as tf_efficientnet_lite0.in1k-w8a8")
    sub.add_argument(
        "--all", action="store_true", help="every recipe by calibration that is not complete in --out"
    )
    sub.add_argument(
        "--qat", action="store_true", help="with --all: the recipes that train, too, hours on a GPU for each"
    )
    sub.add_argument(
        "--engine",
        choices=["local", "ray"],
        default="local",
        help="with --all: one after the other, or many at a time on a Ray cluster (default: local)",
    )
    sub.add_argument(
        "--address",
        help="of the Ray cluster, auto or HOST:6379 (default: one on this machine)",
    )
    dataset_argument(sub)
    data_argument(sub, "images")
    broken_argument(sub)
    workers_argument(sub)
    process_arguments(sub)
    option_arguments(sub, build_options())
    sub.add_argument(
        "--onnx",
        nargs="+",
        choices=list(TARGETS),
        default=["onnxruntime"],
        help="targets of the ONNX files in the folder (default: onnxruntime)",
    )
    sub.add_argument("--no-onnx", action="store_true", help="no ONNX files in the folder")
    sub.add_argument(
        "--out", type=Path, help="folder (default: NAME in the store); with --all the folder of the folders"
    )
    sub.add_argument("--runs", type=Path, default=Path("runs"), help="folder of what is finished")
    sub.add_argument("--again", action="store_true", help="repeat finished steps, too")
    sub.epilog = (
        "The store is the folder QZOO_HOME, by default qzoo in your data folder: what is in it is found by its name. "
        "What no option says, the recipe says: config.json in the folder, or qzoo's own. Interrupted "
        "and started again, it goes on with the step it was in. A name in _qat is trained with its recipe's options, "
        "on the images in DIR/train; --all leaves these out, as a calibration takes minutes and a training hours: "
        "--qat adds them."
    )


def _run(args: argparse.Namespace) -> int:
    import torch

    from qzoo.distributed import joined
    from qzoo.pipeline.build import build
    from qzoo.pipeline.build_all import build_all
    from qzoo.pipeline.cluster import Cluster
    from qzoo.pipeline.plan import BuildJob
    from qzoo.pipeline.summary import summary

    if args.all == (args.name is not None):
        raise ArgumentError("give a NAME or --all, one of them")
    if args.qat and not args.all:
        raise ArgumentError("--qat is for --all; a NAME in _qat is trained without it")
    options = BuildOptions(**given_options(args, build_options()))  # type: ignore[typeddict-item]
    if args.all and options:
        raise ArgumentError(f"--all builds recipes as they are; leave out {', '.join(options)}")
    if args.engine == "ray" and not args.all:
        raise ArgumentError("--engine ray is for --all; torchrun shares one NAME out")
    if args.address and args.engine != "ray":
        raise ArgumentError("--address is for --engine ray")
    onnx = () if args.no_onnx else tuple(args.onnx)
    if args.engine == "ray":
        job = BuildJob(**{**given_fields(args, BuildJob), "device": torch.device("cpu"), "onnx": onnx})
        cluster = Cluster(args.address, args.device, args.threads, tuple(args.imports))
        return _all(build_all(job, qat=args.qat, cluster=cluster))
    with joined(args.timeout, args.device) as group:
        if group.world > 1 and args.all:
            raise ArgumentError("torchrun is for one NAME; --all --engine ray shares checkpoints out")
        job = BuildJob(**{**given_fields(args, BuildJob), "device": group.device, "onnx": onnx})
        if args.all:
            return _all(build_all(job, qat=args.qat))
        options["float_weights"] = checkpoint_folder(args.float_weights)
        report = say if group.first and not args.quiet else None
        folder = build(args.name, options, job, report=report, group=group)
    if group.first:
        if not args.quiet:
            say(summary(folder))
        say(folder)
    return 0


def _all(failed: dict[str, str]) -> int:
    """The exit status of ``--all``, after a line of those that failed."""
    if failed:
        say(f"{len(failed)} failed: {', '.join(failed)}")
    return 1 if failed else 0
