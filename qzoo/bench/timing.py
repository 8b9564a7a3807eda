"""Time calls in turns, so that the comparison holds on a machine that is not quiet.

All candidates take turns, so that a slow minute hits all alike; ratios compare calls of the same round. The order of a
round is drawn anew: a network of much memory makes the one that always follows it up to 6 % slower.
In its turn a candidate is called until some 20 ms have passed: single calls of a small network differ too much. CPU
time beside wall time shows what other processes took. Medians, and the 90th percentile for the tail.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qzoo.progress import track

_DRAWS = 1000  # of a bootstrap

Turn = tuple[Sequence[float], float]
"""What one turn took: wall seconds of each call, and CPU seconds of a call on average."""

Clock = Callable[[Callable[[], Any]], Turn]


@dataclass(frozen=True)
class Timing:
    """The calls of one candidate, in milliseconds.

    Attributes:
        wall, wall_p90: median and 90th percentile of the calls' wall time.
        cpu, cpu_p90: the same of the turns' mean CPU time of a call, all threads of the process.
        calls: number of timed calls.
        wall_over_cpu: wall time of all calls over their CPU time; above 1, with one thread, other processes ran.
    """

    wall: float
    wall_p90: float
    cpu: float
    cpu_p90: float
    calls: int
    wall_over_cpu: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class Samples:
    """The turns of one candidate, in seconds.

    Attributes:
        wall, cpu: of a call, one entry a turn: the median of its calls' wall time, and their mean CPU time.
        calls: wall time of every call of all turns.
        wall_over_cpu: see :class:`Timing`.
    """

    wall: np.ndarray
    cpu: np.ndarray
    calls: np.ndarray
    wall_over_cpu: float

    @classmethod
    def of(cls, turns: Sequence[Turn]) -> Samples:
        """Collect the readings of a clock, turn by turn."""
        wall, cpu = np.array([np.median(calls) for calls, _ in turns]), np.array([mean for _, mean in turns])
        calls = np.concatenate([np.asarray(calls) for calls, _ in turns])
        spent = sum(mean * len(calls) for calls, mean in turns)
        return cls(wall, cpu, calls, float(calls.sum() / spent) if spent > 0 else 1.0)

    def summary(self) -> Timing:
        """Summarize the calls: medians and 90th percentiles."""
        wall, wall_p90 = np.percentile(self.calls, (50, 90)) * 1e3
        cpu, cpu_p90 = np.percentile(self.cpu, (50, 90)) * 1e3
        return Timing(
            float(wall), float(wall_p90), float(cpu), float(cpu_p90), len(self.calls), self.wall_over_cpu
        )


def measure(
    calls: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 2.0,
    rounds: tuple[int, int] = (15, 300),
    title: str = "time",
    progress: bool = True,
    clock: Clock | None = None,
) -> dict[str, Samples]:
    """Time the calls in turns.

    Args:
        calls: what to call, by name.
        seconds: about how long each candidate is timed, after three turns to warm up.
        rounds: the least and the largest number of rounds; one turn of each candidate makes a round.
        title: for the progress bar.
        clock: makes the calls of a turn and says how long they took; by default one call in this process.

    Returns:
        The samples of each candidate, in the order of the rounds.
    """
    generator = random.Random(0)
    take = clock or _time
    longest = max(_warm_up(call, take) for call in calls.values())
    count = int(np.clip(seconds / max(longest, 1e-6), *rounds))
    turns: dict[str, list[Turn]] = {name: [] for name in calls}
    for _ in track(range(count), title, show=progress):
        for name in generator.sample(list(calls), len(calls)):
            turns[name].append(take(calls[name]))
    return {name: Samples.of(values) for name, values in turns.items()}


def ratio(slow: np.ndarray, fast: np.ndarray) -> tuple[float, float, float]:
    """Compute a speed-up: the ratio of the medians, and its 95 % bootstrap interval over rounds.

    Args:
        slow, fast: seconds a call, [rounds] each, of the same rounds (:attr:`Samples.cpu`, :attr:`Samples.wall`).
    """
    generator = np.random.default_rng(0)
    picks = generator.integers(0, len(slow), (_DRAWS, len(slow)))
    resampled = np.median(slow[picks], axis=1) / np.median(fast[picks], axis=1)
    low, high = np.percentile(resampled, (2.5, 97.5))
    return float(np.median(slow) / np.median(fast)), float(low), float(high)


def _warm_up(call: Callable[[], Any], take: Clock) -> float:
    for _ in range(2):
        take(call)
    return sum(take(call)[0])


def _time(call: Callable[[], Any]) -> Turn:
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return [time.perf_counter() - wall], time.process_time() - cpu
