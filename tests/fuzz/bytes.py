"""What disks, transfers and attackers do to bytes, and to JSON and headers that a loader reads."""

from __future__ import annotations

import random
from typing import Any

DTYPES = (
    *["F64", "F32", "F16", "BF16", "F8_E4M3", "I64", "I32", "I16", "I8", "U8", "BOOL", "U64", "F4", "C64"],
    "",
)
_NUMBERS = (
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\0\0\0\x80",
)


def damaged(content: bytes, rng: random.Random, head: int | None = None) -> bytes:
    """The content with one to four changes.

    Args:
        head: all changes are among so many first bytes.
    """
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        if not changed:
            break
        at = rng.randrange(min(len(changed), head or len(changed)))
        kind = rng.choice(("bit", "bit", "byte", "number", "cut", "drop", "insert", "zero", "repeat"))
        if kind == "bit":
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == "byte":
            changed[at] = rng.randrange(256)
        elif kind == "number":
            number = rng.choice(_NUMBERS)
            changed[at : at + len(number)] = number
        elif kind == "cut":
            del changed[rng.randrange(len(changed)) :]
        elif kind == "drop":
            del changed[at : at + rng.randint(1, 64)]
        elif kind == "insert":
            changed[at:at] = rng.randbytes(rng.randint(1, 8))
        elif kind == "zero":  # a block of a disk that was never written
            size = rng.choice((16, 512, 4096))
            changed[at : at + size] = bytes(len(changed[at : at + size]))
        else:
            size = rng.choice((1, 16, 512))
            changed[at:at] = changed[at : at + size]
    return bytes(changed)


def places(value: Any, prefix: tuple = ()) -> Any:
    """Every place inside nested JSON."""
    yield prefix
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*prefix, key))


def replaced(value: Any, place: tuple, change: Any) -> Any:
    """A copy with the item at ``place`` replaced by ``change``, or removed where that is ``...``."""
    if not place:
        return None if change is ... else change
    changed = dict(value) if isinstance(value, dict) else list(value)
    if len(place) == 1 and change is ...:
        del changed[place[0]]
    else:
        changed[place[0]] = replaced(value[place[0]], place[1:], change)
    return changed
