"""``build --all``: every recipe that is not complete."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable
from pathlib import Path

from qzoo.config import WEIGHTS, read_config
from qzoo.errors import QzooError
from qzoo.pipeline.build import build
from qzoo.pipeline.plan import BuildJob
from qzoo.pipeline.recipes import recipes
from qzoo.registry import parse_name
from qzoo.zoo import hub
from qzoo.zoo.store import checkpoint_folder


def is_complete(folder: Path) -> bool:
    """Tell whether a folder holds a checkpoint with its weights, whole, and with figures."""
    try:
        config = read_config(folder)
    except QzooError:
        return False
    weights = folder / WEIGHTS
    return bool(config.metrics) and weights.is_file() and hub.sha256_of(weights) == config.files.get(WEIGHTS)


def build_all(
    job: BuildJob = BuildJob(),  # noqa: B008 - immutable
    *,
    qat: bool = False,
    report: Callable[[str], None] = print,
) -> dict[str, str]:
    """Build every recipe that is not complete; called again, it goes on with what is left.

    A recipe that fails, for whatever reason, does not stop the others.

    Args:
        job: images, device and places; its ``out`` is the folder of all the checkpoints' folders, the user's store if
            None.
        qat: the recipes that train, too, after the others: each takes hours on a GPU, and the training images.
        report: gets a line for each checkpoint, and for each step of it.

    Returns:
        Name -> what went wrong, of those that failed.
    """
    failed = {}
    names = [config.name for config in recipes()]
    tuned = [name for name in names if parse_name(name).qat]
    for name in [name for name in names if name not in tuned] + (tuned if qat else []):
        folder = Path(job.out) / name if job.out is not None else checkpoint_folder(name)
        if not job.again and is_complete(folder):
            report(f"{name}: complete")
            continue
        try:
            report(f"{name}:")
            report(str(build(name, None, dataclasses.replace(job, out=folder), report=report)))
        except (
            Exception
        ) as error:  # out of memory, a runtime's own error: none may keep the others from being built
            expected = isinstance(error, QzooError | OSError)
            failed[name] = str(error) if expected else f"{type(error).__name__}: {error}".rstrip(": ")
            report(f"{name}: {failed[name]}")
            if not expected:
                report(traceback.format_exc().rstrip())
    return failed
