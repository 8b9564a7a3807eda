"""``qzoo card``: cards and the zoo table from config.json."""

from __future__ import annotations

import argparse
from pathlib import Path

from qzoo.commands import Add


def register(add: Add) -> None:
    """Declare the command."""
    sub = add("card", _run, "Write the cards of checkpoint folders anew, from their config.json.")
    sub.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    sub.add_argument("--readme", type=Path, help="a README whose zoo table to write anew, too")


def _run(args: argparse.Namespace) -> int:
    from qzoo.cards import write_card
    from qzoo.tables import update_readme

    for folder in args.folders:
        print(write_card(folder))
    if args.readme is not None and update_readme(args.readme):
        print(args.readme)
    return 0
