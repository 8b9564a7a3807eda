"""The number formats: integer bounds, the smallest usable range, the 8-bit floating-point limits."""

from __future__ import annotations

TINY = 2.0**-24
"""Ranges at or below this quantize everything to zero."""

FP8_LIMIT = {"e4m3": 448.0, "e5m2": 57344.0}
"""Largest finite value of each 8-bit floating-point format (OCP FP8 specification)."""


def bounds(num_bits: int, unsigned: bool = False, narrow_range: bool = True) -> tuple[int, int]:
    """Get the lowest and highest integer of a format; fewer than two signed bits leave only 0.

    >>> bounds(8), bounds(8, narrow_range=False), bounds(8, unsigned=True)
    ((-127, 127), (-128, 127), (0, 255))
    """
    width = num_bits - 1 + unsigned
    high = 2**width - 1 if width > 0 else 0
    if unsigned or high == 0:
        return 0, high
    return (-high if narrow_range else -high - 1), high
