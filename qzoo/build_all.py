"""``build --all``: every recipe that is not complete."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qzoo import hub
from qzoo.build import build
from qzoo.config import WEIGHTS, read_config
from qzoo.errors import QzooError
from qzoo.recipes import recipes
from qzoo.registry import parse_name


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a checkpoint with its weights, whole, and with figures."""
    try:
        config = read_config(folder)
    except QzooError:
        return False
    weights = folder / WEIGHTS
    return bool(config.metrics) and weights.is_file() and hub.sha256_of(weights) == config.files.get(WEIGHTS)


def build_all(
    data: str | Path | None,
    *,
    out: str | Path = "model_cards",
    runs: str | Path = "runs",
    report: Callable[[str], None] = print,
    progress: bool = True,
) -> dict[str, str]:
    """Build every recipe that is not complete in ``out``; called again, it goes on with what is left.

    Recipes of tuning take hours on a GPU and the training images: they are built by name. A recipe that fails does
    not stop the others.

    Returns:
        Name -> what went wrong, of those that failed.
    """
    failed = {}
    for config in recipes():
        folder = Path(out) / config.name
        if parse_name(config.name).qat:
            continue
        if is_complete(folder):
            report(f"{config.name}: complete")
            continue
        try:
            report(str(build(config.name, data=data, out=folder, runs=runs, progress=progress)))
        except (QzooError, OSError) as error:
            failed[config.name] = str(error)
            report(f"{config.name}: {error}")
    return failed
