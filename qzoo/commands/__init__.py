"""The commands of the ``qzoo`` tool, one file each: arguments in, one call of the library, a table out.

Each module has ``register(add)``, which declares its command: ``add(name, command, help)`` returns the parser
to add arguments to; ``command(args)`` returns the exit status. Commands print by :func:`say` alone, since names of
files and texts of configs may be a stranger's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from qzoo.errors import printable

Command = Callable[[argparse.Namespace], int]
Add = Callable[[str, Command, str], argparse.ArgumentParser]


def say(text: object) -> None:
    """Print a text to standard output, control characters escaped."""
    print(printable(str(text)))
