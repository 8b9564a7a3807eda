"""``qzoo survey``: latency of many architectures on this machine, without weights or data."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qzoo.bench.survey import SurveyOptions, SurveyRow
from qzoo.commands import Add, say
from qzoo.errors import one_line

_RUNTIMES = ("onnxruntime", "openvino")


def register(add: Add) -> None:
    """Declare the command."""
    text = "Float and int8 latency of many architectures on this machine, with random weights and no data."
    sub = add("survey", _run, text)
    sub.add_argument(
        "patterns",
        nargs="*",
        default=["*"],
        metavar="PATTERN",
        help="architectures, such as 'resnet*' (default: all)",
    )
    runtime, seconds, limit = SurveyOptions.runtime, SurveyOptions.seconds, SurveyOptions.limit
    sub.add_argument("--runtime", choices=_RUNTIMES, default=runtime, help=f"default: {runtime}")
    text = f"of timing, a model and precision (default: {seconds:g})"
    sub.add_argument("--seconds", type=float, default=seconds, help=text)
    text = f"that a model may take (default: {limit:g})"
    sub.add_argument("--limit", type=float, default=limit, metavar="SECONDS", help=text)
    sub.add_argument(
        "--out",
        type=Path,
        default=Path("survey"),
        help="folder for survey.json, .csv, .html and .png (default: survey)",
    )
    sub.epilog = (
        "Interrupted, it goes on where it was; what failed is tried again. Accuracy is not measured: top-1 is what the "
        "publisher of the float weights gives."
    )


def _run(args: argparse.Namespace) -> int:
    from qzoo.bench.survey import survey
    from qzoo.bench.survey_report import print_survey, write_survey

    options = SurveyOptions(args.runtime, args.threads or 1, args.seconds, args.limit)
    results = survey(
        args.patterns,
        options,
        out=args.out,
        imports=args.imports,
        progress=not args.quiet,
        report=None if args.quiet else _tell,
    )
    print_survey(results)
    for path in write_survey(results, args.out):
        say(path)
    return 0


def _tell(model: SurveyRow) -> None:
    """A line on standard error for a model that is done."""
    if model.float32 is None or model.int8 is None or model.speedup is None:
        text = model.error
    else:
        times = f"float {model.float32.wall_ms:.3g} ms, int8 {model.int8.wall_ms:.3g} ms"
        text = f"{times}, {model.speedup[0]:.2f} x"
    print(one_line(f"{model.model}: {text} ({model.seconds:.0f} s)"), file=sys.stderr)
