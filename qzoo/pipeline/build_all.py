"""``build --all``: every recipe that is not complete."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from qzoo.config import WEIGHTS, read_config
from qzoo.errors import QzooError
from qzoo.pipeline.build import build
from qzoo.pipeline.cluster import Cluster, build_on, told
from qzoo.pipeline.plan import BuildJob
from qzoo.pipeline.recipes import recipes
from qzoo.registry import parse_name
from qzoo.zoo import hub
from qzoo.zoo.store import checkpoint_folder


def is_complete(folder: Path) -> bool:
    """Check whether a folder holds a whole checkpoint: weights and figures."""
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
    cluster: Cluster | None = None,
) -> dict[str, str]:
    """Build every recipe that is not complete; called again, it goes on with what is left.

    A recipe that fails, for whatever reason, does not stop the others.

    Args:
        job: images, device and places; its ``out`` is the folder of all the checkpoints' folders, the user's store if
            None.
        qat: the recipes that train, too, after the others: each takes hours on a GPU, and the training images.
        report: gets a line for each checkpoint, and for each step of it.
        cluster: where many are built at a time, by Ray; one after the other in this process if None.

    Returns:
        Name -> what went wrong, of those that failed.

    Raises:
        MissingDependencyError: Ray is not installed.
        QzooError: the cluster can't be reached.
    """
    names = [config.name for config in recipes()]
    tuned = [name for name in names if parse_name(name).qat]
    left = {}
    for name in [name for name in names if name not in tuned] + (tuned if qat else []):
        folder = Path(job.out) / name if job.out is not None else checkpoint_folder(name)
        if not job.again and is_complete(folder):
            report(f"{name}: complete")
        else:
            left[name] = folder
    if cluster is not None:
        return build_on(cluster, left, job, report)
    failed = {}
    for name, folder in left.items():
        try:
            report(f"{name}:")
            report(str(build(name, None, dataclasses.replace(job, out=folder), report=report)))
        except (
            Exception
        ) as error:  # out of memory, a runtime's own error: none may keep the others from being built
            failed[name], trace = told(error)
            report(f"{name}: {failed[name]}")
            if trace:
                report(trace)
    return failed
