"""Markdown for cards and tables."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from qzoo.errors import one_line
from qzoo.options import plain

_Value = TypeVar("_Value")
_SPECIAL = re.compile(r"[\\`*<>\[\]|!]")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,:=/@+-]*")


def escaped(value: _Value) -> _Value:
    """Escape every text in a value, such as a config, so that Markdown shows it as it is."""
    result: Any = value
    if isinstance(value, str):
        result = _SPECIAL.sub(r"\\\g<0>", one_line(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: escaped(getattr(value, f.name)) for f in dataclasses.fields(value)}
        result = dataclasses.replace(value, **changed)
    elif isinstance(value, dict):
        result = {escaped(key): escaped(item) for key, item in value.items()}
    elif isinstance(value, (list, tuple)):
        result = type(value)(map(escaped, value))
    return result


def word(value: object) -> str:
    """Write a text of a config as an argument of a printed command; three dots where a shell would expand it."""
    text = plain(value)
    return text if isinstance(value, (int, float)) or _WORD.fullmatch(text) else "..."


def number(value: float | None) -> str:
    """Format a number with two digits; "" for None."""
    return "" if value is None else f"{value:.2f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def without_broken(skipped: int) -> str:
    """Say how many images were left out because they do not decode; nothing where none were."""
    return f", without {skipped} that {'does' if skipped == 1 else 'do'} not decode" if skipped else ""
