"""``qzoo benchmark``: accuracy and latency in one table."""

from __future__ import annotations

import argparse
from pathlib import Path

from qzoo.commands import Add, say
from qzoo.commands.arguments import checkpoint_folder, data_arguments, positive, reference_argument


def register(add: Add) -> None:
    """Declare the command."""
    sub = add("benchmark", _run, "Accuracy and latency of checkpoints, in one table.")
    sub.add_argument(
        "names",
        nargs="+",
        metavar="NAME",
        help="checkpoints, such as resnet20.fmnist-w8a8, folders, org/name, or ONNX files",
    )
    sub.epilog = "Accuracy is measured with all cores, whatever --threads is."
    data_arguments(sub)
    reference_argument(sub)
    sub.add_argument(
        "--runtimes",
        nargs="+",
        metavar="NAME",
        help="default: pytorch, and onnxruntime and openvino if installed",
    )
    sub.add_argument("--batch", type=positive, nargs="+", default=[1, 8], help="batch sizes (default: 1 8)")
    sub.add_argument(
        "--seconds", type=float, default=2.0, help="of timing, a model, runtime and batch (default: 2)"
    )
    peers = "quantize_static, nncf, torchvision"
    sub.add_argument("--compare", nargs="+", default=[], metavar="PEER", help=f"other tools' models: {peers}")
    sub.add_argument(
        "--calibration-images",
        type=positive,
        default=128,
        help="the first ones of the data, for peers (default: 128)",
    )
    text = "that loading a model, or one call, may last; torch.compile compiles in its calls (default: 600)"
    sub.add_argument("--limit", type=float, default=600.0, metavar="SECONDS", help=text)
    sub.add_argument(
        "--out", type=Path, help="folder for benchmark.json, .csv, .html and .png; measures layers too"
    )


def _run(args: argparse.Namespace) -> int:
    from qzoo.bench.report import print_table, write_report
    from qzoo.bench.run import benchmark
    from qzoo.export.description import is_onnx

    exact: str | None = args.float_weights
    report = benchmark(
        args.names,
        data=args.data,
        float_weights=exact if exact and is_onnx(exact) else checkpoint_folder(exact),
        subset=args.subset,
        skip_broken=args.skip_broken,
        runtimes=args.runtimes,
        batches=args.batch,
        threads=args.threads or 1,
        seconds=args.seconds,
        compare=args.compare,
        calibration_images=args.calibration_images,
        details=args.out is not None,
        progress=not args.quiet,
        limit=args.limit,
    )
    print_table(report)
    if args.out is not None:
        for path in write_report(report, args.out):
            say(path)
    return 0
