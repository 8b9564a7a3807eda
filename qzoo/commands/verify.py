"""``qzoo verify``: checkpoints against their pins, cards and metrics."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qzoo.commands import Add, say
from qzoo.commands.arguments import data_argument
from qzoo.errors import one_line

if TYPE_CHECKING:
    from qzoo.config import Config, Measurement
    from qzoo.data import Loader


PAGE = Path("docs/zoo.md")


def register(add: Add) -> None:
    """Declare the command."""
    sub = add("verify", _run, "Check that checkpoints are there, whole, and what their cards say.")
    sub.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="of checkpoints, or their folders (default: every checkpoint that the package knows)",
    )
    sub.add_argument(
        "--page", type=Path, help="the zoo's page (default without names: docs/zoo.md, if it is here)"
    )
    data_argument(sub, "measure again those whose recorded figures are of these images, and Fashion-MNIST's")
    sub.add_argument(
        "--measure",
        action="store_true",
        help="measure again those of Fashion-MNIST, whose images are in the package",
    )
    sub.epilog = "The exit status is 1 where something is wrong, and where no figure could be measured again."


def _run(args: argparse.Namespace) -> int:
    from qzoo.release.verify import Load, verify, verify_page

    def images(config: Config, row: Measurement) -> Loader | None:
        return _images(config, row, args.data)

    load: Load | None = images if args.measure or args.data is not None else None
    everything = not (args.names or args.page)
    findings = verify(None if everything else args.names, load, progress=not args.quiet)
    nothing = load is not None and not any(f.measured or f.problem for f in findings)
    page = args.page or (PAGE if everything and PAGE.is_file() else None)
    if page is not None:
        findings.append(verify_page(page))
    for f in findings:
        facts = [
            f"speed-up {f.speedup}" if f.speedup else "",
            f"{f.measured} figures measured" * bool(f.measured),
        ]
        text = "  ".join(word for word in (f.name, f.place, *facts, f.problem, f.note) if word)
        say(f"{'FAIL' if f.problem else 'ok  '}  {one_line(text)}")
    if nothing:
        print("qzoo: no figure was measured again; --data names the folder of the images", file=sys.stderr)
    return 1 if nothing or any(f.problem for f in findings) else 0


def _images(config: Config, row: Measurement, data: str | Path | None) -> Loader | None:
    """The images that a figure was recorded on; None where they are neither in the package nor in the folder."""
    from qzoo.data import batch_for, load_data
    from qzoo.data.sets import is_embedded
    from qzoo.errors import DataError
    from qzoo.pipeline.parts import all_images

    embedded = is_embedded(config.labels)
    if not embedded:
        if data is None:
            return None
        try:
            count = all_images(config, data, "test").count
        except DataError:  # of another label set
            return None
        if not row.data.endswith(f"({count} images)"):  # another folder: its images would be others, too
            return None
    size = batch_for(config.preprocessing)
    return load_data(
        config.preprocessing,
        config.labels,
        None if embedded else data,
        subset=row.subset,
        batch_size=size,
        skip_broken=row.skipped > 0,
    )
