"""``qzoo export``: ONNX with Q/DQ pairs."""

from __future__ import annotations

import argparse
from pathlib import Path

from qzoo.commands import Add
from qzoo.scheme import TARGETS


def register(add: Add) -> None:
    """Declare the command."""
    sub = add("export", _run, "Write a checkpoint as ONNX with Q/DQ pairs.")
    sub.add_argument("name", metavar="NAME")
    sub.add_argument("path", type=Path, help="the file to write")
    sub.add_argument("--target", choices=list(TARGETS), default="onnxruntime")
    sub.add_argument("--opset", type=int)
    sub.add_argument("--batch", default="dynamic", help="'dynamic' or a number (default: dynamic)")


def _run(args: argparse.Namespace) -> int:
    import qzoo

    model = qzoo.create_model(args.name, pretrained=True)
    batch = args.batch if args.batch == "dynamic" else int(args.batch)
    path = qzoo.export_onnx(model, args.path, target=args.target, opset=args.opset, batch=batch)
    print(f"{path}: {Path(path).stat().st_size / 1e6:.2f} MB")
    return 0
