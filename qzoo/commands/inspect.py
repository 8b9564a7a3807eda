"""``qzoo inspect``: the quantizers of a checkpoint as a tree."""

from __future__ import annotations

import argparse

from qzoo.commands import Add, say
from qzoo.commands.arguments import data_arguments, from_zero
from qzoo.scheme import TARGETS


def register(add: Add) -> None:
    """Declare the command."""
    sub = add("inspect", _run, "Quantizers of a checkpoint: bits, ranges, saturation, dead levels.")
    sub.add_argument("name", metavar="NAME", help="of a checkpoint, its folder, or org/name on the Hub")
    data_arguments(sub)
    sub.add_argument("--target", choices=list(TARGETS), help="default: what it was made for")
    sub.add_argument(
        "--images", type=from_zero, default=64, help="images to count activations on; 0: none (default: 64)"
    )


def _run(args: argparse.Namespace) -> int:
    import qzoo
    from qzoo.config import config_of
    from qzoo.data import load_data
    from qzoo.data.files import broken_images
    from qzoo.data.sets import is_embedded
    from qzoo.zoo.create import open_model

    model = open_model(args.name, args.target)
    config = config_of(model)
    loader = None
    if args.images and (args.data is not None or is_embedded(config.labels)):
        loader = load_data(
            config.preprocessing,
            config.labels,
            args.data,
            subset=args.subset,
            batch_size=32,
            skip_broken=args.skip_broken,
        )
    say(qzoo.inspect(model, loader, images=args.images))
    if skipped := broken_images(loader):
        say(f"skipped {skipped} images that do not decode")
    return 0
