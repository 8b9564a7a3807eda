"""Compare two result files: what became slower, what faster.

    pytest benchmarks --benchmark-only --benchmark-json before.json
    python -m benchmarks.compare before.json after.json --slower 1.1

Reads the files of pytest-benchmark (medians of each case) and `benchmark.json` of `qzoo benchmark` (a call of each
model, runtime and batch: CPU time; wall time with several threads and on GPUs). Exit status 1 when a case became slower
than the limit; a warning when the machines differ, because then the figures say nothing about the library.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def times(results: dict[str, Any]) -> dict[str, float]:
    """Seconds by the name of the case.

    Raises:
        ValueError: neither of the two kinds of file.
    """
    if "benchmarks" in results:
        return {case["fullname"]: case["stats"]["median"] for case in results["benchmarks"]}
    if "rows" in results and "schema" in results:
        return {
            f"{row['model']}, {row['runtime']} {row['precision']} {row.get('source', 'qzoo')}, "
            f"batch {batch['batch']}": batch[f"{row.get('clock', 'cpu')}_ms"] / 1e3
            for row in results["rows"]
            for batch in row["batches"]
        }
    raise ValueError("neither a file of pytest-benchmark (--benchmark-json) nor a benchmark.json of qzoo")


def processor(results: dict[str, Any]) -> str:
    """The processor's name, empty where the file does not say."""
    if "machine_info" in results:
        return str(results["machine_info"].get("cpu", {}).get("brand_raw", ""))
    return str(results.get("machine", {}).get("processor", ""))


def compare(before: dict[str, float], after: dict[str, float], limit: float) -> tuple[list[str], bool]:
    """Lines of a table, the case that lost most first, and whether a case lost more than the limit."""
    both = sorted(before.keys() & after.keys(), key=lambda name: after[name] / before[name], reverse=True)
    width = max(map(len, [*before, *after]), default=0)
    lines = [f"{'case':{width}}  {'before, ms':>11}  {'after, ms':>11}  after/before"]
    for name in both:
        ratio = after[name] / before[name]
        word = "  SLOWER" if ratio > limit else "  faster" if ratio < 1 / limit else ""
        times_ = f"{1e3 * before[name]:11.4f}  {1e3 * after[name]:11.4f}"
        lines.append(f"{name:{width}}  {times_}  {ratio:12.3f}{word}")
    for name in sorted(before.keys() ^ after.keys()):
        lines.append(f"{name:{width}}  only in {'the first' if name in before else 'the second'} file")
    return lines, any(after[name] > limit * before[name] for name in both)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit status says whether something became slower."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--slower", type=float, default=1.1, help="the limit of after/before (default: 1.1)")
    args = parser.parse_args(arguments)
    results = [json.loads(path.read_text()) for path in (args.before, args.after)]
    try:
        before, after = (times(result) for result in results)
    except ValueError as error:
        parser.error(str(error))
    lines, slower = compare(before, after, args.slower)
    if processor(results[0]) != processor(results[1]):
        lines.append(f"The machines differ: {processor(results[0])!r} and {processor(results[1])!r}.")
    print("\n".join(lines))
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
