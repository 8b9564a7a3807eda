"""Options of a benchmark."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qzoo import runtimes as rt
from qzoo.bench import peers
from qzoo.errors import ArgumentError


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        runtimes: names of :data:`qzoo.runtimes.RUNTIMES`.
        batches: batch sizes of the latencies; the largest one gives the throughput.
        threads: threads a timed call may use. Accuracy is measured with all.
        seconds: about how long each model is timed in each runtime at each batch size.
        compare: names of :data:`qzoo.bench.peers.RUNS_IN`.
        details: measure what the page shows of single layers too: sensitivity, histograms, time of every node.
        progress: show progress bars.
        limit: seconds that loading a model, or one call, may last (``torch.compile`` compiles in its calls).
        rounds: the least and the largest number of turns of each model.
    """

    runtimes: tuple[str, ...] = ("pytorch", "onnxruntime")
    batches: tuple[int, ...] = (1, 8)
    threads: int = 1
    seconds: float = 2.0
    compare: tuple[str, ...] = ()
    details: bool = False
    progress: bool = True
    limit: float = 600.0
    rounds: tuple[int, int] = (15, 300)

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1:
            raise ArgumentError(f"batches must be positive numbers, not {self.batches}")
        if not (self.threads >= 1 and 0 < self.seconds < math.inf and 0 < self.limit < math.inf):
            values = f"{self.threads}, {self.seconds} and {self.limit}"
            raise ArgumentError(f"threads, seconds and limit must be positive numbers, not {values}")
        unknown = [name for name in self.runtimes if name not in rt.RUNTIMES]
        if unknown or not self.runtimes:
            raise ArgumentError(
                f"no runtime {', '.join(unknown)!r}; expected some of {', '.join(rt.RUNTIMES)}"
            )
        peers.check(self.compare, self.runtimes)
