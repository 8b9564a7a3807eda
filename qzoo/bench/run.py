"""``qzoo.benchmark``: accuracy and latency of checkpoints and their float models, in every runtime, in one report."""

from __future__ import annotations

import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzoo import runtimes as rt
from qzoo.accuracy import Evaluation, evaluate
from qzoo.bench import peers
from qzoo.bench.contenders import WRITTEN_ANYWAY, Contender, contenders
from qzoo.bench.process import Process
from qzoo.bench.results import Against, Report, Row
from qzoo.bench.timing import Samples, measure, ratio
from qzoo.config import config_of
from qzoo.data import batch_for, load_data
from qzoo.data.sets import is_embedded
from qzoo.deployment import any_batch, load
from qzoo.errors import ArgumentError, BenchmarkError, DataError
from qzoo.export.described import Described, described, is_onnx
from qzoo.files import temporary_folder
from qzoo.pipeline.parts import measured_images
from qzoo.progress import track
from qzoo.zoo.floats import open_model, reference_of

Measured = tuple[list[Row], list[str], list[dict[str, Any]]]
_CACHE_BYTES = 2**30  # a data set up to this size is decoded once, not once for every runtime


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        runtimes: names of :data:`qzoo.runtimes.RUNTIMES`.
        batches: batch sizes of the latencies; the largest one gives the throughput.
        threads: threads a timed call may use. Accuracy is measured with all.
        seconds: about how long each model is timed in each runtime at each batch size.
        compare: names of :data:`qzoo.bench.peers.PEERS`.
        details: measure what the page shows of single layers too: sensitivity, histograms, time of every node.
        progress: show progress bars.
        limit: seconds that loading a model, or one call, may last (``torch.compile`` compiles in its calls).
    """

    runtimes: tuple[str, ...] = ("pytorch", "onnxruntime")
    batches: tuple[int, ...] = (1, 8)
    threads: int = 1
    seconds: float = 2.0
    compare: tuple[str, ...] = ()
    details: bool = False
    progress: bool = True
    limit: float = 600.0

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1:
            raise ArgumentError(f"batches must be positive numbers, not {self.batches}")
        if not (self.threads >= 1 and 0 < self.seconds < math.inf and 0 < self.limit < math.inf):
            values = f"{self.threads}, {self.seconds} and {self.limit}"
            raise ArgumentError(f"threads, seconds and limit must be positive numbers, not {values}")
        unknown = [name for name in self.runtimes if name not in rt.RUNTIMES]
        if unknown or not self.runtimes:
            raise ArgumentError(
                f"no runtime {', '.join(unknown)!r}; expected some of {', '.join(rt.RUNTIMES)}"
            )
        peers.check(self.compare, self.runtimes)


def benchmark(
    names: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    data: str | os.PathLike[str] | None = None,
    float_weights: str | os.PathLike[str] | None = None,
    subset: str | None = None,
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
    files = [name for name in asked if is_onnx(name)]
    default = [name for name in rt.installed() if rt.runtime_named(name).default]
    if len(files) == len(asked):  # nothing for PyTorch
        default = [name for name in default if rt.runtime_named(name).runs_files]
    chosen = tuple(default) if runtimes is None else _several(runtimes)
    options = Options(chosen, tuple(batches), threads, seconds, compare, details, progress, limit)
    calibrating = any(peer in peers.RUNS_IN for peer in compare)
    if calibrating and subset is not None:
        _check_beyond(subset, calibration_images)
    rows: list[Row] = []
    notes: list[str] = []
    found: list[dict[str, Any]] = []
    models = _opened([name for name in asked if name not in files])
    described_files = {name: described(name) for name in files}
    label_sets = {config_of(model).labels for model in models.values()}
    label_sets |= {file.labels for file in described_files.values()}
    floats = [config_of(model).name for model in models.values() if config_of(model).scheme is None]
    if floats:
        raise BenchmarkError(
            f"{floats[0]} is a float model; benchmark compares a quantized one with its float model: {floats[0]}-w8a8"
        )
    first = calibration_images if calibrating else 0
    for name, quantized in models.items():
        folder = folder_for(config_of(quantized).labels, label_sets, data)
        exact = reference_of(config_of(quantized), None if float_weights is None else Path(float_weights))
        mine, said, layers = _measure_checkpoint(name, quantized, exact, folder, subset, first, options)
        rows, notes, found = [*rows, *mine], [*notes, *said], [*found, *layers]
    for name, file in described_files.items():
        folder = folder_for(file.labels, label_sets, data)
        mine, said = measure_file(name, file, float_weights, folder, subset, options)
        rows, notes = [*rows, *mine], [*notes, *said]
    return new_report(rows, options, notes, found)


def folder_for(labels: str, label_sets: set[str], data: str | os.PathLike[str] | None) -> Path | None:
    """The folder of a model's images; None for the embedded ones, which Fashion-MNIST takes among other label sets."""
    return None if data is None or (len(label_sets) > 1 and is_embedded(labels)) else Path(data)


def _several(names: str | Sequence[str]) -> tuple[str, ...]:
    """One name as well as several."""
    return (names,) if isinstance(names, str) else tuple(names)


def _names(names: object) -> list[str]:
    """Names, or paths as text, of what to measure. Raises TypeError for anything else, such as a module."""
    given = names if isinstance(names, Iterable) and not isinstance(names, str) else [names]
    found = []
    for name in given:
        if isinstance(name, str | os.PathLike):
            found.append(os.fspath(name))
        else:
            raise TypeError(
                f"benchmark takes names or folders of checkpoints, not {type(name).__name__}: keep a model of your own "
                "with qzoo.save_pretrained(model, folder), and give the folder"
            )
    if not found:
        raise ArgumentError("no names to measure; qzoo.list_models(pretrained=True) lists checkpoints")
    return found


def _opened(names: Sequence[str]) -> dict[str, nn.Module]:
    """The models by their own names; by what was asked for where two have the same one."""
    found = {asked: open_model(asked) for asked in names}
    own = [config_of(model).name for model in found.values()]
    return {
        name if own.count(name) == 1 else asked: model
        for name, (asked, model) in zip(own, found.items(), strict=True)
    }


def _measure_checkpoint(
    name: str,
    quantized: nn.Module,
    reference: nn.Module,
    folder: Path | None,
    subset: str | None,
    first: int,
    options: Options,
) -> Measured:
    """One checkpoint on its data; ``first``: number of images to calibrate peers on."""
    config = config_of(quantized)
    size = 250 if is_embedded(config.labels) else 50
    chosen, said = measured_images(config, folder, subset, first)
    loader = load_data(config.preprocessing, config.labels, folder, subset=chosen.subset, batch_size=size)
    images = None
    if first:
        calibration = load_data(config.preprocessing, config.labels, folder, subset=f":{first}")
        images = torch.cat([x for x, _ in calibration])
    rows, notes, layers = _measure(name, quantized, reference, loader, options, images)
    return rows, [*notes, *([f"{name}: {said}"] if said else [])], layers


def benchmark_models(
    name: str,
    quantized: nn.Module,
    reference: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    options: Options,
    calibration: Tensor | None = None,
) -> Report:
    """The report of one checkpoint: float, int8 and peers in each runtime, each in a process of its own.

    Args:
        name: for the table.
        quantized: calibrated, any target. Its classes must be importable, from files: the processes load them.
        reference: the float model.
        loader: labelled images; the first batch also is what is timed.
        calibration: images [N, C, H, W] for peers.

    Raises:
        DataError: no images.
        BenchmarkError: a runtime failed; the message says which, with what it printed.
    """
    rows, notes, details = _measure(name, quantized, reference, loader, options, calibration)
    return new_report(rows, options, notes, details)


def _measure(
    name: str,
    quantized: nn.Module,
    reference: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    options: Options,
    calibration: Tensor | None,
) -> Measured:
    """Rows, notes and, if asked for, the details of the layers."""
    for runtime in options.runtimes:
        if runtime not in WRITTEN_ANYWAY or len(options.runtimes) == 1:
            rt.check(runtime)
    batches = _cached(loader)
    images = next((images for images, _ in batches), None)
    if images is None:
        raise DataError("the loader gave no images; check the folder, the split and the subset")
    image, details = images[:1], []
    with temporary_folder() as folder:
        found, notes = contenders(quantized, reference, images, options, calibration, folder)

        def score(processes: list[Process]) -> list[Evaluation]:
            if options.details:
                from qzoo.bench.layers import model_details

                details.append(model_details(name, quantized, images, found, processes, options))
            logits = _record(rt.load(reference, "pytorch", os.cpu_count() or 1), batches, options)
            pairs = zip(processes, found, strict=True)
            return [_accuracy(p, c, batches, logits, options) for p, c in pairs]

        rows = _run(name, found, image, score, options)
    return rows, [f"{name}: {note}" for note in notes], details


def measure_file(
    name: str,
    file: Described,
    exact: str | os.PathLike[str] | None,
    data: Path | None,
    subset: str | None,
    options: Options,
) -> tuple[list[Row], list[str]]:
    """Rows and notes of an ONNX file in the runtimes that run files.

    Args:
        exact: the float model's file to compare with.
        data: folder of labelled images; without one, and of no embedded data set, no accuracy is measured.
    """
    names = [runtime for runtime in options.runtimes if rt.runtime_named(runtime).runs_files]
    if not names:
        raise ArgumentError(
            f"{name} is an ONNX file, which {', '.join(options.runtimes)} can't run; add onnxruntime"
        )
    if exact is not None and not is_onnx(exact):
        raise ArgumentError(f"{exact} is no ONNX file; the file {name} is compared with another file")
    if any(peer in peers.RUNS_IN for peer in options.compare):
        raise ArgumentError(f"peers are made from a checkpoint's float weights; leave {name} or compare out")
    files = {name: file} if exact is None else {os.fspath(exact): described(exact), name: file}
    batch = _only_batch(files, options)
    for runtime in names:
        rt.check(runtime)
    found = [_file_contender(runtime, path, each) for runtime in names for path, each in files.items()]
    notes = [f"{name}: {file.assumed}"] if file.assumed else []
    batches, preprocessing = None, file.preprocessing
    if data is None and not is_embedded(file.labels):
        notes.append(f"{name}: timed on noise, without images; --data names a folder to measure accuracy on")
        image = torch.randn((1, *preprocessing.input_size), generator=torch.Generator().manual_seed(0))
    else:
        size = batch or batch_for(preprocessing)
        batches = _cached(load_data(preprocessing, file.labels, data, subset=subset, batch_size=size))
        image = next(iter(batches))[0][:1]

    def score(processes: list[Process]) -> list[Evaluation] | None:
        if batches is None:
            return None
        logits = None
        if exact is not None:
            runner = load(exact, "onnxruntime", os.cpu_count() or 1)
            logits = _record(any_batch(runner, batch), batches, options)
        pairs = zip(processes, found, strict=True)
        return [_accuracy(p, c, batches, logits, options, batch) for p, c in pairs]

    return _run(name, found, image.expand(batch or 1, *image.shape[1:]), score, options), notes


def _only_batch(files: Mapping[str, Described], options: Options) -> int | None:
    """The only number of images that the files take; None for any. Raises ArgumentError where another is asked for."""
    fixed = {path: file.batch for path, file in files.items() if file.batch is not None}
    for path, batch in fixed.items():
        if set(options.batches) != {batch}:
            raise ArgumentError(
                f"{path} takes batches of {batch} only; give that batch size (--batch {batch}), or export it anew"
            )
    return next(iter(fixed.values()), None)


def _file_contender(runtime: str, path: str | os.PathLike[str], file: Described) -> Contender:
    precision = "int8" if file.quantized else "float32"
    return Contender(runtime, precision, "qzoo", Path(path).absolute(), Path(path).stat().st_size, [])


def _run(
    name: str,
    found: list[Contender],
    image: Tensor,
    score: Callable[[list[Process]], list[Evaluation] | None],
    options: Options,
) -> list[Row]:
    """Time the contenders in turns, each in a process of its own, then score them there."""
    with ExitStack() as stack:
        processes = [stack.enter_context(Process(f"{c.title} of {name}", options.limit)) for c in found]
        pairs = list(zip(processes, found, strict=True))
        started = [_start(p, c, image, options) for p, c in track(pairs, "load", show=options.progress)]
        samples = latencies(name, processes, image, options)
        peaks = [process.peak_memory() for process in processes]
        results = score(processes)
    return [
        _row(
            name,
            i,
            found,
            None if results is None else results[i],
            samples,
            started[i],
            peaks[i],
            options.threads,
        )
        for i in range(len(found))
    ]


def new_report(
    rows: Sequence[Row],
    options: Options,
    notes: Sequence[str] = (),
    details: Sequence[dict[str, Any]] = (),
) -> Report:
    """Rows with the machine, the versions and the date they were measured with."""
    from qzoo.bench.environment import describe

    settings = {
        "threads": options.threads,
        "batches": list(options.batches),
        "seconds": options.seconds,
        "compare": list(options.compare),
    }
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Report(tuple(rows), date, settings, describe(), tuple(notes), tuple(details))


def _check_beyond(subset: str, calibration_images: int) -> None:
    """Raises DataError where a subset asks for images that peers are calibrated on."""
    match = re.match(r"(\d*):", subset)
    if match is not None and int(match[1] or 0) < calibration_images:
        raise DataError(
            f"subset {subset!r} holds images that the peers are calibrated on, the first {calibration_images}; "
            f"start at {calibration_images}"
        )


def _row(
    name: str,
    i: int,
    found: list[Contender],
    result: Evaluation | None,
    samples: dict[int, list[Samples]],
    started: tuple[float, float, int | None],
    peak: int | None,
    threads: int,
) -> Row:
    mine = found[i]
    bases = [j for j, c in enumerate(found) if c.runtime == mine.runtime and c.precision == "float32"]
    base = bases[0] if bases else None

    def speedups(clock: str) -> dict[int, tuple[float, float, float]]:
        if base is None:
            return {}
        return {b: ratio(getattr(s[base], clock), getattr(s[i], clock)) for b, s in samples.items()}

    clock = "cpu" if threads == 1 and rt.runtime_named(mine.runtime).on_cpu else "wall"
    against = [
        Against(other.source, other.runtime, batch, *ratio(getattr(s[j], clock), getattr(s[i], clock)))
        for j, other in enumerate(found)
        if mine.source == "qzoo" and mine.precision == "int8" and other.source != "qzoo"
        for batch, s in samples.items()
    ]
    return Row(
        model=name,
        runtime=mine.runtime,
        precision=mine.precision,
        source=mine.source,
        images=result.images if result else 0,
        top1=result.top1 if result else None,
        top1_interval=result.top1_interval if result else None,
        agreement=result.agreement if result else None,
        sqnr_db=result.sqnr_db if result else None,
        latency={batch: s[i].summary() for batch, s in samples.items()},
        clock=clock,
        cpu_speedup=speedups("cpu"),
        wall_speedup=speedups("wall"),
        file_bytes=mine.bytes,
        load_seconds=started[0],
        first_ms=started[1],
        peak_rss_bytes=peak,
        idle_rss_bytes=started[2],
        against=tuple(against),
    )


def _start(
    process: Process, contender: Contender, image: Tensor, options: Options
) -> tuple[float, float, int | None]:
    """Seconds to load, milliseconds of the first call, and memory before (bytes)."""
    seconds, memory = process.load(contender.runtime, contender.path, options.threads, contender.modules)
    process.images(image.numpy())
    return seconds, 1e3 * process.first(), memory


def latencies(
    name: str, processes: list[Process], image: Tensor, options: Options
) -> dict[int, list[Samples]]:
    """For each batch size the samples of every process, timed in turns."""
    found: dict[int, list[Samples]] = {}
    for batch in options.batches:
        images = image.expand(batch, *image.shape[1:]).contiguous().numpy()
        for process in processes:
            process.images(images)
        calls = {f"{i}": process.turn for i, process in enumerate(processes)}
        title = f"time {name}, batch {batch}, {options.threads} thread(s)"
        samples = measure(
            calls, seconds=options.seconds, title=title, progress=options.progress, clock=lambda call: call()
        )
        found[batch] = [samples[f"{i}"] for i in range(len(processes))]
    return found


def _record(
    run: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]], options: Options
) -> list[Tensor]:
    """The float model's logits of every batch: computed once, compared with all the others."""
    return [run(images) for images, _ in track(batches, "evaluate the reference", show=options.progress)]


def _accuracy(
    process: Process,
    contender: Contender,
    batches: Iterable[tuple[Tensor, Tensor]],
    logits: list[Tensor] | None,
    options: Options,
    batch: int | None = None,
) -> Evaluation:
    """Accuracy, and fidelity to recorded logits, if any.

    Args:
        batch: the only number of images that the contender takes.
    """
    recorded = iter(logits or [])
    reference = None if logits is None else lambda images: next(recorded)
    if (contender.runtime, contender.precision) == ("pytorch", "float32"):  # the reference itself
        again = iter(logits or [])
        return evaluate(lambda images: next(again), batches, reference=reference, progress=False)
    if contender.runtime != "torch.compile":  # which would compile anew for another number of threads
        process.load(contender.runtime, contender.path, os.cpu_count() or 1, contender.modules)

    def run(images: Tensor) -> Tensor:
        # Compiled code is for the sizes that were timed; another size is compiled anew.
        size = max(options.batches) if contender.runtime == "torch.compile" else batch or len(images)
        found = []
        for part in images.split(size):
            missing = (batch or len(part)) - len(part)
            full = torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part
            process.images(full.numpy())
            found.append(torch.from_numpy(process.run())[: len(part)])
        return torch.cat(found)

    shown = track(batches, f"evaluate {contender.title}", show=options.progress)
    return evaluate(run, shown, reference=reference, progress=False)


def _cached(loader: Iterable[tuple[Tensor, Tensor]]) -> Iterable[tuple[Tensor, Tensor]]:
    """The batches as a list where they fit into memory, else the loader, watched to give the same in every pass.

    Raises:
        DataError: an iterator, which can be read once only, over more images than are kept.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    size = 0
    for images, labels in loader:
        kept.append((images, labels))
        size += images.numel() * images.element_size()
        if size <= _CACHE_BYTES:
            continue
        if iter(loader) is loader:
            raise DataError(
                f"the loader is a {type(loader).__name__}, which can be read once, and its images take more than "
                f"{_CACHE_BYTES / 2**30:.3g} GiB, too much to keep: pass a list or a DataLoader"
            )
        return _Repeatable(loader, [_mark(*batch) for batch in kept])
    return kept


class _Repeatable:
    """A loader whose batches are compared in every pass with those of the passes before.

    The float model's logits are recorded in one pass and compared with other models' in another: of a loader that
    shuffles or augments they would be of other images.
    """

    def __init__(self, loader: Iterable[tuple[Tensor, Tensor]], marks: list[int]) -> None:
        self._loader, self._marks, self._complete = loader, marks, False

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = 0
        for images, labels in self._loader:
            mark = _mark(images, labels)
            if count == len(self._marks) and not self._complete:
                self._marks.append(mark)
            elif count >= len(self._marks) or mark != self._marks[count]:
                raise DataError(f"{_CHANGES}: batch {count} is another one than before")
            count += 1
            yield images, labels
        if count < len(self._marks):
            raise DataError(f"{_CHANGES}: it gave {len(self._marks)} batches or more, and now {count}")
        self._complete = True


_CHANGES = (
    "the loader does not give the same batches in every pass; the models would be compared on different images. Pass "
    "one with shuffle=False and without random transforms"
)


def _mark(images: Tensor, labels: Tensor) -> int:
    """A checksum of a batch."""
    return zlib.crc32(images.numpy().tobytes(), zlib.crc32(labels.numpy().tobytes()))
