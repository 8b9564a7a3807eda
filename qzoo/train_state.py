"""What a training run keeps on disk: ``state.pt`` to resume from, ``log.csv``, ``log.png``, TensorBoard's events."""

from __future__ import annotations

import csv
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from qzoo.errors import QzooError
from qzoo.training_options import TrainOptions

Log = list[dict[str, float]]


def load_state(path: Path, options: dict[str, Any], batches: int | None = None) -> dict[str, Any] | None:
    """The state of an unfinished run, None where there is none.

    Args:
        options: of the run; one that the file does not know counts as its default.
        batches: in an epoch.

    Raises:
        QzooError: it belongs to a run with other options, or another number of batches.
    """
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True)
    saved = {**asdict(TrainOptions()), **state["options"]}
    wrong = sorted(k for k in options if saved.get(k) != options[k])
    if wrong:
        raise QzooError(
            f"{path} belongs to a run with other options ({', '.join(wrong)}); choose another folder or remove it"
        )
    if batches is not None and state.get("batches", batches) != batches:
        raise QzooError(
            f"{path} belongs to a run with {state['batches']} batches an epoch, not {batches}: another batch size, or "
            "other images; choose another folder or remove it"
        )
    return state


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write the state whole or not at all."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())  # else a power failure may leave the new name on old content
    os.replace(temporary, path)


def write_log(path: Path, log: Log) -> None:
    """One line an epoch, as CSV."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(log[-1]))
        writer.writeheader()
        writer.writerows(log)
    os.replace(temporary, path)


def write_tensorboard(folder: Path, log: Log) -> None:
    """The log as scalars that TensorBoard shows, written anew.

    Raises:
        ImportError: tensorboard is not installed (``pip install 'qzoo[train]'``).
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("TensorBoard is not installed; run pip install 'qzoo[train]'") from error
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as writer:
        for row in log:
            for key in row.keys() - {"epoch"}:
                writer.add_scalar(key, row[key], int(row["epoch"]))


def plot_log(path: Path, log: Log, title: str = "") -> Path:
    """The learning curve as PNG: loss of the training, and top-1 of the evaluation where there is one.

    Raises:
        ImportError: matplotlib is not installed (``pip install 'qzoo[plot]'``).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    epochs = [row["epoch"] + 1 for row in log]
    axes.plot(epochs, [row["loss"] for row in log], color="#999999", marker=".", label="training loss")
    axes.set_xlabel("epoch")
    axes.set_ylabel("training loss")
    if "top1" in log[-1]:
        right = axes.twinx()
        right.plot(epochs, [row["top1"] for row in log], color="#0072B2", marker=".", label="top-1")
        right.set_ylabel("top-1, %")
        right.legend(loc="center right")
    axes.legend(loc="upper right")
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=150)
    return path
