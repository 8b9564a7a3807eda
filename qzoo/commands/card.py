"""``qzoo card``: cards, latencies, the zoo table and the zoo's page, from config.json."""

from __future__ import annotations

import argparse
from pathlib import Path

from qzoo.commands import Add, say
from qzoo.commands.arguments import own_folder
from qzoo.errors import ArgumentError


def register(add: Add) -> None:
    """Declare the command."""
    sub = add("card", _run, "Write cards, and the tables of the zoo, anew from the checkpoints' config.json.")
    sub.add_argument(
        "folders", nargs="*", metavar="FOLDER", help="of checkpoints, or their names in the store"
    )
    sub.add_argument(
        "--benchmark",
        type=Path,
        metavar="FILE",
        help="benchmark.json (of qzoo benchmark --out) whose latencies to record in those it has timed",
    )
    sub.add_argument(
        "--busy", action="store_true", help="record latencies although the benchmark doubts them"
    )
    sub.add_argument("--readme", type=Path, help="a README whose zoo table to write anew, too")
    sub.add_argument("--page", type=Path, help="the zoo's page, docs/zoo.md, to write anew, too")


def _run(args: argparse.Namespace) -> int:
    from qzoo.bench.latency import record_latency, timed_models
    from qzoo.cards.card import write_card
    from qzoo.config import read_config
    from qzoo.release.tables import update_readme
    from qzoo.release.zoo_page import write_page

    if not (args.folders or args.readme or args.page):
        raise ArgumentError("give checkpoint folders, --readme or --page")
    names = {folder: read_config(folder).name for folder in map(own_folder, args.folders)}
    timed = timed_models(args.benchmark) if args.benchmark is not None else set()
    if args.benchmark is not None and not timed & set(names.values()):
        folders = ", ".join(names.values()) or "no checkpoint, as no FOLDER is given"
        raise ArgumentError(
            f"{args.benchmark} times {', '.join(sorted(timed))}; it has no latencies of {folders}"
        )
    for folder, name in names.items():
        if name in timed:
            config = record_latency(folder, args.benchmark, busy=args.busy)
            say(f"{folder}: {len(config.latency)} latencies")
        say(write_card(folder))
    if args.readme is not None and update_readme(args.readme):
        say(args.readme)
    if args.page is not None and write_page(args.page):
        say(args.page)
    return 0
