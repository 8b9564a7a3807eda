"""``qzoo export``: ONNX with Q/DQ pairs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qzoo.commands import Add, say
from qzoo.commands.arguments import data_source, positive
from qzoo.scheme import DEFAULT_TARGET, TARGETS

if TYPE_CHECKING:
    from torch import Tensor, nn

# Of whole trained networks: forms that OpenVINO computes wrongly (docs/openvino.md) left 18.4 dB at most, flipped
# roundings alone 23 and more.
_WORTH_A_LOOK_DB = 20.0


def register(add: Add) -> None:
    """Declare the command."""
    sub = add("export", _run, "Write a checkpoint as ONNX with Q/DQ pairs.")
    sub.add_argument("name", metavar="NAME")
    sub.add_argument("path", type=Path, help="the file to write")
    sub.add_argument("--target", choices=list(TARGETS), default=DEFAULT_TARGET)
    sub.add_argument("--opset", type=int, help="default: the lowest that has the model's formats")
    sub.add_argument(
        "--batch", type=_batch, default="dynamic", help="'dynamic' or a number (default: dynamic)"
    )
    sub.add_argument("--weights", choices=("int8", "int4", "float"), default="int8")
    sub.add_argument(
        "--reduce-range",
        action="store_true",
        help="weights of 7 bits, for x86 processors without VNNI, whose sums of 8-bit products are cut off",
    )
    sub.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="of what is not quantized; float16 for TensorRT, whose float32 is slow (default: float32)",
    )
    text = (
        "run the file in its runtime and compare with the simulation; exit status 1 below 20 dB, for NaN, and where "
        "OpenVINO is far below ONNX Runtime on the same file"
    )
    sub.add_argument("--check", action="store_true", help=text)
    sub.add_argument(
        "--data", type=data_source, help="images for --check (default: Fashion-MNIST's own, else noise)"
    )
    sub.add_argument("--images", type=positive, default=32, help="how many, for --check")


def _run(args: argparse.Namespace) -> int:
    import qzoo
    from qzoo.export import check, lint
    from qzoo.zoo.create import open_model

    model = open_model(args.name)
    path = qzoo.export_onnx(
        model,
        args.path,
        target=args.target,
        opset=args.opset,
        batch=args.batch,
        weights=args.weights,
        reduce_range=args.reduce_range,
        dtype=args.dtype,
    )
    say(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    quantized = getattr(model, "qzoo_config").scheme is not None  # noqa: B009 - nn.Module hides it from mypy
    for finding in lint(path, args.target) if quantized else []:
        say(finding)
    if not args.check:
        return 0
    count = args.images if args.batch == "dynamic" else args.batch
    result = check(path, model, _images(model, args.data, count), target=args.target)
    say(result)
    return 0 if result.sqnr_db >= _WORTH_A_LOOK_DB and not result.misread else 1


def _batch(text: str) -> str | int:
    if text == "dynamic" or (text.isdecimal() and int(text) > 0):
        return text if text == "dynamic" else int(text)
    raise argparse.ArgumentTypeError(f"must be 'dynamic' or a positive number, not {text!r}")


def _images(model: nn.Module, data: str | Path | None, count: int) -> Tensor | None:
    """The first images of the model's data set; None where there are none."""
    from qzoo.data import load_data
    from qzoo.data.sets import is_embedded

    config = getattr(model, "qzoo_config")  # noqa: B009
    if data is None and not is_embedded(config.labels):
        return None
    loader = load_data(config.preprocessing, config.labels, data, subset=f":{count}", batch_size=count)
    return next(iter(loader))[0]
