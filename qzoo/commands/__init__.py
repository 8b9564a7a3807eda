"""The commands of the ``qzoo`` tool, one file each: arguments in, one call of the library, a table out.

Each module has ``register(add)``, which declares its command: ``add(name, command, help)`` returns the parser
to add arguments to; ``command(args)`` returns the exit status.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

Command = Callable[[argparse.Namespace], int]
Add = Callable[[str, Command, str], argparse.ArgumentParser]
