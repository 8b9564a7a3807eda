"""``qzoo new``: a project with one architecture of one's own."""

from __future__ import annotations

import argparse
from pathlib import Path

from qzoo.commands import Add, say


def register(add: Add) -> None:
    """Declare the command."""
    sub = add("new", _run, "Start a project with one architecture of your own: definition, test, commands.")
    sub.add_argument("name", help="of the architecture, its module and its folder, such as my_net")
    sub.add_argument(
        "--from",
        dest="start",
        metavar="NETWORK",
        help="timm:NAME or torchvision:NAME, as a worked example of where quantizers go (default: a template)",
    )
    sub.add_argument("--out", type=Path, default=Path(), help="where to make the folder (default: here)")


def _run(args: argparse.Namespace) -> int:
    from qzoo.zoo.project import write_project

    folder = write_project(args.name, args.out, args.start)
    say(
        f"{folder}: cd there, pip install -e '.[test]' && pytest; README.md has the commands to train and to build"
    )
    return 0
