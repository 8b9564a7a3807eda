"""A benchmark's report as terminal tables, JSON, CSV, a page and a plot."""

from __future__ import annotations

import csv
import io
import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qzoo.bench.results import Report, Row
from qzoo.cards.figures import clocks_in_words
from qzoo.errors import one_line
from qzoo.files import write_text


def print_table(report: Report) -> None:
    """Print all rows to standard output: accuracy and latency, then what the models cost besides.

    As wide as the terminal; where there is none, as the tables need, at least 120 columns.
    """
    from rich.console import Console

    console, tables = Console(), (_table(report), _costs(report))
    if not console.is_terminal:
        console = Console(width=max(120, *(Console(width=1000).measure(table).maximum for table in tables)))
    for table in tables:
        console.print(table)
    for line in footnotes(report):
        console.print(one_line(line), highlight=False, markup=False)


def footnotes(report: Report) -> list[str]:
    """List the notes that belong to the figures, a line each."""
    machine, settings = report.machine, report.settings
    versions = [
        f"{p} {machine[p]}"
        for p in ("torch", "onnxruntime", "openvino")
        if machine.get(p, "not") != "not installed"
    ]
    threads = "1 thread" if settings["threads"] == 1 else f"{settings['threads']} threads"
    return [
        f"{machine['processor']}, {threads}, {report.date}; qzoo {machine['qzoo']}, {', '.join(versions)}",
        "ms: wall time a call, median / 90th percentile. x: times as fast as float32 in the same runtime, "
        f"{clocks_in_words(row.clock for row in report.rows)}.",
        "[ ]: 95 % interval. agree: share of images with the float PyTorch model's top-1. peak MB: memory of a process "
        "that runs this model alone.",
        *_comparisons(report),
        *report.notes,
        *report.warnings(),
    ]


def _comparisons(report: Report) -> list[str]:
    """A line for each int8 model and peer: how many times as fast as the peer."""
    lines = []
    for row in report.rows:
        for peer, runtime in dict.fromkeys((a.peer, a.runtime) for a in row.against):
            ratios = [
                f"{a.ratio:.2f} [{a.low:.2f}, {a.high:.2f}] at batch {a.batch}"
                for a in row.against
                if (a.peer, a.runtime) == (peer, runtime)
            ]
            where = "" if runtime == row.runtime else f" in {runtime}"
            lines.append(f"{row.model} in {row.runtime}, times as fast as {peer}{where}: {', '.join(ratios)}")
    return lines


def _table(report: Report) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    batches = report.settings["batches"]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("model / runtime, precision", no_wrap=True)
    for title in ("top-1 %", "agree %"):
        table.add_column(title, justify="right", no_wrap=True)
    for batch in batches:
        table.add_column(f"ms, batch {batch}", justify="right", no_wrap=True)
    for title in ("images/s", "MB", f"x, batch {'/'.join(map(str, batches))}"):
        table.add_column(title, justify="right", no_wrap=True)
    for model in report.models:
        rows = [row for row in report.rows if row.model == model]
        table.add_row(_bold(model), f"{rows[0].images} images")
        for row in rows:
            table.add_row(*_cells(row, batches))
        table.add_section()
    return table


def _costs(report: Report) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    batches = report.settings["batches"]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("model / runtime, precision", no_wrap=True)
    titles = ("load s", "first ms", "idle MB", "peak MB", *(f"CPU ms, batch {b}" for b in batches), "SQNR dB")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for model in report.models:
        table.add_row(_bold(model))
        for row in (row for row in report.rows if row.model == model):
            memory = ["" if m is None else _digits(m / 1e6) for m in (row.idle_rss_bytes, row.peak_rss_bytes)]
            cpu = [f"{_digits(row.latency[b].cpu)}/{_digits(row.latency[b].cpu_p90)}" for b in batches]
            head = (f"  {_plain(row.label)}", f"{row.load_seconds:.2f}", _digits(row.first_ms))
            table.add_row(*head, *memory, *cpu, _cell(row.sqnr_db))
        table.add_section()
    return table


def _cells(row: Row, batches: list[int]) -> list[str]:
    interval = row.top1_interval
    top1 = "" if interval is None else f"{_cell(row.top1)} \\[{interval[0]:.1f}, {interval[1]:.1f}]"
    latency = [f"{_digits(row.latency[b].wall)}/{_digits(row.latency[b].wall_p90)}" for b in batches]
    return [
        f"  {_plain(row.label)}",
        top1,
        _cell(row.agreement),
        *latency,
        f"{row.images_per_second:.0f}",
        "" if row.file_bytes is None else _digits(row.file_bytes / 1e6),
        " / ".join(f"{row.speedup[b][0]:.2f}" for b in batches if b in row.speedup),
    ]


def _bold(text: str) -> str:
    return f"[bold]{_plain(text)}[/bold]"


def _plain(text: str) -> str:
    """A name of a file or a config: neither markup of the table's nor control characters."""
    from rich.markup import escape

    return escape(one_line(text))


def _cell(value: float | None) -> str:
    """Two digits; nothing where nothing was measured."""
    return "" if value is None else f"{value:.2f}"


def _digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def write_report(report: Report, folder: str | Path) -> list[Path]:
    """Write ``benchmark.json``, ``benchmark.csv``, ``benchmark.html`` and, with matplotlib, ``benchmark.png``.

    Returns:
        The files written. Without matplotlib the picture is left out, with a warning that says what to install.
    """
    from qzoo.bench.page import write_page

    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"benchmark.{kind}" for kind in ("json", "csv", "html")]
    write_text(paths[0], json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n")
    write_csv(report, paths[1])
    write_page(report, paths[2])
    if find_spec("matplotlib") is None:
        warnings.warn("no picture without matplotlib: pip install 'qzoo[plot]'", stacklevel=2)
        return paths
    from qzoo.bench.plot import plot

    return [*paths, plot(report, out / "benchmark.png")]


def write_csv(report: Report, path: Path) -> None:
    """Write a line for each row and batch size; the machine and the date are in every line."""
    lines = []
    for row in report.rows:
        values = row.to_dict()
        low, high = values.pop("top1_interval") or (None, None)
        del values["against"]
        for batch in values.pop("batches"):
            speedups = {
                f"{key}_{k}": v
                for key in ("speedup_cpu", "speedup_wall")
                for k, v in (batch.pop(key) or dict.fromkeys(("ratio", "low", "high"))).items()
            }
            facts = {
                "threads": report.settings["threads"],
                "date": report.date,
                "processor": report.machine["processor"],
            }
            lines.append({**values, "top1_low": low, "top1_high": high, **batch, **speedups, **facts})
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(lines[0]) if lines else [])
    writer.writeheader()
    writer.writerows(lines)
    write_text(path, file.getvalue())
