"""``qzoo verify``: checkpoints against their pins, cards and metrics."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qzoo.commands import Add

if TYPE_CHECKING:
    from qzoo.config import Config, Measurement
    from qzoo.data import Loader


PAGE = Path("docs/zoo.md")


def register(add: Add) -> None:
    """Declare the command."""
    sub = add("verify", _run, "Check that checkpoints are there, whole, and what their cards say.")
    sub.add_argument("names", nargs="*", metavar="NAME", help="of checkpoints, or their folders")
    sub.add_argument(
        "--all", action="store_true", help="every checkpoint that the package knows (the default)"
    )
    sub.add_argument(
        "--page", type=Path, help="the zoo's page (default with --all: docs/zoo.md, if it is here)"
    )
    sub.add_argument("--data", type=Path, help="measure again on these images")
    sub.add_argument("--measure", action="store_true", help="measure Fashion-MNIST checkpoints again")


def _run(args: argparse.Namespace) -> int:
    from qzoo.data import load_data
    from qzoo.verify import Load, verify, verify_page

    def images(config: Config, row: Measurement) -> Loader:
        return load_data(config.preprocessing, config.labels, args.data, subset=row.subset)

    load: Load | None = images if args.measure or args.data is not None else None
    everything = args.all or not (args.names or args.page)
    findings = verify(None if everything else args.names, load, progress=not args.quiet)
    page = args.page or (PAGE if everything and PAGE.is_file() else None)
    if page is not None:
        findings.append(verify_page(page))
    for f in findings:
        speedup = f"  speed-up {f.speedup}" if f.speedup else ""
        print(f"{'FAIL' if f.problem else 'ok  '}  {f.name}  {f.place}{speedup}  {f.problem}".rstrip())
    return 1 if any(f.problem for f in findings) else 0
