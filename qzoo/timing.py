"""How long calls take, so that the comparison holds on a machine that is not quiet.

All candidates take turns, A B C A B C, so that a slow minute hits all alike; ratios compare calls of the same round.
CPU time beside wall time shows what other processes took. Medians, and the 90th percentile for the tail.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qzoo.progress import track

Clock = Callable[[Callable[[], Any]], tuple[float, float]]


@dataclass(frozen=True)
class Timing:
    """The calls of one candidate, in milliseconds.

    Attributes:
        wall, cpu: median of wall time and of this process's CPU time (all its threads).
        wall_p90, cpu_p90: 90th percentile.
        calls: number of timed calls.
    """

    wall: float
    wall_p90: float
    cpu: float
    cpu_p90: float
    calls: int

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class Samples:
    """Seconds of every timed call: wall and CPU time, one entry a round."""

    wall: np.ndarray
    cpu: np.ndarray

    def summary(self) -> Timing:
        """Medians and 90th percentiles."""
        wall, wall_p90 = np.percentile(self.wall, (50, 90)) * 1e3
        cpu, cpu_p90 = np.percentile(self.cpu, (50, 90)) * 1e3
        return Timing(float(wall), float(wall_p90), float(cpu), float(cpu_p90), len(self.wall))


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
        seconds: about how long each candidate is timed, after a warm-up of three calls.
        rounds: the least and the largest number of rounds; one call of each candidate makes a round.
        title: for the progress bar.
        clock: makes a call and says how long it took, wall and CPU seconds; by default in this process.

    Returns:
        The samples of each candidate, in the order of the rounds.
    """
    take = clock or _time
    slowest = max(_warm_up(call, take) for call in calls.values())
    count = int(np.clip(seconds / max(slowest, 1e-6), *rounds))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in track(range(count), title, show=progress):
        for name, call in calls.items():
            times[name].append(take(call))
    return {name: Samples(*np.array(values).T) for name, values in times.items()}


def ratio(slow: np.ndarray, fast: np.ndarray, draws: int = 1000) -> tuple[float, float, float]:
    """How many times as fast: the ratio of the medians, and its 95 % bootstrap interval over rounds.

    Args:
        slow, fast: seconds a call, [rounds] each, of the same rounds.
    """
    generator = np.random.default_rng(0)
    picks = generator.integers(0, len(slow), (draws, len(slow)))
    resampled = np.median(slow[picks], axis=1) / np.median(fast[picks], axis=1)
    low, high = np.percentile(resampled, (2.5, 97.5))
    return float(np.median(slow) / np.median(fast)), float(low), float(high)


def _warm_up(call: Callable[[], Any], take: Clock) -> float:
    for _ in range(2):
        take(call)
    return take(call)[0]


def _time(call: Callable[[], Any]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu
