"""What a benchmark found: rows and the report around them, as plain values with a JSON form."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qzoo.bench.timing import Timing
from qzoo.fields import finite

SCHEMA = 3
"""Version of the JSON form; it rises when a field changes its meaning."""

_BUSY = 1.25  # wall time over CPU time of a single thread, beyond which the machine did something else too
_SPREAD = 1.5  # 90th percentile over median, beyond which turns of one kind differ


@dataclass(frozen=True)
class PeerSpeedup:
    """How many times as fast as a peer's int8 model of the same weights, by the row's clock, with its 95 % interval.

    Attributes:
        peer, runtime: whose model, and where it ran.
    """

    peer: str
    runtime: str
    batch: int
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One model in one runtime at one precision.

    Attributes:
        runtime, precision: such as ``"onnxruntime"``, ``"int8"``.
        source: who quantized it: ``"qzoo"``, or a peer such as ``"quantize_static"``.
        images: number of labelled images behind the accuracy; 0 for an ONNX file that there were none for.
        top1, top1_interval: percent, with the 95 % Wilson interval; None without images.
        agreement: percent of images with the float model's top-1, in PyTorch, of an ONNX file in ONNX Runtime; None
            for a file that has no float model beside it.
        sqnr_db: of the logits against the same; infinite where they are equal.
        latency: by batch size, milliseconds a call.
        cpu_speedup: by batch size, how many times as fast as float32 in the same runtime, by CPU time: ratio of the
            medians and its 95 % bootstrap interval; empty without a float model.
        wall_speedup: the same by wall time.
        clock: which of the two tables and cards show. ``"cpu"`` for one thread of the processor, which other work on
            the machine changes least; ``"wall"`` for several threads, whose CPU time is no waiting time, and for GPUs.
        file_bytes: the ONNX file, the state dict for float PyTorch; None for the simulation, which has no file.
        load_seconds, first_ms: loading the model, and its first call.
        peak_rss_bytes: the most memory that the process of this model alone had while it was loaded and timed; None
            where the system does not tell.
        idle_rss_bytes: the process's memory before, with the runtime imported.
        against: of an int8 model of qzoo, its speed against each peer.
    """

    model: str
    runtime: str
    precision: str
    images: int
    top1: float | None
    top1_interval: tuple[float, float] | None
    agreement: float | None
    sqnr_db: float | None
    latency: dict[int, Timing]
    cpu_speedup: dict[int, tuple[float, float, float]]
    wall_speedup: dict[int, tuple[float, float, float]]
    file_bytes: int | None
    load_seconds: float
    first_ms: float
    peak_rss_bytes: int | None = None
    idle_rss_bytes: int | None = None
    source: str = "qzoo"
    clock: str = "cpu"
    against: tuple[PeerSpeedup, ...] = ()

    @property
    def speedup(self) -> dict[int, tuple[float, float, float]]:
        """How many times as fast as float32, by the row's clock."""
        return self.cpu_speedup if self.clock == "cpu" else self.wall_speedup

    @property
    def spread(self) -> float:
        """90th percentile over median of the time that the speed-ups are of; the largest of the batch sizes."""
        pairs = [
            (t.cpu_p90, t.cpu) if self.clock == "cpu" else (t.wall_p90, t.wall) for t in self.latency.values()
        ]
        return max((tail / median for tail, median in pairs if median > 0), default=1.0)

    @property
    def label(self) -> str:
        """Runtime and precision, or runtime and peer."""
        return f"{self.runtime} {self.precision if self.source == 'qzoo' else self.source}"

    @property
    def images_per_second(self) -> float:
        """Throughput at the largest batch, by the median of the wall time."""
        batch = max(self.latency)
        return 1e3 * batch / self.latency[batch].wall

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; an infinite SQNR becomes None."""
        values = {k: v for k, v in vars(self).items() if k not in ("latency", "cpu_speedup", "wall_speedup")}
        values["sqnr_db"] = finite(self.sqnr_db)
        values["images_per_second"] = self.images_per_second
        values["against"] = [asdict(entry) for entry in self.against]
        values["batches"] = [
            {
                "batch": batch,
                "wall_ms": timing.wall,
                "wall_p90_ms": timing.wall_p90,
                "cpu_ms": timing.cpu,
                "cpu_p90_ms": timing.cpu_p90,
                "calls": timing.calls,
                "wall_over_cpu": timing.wall_over_cpu,
                "speedup_cpu": _named(self.cpu_speedup.get(batch)),
                "speedup_wall": _named(self.wall_speedup.get(batch)),
            }
            for batch, timing in self.latency.items()
        ]
        return values


def _named(ratio: tuple[float, float, float] | None) -> dict[str, float] | None:
    return None if ratio is None else dict(zip(("ratio", "low", "high"), ratio, strict=True))


@dataclass(frozen=True)
class Report:
    """Rows, and what their figures depend on.

    Attributes:
        date: when, ISO 8601, UTC.
        settings: threads, batch sizes, seconds a measurement.
        machine: processor and versions (:func:`qzoo.bench.environment.describe`).
        notes: what was asked for and not measured, and why.
        details: of each model, what is known of its layers (:func:`qzoo.bench.layers.model_details`),
            empty if not asked.
    """

    rows: tuple[Row, ...]
    date: str
    settings: dict[str, Any]
    machine: dict[str, str]
    notes: tuple[str, ...] = ()
    details: tuple[dict[str, Any], ...] = ()

    @property
    def models(self) -> list[str]:
        """Names of the models, in the order of the rows."""
        return list(dict.fromkeys(row.model for row in self.rows))

    def warnings(self) -> list[str]:
        """List what makes the figures doubtful, in sentences; empty on a quiet machine."""
        lines = []
        alone = [t for row in self.rows if row.clock == "cpu" for t in row.latency.values()]
        busy = max((t.wall_over_cpu for t in alone), default=1.0)
        if busy > _BUSY:
            lines.append(
                f"The machine was busy: up to {busy:.1f} times as much wall time as CPU time passed. The speed-ups are "
                "by CPU time; measure again on a quiet machine for latencies."
            )
        spread = max((row.spread for row in self.rows), default=1.0)
        if spread > _SPREAD:
            lines.append(
                f"The calls differed: the slowest tenth took at least {spread:.1f} times as long as the median. Look "
                "at the intervals; other work on the machine, or a changing clock, does this."
            )
        governor = self.machine.get("frequency governor", "unknown")
        if governor not in ("performance", "unknown"):
            lines.append(
                f"The frequency governor is {governor!r}: the clock follows the load; set 'performance'."
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary, documented in docs/benchmark.md."""
        return {
            "schema": SCHEMA,
            "date": self.date,
            "settings": self.settings,
            "machine": self.machine,
            "warnings": self.warnings(),
            "notes": list(self.notes),
            "rows": [row.to_dict() for row in self.rows],
            "details": list(self.details),
        }
