"""``qzoo evaluate``: accuracy, and fidelity to the float model."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from qzoo.commands import Add, say
from qzoo.commands.arguments import (
    checkpoint_folder,
    data_arguments,
    dataset_argument,
    positive,
    process_arguments,
    reference_argument,
    workers_argument,
)
from qzoo.errors import ArgumentError, one_line
from qzoo.scheme import TARGETS

if TYPE_CHECKING:
    from qzoo.accuracy import Evaluation


def register(add: Add) -> None:
    """Declare the command."""
    sub = add("evaluate", _run, "Accuracy of a checkpoint or an ONNX file, and fidelity to its float model.")
    sub.add_argument(
        "name", metavar="NAME", help="of a checkpoint, its folder, org/name on the Hub, or an ONNX file"
    )
    dataset_argument(sub)
    data_arguments(sub)
    reference_argument(sub)
    sub.add_argument(
        "--batch-size",
        type=positive,
        help="images a batch (default: 4 of 224 x 224 on a CPU, more of smaller ones)",
    )
    workers_argument(sub)
    process_arguments(sub)
    sub.add_argument(
        "--target",
        choices=list(TARGETS),
        help="default: what it was made for; of an ONNX file the runtime that runs it (default: onnxruntime)",
    )


def _run(args: argparse.Namespace) -> int:
    from qzoo.export.description import is_onnx

    return (_run_file if is_onnx(args.name) else _run_checkpoint)(args)


def _run_file(args: argparse.Namespace) -> int:
    """An ONNX file, against another one where ``--float`` names it."""
    import torch

    import qzoo
    from qzoo.data import batch_for
    from qzoo.deployment import any_batch, load
    from qzoo.distributed import joined
    from qzoo.export.description import is_onnx, read_description
    from qzoo.pipeline.parts import images_of_file

    if args.float_weights is not None and not is_onnx(args.float_weights):
        raise ArgumentError(f"--float {args.float_weights}: an ONNX file is compared with another ONNX file")
    file, runtime = read_description(args.name), args.target or "onnxruntime"
    with joined(args.timeout, args.device) as group:
        threads = torch.get_num_threads()
        reference = None
        if args.float_weights is not None:
            batch = read_description(args.float_weights).batch
            reference = any_batch(load(args.float_weights, "onnxruntime", threads), batch)
        images, note = images_of_file(file, args.name, args.data, args.subset)
        named = replace(file, labels=args.dataset or file.labels)
        size = args.batch_size or file.batch or batch_for(file.preprocessing)
        loader = images.load(
            named, args.data, batch_size=size, workers=args.workers, skip_broken=args.skip_broken
        )
        run = any_batch(load(args.name, runtime, threads), file.batch)
        result = qzoo.evaluate(run, loader, reference=reference, progress=not args.quiet, group=group)
    if group.first:
        note = "; ".join(filter(None, (file.assumed, note)))
        _print(args.name, runtime, result, f" ({note})" if note else "")
    return 0


def _run_checkpoint(args: argparse.Namespace) -> int:
    import qzoo
    from qzoo.config import config_of
    from qzoo.data import batch_for
    from qzoo.distributed import joined
    from qzoo.pipeline.parts import for_data_set, measured_images
    from qzoo.quantizers import set_target
    from qzoo.zoo.create import open_model
    from qzoo.zoo.floats import reference_of

    with joined(args.timeout, args.device) as group:
        with group.first_alone():
            model = open_model(args.name, args.target).to(group.device)
            config, reference = for_data_set(config_of(model), args.dataset), None
            target = args.target or config.target
            if config.scheme is not None:
                set_target(model, target)
                reference = reference_of(config, checkpoint_folder(args.float_weights)).to(group.device)
            images, note = measured_images(config, args.data, args.subset)
            default = 64 if group.device.type == "cuda" else batch_for(config.preprocessing)
            size = args.batch_size or default
            loader = images.load(
                config, args.data, batch_size=size, workers=args.workers, skip_broken=args.skip_broken
            )
        result = qzoo.evaluate(model, loader, reference=reference, progress=not args.quiet, group=group)
    if group.first:
        _print(args.name, target, result, f" ({note})" if note else "")
    return 0


def _print(name: str, target: str, result: Evaluation, note: str) -> None:
    low, high = result.top1_interval
    say(f"{one_line(name)}, {result.images} images{note}, target {target}")
    if result.skipped:
        say(f"skipped    {result.skipped} images that do not decode")
    say(f"top-1      {result.top1:.2f} % (95 % interval {low:.2f} to {high:.2f})")
    say(f"top-5      {result.top5:.2f} %")
    say(f"loss       {result.loss:.4f}")
    say(f"speed      {result.images_per_second:.0f} images/s")
    if result.reference is not None:
        low, high = result.reference.top1_interval
        say(f"float      {result.reference.top1:.2f} % (95 % interval {low:.2f} to {high:.2f}), same images")
        say(f"agreement  {result.agreement:.2f} % of images have the float model's top-1")
        say(f"SQNR       {result.sqnr_db:.2f} dB of the logits")
