"""A model in a runtime in a process of its own: clean figures of memory and load time, and no runtime disturbs another.

What several runtimes in one process do to each other (thread pools, allocators, at worst a crash) is no figure of any.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import IO, Any

import numpy as np

from qzoo.bench.timing import Turn
from qzoo.errors import BenchmarkError
from qzoo.files import temporary_folder

_TURN = 0.02  # seconds
# Neither -m nor -c alone: both put the current folder first on the path, where a numpy.py would be imported for NumPy.
_START = "import sys; sys.path[:] = filter(None, sys.path); from qzoo.bench.worker import main; main()"


class Process:
    """Starts the process; use it in a ``with`` block, or :meth:`close` it.

    Args:
        title: of the model and the runtime, for error messages.
        limit: seconds that an answer may take.
    """

    def __init__(self, title: str, limit: float = 600.0) -> None:
        self.title, self.limit = title, limit
        self._scratch = ExitStack()
        self._folder = self._scratch.enter_context(temporary_folder())
        self._log = self._folder / "log"
        self._warm = False
        paths = [os.path.abspath(path) for path in sys.path]  # what this process can import, in its order
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-c", _START, str(self._folder), str(limit)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )
        self._requests, self._answers = _open(self._child.stdin), _open(self._child.stdout)

    def load(
        self, runtime: str, source: str | os.PathLike[str], threads: int, modules: Sequence[str]
    ) -> tuple[float, int | None]:
        """Open the model. Returns seconds, and the memory of the process before (bytes, None if not known)."""
        answer = self._ask(
            "load", runtime=runtime, source=os.fspath(source), threads=threads, modules=modules
        )
        return answer["seconds"], answer["rss"]

    def images(self, images: np.ndarray) -> None:
        """Set the float32 images [B, C, H, W] of the calls to come."""
        np.ascontiguousarray(images, np.float32).tofile(self._folder / "images")
        self._ask("images", shape=list(images.shape))
        self._warm = False

    def first(self) -> float:
        """Time the first call, without a warm-up; wall seconds."""
        wall: float = self._ask("time", warm=False, least=0.0)["wall"][0]
        return wall

    def turn(self) -> Turn:
        """Call until 20 ms have passed. Calls shorter than that follow one that is not timed, for warm caches."""
        answer = self._ask("time", warm=self._warm, least=_TURN)
        self._warm = min(answer["wall"]) < _TURN
        return answer["wall"], answer["cpu"]

    def run(self) -> np.ndarray:
        """Compute the logits [B, classes] of the images."""
        shape = self._ask("run")["shape"]
        return np.fromfile(self._folder / "logits", np.float32).reshape(shape)

    def peak_memory(self) -> int | None:
        """Read the peak memory (resident set, bytes) since the model was loaded; None where it is not known."""
        peak: int | None = self._ask("memory")["peak"]
        return peak

    def profile(
        self, runtime: str, source: str | os.PathLike[str], threads: int, runs: int
    ) -> list[dict[str, Any]]:
        """Profile the nodes of the model, see :func:`qzoo.bench.profile.node_times`."""
        nodes: list[dict[str, Any]] = self._ask(
            "profile", runtime=runtime, source=os.fspath(source), threads=threads, runs=runs
        )["nodes"]
        return nodes

    def _ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        try:
            self._requests.write(json.dumps({"do": do, **arguments}) + "\n")
            self._requests.flush()
            line = self._answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise BenchmarkError(f"{self.title}: {self._last_words(do)}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchmarkError(f"{self.title}: {answer['error']}")
        return answer

    def _last_words(self, do: str) -> str:
        """Why the process has ended."""
        status = self._child.wait()
        log = self._log.read_text(errors="replace")
        _, expired, places = log.rpartition("Timeout (")  # what faulthandler writes at the limit
        # Any status: its watchdog reads the stack of a thread that runs on, and may crash (SIGSEGV) while it writes.
        if expired:
            innermost = " < ".join(line.strip() for line in places.splitlines() if line.startswith("  File"))
            where = innermost[:600] or "a place it could not name"
            return f"no answer to {do!r} within {self.limit:g} s; it was at {where}"
        words = " ".join(log.split()[-60:])
        return f"its process ended with status {status}; it said: {words or 'nothing'}"

    def close(self) -> None:
        """End the process."""
        with suppress(BrokenPipeError):  # it has ended already, with a request unread
            self._requests.close()
        try:
            self._child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._answers.close()
        self._scratch.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _open(pipe: IO[str] | None) -> IO[str]:
    """A pipe that was asked for."""
    if pipe is None:
        raise BenchmarkError("the process has no pipe to talk through")
    return pipe
