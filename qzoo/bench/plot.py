"""Pictures of a benchmark (latency of every runtime, accuracy beside it) and of a survey (accuracy against latency)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from qzoo.bench.results import Report, Row
from qzoo.bench.survey import Survey
from qzoo.files import write_bytes

# Colour-blind safe (Okabe and Ito): float in grey, int8 in blue, the simulation in orange.
_COLOURS = {"float32": "#999999", "int8": "#0072B2", "fake-quant int8": "#E69F00"}


def plot(report: Report, path: Path) -> Path:
    """Write a PNG with one panel a model and batch size: wall time (bar: median, line: 90th percentile).

    Raises:
        ImportError: matplotlib is not installed (``pip install 'qzoo[plot]'``).
    """
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False}):  # a "$" in a name is a dollar sign
        return _plot(report, path)


def _plot(report: Report, path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    batches, models = report.settings["batches"], report.models
    tallest = max(sum(row.model == model for row in report.rows) for model in models)
    figure = Figure(figsize=(6.5 * len(batches), len(models) * (0.5 * tallest + 1.4)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(models), len(batches), squeeze=False)
    for i, model in enumerate(models):
        rows = [row for row in report.rows if row.model == model]
        for j, batch in enumerate(batches):
            _panel(panels[i][j], rows, batch, labelled=j == 0)
            panels[i][j].set_title(f"{model}, batch {batch}", fontsize=10)
    threads = report.settings["threads"]
    figure.suptitle(f"{report.machine['processor']}, {threads} thread(s), {report.date[:10]}", fontsize=9)
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    write_bytes(path, picture.getvalue())
    return path


def _panel(axes, rows: list[Row], batch: int, labelled: bool) -> None:  # type: ignore[no-untyped-def]
    places = range(len(rows))
    medians = [row.latency[batch].wall for row in rows]
    tails = [max(row.latency[batch].wall_p90 - row.latency[batch].wall, 0.0) for row in rows]
    bars = axes.barh(
        places,
        medians,
        xerr=([0.0] * len(rows), tails),
        color=[
            _COLOURS.get(row.precision if row.source == "qzoo" else row.source, "#009E73") for row in rows
        ],
        error_kw={"linewidth": 1, "ecolor": "#444444"},
    )
    names = [row.label if row.top1 is None else f"{row.label}\n{row.top1:.2f} % top-1" for row in rows]
    axes.set_yticks(places, names if labelled else [""] * len(rows), fontsize=8)
    ratios = [f" {row.wall_speedup[batch][0]:.2f}x" if row.wall_speedup else "" for row in rows]
    axes.bar_label(bars, ratios, fontsize=8, padding=4)
    axes.invert_yaxis()
    axes.set_xlabel("ms a call, wall time (x: against float32 in the same runtime)", fontsize=8)
    axes.margins(x=0.18)
    axes.spines[["top", "right"]].set_visible(False)


def plot_survey(survey: Survey, path: Path) -> Path:
    """Write a PNG of published float top-1 against measured latency: float and int8 of a model are joined by a line.

    The models on the Pareto front of int8 have their names.

    Raises:
        ImportError: matplotlib is not installed (``pip install 'qzoo[plot]'``).
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"text.parse_math": False}):  # a "$" in a name is a dollar sign
        figure = Figure(figsize=(11, 7), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        points = {name: _points(survey, name) for name in ("float32", "int8")}
        for (slow, top1, _), (fast, *_) in zip(points["float32"], points["int8"], strict=True):
            axes.plot([slow, fast], [top1, top1], color="#cccccc", linewidth=0.8, zorder=1)
        for name in points:
            _front(axes, survey, name, points[name])
        for time, top1, model in points["int8"]:
            if model in survey.front("int8"):
                axes.annotate(
                    model, (time, top1), xytext=(-4, 3), textcoords="offset points", ha="right", fontsize=6
                )
        axes.set_xscale("log", subs=(2, 5))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.set_xlabel("ms a call, batch 1 (median wall time)")
        axes.set_ylabel("top-1 of the float weights on ImageNet, as published, %")
        axes.legend(loc="lower right")
        axes.spines[["top", "right"]].set_visible(False)
        threads = f"{survey.options.threads} thread(s), {survey.options.runtime}"
        axes.set_title(f"{survey.machine['processor']}, {threads}, {survey.date[:10]}", fontsize=9)
        return _save(figure, path)


def _points(survey: Survey, precision: str) -> list[tuple[float, float, str]]:
    """Latency, top-1 and name of the models whose top-1 is known."""
    costs = ((getattr(model, precision), model) for model in survey.measured)
    return [(time.wall_ms, model.top1, model.model) for time, model in costs if model.top1 is not None]


def _front(axes: Any, survey: Survey, precision: str, points: list[tuple[float, float, str]]) -> None:
    colour, label = _COLOURS[precision], "int8" if precision == "int8" else "float"
    axes.scatter(
        [x for x, *_ in points], [y for _, y, _ in points], color=colour, s=14, zorder=3, label=label
    )
    best = sorted(point for point in points if point[2] in survey.front(precision))
    axes.step([x for x, *_ in best], [y for _, y, _ in best], where="post", color=colour, zorder=2)
