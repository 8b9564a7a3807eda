"""``qzoo list``: list architectures or checkpoints."""

from __future__ import annotations

import argparse

from qzoo.commands import Add


def register(add: Add) -> None:
    """Declare the command."""
    sub = add("list", _run, "List architectures, or checkpoints with --pretrained.")
    sub.add_argument("pattern", nargs="?", default="*", help="shell pattern, such as 'resnet*'")
    sub.add_argument("--pretrained", action="store_true", help="names that have weights")


def _run(args: argparse.Namespace) -> int:
    import qzoo

    for name in qzoo.list_models(args.pattern, pretrained=args.pretrained):
        print(name)
    return 0
