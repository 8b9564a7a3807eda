"""``build --all --engine ray``: every checkpoint a task of a Ray cluster, its files gathered into one folder.

Ray (Moritz et al. 2018, arXiv:1712.05889) places the tasks and starts those anew whose process died. The steps of a
build are on disk (:mod:`qzoo.pipeline.steps`): a task that is started anew goes on with the step that it was in, where
it finds the folder of the steps, on the same machine or a shared disk; elsewhere it begins at the beginning.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qzoo.data.sets import is_stream
from qzoo.errors import ArgumentError, MissingDependencyError, QzooError, one_line
from qzoo.files import scratch_beside, temporary_folder, write_text
from qzoo.pipeline.build import build, install
from qzoo.pipeline.plan import BuildJob
from qzoo.registry import import_models

TRIES = 4  # of a checkpoint whose processes die
_SECONDS = 0.5  # between two looks at what the tasks say


@dataclass(frozen=True)
class Cluster:
    """Machines that build checkpoints, and what each of these gets.

    Attributes:
        address: of a Ray cluster, ``"auto"`` or such as ``"head:6379"``; None starts one on this machine.
        device: "cpu", "cuda" (one GPU a checkpoint) or "auto" (GPUs where the cluster has some).
        threads: processors of a checkpoint, and threads of torch: by default a GPU's share of a machine, and a quarter
            of one without GPUs.
        imports: Python that registers architectures, see :func:`qzoo.registry.import_models`.
    """

    address: str | None = None
    device: str = "cpu"
    threads: int | None = None
    imports: tuple[str, ...] = ()


def build_on(
    cluster: Cluster, folders: Mapping[str, Path], job: BuildJob, report: Callable[[str], None]
) -> dict[str, str]:
    """Build checkpoints on a cluster; one that fails does not stop the others.

    Args:
        cluster: where.
        folders: of the checkpoints, on this machine, by name.
        job: images and places. The machines need the images under the same path. Shared ``runs`` let a checkpoint go on
            on another machine than it was begun on.
        report: gets a line for each checkpoint, and for each step of it.

    Returns:
        Name -> what went wrong, of those that failed.

    Raises:
        MissingDependencyError: Ray is not installed.
        ArgumentError: GPUs are asked for, and the cluster has none.
        QzooError: the cluster can't be reached.
    """
    if not folders:
        return {}
    with _connect(cluster.address) as ray:
        share, device = _share(ray, cluster)
        lines = _lines(ray)
        task = ray.remote(**share, max_retries=TRIES - 1)(_build)
        job = dataclasses.replace(job, runs=Path(job.runs).absolute(), device=device, progress=False)
        if job.data is not None and not is_stream(job.data):
            job = dataclasses.replace(job, data=Path(job.data).absolute())
        running = {}
        for name, folder in folders.items():
            old = folder / "config.json"
            recipe = old.read_text(encoding="utf-8") if old.is_file() else None
            arguments = (
                dataclasses.replace(job, out=None),
                recipe,
                share["num_cpus"],
                cluster.imports,
                lines,
            )
            running[task.remote(name, *arguments)] = name
        with _Table(tuple(folders), report, job.progress) as table:
            return _gather(ray, running, folders, lines, table)


def _gather(
    ray: Any, running: dict[Any, str], folders: Mapping[str, Path], lines: Any, table: _Table
) -> dict[str, str]:
    """Wait for the tasks, and write what each gives into its folder."""
    failed: dict[str, str] = {}
    while running:
        ended, _ = ray.wait(list(running), num_returns=1, timeout=_SECONDS)
        with suppress(ray.exceptions.RayError):  # of the actor, whose machine may be gone: it is started anew
            for line in ray.get(lines.take.remote()):
                table.add(*line)
        for task in ended:
            name = running.pop(task)
            try:
                answer = ray.get(task)
                if isinstance(answer, _Failure):
                    failed[name] = answer.reason
                    table.end(name, answer.reason, answer.trace)
                    continue
                _write(answer, folders[name])
                table.end(name, "")
            except (ray.exceptions.RayError, QzooError, OSError) as error:
                failed[name] = f"its process died {TRIES} times ({told(error)[0]})"
                if not isinstance(error, ray.exceptions.RayError):
                    failed[name] = told(error)[0]
                table.end(name, failed[name])
    return failed


def _write(files: Mapping[str, bytes], folder: Path) -> None:
    """A checkpoint's files into its folder, whole or not at all."""
    with scratch_beside(folder.absolute()) as scratch:
        for name, content in files.items():
            (scratch / name).parent.mkdir(exist_ok=True)
            (scratch / name).write_bytes(content)
        install(scratch, folder.absolute())


def told(error: Exception) -> tuple[str, str]:
    """Format an error, with its traceback where it is not the user's mistake."""
    if isinstance(error, QzooError | OSError):
        return str(error), ""
    text = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".rstrip(": ")
    return text, "".join(traceback.format_exception(error)).rstrip()


# ---- in the cluster ----


@dataclass(frozen=True)
class _Failure:
    """Why a checkpoint could not be built, in place of its files."""

    reason: str
    trace: str


def _lines(ray: Any) -> Any:
    """An actor that keeps what the tasks report, in order; made here, so that its process imports no torch."""

    class Lines:
        def __init__(self) -> None:
            self.lines: list[tuple[str, str]] = []

        def add(self, name: str, line: str) -> None:
            self.lines.append((name, line))

        def take(self) -> list[tuple[str, str]]:
            lines, self.lines = self.lines, []
            return lines

    return ray.remote(num_cpus=0, max_restarts=-1)(Lines).remote()


def _build(
    name: str, job: BuildJob, recipe: str | None, threads: int, imports: tuple[str, ...], lines: Any
) -> dict[str, bytes] | _Failure:
    """The files of a checkpoint: a task.

    Args:
        recipe: the config.json that its folder has, which says how it is made.
        lines: gets what it reports.
    """
    import ray

    def report(line: str) -> None:
        with suppress(ray.exceptions.RayError):  # the machine of the actor may be gone
            ray.get(lines.add.remote(name, line))  # it has come before the task's result

    report(f"{_BEGUN} {socket.gethostname()}, process {os.getpid()}")
    torch.set_num_threads(threads)
    try:
        for where in imports:
            import_models(where)
        with temporary_folder("qzoo-build-") as scratch:
            out = scratch / name
            if recipe is not None:
                out.mkdir()
                write_text(out / "config.json", recipe)
            build(name, None, dataclasses.replace(job, out=out), report=report)
            return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    except Exception as error:  # out of memory, a runtime's own error: it is told, and no reason to try again
        return _Failure(*told(error))


_BEGUN = "begun on"


# ---- the cluster ----


@contextmanager
def _connect(address: str | None) -> Iterator[Any]:
    """Ray, connected; a cluster of its own ends with the block."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that is started here reports to no one
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError("--engine ray needs Ray: pip install 'qzoo[ray]'") from error
    settings: dict[str, Any] = {
        "address": address or "local",
        "log_to_driver": False,
        "logging_level": "ERROR",
    }
    if address is None:
        settings |= {"include_dashboard": False, "num_cpus": os.cpu_count()}
    try:
        _knock(address or "")
        ray.init(**settings)
    except Exception as error:  # other versions of Python or Ray, no server: it raises several types
        if address is None:
            raise QzooError(f"Ray can't be started on this machine ({told(error)[0]}); try again") from error
        raise QzooError(
            f"the Ray cluster {address} can't be reached ({told(error)[0]}); check --address, and that its machines "
            "have the same Python, Ray and qzoo"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raise OSError where no server listens at ``HOST:PORT``, which Ray tries for many minutes."""
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=30).close()


def _share(ray: Any, cluster: Cluster) -> tuple[dict[str, Any], torch.device]:
    """What a task takes of a machine, and its device."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    with_gpus = [machine for machine in machines if machine.get("GPU")]
    if cluster.device == "cuda" and not with_gpus:
        raise ArgumentError("--device cuda: no machine of the Ray cluster has a GPU; leave it out")
    if with_gpus and cluster.device != "cpu":
        threads = cluster.threads or max(1, min(int(m["CPU"] // m["GPU"]) for m in with_gpus))
        return {"num_cpus": threads, "num_gpus": 1}, torch.device("cuda")
    threads = cluster.threads or max(1, min(int(machine["CPU"]) for machine in machines) // 4)
    return {"num_cpus": threads}, torch.device("cpu")


# ---- the table ----


@dataclass
class _Row:
    """A checkpoint that is built: what it does, where, how often it was begun, and since when."""

    doing: str = "waits"
    where: str = ""
    tries: int = 0
    began: float = 0.0
    took: float = field(default=0.0)


class _Table:
    """Progress of all checkpoints: a table that is kept up to date on a terminal, else a line for each step."""

    def __init__(self, names: tuple[str, ...], report: Callable[[str], None], show: bool) -> None:
        self.rows, self.report = {name: _Row() for name in names}, report
        self.live: Any = None
        if show and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self.live = Live(
                console=Console(file=sys.stderr), get_renderable=self.render, refresh_per_second=2
            )

    def __enter__(self) -> _Table:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()

    def add(self, name: str, line: str) -> None:
        """Add a line that a task reports."""
        row = self.rows[name]
        if line.startswith(_BEGUN):
            row.tries, row.began = row.tries + 1, row.began or time.monotonic()
            row.where = line.removeprefix(_BEGUN).partition(",")[0].strip()
        row.doing = line
        if self.live is None:
            self.report(f"{name}: {line}")

    def end(self, name: str, reason: str, trace: str = "") -> None:
        """Note that a checkpoint is in its folder, or that it failed, with the reason."""
        row = self.rows[name]
        row.doing, row.took = reason or "done", time.monotonic() - row.began if row.began else 0.0
        if self.live is None:
            self.report(f"{name}: {row.doing}")
        if trace:
            self.report(trace)

    def render(self) -> Any:
        """Make the table of this moment."""
        from rich.table import Table

        table = Table("checkpoint", "step", "machine", "tries", "minutes")
        for name, row in self.rows.items():
            seconds = row.took or (time.monotonic() - row.began if row.began else 0.0)
            table.add_row(name, one_line(row.doing), row.where, str(row.tries or ""), f"{seconds / 60:.1f}")
        return table
