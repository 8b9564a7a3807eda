"""The number scheme once more, in NumPy, from its definition: what the torch code is tested against."""

from __future__ import annotations

import numpy as np


def fake_quantize(x, amax, bits=8, unsigned=False, narrow=True):
    """float32 in, float32 out; amax broadcasts."""
    x = np.asarray(x, dtype=np.float32)
    amax = np.asarray(amax, dtype=np.float32)
    high = np.float32(2 ** (bits - 1 + unsigned) - 1)
    low = np.float32(0 if unsigned else (-high if narrow else -high - 1))
    dead = amax <= 2.0**-24
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        scale = np.where(dead, np.float32(1), high / amax).astype(np.float32)
        q = np.clip(np.round(x * scale), low, high)
    return np.where(dead, np.float32(0), q / scale).astype(np.float32)


def e4m3_values():
    """All finite non-negative E4M3 values, by their bit patterns."""
    values = []
    for byte in range(0x7F):
        exponent, mantissa = byte >> 3, byte & 7
        values.append(mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return np.array(values)


def nearest_e4m3(x):
    """Round to the nearest value, ties to the even mantissa, saturating."""
    table = e4m3_values()
    x = np.asarray(x, dtype=np.float64)
    distance = np.abs(np.abs(x)[..., None] - table)
    best = distance.min(-1, keepdims=True)
    ties = distance == best
    even = (np.arange(len(table)) % 2) == 0
    index = np.where(ties.sum(-1) > 1, (ties & even).argmax(-1), ties.argmax(-1))
    return np.sign(x) * table[index]
