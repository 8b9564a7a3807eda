"""Cost of collecting statistics for all calibration methods against a plain forward pass, and of computing the ranges.

    python -m benchmarks.calibration [--threads N] [--rounds N] [--out FILE]

The two passes take turns on the same batch, so that a busy machine slows both; the ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import machine
from qzoo.ptq.collect import METHODS, collect
from qzoo.quantizers import quantizers_off
from qzoo.zoo.create import create_model

BATCHES = 2  # the first one also finds the width of the bins
MODELS = ("tf_efficientnet_lite0", "resnet50")


def measure(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """Seconds of a plain forward pass and of one that collects for all methods, and of all ranges by all methods."""
    torch.manual_seed(0)
    model = create_model(name, quantize=True).eval()
    x = torch.randn(batch, 3, 224, 224)
    plain: list[float] = []
    with_statistics: list[float] = []

    def forward() -> None:
        with torch.no_grad(), quantizers_off(model):
            for _ in range(BATCHES):
                model(x)

    forward()
    for _ in range(rounds):
        plain.append(_seconds(forward))
        with_statistics.append(
            _seconds(lambda: collect(model, [x] * BATCHES, histograms=True, progress=False))
        )
    gathered = collect(model, [x], histograms=True, progress=False)
    seconds = {method: _seconds(lambda m=method: gathered.ranges(m, 99.99)) for method in METHODS}  # type: ignore[misc]
    ratio = statistics.median(b / a for a, b in zip(plain, with_statistics, strict=True))
    return {
        "model": name,
        "batch": batch,
        "rounds": rounds,
        "forward_s": statistics.median(plain),
        "collect_s": statistics.median(with_statistics),
        "ratio": ratio,
        "ranges_s": seconds,
        "all_ranges_s": sum(seconds.values()),
    }


def _seconds(work: Callable[[], Any]) -> float:
    """CPU time with one thread, elapsed time with more, as :func:`benchmarks.measure.interleaved`."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    work()
    return clock() - start


def main() -> None:
    """Print and save the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--note", default="", help="what else the machine did")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "calibration.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [measure(name, args.batch, args.rounds) for name in MODELS]
    for row in rows:
        print(
            f"{row['model']}: forward {row['forward_s']:.2f} s, collect {row['collect_s']:.2f} s, ratio "
            f"{row['ratio']:.2f}; all ranges {row['all_ranges_s']:.2f} s"
        )
    values = {**machine(), "threads": args.threads, "note": args.note, "rows": rows}
    args.out.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
