"""What a training run keeps on disk: ``state.pt`` to resume from, ``log.csv``, ``log.png``, TensorBoard's events."""

from __future__ import annotations

import contextlib
import csv
import errno
import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from qzoo.errors import CheckpointError, MissingDependencyError, QzooError
from qzoo.options import TrainOptions

Log = list[dict[str, float]]


def load_state(
    path: Path, options: dict[str, Any], batches: int | None = None, origin: Mapping[str, str] | None = None
) -> dict[str, Any] | None:
    """Load the state of an unfinished run, None where there is none.

    Args:
        options: of the run; one that the file does not know counts as its default.
        batches: in an epoch.
        origin: what the run starts from; a file that does not say counts as of the same.

    Raises:
        QzooError: it belongs to a run with other options, from another origin, or of another number of batches.
        CheckpointError: it is damaged.
    """
    if not path.exists():
        return None
    state = _read_state(path)
    saved = {**asdict(TrainOptions()), **state["options"]}
    wrong = sorted(k for k in options if saved.get(k) != options[k])
    if wrong:
        raise QzooError(
            f"{path} belongs to a run with other options ({', '.join(wrong)}); choose another folder or remove it"
        )
    before, now = state.get("origin", origin) or {}, origin or {}
    other = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if other:
        there, here = (
            ", ".join(f"{key} {versions.get(key, 'none')}" for key in other) for versions in (before, now)
        )
        raise QzooError(
            f"{path} belongs to a run with another origin ({there}), not this one ({here}); choose another folder or "
            "remove it"
        )
    if batches is not None and state.get("batches", batches) != batches:
        raise QzooError(
            f"{path} belongs to a run with {state['batches']} batches an epoch, not {batches}: another batch size, or "
            "other images; choose another folder or remove it"
        )
    return state


_PARTS = {"model": dict, "optimizer": dict, "log": list, "options": dict}


def _read_state(path: Path) -> dict[str, Any]:
    """The content of ``state.pt``, checked against its own checksums, which torch does not look at."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise zipfile.BadZipFile(f"the checksum of {broken} differs")
        state = torch.load(path, map_location="cpu", weights_only=True)
        wrong = [key for key, kind in _PARTS.items() if not isinstance(state[key], kind)]
        wrong += ["log"] if not all(isinstance(row, dict) for row in state["log"]) else []
        if wrong:
            raise KeyError(wrong[0])
    except (
        Exception
    ) as error:  # zipfile and the restricted unpickler fail in many ways on what is no such file
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {reason}); remove it, and the training starts anew"
        ) from error
    return dict(state)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write the state whole or not at all.

    Raises:
        QzooError: the disk is full, or the folder can't be written.
    """
    with _replace(path) as temporary, temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # else a power failure may leave the new name on old content


def write_log(path: Path, log: Log) -> None:
    """Write the log as CSV, one line an epoch.

    Raises:
        QzooError: the disk is full, or the folder can't be written.
    """
    with _replace(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in log for key in row)))
        writer.writeheader()
        writer.writerows(log)


@contextlib.contextmanager
def _replace(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that takes its place when it was written whole, and goes when not."""
    temporary = path.with_suffix(".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's writer hides the system's error behind one of its own
        cause = _system_error(error)
        if cause is None:
            raise
        full = cause.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if full else str(cause)
        raise QzooError(
            f"{path} can't be written: {what}. Make room, or mend that, and start the training again: it goes on from "
            "the state that was saved last"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _system_error(error: BaseException | None) -> OSError | None:
    """The system's error at the bottom of an exception."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def require_tools(*, tensorboard: bool = False, plot: bool = False) -> None:
    """Check that the packages to write TensorBoard files or plots are installed. Raises MissingDependencyError."""
    for wanted, package, extra in ((tensorboard, "tensorboard", "train"), (plot, "matplotlib", "plot")):
        if wanted and find_spec(package) is None:
            raise MissingDependencyError(f"{package} is not installed; run pip install 'qzoo[{extra}]'")


def write_tensorboard(folder: Path, log: Log) -> None:
    """Write the log anew, as scalars that TensorBoard shows.

    Raises:
        MissingDependencyError: tensorboard is not installed (``pip install 'qzoo[train]'``).
    """
    require_tools(tensorboard=True)
    from torch.utils.tensorboard import SummaryWriter

    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as writer:
        for row in log:
            for key in row.keys() - {"epoch"}:
                writer.add_scalar(key, row[key], int(row["epoch"]))


def plot_log(path: Path, log: Log, title: str = "") -> Path:
    """Plot the learning curve as PNG: loss of the training, and top-1 of the evaluation where there is one.

    Raises:
        MissingDependencyError: matplotlib is not installed (``pip install 'qzoo[plot]'``).
    """
    require_tools(plot=True)
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
