"""``qzoo verify``: checkpoints against their pins, cards and metrics."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qzoo.commands import Add

if TYPE_CHECKING:
    from qzoo.config import Config, Measurement
    from qzoo.data import Loader


def register(add: Add) -> None:
    """Declare the command."""
    sub = add("verify", _run, "Check that checkpoints are there, whole, and what their cards say.")
    sub.add_argument("names", nargs="*", metavar="NAME")
    sub.add_argument("--all", action="store_true", help="every checkpoint that the package knows")
    sub.add_argument("--data", type=Path, help="measure again on these images")
    sub.add_argument("--measure", action="store_true", help="measure Fashion-MNIST checkpoints again")


def _run(args: argparse.Namespace) -> int:
    from qzoo.data import load_data
    from qzoo.verify import Load, verify

    def images(config: Config, row: Measurement) -> Loader:
        return load_data(config.preprocessing, config.labels, args.data, subset=row.subset)

    load: Load | None = images if args.measure or args.data is not None else None
    findings = verify(None if args.all else args.names, load, progress=not args.quiet)
    for finding in findings:
        print(f"{'FAIL' if finding.problem else 'ok  '}  {finding.name}  {finding.place}  {finding.problem}")
    return 1 if any(finding.problem for finding in findings) else 0
