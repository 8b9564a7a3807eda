"""Pages of a benchmark and of a survey: one HTML file with its data, its style and its script. It needs no network."""

from __future__ import annotations

import html
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from qzoo.bench.results import Report
from qzoo.bench.survey import Survey
from qzoo.files import write_text


def write_page(report: Report, path: Path) -> Path:
    """Write the page of a benchmark; it appears complete or not at all. Its data are those of ``benchmark.json``.

    Returns:
        The path.
    """
    write_text(path, _page("qzoo benchmark: " + ", ".join(report.models), "page.js", report.to_dict()))
    return path


def write_survey_page(survey: Survey, notes: list[str], path: Path) -> Path:
    """Write the page of a survey; it appears complete or not at all. Its data are those of ``survey.json``, and notes.

    Returns:
        The path.
    """
    write_text(path, _page("qzoo survey", "survey.js", {**survey.to_dict(), "notes": notes}))
    return path


def _page(title: str, script: str, values: dict[str, Any]) -> str:
    here = files("qzoo.bench.page")
    parts = {
        name: here.joinpath(name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css", "draw.js", script)
    }
    # A "<" in the data could end the script element that holds them.
    data = json.dumps(values, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    page = parts["page.html"]
    for mark, text in (
        ("TITLE", html.escape(title)),
        ("STYLE", parts["page.css"]),
        ("SCRIPT", parts["draw.js"] + parts[script]),
        ("DATA", data),
    ):
        page = page.replace(f"<!-- {mark} -->", text)
    return page
