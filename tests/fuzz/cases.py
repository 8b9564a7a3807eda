"""What a case of the fuzz is: one seeded attack on a subject, run in a process of its own that may crash or hang."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import multiprocessing
import os
import random
import resource
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path

SUBJECTS = ("loader", "lint", "images")
SECONDS = 5.0  # of computing time; a case that takes longer is a hang
_WAIT = 60.0  # and one that does not compute, but waits, or a machine that is busy
MEGABYTES = 1536.0  # what a case may add to the memory of its process: an image of 2**27 pixels takes 1,100
_PREPARATION = 120.0

# Runs one case: "refused", or "accepted" if everything that can be checked of the result is right.
Case = Callable[[random.Random], str]


class Wrong(Exception):
    """A damaged file that was accepted and means something else than the undamaged one."""


@dataclass(frozen=True)
class Outcome:
    """How a case ended: "refused", "accepted", "wrong", "crash", "hang" or "memory"; the note says more."""

    subject: str
    index: int
    kind: str
    note: str = ""
    seconds: float = 0.0
    megabytes: float = 0.0


def case_of(subject: str, folder: Path) -> Case:
    """Import a subject and make its undamaged files in ``folder``."""
    place = folder / subject
    place.mkdir(parents=True)
    case: Case = import_module(f"tests.fuzz.{subject}").prepare(place)
    for index in range(4):  # what is imported or compiled at first use
        with contextlib.suppress(Exception):
            case(random.Random(index))
    return case


def random_of(subject: str, seed: int, index: int) -> random.Random:
    """The source of all chance of a case."""
    return random.Random(f"{subject} {seed} {index}")


class Worker:
    """A process that runs cases, started anew after a crash or a hang.

    Args:
        folder: for its files; it must exist.
        seed: of all cases.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed, self.starts = folder, seed, 0
        self._start()

    def _start(self) -> None:
        self.starts += 1
        self._log = self.folder / f"{self.starts}.err"
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        place = self.folder / str(self.starts)
        self._process = context.Process(
            target=_serve, args=(theirs, place, self._log, self.seed), daemon=True
        )
        self._process.start()
        theirs.close()

    def run(self, subject: str, index: int) -> Outcome:
        """Run one case."""
        try:
            self._pipe.send((subject, index))
            if not self._pipe.poll(_PREPARATION):
                raise RuntimeError(f"{subject} is not ready after {_PREPARATION} s")
            self._pipe.recv()
            computed, start = self._computed(), time.monotonic()
            while not self._pipe.poll(0.5):
                if self._computed() - computed > SECONDS or time.monotonic() - start > _WAIT:
                    kind, note = "hang", f"no end after {self._computed() - computed:.1f} s of computing"
                    break
            else:
                outcome: Outcome = self._pipe.recv()
                return outcome
        except (EOFError, OSError):
            self._process.join(10)
            tail = self._log.read_text(errors="replace").strip()[-2000:]
            kind, note = "crash", f"the process ended with {self._process.exitcode}\n{tail}"
        self.close()
        self._start()
        return Outcome(subject, index, kind, note)

    def _computed(self) -> float:
        """Seconds of computing of the process so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Connection, folder: Path, log: Path, seed: int) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)  # decoders written in C warn there
    os.environ["OMP_NUM_THREADS"] = "1"  # a process a core
    faulthandler.enable()
    warnings.simplefilter("ignore")
    logging.disable()
    cases: dict[str, Case] = {}
    with contextlib.suppress(EOFError):
        while True:
            subject, index = pipe.recv()
            if subject not in cases:
                cases[subject] = case_of(subject, folder)
                _bound_memory()
            pipe.send("ready")
            pipe.send(measured(cases[subject], subject, seed, index))


def measured(case: Case, subject: str, seed: int, index: int) -> Outcome:
    """Run one case in this process."""
    before, start, note = _reset_peak(), time.process_time(), ""
    try:
        kind = case(random_of(subject, seed, index))
    except Wrong as error:
        kind, note = "wrong", str(error)
    except Exception:
        kind, note = "crash", traceback.format_exc(limit=-6)
    seconds, megabytes = time.process_time() - start, _peak() - before
    if kind in ("refused", "accepted") and megabytes > MEGABYTES:
        kind, note = "memory", f"{megabytes:.0f} MB"
    return Outcome(subject, index, kind, note, seconds, megabytes)


def _bound_memory() -> None:
    """So that a case that would take all memory fails alone."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + int(4 * MEGABYTES * 2**20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def _reset_peak() -> float:
    """Start to measure the peak of the process's memory; what it has now, in MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
