"""The benchmark's page: one HTML file with its data, its style and its script in it. It needs no network."""

from __future__ import annotations

import html
import json
from importlib.resources import files
from pathlib import Path

from qzoo.bench.results import Report
from qzoo.files import write_text


def write_page(report: Report, path: Path) -> Path:
    """Write the page; it appears complete or not at all. Its data are those of ``benchmark.json``.

    Returns:
        The path.
    """
    write_text(path, _page(report))
    return path


def _page(report: Report) -> str:
    here = files("qzoo.bench.page")
    parts = {
        name: here.joinpath(f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")
    }
    # A "<" in the data could end the script element that holds them.
    data = json.dumps(report.to_dict(), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    title = html.escape("qzoo benchmark: " + ", ".join(report.models))
    page = parts["html"]
    for mark, text in (("TITLE", title), ("STYLE", parts["css"]), ("SCRIPT", parts["js"]), ("DATA", data)):
        page = page.replace(f"<!-- {mark} -->", text)
    return page
