"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from qzoo.data.sets import DATA_SETS, is_stream
from qzoo.errors import ArgumentError
from qzoo.options import flag
from qzoo.scheme import FLOAT, LayerBits


def positive(text: str) -> int:
    """Parse an argument that is a whole number of 1 or more."""
    if text.isdecimal() and 0 < int(text) < 2**31:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, not {text!r}")


def from_zero(text: str) -> int:
    """Parse an argument that is a whole number of 0 or more."""
    if text.isdecimal() and int(text) < 2**31:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number of 0 or more, not {text!r}")


def _seconds(text: str) -> float:
    """A type of argument: a finite time above 0."""
    with suppress(ValueError):
        if 0 < float(text) < 1e9:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, not {text!r}")


def import_argument(sub: argparse.ArgumentParser) -> None:
    """Add ``--import``, which :func:`import_given` carries out."""
    sub.add_argument(
        "--import",
        action="append",
        default=[],
        dest="imports",
        metavar="FILE_OR_MODULE",
        help="Python that registers models of your own (qzoo.registry.register_model); may be repeated",
    )


def import_given(args: argparse.Namespace) -> None:
    """Import what ``--import`` names. Raises ArgumentError where there is no such file or module."""
    for where in getattr(args, "imports", ()):
        from qzoo.registry import import_models

        import_models(where)


def checkpoint_folder(text: str | None) -> Path | None:
    """Find the folder that ``--float`` gives or names; a factory stays as it is. Raises QzooError for anything else."""
    from qzoo.placement.factory import is_factory
    from qzoo.zoo import hub

    return None if text is None else Path(text) if is_factory(text) else hub.locate(text)


def own_folder(text: str) -> Path:
    """Find a folder to write into, or the name of a checkpoint of the user's store."""
    from qzoo.zoo.store import stored

    return Path(text) if Path(text).is_dir() else stored().get(text, Path(text))


def workers_argument(sub: argparse.ArgumentParser) -> None:
    """Add ``--workers``."""
    sub.add_argument("--workers", type=_workers, default=0, help="processes that decode images (default: 0)")


def _workers(text: str) -> int:
    """A type of argument: so many processes as the machine can take."""
    most, count = 4 * (os.cpu_count() or 1), from_zero(text)
    if count > most:
        raise argparse.ArgumentTypeError(
            f"must be at most {most}, four for each of this machine's cores, not {count}"
        )
    return count


def process_arguments(sub: argparse.ArgumentParser) -> None:
    """Add ``--device``, and ``--timeout`` of the processes that torchrun starts."""
    sub.add_argument(
        "--device",
        choices=["cpu", "cuda", "auto"],
        default="cpu",
        help="auto: a GPU for each process where there are enough (default: cpu)",
    )
    sub.add_argument(
        "--timeout",
        type=_seconds,
        default=1800.0,
        metavar="SECONDS",
        help="under torchrun: how long a process waits for the others (default: 1800)",
    )


def data_source(text: str) -> str | Path:
    """Parse an argument that names a folder, or images in another form, which is no path."""
    return text if is_stream(text) else Path(text)


def data_argument(sub: argparse.ArgumentParser, what: str, required: bool = False) -> None:
    """Add ``--data``."""
    sub.add_argument(
        "--data",
        type=data_source,
        metavar="FOLDER",
        required=required,
        help=f"{what}: one folder a class, or hfds:NAME[:SPLIT], wds:PATTERN, parquet:PATH, npz:FILE",
    )


def broken_argument(sub: argparse.ArgumentParser) -> None:
    """Add ``--skip-broken``."""
    sub.add_argument(
        "--skip-broken", action="store_true", help="leave out images that do not decode, and count them"
    )


def data_arguments(sub: argparse.ArgumentParser) -> None:
    """Add ``--data``, ``--subset`` and ``--skip-broken``."""
    data_argument(sub, "labelled images (not needed for Fashion-MNIST)")
    sub.add_argument("--subset", metavar="START:STOP", help="part of the images, in a fixed shuffled order")
    broken_argument(sub)


def reference_argument(sub: argparse.ArgumentParser) -> None:
    """Add ``--float``, the model to compare with."""
    text = "the float model to compare with: its folder or name, of an ONNX file another one"
    sub.add_argument("--float", dest="float_weights", help=text)


def dataset_argument(sub: argparse.ArgumentParser, default: str = "what the weights are for") -> None:
    """Add ``--dataset``."""
    sub.add_argument("--dataset", choices=list(DATA_SETS), default="", help=f"default: {default}")


def option_arguments(
    sub: argparse.ArgumentParser, options: Mapping[str, Field[Any]], defaults: Mapping[str, str] | None = None
) -> None:
    """Add a flag for every field of :func:`qzoo.options.train_options` and its like; :func:`given_options` reads them.

    Args:
        defaults: in words, where they are not the fields' own.
    """
    for name, option in options.items():
        details = option.metadata
        words, text = details["flag"] or flag(name), details["help"]
        if details["kind"] is bool and option.default is None:
            sub.add_argument(words, dest=name, action=argparse.BooleanOptionalAction, help=text)
        elif details["kind"] is bool:
            sub.add_argument(words, dest=name, action="store_const", const=True, help=text)
        elif details["kind"] is tuple:
            sub.add_argument(words, dest=name, nargs="+", metavar=details["metavar"], help=text)
        else:
            default = (defaults or {}).get(name, option.default)
            if not (default is None or default is False or "(default" in text):
                text = f"{text} (default: {default})"
            choices, metavar = details["choices"] or None, details["metavar"]
            sub.add_argument(
                words, dest=name, type=details["kind"], choices=choices, metavar=metavar, help=text
            )


def given_options(args: argparse.Namespace, options: Mapping[str, Field[Any]]) -> dict[str, Any]:
    """Collect the values of those flags of :func:`option_arguments` that were given.

    Raises:
        ValueError: bits of layers in another form than ``fc=4``.
    """
    values = {name: value for name in options if (value := getattr(args, name, None)) is not None}
    pairs = {name: _layer_bits(values[name]) for name in values if options[name].metadata["kind"] is tuple}
    return {**values, **pairs}


def given_fields(args: argparse.Namespace, kind: type) -> dict[str, Any]:
    """Collect the values of a job from the arguments of a command that have the names of its fields."""
    known = [f.name for f in fields(kind) if hasattr(args, f.name)]
    return {**{name: getattr(args, name) for name in known}, "progress": not args.quiet}


def _layer_bits(texts: list[str]) -> LayerBits:
    """``["fc=4", "conv1=float"]`` as names and bits."""
    pairs = [text.rpartition("=") for text in texts]
    for text, (name, _, bits) in zip(texts, pairs, strict=True):
        if not name or not (bits.isdecimal() or bits == FLOAT):
            raise ArgumentError(f"--layer-bits takes LAYER=BITS, such as fc=4 or fc=float, not {text!r}")
    return tuple((name, FLOAT if bits == FLOAT else int(bits)) for name, _, bits in pairs)
