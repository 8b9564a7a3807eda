"""``qzoo env``: what runs here."""

from __future__ import annotations

import argparse

from qzoo.commands import Add, say


def register(add: Add) -> None:
    """Declare the command."""
    add("env", _run, "Versions, processor, and which kernels run.")


def _run(args: argparse.Namespace) -> int:
    from qzoo.bench.environment import describe

    for key, value in describe().items():
        say(f"{key:22} {value}")
    return 0
