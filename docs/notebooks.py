"""The notebooks as pages: run while the site is built, and shown with what they print and draw."""

from __future__ import annotations

import base64
import functools
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent / "notebooks"


def notebooks() -> dict[str, str | bytes]:
    """The pages and pictures of all notebooks, by their path in the site."""
    made: dict[str, str | bytes] = {}
    for path in sorted(FOLDER.glob("*.ipynb")):
        made |= page(path.stem, path.read_text(encoding="utf-8"))
    return made


@functools.cache  # mkdocs serve builds again and again
def page(name: str, text: str) -> dict[str, str | bytes]:
    """One notebook as Markdown, and its pictures.

    Raises:
        CellExecutionError: of nbclient; a cell raises.
    """
    parts: list[str] = []
    pictures: dict[str, str | bytes] = {}
    for cell in executed(text).cells:
        if cell.cell_type == "markdown":
            parts.append(re.sub(r"\((\w+)\.ipynb\)", r"(\1.md)", cell.source))
            continue
        parts.append(f"```python\n{cell.source}\n```")
        printed = "".join(text_of(output) for output in cell.outputs).rstrip()
        if printed:
            parts.append(f"```text\n{printed}\n```")
        for content in (output.get("data", {}).get("image/png") for output in cell.outputs):
            if content:
                file = f"{name}-{len(pictures)}.png"
                pictures[f"notebooks/{file}"] = base64.b64decode(content)
                parts.append(f"![what the cell draws]({file})")
    parts.insert(1, f"This page is a notebook: [download it]({name}.ipynb).")
    return {f"notebooks/{name}.md": "\n\n".join(parts) + "\n", **pictures}


def executed(text: str) -> Any:
    """A notebook with its outputs, run in an empty folder."""
    notebook = nbformat.reads(text, as_version=4)
    with TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    return notebook


def text_of(output: Any) -> str:
    """What one output prints; standard error, and a picture's stand-in of text, are left out."""
    if output.output_type == "stream":
        return output.text if output.name == "stdout" else ""
    data = output.get("data", {})
    return "" if "image/png" in data else data.get("text/plain", "") + "\n"
