"""``.eval_results/qzoo.yaml``: measured accuracies as the Hub reads them for its leaderboards.

The format is https://huggingface.co/docs/hub/eval-results; huggingface_hub calls an entry ``EvalResultEntry``.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from qzoo.config import Config, Measurement, read_config
from qzoo.data.sets import DATA_SETS
from qzoo.files import write_text

PATH = ".eval_results/qzoo.yaml"


def eval_results(config: Config) -> str:
    """Write the text of the file: top-1 of every measured row; "" where the data set has no place on the Hub."""
    dataset = DATA_SETS.get(config.labels)
    if dataset is None or not dataset.hub or not config.metrics:
        return ""
    entries = [
        {
            "dataset": {"id": dataset.hub, "task_id": "default"},
            "value": round(row.top1, 2),
            "notes": _notes(row),
        }
        for row in config.metrics
    ]
    return yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, width=110)


def write_eval_results(folder: Path) -> Path | None:
    """Write the file into a checkpoint folder; None, and no file, where there is nothing to say."""
    text = eval_results(read_config(folder))
    path = folder / PATH
    if not text:
        return None
    path.parent.mkdir(exist_ok=True)
    write_text(path, text)
    return path


def _notes(row: Measurement) -> str:
    placed = f", placement of {row.target}" if row.target else ""
    low, high = row.top1_interval
    return (
        f"top-1 in percent, {row.precision}, {row.runtime}{placed}; {row.images} images: {row.data}, {row.subset}; "
        f"95 % interval {low:.2f} to {high:.2f}"
    )
