"""``qzoo benchmark``: accuracy and latency in one table."""

from __future__ import annotations

import argparse
from pathlib import Path

from qzoo.commands import Add
from qzoo.commands.arguments import data_arguments


def register(add: Add) -> None:
    """Declare the command."""
    sub = add("benchmark", _run, "Accuracy and latency of checkpoints, in one table.")
    sub.add_argument("names", nargs="+", metavar="NAME", help="checkpoints, such as resnet20.fmnist-w8a8")
    data_arguments(sub)
    sub.add_argument(
        "--runtimes", nargs="+", help="default: pytorch, and onnxruntime and openvino if installed"
    )
    sub.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes (default: 1 8)")
    sub.add_argument("--latency-threads", type=int, default=1, help="threads of the timed runs (default: 1)")
    sub.add_argument("--out", type=Path, help="folder for benchmark.json, .csv and .png")


def _run(args: argparse.Namespace) -> int:
    from qzoo.benchmark import benchmark
    from qzoo.report import print_table, write_report

    report = benchmark(
        args.names,
        data=args.data,
        subset=args.subset,
        runtimes=args.runtimes,
        batches=args.batch,
        threads=args.latency_threads,
        progress=not args.quiet,
    )
    print_table(report)
    if args.out is not None:
        for path in write_report(report, args.out):
            print(path)
    return 0
