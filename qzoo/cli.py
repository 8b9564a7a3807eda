"""The ``qzoo`` command: arguments in, tables out; every command is one call of the library."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qzoo.errors import QzooError
from qzoo.scheme import TARGETS

if TYPE_CHECKING:
    from qzoo.config import Config, Measurement
    from qzoo.data import Loader

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status (2 for an error that the message explains)."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.threads is not None:
        import torch

        torch.set_num_threads(args.threads)
    command: Command = args.command
    try:
        return command(args)
    except (QzooError, ValueError, FileNotFoundError) as error:
        print(f"qzoo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qzoo: interrupted", file=sys.stderr)
        return 130


def _list(args: argparse.Namespace) -> int:
    import qzoo

    for name in qzoo.list_models(args.pattern, pretrained=args.pretrained):
        print(name)
    return 0


def _benchmark(args: argparse.Namespace) -> int:
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


def _evaluate(args: argparse.Namespace) -> int:
    import qzoo
    from qzoo.config import config_of
    from qzoo.data import load_data
    from qzoo.zoo import float_model

    model = qzoo.create_model(args.name, pretrained=True, target=args.target)
    config = config_of(model)
    loader = load_data(config.preprocessing, config.labels, args.data, subset=args.subset)
    reference = float_model(config) if config.scheme is not None else None
    result = qzoo.evaluate(model, loader, reference=reference, progress=not args.quiet)
    low, high = result.top1_interval
    print(f"{args.name}, {result.images} images, target {args.target}")
    print(f"top-1      {result.top1:.2f} % (95 % interval {low:.2f} to {high:.2f})")
    print(f"top-5      {result.top5:.2f} %")
    print(f"loss       {result.loss:.4f}")
    print(f"speed      {result.images_per_second:.0f} images/s")
    if result.reference is not None:
        low, high = result.reference.top1_interval
        print(
            f"float      {result.reference.top1:.2f} % (95 % interval {low:.2f} to {high:.2f}), same images"
        )
        print(f"agreement  {result.agreement:.2f} % of images have the float model's top-1")
        print(f"SQNR       {result.sqnr_db:.2f} dB of the logits")
    return 0


def _build(args: argparse.Namespace) -> int:
    from qzoo.build import build

    folder = build(
        args.name,
        data=args.data,
        calibration_subset=args.calibration_subset,
        evaluation_subset=args.evaluation_subset,
        method=args.method,
        rounding=args.rounding,
        out=args.out,
        progress=not args.quiet,
    )
    print(folder)
    return 0


def _train(args: argparse.Namespace) -> int:
    from qzoo.train import TrainOptions
    from qzoo.train_checkpoint import train_checkpoint

    options = TrainOptions(
        epochs=args.epochs,
        lr=args.lr,
        weight_decay=args.weight_decay,
        label_smoothing=args.label_smoothing,
        seed=args.seed,
        bf16=args.bf16,
    )
    folder = train_checkpoint(
        args.name,
        options,
        data=args.data,
        batch_size=args.batch_size,
        runs=args.runs,
        out=args.out,
        progress=not args.quiet,
    )
    print(folder)
    return 0


def _card(args: argparse.Namespace) -> int:
    from qzoo.cards import write_card
    from qzoo.tables import update_readme

    for folder in args.folders:
        print(write_card(folder))
    if args.readme is not None and update_readme(args.readme):
        print(args.readme)
    return 0


def _publish(args: argparse.Namespace) -> int:
    from qzoo.publish import publish

    done = publish(args.folder, args.to, private=args.private, revision=args.revision, dry_run=args.dry_run)
    for path, size in done.files.items():
        print(f"{size:12,}  {path}")
    print(
        f"{done.repo}: {'dry run, nothing sent' if args.dry_run else f'commit {done.commit}, tag {done.tag}'}"
    )
    return 0


def _verify(args: argparse.Namespace) -> int:
    from qzoo.data import load_data
    from qzoo.verify import Load, verify

    def images(config: Config, row: Measurement) -> Loader:
        return load_data(config.preprocessing, config.labels, args.data, subset=row.subset)

    load: Load | None = images if args.measure or args.data is not None else None
    findings = verify(None if args.all else args.names, load, progress=not args.quiet)
    for finding in findings:
        print(f"{'FAIL' if finding.problem else 'ok  '}  {finding.name}  {finding.place}  {finding.problem}")
    return 1 if any(finding.problem for finding in findings) else 0


def _export(args: argparse.Namespace) -> int:
    import qzoo

    model = qzoo.create_model(args.name, pretrained=True)
    batch = args.batch if args.batch == "dynamic" else int(args.batch)
    path = qzoo.export_onnx(model, args.path, target=args.target, opset=args.opset, batch=batch)
    print(f"{path}: {Path(path).stat().st_size / 1e6:.2f} MB")
    return 0


def _predict(args: argparse.Namespace) -> int:
    from qzoo.predict import predict

    for label, probability in predict(args.image, args.model, k=args.top):
        print(f"{100 * probability:6.2f} %  {label}")
    return 0


def _env(args: argparse.Namespace) -> int:
    from qzoo.environment import describe

    for key, value in describe().items():
        print(f"{key:22} {value}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qzoo", description="Pre-quantized vision models, measured.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        sub.add_argument("--threads", type=int, help="threads that torch may use (default: all cores)")
        sub.add_argument("-q", "--quiet", action="store_true", help="no progress bars")
        return sub

    sub = add("list", _list, "List architectures, or checkpoints with --pretrained.")
    sub.add_argument("pattern", nargs="?", default="*", help="shell pattern, such as 'resnet*'")
    sub.add_argument("--pretrained", action="store_true", help="names that have weights")

    sub = add("benchmark", _benchmark, "Accuracy and latency of checkpoints, in one table.")
    sub.add_argument("names", nargs="+", metavar="NAME", help="checkpoints, such as resnet20.fmnist-w8a8")
    _data_arguments(sub)
    sub.add_argument(
        "--runtimes", nargs="+", help="default: pytorch, and onnxruntime and openvino if installed"
    )
    sub.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes (default: 1 8)")
    sub.add_argument("--latency-threads", type=int, default=1, help="threads of the timed runs (default: 1)")
    sub.add_argument("--out", type=Path, help="folder for benchmark.json, .csv and .png")

    sub = add("evaluate", _evaluate, "Accuracy of a checkpoint, and fidelity to its float model.")
    sub.add_argument("name", metavar="NAME")
    _data_arguments(sub)
    sub.add_argument("--target", choices=list(TARGETS), default="tensorrt")

    _build_arguments(add("build", _build, "Make a calibrated checkpoint and its card from float weights."))
    _train_arguments(add("train", _train, "Train a float model from scratch and save it as a checkpoint."))

    sub = add("card", _card, "Write the cards of checkpoint folders anew, from their config.json.")
    sub.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    sub.add_argument("--readme", type=Path, help="a README whose zoo table to write anew, too")

    sub = add("publish", _publish, "Upload a checkpoint to the Hub: weights, ONNX, card; one commit, pinned.")
    sub.add_argument("folder", type=Path, metavar="FOLDER")
    sub.add_argument(
        "--to", metavar="ORG/NAME", help="default: the checkpoint's name in $QZOO_HUB_ORG or qzoo"
    )
    sub.add_argument("--private", action="store_true")
    sub.add_argument("--revision", default="main", help="branch (default: main)")
    sub.add_argument("--dry-run", action="store_true", help="everything but the upload")

    sub = add("verify", _verify, "Check that checkpoints are there, whole, and what their cards say.")
    sub.add_argument("names", nargs="*", metavar="NAME")
    sub.add_argument("--all", action="store_true", help="every checkpoint that the package knows")
    sub.add_argument("--data", type=Path, help="measure again on these images")
    sub.add_argument("--measure", action="store_true", help="measure Fashion-MNIST checkpoints again")

    sub = add("export", _export, "Write a checkpoint as ONNX with Q/DQ pairs.")
    sub.add_argument("name", metavar="NAME")
    sub.add_argument("path", type=Path, help="the file to write")
    sub.add_argument("--target", choices=list(TARGETS), default="onnxruntime")
    sub.add_argument("--opset", type=int)
    sub.add_argument("--batch", default="dynamic", help="'dynamic' or a number (default: dynamic)")

    sub = add("predict", _predict, "Top labels of a photo, int8 in ONNX Runtime.")
    sub.add_argument("image", type=Path)
    sub.add_argument("--model", default="tf_efficientnet_lite0", help="default: tf_efficientnet_lite0")
    sub.add_argument("--top", type=int, default=5, help="labels to print (default: 5)")

    add("env", _env, "Versions, processor, and which kernels run.")
    return parser


def _data_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--data", type=Path, help="folder of labelled images (not needed for Fashion-MNIST)")
    sub.add_argument("--subset", metavar="START:STOP", help="part of the images, in a fixed shuffled order")


def _build_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("name", metavar="NAME", help="such as tf_efficientnet_lite0.in1k-w8a8")
    sub.add_argument("--data", type=Path, help="folder of images, one folder a class")
    sub.add_argument("--calibration-subset", metavar="START:STOP", help="images to calibrate on")
    sub.add_argument("--evaluation-subset", metavar="START:STOP", help="images to evaluate on")
    sub.add_argument(
        "--method",
        choices=["auto", "max", "percentile", "mse", "entropy"],
        help="of the ranges (default: auto)",
    )
    sub.add_argument("--rounding", choices=["nearest", "learned"], help="of weights (default: nearest)")
    sub.add_argument("--out", type=Path, help="folder (default: model_cards/NAME)")


def _train_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("name", metavar="NAME", help="such as resnet20.fmnist")
    sub.add_argument("--data", type=Path, help="folder with the training set (default: found or downloaded)")
    sub.add_argument("--epochs", type=int, default=36)
    sub.add_argument("--batch-size", type=int, default=128)
    sub.add_argument("--lr", type=float, default=0.1)
    sub.add_argument("--weight-decay", type=float, default=5e-4)
    sub.add_argument("--label-smoothing", type=float, default=0.0)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    sub.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the state to resume from")
    sub.add_argument("--out", type=Path, help="folder of the checkpoint (default: model_cards/NAME)")
