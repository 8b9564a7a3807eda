"""What a benchmark found: rows and the report around them, as plain values with a JSON form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from qzoo.timing import Timing

SCHEMA = 1
"""Version of the JSON form; it rises when a field changes its meaning."""

_BUSY = 1.25  # wall time over CPU time of a single thread, beyond which the machine did something else too


@dataclass(frozen=True)
class Row:
    """One model in one runtime at one precision.

    Attributes:
        runtime, precision: such as ``"onnxruntime"``, ``"int8"``.
        images: number of labelled images behind the accuracy.
        top1, top1_interval: percent, with the 95 % Wilson interval.
        agreement: percent of images with the float PyTorch model's top-1.
        sqnr_db: of the logits against the float PyTorch model; infinite where they are equal.
        latency: by batch size, milliseconds a call.
        speedup: by batch size, how many times as fast as float32 in the same runtime, by CPU time: ratio of the
            medians and its 95 % bootstrap interval.
        wall_speedup: the same by wall time.
        file_bytes: the ONNX file, the state dict for float PyTorch; None for the simulation, which has no file.
        load_seconds, first_ms: loading the model, and its first call.
    """

    model: str
    runtime: str
    precision: str
    images: int
    top1: float
    top1_interval: tuple[float, float]
    agreement: float
    sqnr_db: float
    latency: dict[int, Timing]
    speedup: dict[int, tuple[float, float, float]]
    wall_speedup: dict[int, tuple[float, float, float]]
    file_bytes: int | None
    load_seconds: float
    first_ms: float

    @property
    def images_per_second(self) -> float:
        """At the largest batch, by the median of the wall time."""
        batch = max(self.latency)
        return 1e3 * batch / self.latency[batch].wall

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; an infinite SQNR becomes None."""
        values = {k: v for k, v in vars(self).items() if k not in ("latency", "speedup", "wall_speedup")}
        values["sqnr_db"] = self.sqnr_db if math.isfinite(self.sqnr_db) else None
        values["images_per_second"] = self.images_per_second
        values["batches"] = [
            {
                "batch": batch,
                "wall_ms": timing.wall,
                "wall_p90_ms": timing.wall_p90,
                "cpu_ms": timing.cpu,
                "cpu_p90_ms": timing.cpu_p90,
                "calls": timing.calls,
                "speedup_cpu": dict(zip(("ratio", "low", "high"), self.speedup[batch], strict=True)),
                "speedup_wall": dict(zip(("ratio", "low", "high"), self.wall_speedup[batch], strict=True)),
            }
            for batch, timing in self.latency.items()
        ]
        return values


@dataclass(frozen=True)
class Report:
    """Rows, and what their figures depend on.

    Attributes:
        date: when, ISO 8601, UTC.
        settings: threads, batch sizes, seconds a measurement.
        machine: processor and versions (:func:`qzoo.environment.describe`).
    """

    rows: tuple[Row, ...]
    date: str
    settings: dict[str, Any]
    machine: dict[str, str]

    @property
    def models(self) -> list[str]:
        """Names of the models, in the order of the rows."""
        return list(dict.fromkeys(row.model for row in self.rows))

    def warnings(self) -> list[str]:
        """What makes the figures doubtful, in sentences; empty on a quiet machine."""
        if self.settings["threads"] != 1:
            return []
        worst = max(
            (t.wall / t.cpu for row in self.rows for t in row.latency.values() if t.cpu > 0), default=1.0
        )
        if worst <= _BUSY:
            return []
        return [
            f"The machine was busy: up to {worst:.1f} times as much wall time as CPU time passed. The speed-ups are by "
            "CPU time; measure again on a quiet machine for latencies."
        ]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary: schema, date, settings, machine, warnings, rows."""
        return {
            "schema": SCHEMA,
            "date": self.date,
            "settings": self.settings,
            "machine": self.machine,
            "warnings": self.warnings(),
            "rows": [row.to_dict() for row in self.rows],
        }
