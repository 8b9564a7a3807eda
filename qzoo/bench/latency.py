"""Record a benchmark's latencies in the config of the checkpoint that was timed, for its card."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qzoo.bench.results import SCHEMA
from qzoo.cards.card import write_card
from qzoo.config import Config, Latency, read_config
from qzoo.errors import QzooError
from qzoo.files import write_text
from qzoo.scheme import TARGETS

_TAIL = (
    1.5  # 90th percentile over median of the wall time, beyond which a latency is no property of the model
)


def record_latency(
    folder: str | Path, report: str | Path | Mapping[str, Any], *, busy: bool = False
) -> Config:
    """Write a benchmark's latencies into a checkpoint's config.json, and its card anew.

    Only its own rows count, float and quantized; a simulation in PyTorch has no latency worth a name.

    Args:
        folder: the checkpoint.
        report: ``benchmark.json``, or :meth:`qzoo.bench.results.Report.to_dict`.
        busy: take figures that the report itself doubts.

    Returns:
        The new config.

    Raises:
        QzooError: no such report, or one of another schema, without the checkpoint, or whose figures are
            doubtful.
    """
    path = Path(folder) / "config.json"
    config = read_config(folder)
    values = report if isinstance(report, Mapping) else _read(Path(report))
    try:
        if values["schema"] != SCHEMA:
            raise QzooError(
                f"the report has schema {values['schema']}; this qzoo reads schema {SCHEMA}: measure again"
            )
        if values["warnings"] and not busy:
            raise QzooError(f"the report doubts its own figures: {' '.join(values['warnings'])}")
        rows = latencies(config, values)
        disturbed = [row for row in rows if row.p90_ms > _TAIL * row.median_ms]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise QzooError(f"this is no report of qzoo benchmark ({type(error).__name__}: {error})") from error
    if not rows:
        models = sorted({row["model"] for row in values["rows"]})
        raise QzooError(f"the report times {', '.join(models)}, not {config.name}")
    if disturbed and not busy:
        row = disturbed[0]
        raise QzooError(
            f"a tenth of the calls of {row.precision} in {row.runtime} took more than {row.p90_ms / row.median_ms:.1f} "
            "times the median: the machine did something else too; measure again on a quiet one"
        )
    config = dataclasses.replace(config, latency=rows)
    write_text(path, config.to_json())
    write_card(folder)
    return config


def latencies(config: Config, report: Mapping[str, Any]) -> tuple[Latency, ...]:
    """Collect a checkpoint's rows of a report, one for each batch size."""
    machine, threads = report["machine"], int(report["settings"]["threads"])
    where = f"{machine['processor']} ({machine.get('instruction sets', 'instruction sets unknown')})"
    rows = []
    for row in report["rows"]:
        is_float = row["precision"] == "float32"
        simulated = row["runtime"] == "pytorch" and not is_float
        if row["model"] != config.name or row["source"] != "qzoo" or simulated:
            continue
        runtime = "torch" if row["runtime"] == "pytorch" else str(row["runtime"])
        package = machine.get(runtime, "version unknown")
        for batch in row["batches"]:
            speedup = batch[f"speedup_{row['clock']}"]
            rows.append(
                Latency(
                    runtime=runtime,
                    precision="float" if is_float else str(config.scheme),
                    target=None if is_float or runtime not in TARGETS else runtime,
                    batch=int(batch["batch"]),
                    threads=threads,
                    median_ms=float(batch["wall_ms"]),
                    p90_ms=float(batch["wall_p90_ms"]),
                    speedup=None if is_float else float(speedup["ratio"]),
                    machine=where,
                    versions=f"qzoo {machine['qzoo']}, {runtime} {package}",
                    date=str(report["date"])[:10],
                    speedup_interval=None if is_float else (float(speedup["low"]), float(speedup["high"])),
                    speedup_clock="wall" if is_float else str(row["clock"]),
                )
            )
    return tuple(rows)


def speedup_text(config: Config) -> str:
    """Format the speed-up over float in ONNX Runtime at the smallest batch; "" where none is recorded."""
    rows = [r for r in config.latency if r.runtime == "onnxruntime" and r.speedup is not None]
    if not rows:
        return ""
    row = min(rows, key=lambda r: r.batch)
    threads = f"{row.threads} thread{'s' if row.threads > 1 else ''}"
    clock = "" if row.speedup_clock == "cpu" else ", wall time"
    return f"{row.speedup:.2f} (batch {row.batch}, {threads}{clock})"


def _read(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise QzooError(f"{path} can't be read as a report of qzoo benchmark ({error})") from error
    if not isinstance(values, dict):
        raise QzooError(f"{path} is no report of qzoo benchmark")
    return values


def timed_models(report: Path) -> set[str]:
    """List the models that a report has timed. Raises QzooError for anything but a report."""
    try:
        return {str(row["model"]) for row in _read(report)["rows"]}
    except (KeyError, TypeError) as error:
        raise QzooError(f"{report} is no report of qzoo benchmark") from error
