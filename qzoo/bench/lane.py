"""One contender, running in a process of its own, and all that a benchmark learns of it: its row."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qzoo import runtimes as rt
from qzoo.accuracy import Evaluation, RecordedLogits, evaluate
from qzoo.bench import timing
from qzoo.bench.batches import Batches
from qzoo.bench.contenders import Contender
from qzoo.bench.options import Options
from qzoo.bench.process import Process
from qzoo.bench.results import PeerSpeedup, Row
from qzoo.deployment import any_batch
from qzoo.progress import track


@dataclass
class Lane:
    """A contender and its process.

    Attributes:
        load_seconds, first_ms: loading the model, and its first call.
        idle_bytes, peak_bytes: memory of the process before, and the most up to the end of the timing; None if unknown.
        samples: by batch size, the turns of this contender.
        score: its accuracy, None where there are no images.
    """

    contender: Contender
    process: Process
    options: Options
    load_seconds: float = 0.0
    first_ms: float = 0.0
    idle_bytes: int | None = None
    peak_bytes: int | None = None
    samples: dict[int, timing.Samples] = field(default_factory=dict)
    score: Evaluation | None = None

    def start(self, image: Tensor) -> None:
        """Load the model and call it once, on one image or as many as it takes."""
        self.load_seconds, self.idle_bytes = self._load(self.options.threads)
        self.process.images(image.expand(self.contender.batch or 1, *image.shape[1:]).numpy())
        self.first_ms = 1e3 * self.process.first()

    def run(self, images: Tensor) -> Tensor:
        """Compute the logits of a batch."""
        self.process.images(images.numpy())
        return torch.from_numpy(self.process.run())

    def evaluate(self, batches: Batches, reference: Tensor | None) -> Evaluation:
        """Measure accuracy with all threads, and fidelity to the float model's logits, if any."""
        runtime, size = self.contender.runtime, self.contender.batch
        if reference is not None and (runtime, self.contender.precision) == ("pytorch", "float32"):
            return evaluate(RecordedLogits(reference), batches, reference=reference, progress=False)
        if (
            runtime == "torch.compile"
        ):  # which compiles anew for other threads, and for other sizes than the timed
            size = max(self.options.batches)
        else:
            self._load(os.cpu_count() or 1)
        shown = track(batches, f"evaluate {self.contender.title}", show=self.options.progress)
        return evaluate(any_batch(self.run, size), shown, reference=reference, progress=False)

    def row(self, model: str, lanes: Sequence[Lane]) -> Row:
        """Summarize the lane as a row, against the float model in this runtime and the peers among ``lanes``."""
        own, score = self.contender, self.score
        clock = "cpu" if self.options.threads == 1 and rt.runtime_named(own.runtime).on_cpu else "wall"
        floats = [lane for lane in lanes if lane.contender.precision == "float32"]
        base = next((lane for lane in floats if lane.contender.runtime == own.runtime), None)
        others = [lane for lane in lanes if lane.contender.source != "qzoo"]
        against = [
            PeerSpeedup(other.contender.source, other.contender.runtime, batch, *ratio)
            for other in others
            if (own.source, own.precision) == ("qzoo", "int8")
            for batch, ratio in self._speedup(other, clock).items()
        ]
        return Row(
            model=model,
            runtime=own.runtime,
            precision=own.precision,
            source=own.source,
            images=score.images if score else 0,
            top1=score.top1 if score else None,
            top1_interval=score.top1_interval if score else None,
            agreement=score.agreement if score else None,
            sqnr_db=score.sqnr_db if score else None,
            latency={batch: samples.summary() for batch, samples in self.samples.items()},
            clock=clock,
            cpu_speedup=self._speedup(base, "cpu"),
            wall_speedup=self._speedup(base, "wall"),
            file_bytes=own.bytes,
            load_seconds=self.load_seconds,
            first_ms=self.first_ms,
            peak_rss_bytes=self.peak_bytes,
            idle_rss_bytes=self.idle_bytes,
            against=tuple(against),
        )

    def _load(self, threads: int) -> tuple[float, int | None]:
        own = self.contender
        return self.process.load(own.runtime, own.path, threads, own.modules)

    def _speedup(self, other: Lane | None, clock: str) -> dict[int, tuple[float, float, float]]:
        """Speed-ups over another lane, by batch size; empty without one."""
        if other is None:
            return {}
        return {
            batch: timing.ratio(getattr(other.samples[batch], clock), getattr(samples, clock))
            for batch, samples in self.samples.items()
        }


@contextmanager
def running(contenders: Sequence[Contender], name: str, options: Options) -> Iterator[list[Lane]]:
    """Run a process for each contender until the block ends; ``name`` is the model's, for messages."""
    with ExitStack() as stack:
        yield [
            Lane(each, stack.enter_context(Process(f"{each.title} of {name}", options.limit)), options)
            for each in contenders
        ]


def time_in_turns(lanes: Sequence[Lane], name: str, image: Tensor, options: Options) -> None:
    """Start every lane, time them in turns at each batch size of an image [1, C, H, W], and ask for their memory."""
    for lane in track(lanes, "load", show=options.progress):
        lane.start(image)
    for batch in options.batches:
        images = image.expand(batch, *image.shape[1:]).contiguous().numpy()
        for lane in lanes:
            lane.process.images(images)
        samples = timing.measure(
            {f"{i}": lane.process.turn for i, lane in enumerate(lanes)},
            seconds=options.seconds,
            rounds=options.rounds,
            title=f"time {name}, batch {batch}, {options.threads} thread(s)",
            progress=options.progress,
            clock=lambda call: call(),
        )
        for lane, turns in zip(lanes, samples.values(), strict=True):
            lane.samples[batch] = turns
    for lane in lanes:
        lane.peak_bytes = lane.process.peak_memory()
