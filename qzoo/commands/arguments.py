"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from qzoo.data.sets import DATA_SETS
from qzoo.errors import ArgumentError
from qzoo.options import flag


def positive(text: str) -> int:
    """A type of argument: a whole number of 1 and more."""
    if text.isdecimal() and 0 < int(text) < 2**31:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, not {text!r}")


def from_zero(text: str) -> int:
    """A type of argument: a whole number of 0 and more."""
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
    """``--import``, done by :func:`import_given`."""
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
    """The folder that ``--float`` gives, or the name of a checkpoint. Raises QzooError where there is neither."""
    from qzoo.zoo import hub

    return None if text is None else hub.locate(text)


def own_folder(text: str) -> Path:
    """A folder to write into, or the name of a checkpoint of the user's store."""
    from qzoo.zoo.store import stored

    return Path(text) if Path(text).is_dir() else stored().get(text, Path(text))


def process_arguments(sub: argparse.ArgumentParser, device: str = "cpu") -> None:
    """``--device``, and ``--timeout`` of the processes that torchrun starts."""
    sub.add_argument(
        "--device",
        choices=["cpu", "cuda", "auto"],
        default=device,
        help=f"auto: a GPU for each process where there are enough (default: {device})",
    )
    sub.add_argument(
        "--timeout",
        type=_seconds,
        default=1800.0,
        metavar="SECONDS",
        help="under torchrun: how long a process waits for the others (default: 1800)",
    )


def data_arguments(sub: argparse.ArgumentParser) -> None:
    """``--data`` and ``--subset``."""
    sub.add_argument("--data", type=Path, help="folder of labelled images (not needed for Fashion-MNIST)")
    sub.add_argument("--subset", metavar="START:STOP", help="part of the images, in a fixed shuffled order")


def dataset_argument(sub: argparse.ArgumentParser, default: str = "what the weights are for") -> None:
    """``--dataset``."""
    sub.add_argument("--dataset", choices=list(DATA_SETS), default="", help=f"default: {default}")


def layer_argument(sub: argparse.ArgumentParser) -> None:
    """``--layer-bits``, read by :func:`layer_bits`."""
    sub.add_argument(
        "--layer-bits", nargs="+", metavar="LAYER=BITS", help="bits of single layers, such as fc=4"
    )


def layer_bits(texts: list[str] | None) -> tuple[tuple[str, int], ...] | None:
    """``["fc=4"]`` as names and bits. Raises ValueError for another form."""
    if texts is None:
        return None
    pairs = [text.rpartition("=") for text in texts]
    wrong = [
        text for text, (name, _, bits) in zip(texts, pairs, strict=True) if not name or not bits.isdigit()
    ]
    if wrong:
        raise ArgumentError(f"--layer-bits takes LAYER=BITS, such as fc=4, not {wrong[0]!r}")
    return tuple((name, int(bits)) for name, _, bits in pairs)


def option_arguments(sub: argparse.ArgumentParser, options: type, defaults: Mapping[str, str]) -> None:
    """A flag for every field of a dataclass of options, read by :func:`given_options`.

    Args:
        options: whose fields have ``help`` and ``choices`` in their metadata (:mod:`qzoo.options`).
        defaults: in words, where they are not the fields' own.
    """
    for field in fields(options):
        default = defaults.get(field.name, field.default)
        if isinstance(field.default, bool):
            sub.add_argument(flag(field.name), action="store_const", const=True, help=field.metadata["help"])
        else:
            sub.add_argument(
                flag(field.name),
                type=type(field.default),
                choices=field.metadata["choices"] or None,
                help=f"{field.metadata['help']} (default: {default})",
            )


def given_options(args: argparse.Namespace, options: type) -> dict[str, Any]:
    """The fields of a dataclass of options whose flags were given."""
    return {f.name: value for f in fields(options) if (value := getattr(args, f.name)) is not None}
