"""Interleaved timing and the ratio's interval, on calls of known cost."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np

from qzoo.bench.timing import Samples, measure, ratio


def test_calls_take_turns() -> None:
    order: list[str] = []
    samples = measure(
        {name: lambda name=name: order.append(name) for name in "abc"},
        rounds=(300, 300),
        seconds=0.0,
        progress=False,
    )
    warm_up, timed = order[:9], order[9:]
    assert "".join(warm_up) == "aaabbbccc"
    rounds = ["".join(timed[i : i + 3]) for i in range(0, 900, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert list(samples) == ["a", "b", "c"]
    assert all(len(s.wall) == len(s.cpu) == 300 for s in samples.values())
    # Whom a call follows is left to chance: of 600 places behind another call of the round, each pair has a sixth.
    pairs = Counter(pair for each in rounds for pair in (each[:2], each[1:]))
    assert len(pairs) == 6
    assert all(70 <= count <= 130 for count in pairs.values())


def test_wall_and_cpu_time_are_told_apart() -> None:
    sleep = measure({"s": lambda: time.sleep(0.01)}, rounds=(3, 3), progress=False)["s"].summary()
    assert sleep.wall >= 10.0
    assert sleep.cpu < 5.0
    assert sleep.calls == 3
    assert sleep.wall_over_cpu > 2


def test_summary_and_ratio_against_numpy() -> None:
    values = np.arange(1.0, 12.0)
    turns = [([v - 0.5, v, v + 0.5], 2 * v) for v in values]
    samples = Samples.of(turns)
    np.testing.assert_array_equal(samples.wall, values)
    summary = samples.summary()
    assert summary.calls == 33
    assert (summary.wall, summary.cpu, summary.cpu_p90) == (6e3, 12e3, 20e3)
    assert summary.wall_p90 == np.percentile([v for calls, _ in turns for v in calls], 90) * 1e3
    assert summary.wall_over_cpu == 0.5
    found, low, high = ratio(np.full(20, 3.0), np.full(20, 1.5))
    assert (found, low, high) == (2.0, 2.0, 2.0)
    generator = np.random.default_rng(1)
    found, low, high = ratio(generator.normal(3, 0.3, 100), generator.normal(1, 0.1, 100))
    assert low < 3.0 < high
    assert low < found < high
    assert high - low < 0.4
