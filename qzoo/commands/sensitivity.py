"""``qzoo sensitivity``: which layers lose most by quantization."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from qzoo.commands import Add, say
from qzoo.commands.arguments import data_arguments, positive
from qzoo.errors import ArgumentError, one_line
from qzoo.registry import parse_name
from qzoo.scheme import TARGETS

if TYPE_CHECKING:
    from qzoo.config import Config

_SHOWN = 2  # layers that are proposed for float


def register(add: Add) -> None:
    """Declare the command."""
    sub = add("sensitivity", _run, "Layers of a checkpoint, ranked by what their quantization costs.")
    sub.add_argument("name", metavar="NAME", help="of a checkpoint, its folder, or org/name on the Hub")
    data_arguments(sub)
    sub.add_argument("--target", choices=list(TARGETS), help="default: what it was made for")
    sub.add_argument("--images", type=positive, default=64, help="number of images (default: 64)")
    sub.add_argument("--out", type=Path, help="JSON file to write as well")


def _run(args: argparse.Namespace) -> int:
    import qzoo
    from qzoo.config import config_of
    from qzoo.data.files import broken_images
    from qzoo.files import write_text
    from qzoo.pipeline.parts import measured_images
    from qzoo.zoo.create import open_model

    if args.out is not None and (args.out.is_dir() or not args.out.parent.is_dir()):
        raise ArgumentError(f"--out {args.out}: give a file in a folder that is there")
    model = open_model(args.name, args.target)
    config = config_of(model)
    images, _ = measured_images(config, args.data, args.subset)
    loader = images.load(config, args.data, skip_broken=args.skip_broken)
    report = qzoo.sensitivity(model, loader, images=args.images, progress=not args.quiet)
    target = args.target or config.target
    say(f"{one_line(args.name)}, target {target}, {report}")
    if skipped := broken_images(loader):
        say(f"skipped {skipped} images that do not decode")
    costly = [x.name for x in report.layers if any(q.startswith("weight") for q in x.quantizers)][:_SHOWN]
    if costly:
        flags = " ".join(f"{one_line(name)}=float" for name in costly)
        say(f"to keep the costliest layers in float: qzoo {_maker(config)} --layer-bits {flags}")
    if args.out is not None:
        values = {"model": args.name, "target": target, **report.to_dict()}
        write_text(args.out, json.dumps(values, indent=2) + "\n")
    return 0


def _maker(config: Config) -> str:
    """The command that makes such a checkpoint."""
    if config.factory:
        return f"quantize {config.factory} --out FOLDER --data DIR"
    return f"train {config.name}" if parse_name(config.name).qat else f"build {config.name}"
