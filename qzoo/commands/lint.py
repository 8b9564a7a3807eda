"""``qzoo lint``: what of a Q/DQ file will not run in int8."""

from __future__ import annotations

import argparse
import json
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from qzoo.commands import Add, say
from qzoo.errors import one_line
from qzoo.scheme import TARGETS

if TYPE_CHECKING:
    from qzoo.export.lint import Report

_SHOWN = 5


def register(add: Add) -> None:
    """Declare the command."""
    text = "Say what of a Q/DQ ONNX file will run slowly or in float, in which runtime, and why."
    sub = add("lint", _run, text)
    sub.add_argument("files", nargs="+", metavar="FILE", type=Path, help="ONNX files, of qzoo or not")
    sub.add_argument(
        "--target",
        choices=list(TARGETS),
        help="this runtime only (default: what the file was exported for, else all)",
    )
    sub.add_argument("--json", action="store_true", help="findings as JSON, all nodes listed")
    sub.epilog = "Exit status: 0 no findings, 1 findings, 2 the file can't be read."


def _run(args: argparse.Namespace) -> int:
    from qzoo.export.lint import examine

    findings = {}
    for file in args.files:
        report = examine(file, args.target)
        findings[file] = report.findings
        if not args.json:
            _print(file, report)
    if args.json:
        say(json.dumps({str(file): [f.to_dict() for f in rows] for file, rows in findings.items()}, indent=2))
    return 1 if any(findings.values()) else 0


def _print(file: Path, report: Report) -> None:
    findings, target = report.findings, report.target or "all targets"
    say(
        f"{one_line(str(file))}: {len(findings) or 'no'} finding{'' if len(findings) == 1 else 's'} for {target}"
    )
    for rule, group in groupby(findings, key=lambda finding: finding.rule):
        rows = list(group)
        say(f"\n{rule}: {len(rows)} x, hits {', '.join(rows[0].targets)}")
        say(f"  why: {one_line(rows[0].why)}\n  fix: {one_line(rows[0].fix)}")
        for row in rows[:_SHOWN]:
            say(f"  at   {one_line(' > '.join(row.nodes)) or 'the whole graph'}")
        if len(rows) > _SHOWN:
            say(f"  and {len(rows) - _SHOWN} more places (--json lists all)")
    say(("\n" if findings else "") + report.summary())
