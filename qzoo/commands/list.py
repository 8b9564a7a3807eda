"""``qzoo list``: architectures, or what has weights and where it lies."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from qzoo.commands import Add, say
from qzoo.errors import ArgumentError, QzooError, one_line, shown

if TYPE_CHECKING:
    from qzoo.config import Config, Measurement

_UNKNOWN = "-"


def register(add: Add) -> None:
    """Declare the command."""
    sub = add("list", _run, "List architectures, or with --pretrained what has weights, and where it lies.")
    sub.add_argument("pattern", nargs="?", default="*", help="shell pattern, such as 'resnet*'")
    sub.add_argument("--pretrained", action="store_true", help="names that have weights")
    sub.epilog = (
        "Top-1 is as measured, on the number of images behind it. Sizes are of the weights' files; in parentheses, of "
        "float32 parameters."
    )


def _run(args: argparse.Namespace) -> int:
    import qzoo

    names = qzoo.list_models(args.pattern, pretrained=args.pretrained)
    if not names:
        what = "no name with weights" if args.pretrained else "no architecture"
        raise ArgumentError(f"{what} matches {shown(args.pattern)}; without a pattern all are listed")
    if args.pretrained:
        head: tuple[str, ...] = ("name", "parameters", "float top-1", "top-1", "size", "where")
        rows = [_weights_or_why_not(name) for name in names]
    else:
        head = ("name", "parameters", "float top-1", "size", "checkpoints")
        rows = [_architecture(name) for name in names]
    say(_table([head, *rows]))
    return 0


def _architecture(name: str) -> tuple[str, ...]:
    from qzoo.registry import parse_name
    from qzoo.zoo import hub

    names = [other for other in hub.checkpoints() if parse_name(other).arch == name]
    tops = []
    for other in names:
        with suppress(QzooError):  # --pretrained says what is wrong with it
            tops += [row for row in [_float_row(_config(other))] if row]
    millions, size = _parameters(name)
    short = " ".join(other.removeprefix(f"{name}.") for other in names)
    return name, millions, _top1(tops[0] if tops else None), f"({size})", short or _UNKNOWN


def _weights_or_why_not(name: str) -> tuple[str, ...]:
    """A row also for a checkpoint that is damaged, or whose architecture is not imported."""
    from qzoo.zoo import hub

    try:
        return _weights(name)
    except QzooError as error:
        place = hub.place_of(name)
        reason = str(error) if str(error).startswith(place) else f"{place}: {error}"
        return name, _UNKNOWN, _UNKNOWN, _UNKNOWN, _UNKNOWN, reason


def _weights(name: str) -> tuple[str, ...]:
    """A checkpoint, or float weights that are downloaded from their publisher."""
    from qzoo.config import WEIGHTS
    from qzoo.registry import architecture, parse_name
    from qzoo.release.tables import quantized_row
    from qzoo.zoo import hub

    parsed, config = parse_name(name), _config(name)
    millions, size = _parameters(parsed.arch, config)
    if name not in hub.checkpoints():
        sources = architecture(parsed.arch).weights[parsed.tag or ""].sources
        return name, millions, _UNKNOWN, _UNKNOWN, f"({size})", sources[0]
    own = None
    if config is not None:
        size = _megabytes(config.sizes.get(WEIGHTS, 0))
        own = quantized_row(config) if config.scheme and len(config.metrics) > 1 else None
    return name, millions, _top1(_float_row(config)), _top1(own), size, hub.place_of(name)


def _config(name: str) -> Config | None:
    """The config of a checkpoint on this machine; nothing is downloaded for a list."""
    from qzoo.config import read_config
    from qzoo.zoo import hub

    folders = hub.local_folders(name)
    return read_config(folders[0]) if folders else None


def _float_row(config: Config | None) -> Measurement | None:
    rows = config.metrics if config is not None else ()
    return next((row for row in rows if row.precision == "float"), None)


def _top1(row: Measurement | None) -> str:
    return f"{row.top1:.2f} % of {row.images:,}" if row is not None else _UNKNOWN


def _parameters(arch: str, config: Config | None = None) -> tuple[str, str]:
    """Number of parameters, and the size that they have in float32."""
    from qzoo.zoo.checkpoint import empty_model
    from qzoo.zoo.request import new_config

    try:
        model = empty_model(config or new_config(arch), None)
    except ArgumentError:  # a builder without defaults
        return _UNKNOWN, _UNKNOWN
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{count / 1e6:.2f} M", _megabytes(4 * count)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, two spaces between them."""
    rows = [tuple(map(one_line, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)
