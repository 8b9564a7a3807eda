"""Show one progress bar for everything that takes time, on standard error; off a terminal, a plain line at the end."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from qzoo.errors import one_line

T = TypeVar("T")


def length(items: Iterable[object]) -> int | None:
    """Return ``len(items)``, None where there is none (as of a ``DataLoader`` of a stream)."""
    try:
        return len(items) if isinstance(items, Sized) else None
    except TypeError:
        return None


def track(items: Iterable[T], title: str, total: int | None = None, show: bool = True) -> Iterator[T]:
    """Yield the items while a bar with rate and remaining time advances.

    Args:
        title: what is being done, in a few words.
        total: number of items; ``len(items)`` when it has one.
        show: False yields silently.
    """
    if not show:
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    total = length(items) if total is None else total
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, Remaining(), console=Console(file=sys.stderr)) as bar:
        yield from bar.track(items, total=total, description=one_line(title))
