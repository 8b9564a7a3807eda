"""``qzoo.benchmark``: accuracy and latency of checkpoints and their float models, in every runtime, in one report."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor

from qzoo import runtimes as rt
from qzoo.bench.batches import Batches, repeatable
from qzoo.bench.environment import describe
from qzoo.bench.lane import running, time_in_turns
from qzoo.bench.options import Options
from qzoo.bench.results import Report, Row
from qzoo.bench.subject import Source, Subject, subjects
from qzoo.data.files import broken_images
from qzoo.errors import ArgumentError
from qzoo.export.description import is_onnx
from qzoo.files import temporary_folder
from qzoo.progress import track


def benchmark(
    names: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    data: str | os.PathLike[str] | None = None,
    float_weights: str | os.PathLike[str] | None = None,
    subset: str | None = None,
    skip_broken: bool = False,
    runtimes: str | Sequence[str] | None = None,
    batches: Sequence[int] = (1, 8),
    threads: int = 1,
    seconds: float = 2.0,
    compare: str | Sequence[str] = (),
    calibration_images: int = 128,
    details: bool = False,
    progress: bool = True,
    limit: float = 600.0,
) -> Report:
    """Benchmark checkpoints and the float models they were made from, on the same images and machine.

    Args:
        names: checkpoints such as ``"resnet20.fmnist-w8a8"``, their folders, or ``"org/name"`` on the Hub; they are
            loaded, with their float model. Or ONNX files; their accuracy is measured where there are images.
        data: folder of labelled images; by default the embedded test set where the checkpoint has one. With
            checkpoints of several label sets, those of Fashion-MNIST take the embedded one.
        float_weights: folder of the float model, of checkpoints that were made from weights of your own; the float
            file that ONNX files are compared with.
        subset: part of the images, ``"start:stop"``.
        skip_broken: leave out images that do not decode; a note says how many.
        runtimes: by default PyTorch, and of ONNX Runtime and OpenVINO what is installed. Of TensorRT where it is not
            at hand the file is written, linted and checked in ONNX Runtime; a note says the result.
        compare: other tools' models of the same float weights: ``"quantize_static"``, ``"nncf"``,
            ``"torchvision"``. They are calibrated on the first ``calibration_images`` of the data, which are then
            left out of the evaluation of everything.
        details: measure what the page shows of single layers too.
        limit: seconds that loading a model, or one call, may last.
        batches: batch sizes of the latencies; the largest one gives the throughput.
        threads: threads that a timed call may use. Accuracy is measured with all.
        seconds: about how long each model is timed in each runtime at each batch size.
        progress: show progress bars.

    Returns:
        A row for each model, runtime and precision, and the machine.

    Raises:
        QzooError: a name, a checkpoint, data, a runtime or a peer that is not there.
        TypeError: a module in place of a name.
        ValueError: options out of range.

    Example:
        >>> report = qzoo.benchmark("resnet20.fmnist-w8a8", runtimes="pytorch", subset=":32", batches=[1], seconds=0.05)
        >>> [(row.runtime, row.images, row.top1) for row in report.rows]  # float, then int8
        [('pytorch', 32, 90.625), ('pytorch', 32, 90.625)]
    """
    asked, compare = _names(names), _several(compare)
    default = [name for name in rt.installed() if rt.runtime_named(name).default]
    if all(map(is_onnx, asked)):  # nothing for PyTorch
        default = [name for name in default if rt.runtime_named(name).runs_files]
    chosen = tuple(default) if runtimes is None else _several(runtimes)
    options = Options(chosen, tuple(batches), threads, seconds, compare, details, progress, limit)
    peer_images = calibration_images if compare else 0
    source = Source(data, float_weights, subset, skip_broken, peer_images)
    return new_report([measure(subject, options) for subject in subjects(asked, options, source)], options)


def _several(names: str | Sequence[str]) -> tuple[str, ...]:
    """One name as well as several."""
    return (names,) if isinstance(names, str) else tuple(names)


def _names(names: object) -> list[str]:
    """Names, or paths as text, of what to measure. Raises TypeError for anything else, such as a module."""
    several = names if isinstance(names, Iterable) and not isinstance(names, str) else [names]
    texts = []
    for name in several:
        if isinstance(name, str | os.PathLike):
            texts.append(os.fspath(name))
        else:
            raise TypeError(
                f"benchmark takes names or folders of checkpoints, not {type(name).__name__}: keep a model of your own "
                "with qzoo.save_pretrained(model, folder), and give the folder"
            )
    if not texts:
        raise ArgumentError("no names to measure; qzoo.list_models(pretrained=True) lists checkpoints")
    return texts


@dataclass(frozen=True)
class Section:
    """One subject's part of a report: rows, notes on them, and its layers where asked for."""

    rows: list[Row]
    notes: list[str]
    layers: list[dict[str, Any]]


def measure(subject: Subject, options: Options) -> Section:
    """Time the contenders of a subject in turns, each in a process of its own, then score them there.

    Raises:
        DataError: no images, or others in every pass.
        BenchmarkError: a runtime failed; the message says which, with what it printed.
    """
    batches = repeatable(subject.loader)
    images = next(iter(batches))[0]
    with temporary_folder() as folder:
        contenders, notes = subject.write(images, options, folder)
        with running(contenders, subject.name, options) as lanes:
            time_in_turns(lanes, subject.name, images[:1], options)
            layers = subject.layers(images, lanes, options) if options.details else []
            if subject.labelled:
                logits = _logits(subject.exact(), batches, options)
                for lane in lanes:
                    lane.score = lane.evaluate(batches, reference=logits)
    if skipped := broken_images(subject.loader):
        notes.append(f"{subject.name}: {skipped} images that do not decode are left out")
    return Section([lane.row(subject.name, lanes) for lane in lanes], [*notes, *subject.notes], layers)


def _logits(run: Callable[[Tensor], Tensor] | None, batches: Batches, options: Options) -> Tensor | None:
    """The float model's logits: computed once, compared with all the others."""
    if run is None:
        return None
    shown = track(batches, "evaluate the reference", show=options.progress)
    return torch.cat([run(images) for images, _ in shown])


def new_report(sections: Sequence[Section], options: Options) -> Report:
    """Make the report of all sections, with the machine, the versions and the date."""
    settings = {
        "threads": options.threads,
        "batches": list(options.batches),
        "seconds": options.seconds,
        "compare": list(options.compare),
    }
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    rows, notes, layers = (
        tuple(item for each in sections for item in getattr(each, part))
        for part in ("rows", "notes", "layers")
    )
    return Report(rows, date, settings, describe(), notes, layers)
