"""The ``qzoo`` command: its commands are the files of :mod:`qzoo.commands`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from qzoo.commands import Command
from qzoo.commands.arguments import import_argument, import_given, positive
from qzoo.errors import QzooError, printable
from qzoo.version import __version__

COMMANDS = (
    "list",
    "predict",
    "benchmark",
    "evaluate",
    "inspect",
    "sensitivity",
    "build",
    "calibrate",
    "train",
    "export",
    "lint",
    "card",
    "publish",
    "verify",
    "env",
)

_WITHOUT_MODELS = ("lint", "env")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status (2 for an error that the message explains).

    What qzoo or the system refuses is one line; anything else is a mistake, of qzoo or of a package under it, and
    keeps its traceback.
    """
    parser = _parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help(sys.stderr)
        return 2
    args = parser.parse_args(argv)
    if args.threads is not None:
        import torch

        torch.set_num_threads(args.threads)
    command: Command = args.command
    try:
        import_given(args)
        return command(args)
    except (QzooError, OSError) as error:
        print(f"qzoo: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qzoo: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qzoo", description="Pre-quantized vision models, measured.")
    parser.add_argument("--version", action="version", version=f"qzoo {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        sub.add_argument("--threads", type=positive, help="threads that torch may use (default: all cores)")
        sub.add_argument("-q", "--quiet", action="store_true", help="no progress bars")
        if name not in _WITHOUT_MODELS:
            import_argument(sub)
        return sub

    for name in COMMANDS:
        import_module(f"qzoo.commands.{name}").register(add)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
