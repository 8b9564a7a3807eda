"""``python -m tests.fuzz --cases N``: damaged and hostile checkpoints, ONNX files and images, on Linux.

Every case must end within 5 s of computing and 1.5 GB, in what is right or in an error that qzoo raises on purpose:

- *loader*: a damaged checkpoint is refused, or computes the same logits, to the bit, as the undamaged one; a hostile
  one (its hashes are right) is refused, or is finite and comes back the same when it is saved.
- *lint*: ``qzoo lint`` of a damaged or hostile ONNX file ends with status 0, 1 or 2 and says why in one line; of an
  equivalent one, with the same findings.
- *images*: a damaged image is a DataError that names the file, or a finite tensor; one set of pixels is the same
  tensor in every lossless format and depth.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.fuzz.cases import SUBJECTS, Outcome, Worker, case_of, random_of

GOOD = ("refused", "accepted")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", type=int, default=300, help="of all subjects together (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="of all cases (default: 0)")
    parser.add_argument("--only", choices=SUBJECTS, nargs="+", default=SUBJECTS, help="these subjects")
    parser.add_argument("--minutes", type=float, help="stop then, however many cases were run")
    parser.add_argument(
        "--replay", metavar="SUBJECT:INDEX", help="run one case in this process, for a debugger"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.replay:
            subject, index = args.replay.split(":")
            print(case_of(subject, Path(folder))(random_of(subject, args.seed, int(index))))
            return 0
        start = time.monotonic()
        outcomes = run(Path(folder), args.only, args.cases, args.seed, args.minutes)
    report(outcomes, args.seed, time.monotonic() - start)
    if len(outcomes) < args.cases:
        print(f"stopped after {args.minutes:g} minutes")
    return 1 if any(outcome.kind not in GOOD for outcome in outcomes) else 0


def run(
    folder: Path, subjects: list[str], count: int, seed: int, minutes: float | None = None
) -> list[Outcome]:
    """Deal the cases out to a process a core."""
    end = time.monotonic() + 60 * minutes if minutes else float("inf")
    cases, lock = iter(range(count)), threading.Lock()

    def dealt() -> Iterator[int]:
        while time.monotonic() < end:
            with lock:
                index = next(cases, None)
            if index is None:
                return
            yield index

    def work(number: int) -> list[Outcome]:
        place = folder / f"worker{number}"
        place.mkdir()
        worker, outcomes = Worker(place, seed), []
        try:
            for i in dealt():
                outcome = worker.run(subjects[i % len(subjects)], i // len(subjects))
                outcomes.append(outcome)
                if outcome.kind not in GOOD:
                    print(f"{outcome.kind}: {_again(outcome, seed)}\n{outcome.note}\n", flush=True)
        finally:
            worker.close()
        return outcomes

    jobs = min(os.cpu_count() or 1, count)
    with ThreadPoolExecutor(jobs) as pool:
        return [outcome for part in pool.map(work, range(jobs)) for outcome in part]


def report(outcomes: list[Outcome], seed: int, seconds: float) -> None:
    """Print a line a subject."""
    for subject in SUBJECTS:
        rows = [outcome for outcome in outcomes if outcome.subject == subject]
        if not rows:
            continue
        kinds = Counter(row.kind for row in rows)
        parts = [f"{kinds[kind]} {kind}" for kind in (*GOOD, "wrong", "crash", "hang", "memory")]
        slowest, largest = (
            max(rows, key=lambda row: row.seconds),
            max(rows, key=lambda row: row.megabytes),
        )
        print(
            f"{subject}: {len(rows)} cases: {', '.join(parts)}; slowest {slowest.seconds:.2f} s "
            f"({slowest.index}), most memory {largest.megabytes:.0f} MB ({largest.index})"
        )
    print(f"{len(outcomes)} cases of seed {seed} in {seconds:.0f} s")


def _again(outcome: Outcome, seed: int) -> str:
    return f"python -m tests.fuzz --seed {seed} --replay {outcome.subject}:{outcome.index}"


if __name__ == "__main__":
    sys.exit(main())
