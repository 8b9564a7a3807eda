"""``qzoo.benchmark``: accuracy and latency of checkpoints and their float models, in every runtime, in one report."""

from __future__ import annotations

import copy
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzoo import runtimes as rt
from qzoo.errors import DataError
from qzoo.evaluate import Evaluation, evaluate
from qzoo.export import export_onnx
from qzoo.progress import track
from qzoo.results import Report, Row
from qzoo.scheme import set_target
from qzoo.timing import Samples, measure, ratio

_CACHE_BYTES = 2**30  # a data set up to this size is decoded once, not once for every runtime


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        runtimes: names of :data:`qzoo.runtimes.RUNTIMES`.
        batches: batch sizes of the latencies; the largest one gives the throughput.
        threads: threads a timed call may use. Accuracy is measured with all.
        seconds: about how long each model is timed in each runtime at each batch size.
        progress: show progress bars.
    """

    runtimes: tuple[str, ...] = ("pytorch", "onnxruntime")
    batches: tuple[int, ...] = (1, 8)
    threads: int = 1
    seconds: float = 2.0
    progress: bool = True

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"batches must be positive numbers, not {self.batches}")
        if self.threads < 1 or self.seconds <= 0:
            raise ValueError(f"threads and seconds must be positive, not {self.threads} and {self.seconds}")
        unknown = [name for name in self.runtimes if name not in rt.RUNTIMES]
        if unknown or not self.runtimes:
            raise ValueError(f"no runtime {', '.join(unknown)!r}; expected some of {', '.join(rt.RUNTIMES)}")


def benchmark(
    names: str | Sequence[str],
    *,
    data: str | os.PathLike[str] | None = None,
    subset: str | None = None,
    runtimes: Sequence[str] | None = None,
    batches: Sequence[int] = (1, 8),
    threads: int = 1,
    seconds: float = 2.0,
    progress: bool = True,
) -> Report:
    """Measure checkpoints and the float models they were made from, on the same images and machine.

    Args:
        names: checkpoints such as ``"resnet20.fmnist-w8a8"``; they are loaded, with their float model.
        data: folder of labelled images; the embedded test set where the checkpoint has one.
        subset: part of the images, ``"start:stop"``.
        runtimes: by default all that are installed.

    Raises:
        QzooError: a name, a checkpoint, data or a runtime that is not there.
        ValueError: options out of range.
    """
    from qzoo.data import load_data
    from qzoo.zoo import create_model, float_model

    chosen = tuple(rt.installed() if runtimes is None else runtimes)
    options = Options(chosen, tuple(batches), threads, seconds, progress)
    rows: list[Row] = []
    for name in [names] if isinstance(names, str) else names:
        quantized: Any = create_model(name, pretrained=True)
        config = quantized.qzoo_config
        batch_size = 250 if config.labels == "fashion-mnist" else 50
        loader = load_data(
            config.preprocessing,
            config.labels,
            None if data is None else Path(data),
            subset=subset,
            batch_size=batch_size,
        )
        rows += benchmark_models(name, quantized, float_model(config), loader, options)
    return new_report(rows, options)


def benchmark_models(
    name: str,
    quantized: nn.Module,
    reference: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    options: Options,
) -> list[Row]:
    """The rows of one checkpoint: float and int8 in each runtime.

    Args:
        name: for the table.
        quantized: calibrated, any target.
        reference: the float model.
        loader: labelled images; the first batch also is what is timed.

    Raises:
        DataError: no images.
    """
    for runtime in options.runtimes:
        rt.check(runtime)
    batches = _cached(loader)
    image = next((images[:1] for images, _ in batches), None)
    if image is None:
        raise DataError("the loader gave no images; check the folder, the split and the subset")
    with tempfile.TemporaryDirectory(prefix="qzoo-") as folder:
        entries = _entries(quantized, reference, image, options, Path(folder))
        baseline = _record(rt.load(reference, "pytorch", _all_threads()), batches, options)
        results = [_accuracy(entry, batches, baseline, options) for entry in entries]
        timed = [_first_calls(entry, image, options) for entry in entries]
        samples = _latencies(name, [run for run, _, _ in timed], entries, image, options)
    rows = []
    for i, entry in enumerate(entries):
        result, (_, load_seconds, first_ms) = results[i], timed[i]
        mine = {batch: samples[batch][i] for batch in options.batches}
        base = next(
            j for j, e in enumerate(entries) if e.runtime == entry.runtime and e.precision == "float32"
        )
        rows.append(
            Row(
                model=name,
                runtime=entry.runtime,
                precision=entry.precision,
                images=result.images,
                top1=result.top1,
                top1_interval=result.top1_interval,
                agreement=_known(result.agreement),
                sqnr_db=_known(result.sqnr_db),
                latency={batch: s.summary() for batch, s in mine.items()},
                speedup={b: ratio(samples[b][base].cpu, s.cpu) for b, s in mine.items()},
                wall_speedup={b: ratio(samples[b][base].wall, s.wall) for b, s in mine.items()},
                file_bytes=entry.bytes,
                load_seconds=load_seconds,
                first_ms=first_ms,
            )
        )
    return rows


def new_report(rows: Sequence[Row], options: Options) -> Report:
    """Rows with the machine, the versions and the date they were measured with."""
    from qzoo.environment import describe

    settings = {"threads": options.threads, "batches": list(options.batches), "seconds": options.seconds}
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Report(tuple(rows), date, settings, describe())


@dataclass(frozen=True)
class _Entry:
    """One model in one runtime; ``load(threads)`` makes it ready."""

    runtime: str
    precision: str
    load: Callable[[int], rt.Runner]
    bytes: int | None


def _entries(
    quantized: nn.Module, reference: nn.Module, image: Tensor, options: Options, folder: Path
) -> list[_Entry]:
    """What is measured: float and int8 in each runtime, float first. PyTorch simulates ONNX Runtime's placement."""
    entries: list[_Entry] = []
    for runtime in options.runtimes:
        if runtime == "pytorch":
            simulation = set_target(copy.deepcopy(quantized), "onnxruntime")
            entries += [
                _Entry(runtime, "float32", _opener(reference, runtime), _state_bytes(reference)),
                _Entry(runtime, "fake-quant int8", _opener(simulation, runtime), None),
            ]
            continue
        for model, precision in ((reference, "float32"), (quantized, "int8")):
            path = export_onnx(model, folder / f"{runtime}_{precision}.onnx", target=runtime, example=image)
            entries.append(_Entry(runtime, precision, _opener(path, runtime), path.stat().st_size))
    return entries


def _known(value: float | None) -> float:
    """A figure that is there because there was a reference."""
    assert value is not None
    return value


def _opener(source: nn.Module | Path, runtime: str) -> Callable[[int], rt.Runner]:
    return lambda threads: rt.load(source, runtime, threads)


def _all_threads() -> int:
    return os.cpu_count() or 1


def _state_bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def _record(run: rt.Runner, batches: Iterable[tuple[Tensor, Tensor]], options: Options) -> list[Tensor]:
    """The float model's logits of every batch: computed once, compared with all the others."""
    return [run(images) for images, _ in track(batches, "evaluate the reference", show=options.progress)]


def _accuracy(
    entry: _Entry, batches: Iterable[tuple[Tensor, Tensor]], baseline: list[Tensor], options: Options
) -> Evaluation:
    recorded = iter(baseline)
    shown = track(batches, f"evaluate {entry.runtime} {entry.precision}", show=options.progress)
    if (entry.runtime, entry.precision) == ("pytorch", "float32"):  # the reference itself
        again = iter(baseline)
        return evaluate(
            lambda images: next(again), batches, reference=lambda images: next(recorded), progress=False
        )
    run = entry.load(_all_threads())
    return evaluate(run, shown, reference=lambda images: next(recorded), progress=False)


def _first_calls(entry: _Entry, image: Tensor, options: Options) -> tuple[rt.Runner, float, float]:
    """The runner, how long it took to load (seconds), and its first call (milliseconds)."""
    start = time.perf_counter()
    run = entry.load(options.threads)
    loaded = time.perf_counter()
    run(image)
    return run, loaded - start, 1e3 * (time.perf_counter() - loaded)


def _latencies(
    name: str, runners: list[rt.Runner], entries: list[_Entry], image: Tensor, options: Options
) -> dict[int, list[Samples]]:
    """For each batch size the samples of every entry, timed in turns."""
    found: dict[int, list[Samples]] = {}
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        for batch in options.batches:
            images = image.expand(batch, *image.shape[1:]).contiguous()
            calls = {f"{i}": _call(run, images) for i, run in enumerate(runners)}
            title = f"time {name}, batch {batch}, {options.threads} thread(s)"
            samples = measure(calls, seconds=options.seconds, title=title, progress=options.progress)
            found[batch] = [samples[f"{i}"] for i in range(len(entries))]
    finally:
        torch.set_num_threads(before)
    return found


def _call(run: rt.Runner, images: Tensor) -> Callable[[], Tensor]:
    return lambda: run(images)


def _cached(loader: Iterable[tuple[Tensor, Tensor]]) -> Iterable[tuple[Tensor, Tensor]]:
    """The batches as a list where they fit into memory, else the loader itself, which decodes them again."""
    kept: list[tuple[Tensor, Tensor]] = []
    size = 0
    for images, labels in loader:
        size += images.numel() * images.element_size()
        if size > _CACHE_BYTES:
            return loader
        kept.append((images, labels))
    return kept
