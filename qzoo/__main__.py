"""The ``qzoo`` command: its commands are the files of :mod:`qzoo.commands`."""

from __future__ import annotations

import os
import sys

# Python's own -m puts the current folder first on the path, where a numpy.py would be imported in place of NumPy.
# A checkout of qzoo that it runs from stays.
if (
    __name__ == "__main__"
    and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False))
    and os.path.abspath(sys.path[0]) != os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
):
    sys.path.pop(0)

import argparse
import contextlib
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import NoReturn

from qzoo.commands import Command
from qzoo.commands.arguments import import_argument, import_given, positive
from qzoo.errors import QzooError, printable
from qzoo.version import __version__

COMMANDS = (
    "list",
    "predict",
    "benchmark",
    "survey",
    "evaluate",
    "inspect",
    "sensitivity",
    "build",
    "calibrate",
    "quantize",
    "train",
    "new",
    "export",
    "lint",
    "card",
    "publish",
    "verify",
    "env",
)

_TIMED = ("benchmark", "survey")
_WITHOUT_MODELS = ("lint", "env", "new")


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
        with _escape_warnings():
            import_given(args)
            return command(args)
    except (QzooError, OSError) as error:
        print(f"qzoo: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qzoo: interrupted", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Refuse arguments, which a shell may have made of the names of a stranger's files."""
        super().error(printable(message))


@contextlib.contextmanager
def _escape_warnings() -> Iterator[None]:
    """Warnings name files and layers, too."""
    original = warnings.formatwarning

    def escaped(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        return printable(original(message, category, filename, lineno, line))

    warnings.formatwarning = escaped
    try:
        yield
    finally:
        warnings.formatwarning = original


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="qzoo", description="Pre-quantized vision models, measured.")
    parser.add_argument("--version", action="version", version=f"qzoo {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        timed = "threads that a timed call may use (default: 1)"
        usual = "threads that torch may use (default: all cores)"
        sub.add_argument("--threads", type=positive, help=timed if name in _TIMED else usual)
        sub.add_argument("-q", "--quiet", action="store_true", help="no progress bars")
        if name not in _WITHOUT_MODELS:
            import_argument(sub)
        return sub

    for name in COMMANDS:
        import_module(f"qzoo.commands.{name}").register(add)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
