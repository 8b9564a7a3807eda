"""The process that a benchmark measures one model in, which :class:`qzoo.bench.process.Process` starts.

Commands come as lines of JSON on standard input, answers go back as lines of JSON; arrays lie in files of the folder.
Nothing is imported that the runtime does not need, so that the process's memory is the runtime's own. A command that
lasts longer than SECONDS ends the process, with the place where it was on standard error.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from qzoo.bench import profile
from qzoo.runtimes import runtime_named

Call = Callable[[np.ndarray], np.ndarray]


class Worker:
    """One model in one runtime; each public method is a command."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._call: Call = _nothing_loaded
        self._images: np.ndarray = np.zeros(0, np.float32)

    def load(self, runtime: str, source: str, threads: int, modules: list[str]) -> dict[str, Any]:
        """Open a model; ``modules`` are imported first, so that the time is the model's."""
        opener = _opener(runtime)
        for module in modules:
            import_module(module)
        _reset_peak()
        before, start = _status("VmRSS"), time.perf_counter()
        self._call = opener(source, threads)
        return {"seconds": time.perf_counter() - start, "rss": before}

    def images(self, shape: list[int]) -> dict[str, Any]:
        """Take the images that the parent wrote."""
        self._images = np.fromfile(self._folder / "images", np.float32).reshape(shape)
        return {}

    def time(self, warm: bool, least: float) -> dict[str, Any]:
        """Time calls until ``least`` seconds have passed, at least one; ``warm``: after one that is not timed.

        Returns wall seconds of each call, and CPU seconds of a call on average.
        """
        call, images = self._call, self._images
        if warm:
            call(images)
        walls: list[float] = []
        cpu, now = time.process_time(), time.perf_counter()
        end = now + least
        while not walls or now < end:
            start = now
            call(images)
            now = time.perf_counter()
            walls.append(now - start)
        return {"wall": walls, "cpu": (time.process_time() - cpu) / len(walls)}

    def run(self) -> dict[str, Any]:
        """Write the logits of the images for the parent."""
        logits = np.ascontiguousarray(self._call(self._images), np.float32)
        logits.tofile(self._folder / "logits")
        return {"shape": logits.shape}

    def memory(self) -> dict[str, Any]:
        """Read the peak memory of this process since the model was loaded, bytes; None where it is not known."""
        return {"peak": _status("VmHWM")}

    def profile(self, runtime: str, source: str, threads: int, runs: int) -> dict[str, Any]:
        """Measure the median time of every node."""
        return {"nodes": profile.node_times(runtime, source, threads, self._images, runs, self._folder)}


def _nothing_loaded(images: np.ndarray) -> np.ndarray:
    raise RuntimeError("no model is loaded")


def _opener(runtime: str) -> Callable[[str, int], Call]:
    """What opens a model for the runtime, with everything imported."""
    chosen = runtime_named(runtime)
    if chosen.provider:
        from qzoo.runtimes.sessions import onnxruntime_session

        import_module("onnxruntime")

        def open_onnxruntime(source: str, threads: int) -> Call:
            session = onnxruntime_session(source, threads, provider=chosen.provider)
            name = session.get_inputs()[0].name
            return lambda images: session.run(None, {name: images})[0]

        return open_onnxruntime
    if runtime == "openvino":
        from qzoo.runtimes.sessions import openvino_model

        import_module("openvino")

        def open_openvino(source: str, threads: int) -> Call:
            request = openvino_model(source, threads).create_infer_request()
            return lambda images: request.infer([images], share_inputs=True)[0]

        return open_openvino
    return _open_with_torch(runtime)


def _open_with_torch(runtime: str) -> Callable[[str, int], Call]:
    import torch

    from qzoo.runtimes import load

    def open_module(source: str, threads: int) -> Call:
        torch.set_num_threads(threads)
        # The file was written by the benchmark itself, for this process.
        model = source if runtime_named(runtime).runs_files else torch.load(source, weights_only=False)
        runner = load(model, runtime, threads)
        return lambda images: runner(torch.from_numpy(images)).numpy()

    return open_module


def _status(field: str) -> int | None:
    """A figure of this process's memory in bytes (Linux)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = [line for line in status.read_text().splitlines() if line.startswith(field + ":")]
    return 1024 * int(lines[0].split()[1]) if lines else None


def _reset_peak() -> None:
    """Forget the peak of importing; where the kernel does not allow it, the peak stays what imports took."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def main() -> None:
    """Answer commands until standard input ends; arguments: a folder for arrays, and the seconds a command may last."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    worker, limit = Worker(Path(sys.argv[1])), float(sys.argv[2])
    for line in sys.stdin:
        command = json.loads(line)
        faulthandler.dump_traceback_later(limit, exit=True)
        try:
            answer = getattr(worker, command.pop("do"))(**command)
        except Exception as error:  # whatever it is, the parent has to know
            answer = {"error": f"{type(error).__name__}: {error}"}
        faulthandler.cancel_dump_traceback_later()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
