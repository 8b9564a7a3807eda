"""Rows of a report, for its forms."""

from __future__ import annotations

from typing import Any

from qzoo.bench.results import Row
from qzoo.bench.timing import Timing


def row(runtime: str, precision: str, wall: float, cpu: float, **changes: Any) -> Row:
    timing = {
        1: Timing(wall, 1.2 * wall, cpu, 1.2 * cpu, 30),
        8: Timing(8 * wall, 9 * wall, 8 * cpu, 9 * cpu, 30),
    }
    values: dict[str, Any] = {
        "model": "tf_efficientnet_lite0.in1k-w8a8",
        "runtime": runtime,
        "precision": precision,
        "images": 372,
        "top1": 86.8,
        "top1_interval": (83.0, 89.9),
        "agreement": 98.4,
        "sqnr_db": 19.25,
        "latency": timing,
        "cpu_speedup": {1: (2.0, 1.9, 2.1), 8: (2.5, 2.4, 2.6)},
        "wall_speedup": {1: (2.1, 1.8, 2.3), 8: (2.6, 2.2, 2.9)},
        "file_bytes": 4_952_105,
        "load_seconds": 0.1,
        "first_ms": 12.0,
    }
    return Row(**{**values, **changes})
