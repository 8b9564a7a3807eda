"""A survey as a terminal table, CSV, a page, a picture and a table in Markdown."""

from __future__ import annotations

import csv
import io
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qzoo.bench.survey import FILE, Survey, SurveyRow
from qzoo.cards.markdown import table
from qzoo.errors import one_line
from qzoo.files import write_text

HEAD = ("architecture", "float top-1, %", "image", "parameters, M", "float, ms", "int8, ms", "speed-up")


def rows(survey: Survey) -> list[tuple[str, ...]]:
    """Make the rows of a table under :data:`HEAD`, the fastest in int8 first; on the Pareto front marked ``*``."""
    front = survey.front("int8")
    return [_cells(model, model.model in front) for model in survey.measured]


def _cells(model: SurveyRow, on_front: bool) -> tuple[str, ...]:
    exact, int8, ratio = model.float32, model.int8, model.speedup
    return (
        f"{model.model}{' *' if on_front else ''}",
        "" if model.top1 is None else f"{model.top1:.2f}",
        f"{model.size[1]}",
        f"{model.parameters / 1e6:.1f}",
        "" if exact is None else _digits(exact.wall_ms),
        "" if int8 is None else _digits(int8.wall_ms),
        "" if ratio is None else f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]",
    )


def notes(survey: Survey) -> list[str]:
    """List what belongs to the figures: the machine, what they are of, what makes them doubtful, what failed."""
    options, machine = survey.options, survey.machine
    threads = "1 thread" if options.threads == 1 else f"{options.threads} threads"
    clock = "CPU time" if options.threads == 1 else "wall time"
    version = f"{options.runtime} {machine.get(options.runtime, 'of unknown version')}"
    text = [
        f"{machine['processor']}, {threads}, batch 1, {survey.date[:10]}; qzoo {machine['qzoo']}, {version}",
        f"ms: median wall time a call, with random weights. Speed-up: int8 over float, by {clock}, float and int8 in "
        "turns, with its 95 % interval. Top-1: of the float weights, as their publisher gives it; that of int8 is not "
        "measured here. *: no other is both faster in int8 and more accurate in float.",
    ]
    alone = [cost.wall_over_cpu for m in survey.measured for cost in (m.float32, m.int8) if cost is not None]
    busy = max(alone, default=1.0)
    if options.threads == 1 and busy > 1.25:
        text.append(
            f"The machine was busy: up to {busy:.1f} times as much wall time as CPU time passed; measure again on a "
            "quiet one for latencies."
        )
    return text + [f"{model.model} failed: {model.error}" for model in survey.models if model.error]


def print_survey(survey: Survey) -> None:
    """Print the table to standard output, and the notes under it."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    grid = Table(box=SIMPLE_HEAD, padding=(0, 1), show_edge=False, pad_edge=False, collapse_padding=True)
    for i, title in enumerate(HEAD):
        grid.add_column(title, justify="right" if i else "left", no_wrap=True)
    for row in rows(survey):
        grid.add_row(*(escape(one_line(cell)) for cell in row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(120, Console(width=1000).measure(grid).maximum))
    console.print(grid)
    for line in notes(survey):
        console.print(one_line(line), highlight=False, markup=False)


def markdown(survey: Survey) -> str:
    """Write the table and the notes in Markdown."""
    text = "\n\n".join(notes(survey))
    return f"{table(HEAD, rows(survey))}\n\n{text}"


def write_survey(survey: Survey, folder: str | Path) -> list[Path]:
    """Write ``survey.csv``, ``survey.html`` and, with matplotlib, ``survey.png`` beside ``survey.json``.

    Returns:
        All four. The picture is left out where no model has both a latency and a published top-1, and without
        matplotlib, with a warning that says what to install.
    """
    from qzoo.bench.page import write_survey_page

    out = Path(folder)
    paths = [out / FILE, out / "survey.csv", out / "survey.html"]
    _write_csv(survey, paths[1])
    write_survey_page(survey, notes(survey), paths[2])
    if not survey.front("int8"):
        return paths
    if find_spec("matplotlib") is None:
        warnings.warn("no picture without matplotlib: pip install 'qzoo[plot]'", stacklevel=2)
        return paths
    from qzoo.bench.plot import plot_survey

    return [*paths, plot_survey(survey, out / "survey.png")]


def _write_csv(survey: Survey, path: Path) -> None:
    """A line for each model, those that failed too; the machine and the options are in every line."""
    facts = {
        "runtime": survey.options.runtime,
        "threads": survey.options.threads,
        "date": survey.date,
        "processor": survey.machine["processor"],
    }
    lines = [_line(model) | facts for model in survey.models]
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(dict.fromkeys(key for line in lines for key in line)))
    writer.writeheader()
    writer.writerows(lines)
    write_text(path, file.getvalue())


def _line(model: SurveyRow) -> dict[str, Any]:
    values = {
        key: value for key, value in vars(model).items() if key not in ("float32", "int8", "speedup", "size")
    }
    values["size"] = "x".join(map(str, model.size))
    for precision in ("float32", "int8"):
        cost = getattr(model, precision)
        values |= {f"{precision}_{key}": value for key, value in (vars(cost) if cost else {}).items()}
    ratio = model.speedup or (None, None, None)
    return values | dict(zip(("speedup", "speedup_low", "speedup_high"), ratio, strict=True))


def _digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
