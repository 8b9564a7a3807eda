"""What a benchmark is of: a checkpoint beside its float model, or an ONNX file; with the images it is measured on."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzoo import runtimes as rt
from qzoo.bench import contenders
from qzoo.bench.batches import Batches
from qzoo.bench.contenders import Contender
from qzoo.bench.lane import Lane
from qzoo.bench.layers import model_details
from qzoo.bench.options import Options
from qzoo.config import config_of
from qzoo.data import batch_for, load_data
from qzoo.data.sets import is_embedded
from qzoo.deployment import any_batch, load
from qzoo.errors import ArgumentError, BenchmarkError, DataError
from qzoo.export.description import OnnxDescription, is_onnx, read_description
from qzoo.pipeline.parts import images_of_file, measured_images
from qzoo.preprocessing import Preprocessing
from qzoo.zoo.create import open_model
from qzoo.zoo.floats import reference_of


@dataclass(frozen=True)
class Source:
    """Where images and float weights are, as :func:`qzoo.benchmark` is told.

    Attributes:
        skip_broken: leave out images that do not decode.
        peer_images: number of images at the start that peers are calibrated on.
        label_sets: of all that is measured.
    """

    data: str | os.PathLike[str] | None
    float_weights: str | os.PathLike[str] | None = None
    subset: str | None = None
    skip_broken: bool = False
    peer_images: int = 0
    label_sets: Collection[str] = ()

    def folder(self, labels: str) -> str | Path | None:
        """Find the folder of a model's images; None for embedded ones: Fashion-MNIST's, among other label sets."""
        embedded = len(self.label_sets) > 1 and is_embedded(labels)
        return (
            None
            if self.data is None or embedded
            else self.data
            if isinstance(self.data, str)
            else Path(self.data)
        )


@dataclass(frozen=True)
class Checkpoint:
    """A quantized model and the float model that it was made from.

    Attributes:
        name: for the table.
        quantized: calibrated, any target. Its classes must be importable, from files: the processes load them.
        reference: the float model.
        loader: labelled images, or noise for an image encoder; the first batch also is what is timed.
        calibration: images [N, C, H, W] for peers.
        notes: what is to be said of the images.
        labelled: whether accuracy can be measured.
    """

    name: str
    quantized: nn.Module
    reference: nn.Module
    loader: Batches
    calibration: Tensor | None = None
    notes: tuple[str, ...] = ()
    labelled: bool = True

    @classmethod
    def of(cls, name: str, quantized: nn.Module, options: Options, source: Source) -> Checkpoint:
        """Find its float model and its images."""
        for runtime in options.runtimes:
            if runtime not in contenders.WRITTEN_ANYWAY or len(options.runtimes) == 1:
                rt.check(runtime)
        config, weights, first = config_of(quantized), source.float_weights, source.peer_images
        folder = source.folder(config.labels)
        if config.is_encoder and first:
            raise ArgumentError(
                f"peers are measured by top-1, which the image encoder {name} has not; leave compare out"
            )
        reference = reference_of(config, None if weights is None else Path(weights))
        if config.is_encoder:
            note = f"{name}: an image encoder, timed on noise; qzoo.compare_features measures its features"
            return cls(
                name, quantized, reference, _noise(config.preprocessing), notes=(note,), labelled=False
            )
        chosen, note = measured_images(config, folder, source.subset, first)

        def images(subset: str, size: int) -> Batches:
            return load_data(
                config.preprocessing,
                config.labels,
                folder,
                subset=subset,
                batch_size=size,
                skip_broken=source.skip_broken,
            )

        loader = images(chosen.subset, 250 if is_embedded(config.labels) else 50)
        calibration = torch.cat([x for x, _ in images(f":{first}", 64)]) if first else None
        return cls(name, quantized, reference, loader, calibration, (f"{name}: {note}",) if note else ())

    def write(self, images: Tensor, options: Options, folder: Path) -> tuple[list[Contender], list[str]]:
        """Write the contenders' files, see :func:`qzoo.bench.contenders.write`; and notes."""
        candidates, notes = contenders.write(
            self.quantized, self.reference, images, options, self.calibration, folder
        )
        return candidates, [f"{self.name}: {note}" for note in notes]

    def layers(self, images: Tensor, lanes: list[Lane], options: Options) -> list[dict[str, Any]]:
        """Measure what the page shows of the layers."""
        return [model_details(self.name, self.quantized, images, lanes, options)]

    def exact(self) -> Callable[[Tensor], Tensor] | None:
        """Load the float model into PyTorch, ready to run."""
        return rt.load(self.reference, "pytorch", os.cpu_count() or 1)


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file, and the float model's, if there is one, in the runtimes that run files.

    Attributes:
        contenders: of the float model's file, where there is one, and the file, in each runtime.
        float_file: the float model's.
        batch: the only number of images that the files take; None for any.
        loader: labelled images, or noise.
        labelled: whether they are images.
        notes: what the file does not say, and that there are no images.
    """

    name: str
    contenders: list[Contender]
    float_file: str | None
    batch: int | None
    loader: Batches
    labelled: bool
    notes: tuple[str, ...]

    @classmethod
    def of(cls, name: str, file: OnnxDescription, options: Options, source: Source) -> OnnxFile:
        """Find what it is compared with, its runtimes and its images.

        Raises:
            ArgumentError: options that no file can be measured with, or these can't.
            MissingDependencyError: a runtime is not installed.
        """
        float_weights, data = source.float_weights, source.folder(file.labels)
        runtimes = tuple(runtime for runtime in options.runtimes if rt.runtime_named(runtime).runs_files)
        if not runtimes:
            raise ArgumentError(
                f"{name} is an ONNX file, which {', '.join(options.runtimes)} can't run; add onnxruntime"
            )
        if float_weights is not None and not is_onnx(float_weights):
            raise ArgumentError(
                f"{float_weights} is no ONNX file; the file {name} is compared with another file"
            )
        if options.compare:
            raise ArgumentError(
                f"peers are made from a checkpoint's float weights; leave {name} or compare out"
            )
        exact = None if float_weights is None else os.fspath(float_weights)
        files = {name: file} if exact is None else {exact: read_description(exact), name: file}
        batch = _only_batch(files, options)
        for runtime in runtimes:
            rt.check(runtime)
        notes = [f"{name}: {file.assumed}"] if file.assumed else []
        labelled = data is not None or is_embedded(file.labels)
        loader: Batches
        if labelled:
            size = batch or batch_for(file.preprocessing)
            images, note = images_of_file(file, name, data, source.subset)
            notes += [f"{name}: {note}"] if note else []
            loader = images.load(file, data, batch_size=size, skip_broken=source.skip_broken)
        else:
            notes.append(
                f"{name}: timed on noise, without images; --data names a folder to measure accuracy on"
            )
            loader = _noise(file.preprocessing)
        candidates = [
            _file(runtime, path, each, batch) for runtime in runtimes for path, each in files.items()
        ]
        return cls(name, candidates, exact, batch, loader, labelled, tuple(notes))

    def write(self, images: Tensor, options: Options, folder: Path) -> tuple[list[Contender], list[str]]:
        """Return the contenders, whose files are there."""
        return self.contenders, []

    def layers(self, images: Tensor, lanes: list[Lane], options: Options) -> list[dict[str, Any]]:
        """Return nothing: the layers of a file are not studied."""
        return []

    def exact(self) -> Callable[[Tensor], Tensor] | None:
        """Return the float file, ready to run; None without one."""
        if self.float_file is None:
            return None
        return any_batch(load(self.float_file, "onnxruntime", os.cpu_count() or 1), self.batch)


Subject = Checkpoint | OnnxFile


def subjects(names: Sequence[str], options: Options, source: Source) -> Iterator[Subject]:
    """Open the checkpoints and ONNX files of a benchmark; whatever is refused is so before the first one.

    Checkpoints are made one by one, as each holds its float model.
    """
    if source.peer_images and source.subset is not None:
        _check_beyond(source.subset, source.peer_images)
    models = _open([name for name in names if not is_onnx(name)])
    files = {name: read_description(name) for name in names if is_onnx(name)}
    label_sets = {config_of(model).labels for model in models.values()}
    source = replace(source, label_sets=label_sets | {file.labels for file in files.values()})
    described_files = [OnnxFile.of(name, file, options, source) for name, file in files.items()]
    for name, quantized in models.items():
        yield Checkpoint.of(name, quantized, options, source)
    yield from described_files


def _open(names: Sequence[str]) -> dict[str, nn.Module]:
    """The models by their own names; by what was asked for where two have the same one.

    Raises:
        BenchmarkError: a float model.
    """
    models = {asked: open_model(asked) for asked in names}
    for config in map(config_of, models.values()):
        if config.scheme is None:
            raise BenchmarkError(
                f"{config.name} is a float model; benchmark compares a quantized one with its float model: "
                f"{config.name}-w8a8"
            )
    own = [config_of(model).name for model in models.values()]
    return {
        name if own.count(name) == 1 else asked: model
        for name, (asked, model) in zip(own, models.items(), strict=True)
    }


def _check_beyond(subset: str, calibration_images: int) -> None:
    """Raises DataError where a subset asks for images that peers are calibrated on."""
    match = re.match(r"(\d*):", subset)
    if match is not None and int(match[1] or 0) < calibration_images:
        raise DataError(
            f"subset {subset!r} holds images that the peers are calibrated on, the first {calibration_images}; "
            f"start at {calibration_images}"
        )


def _only_batch(files: Mapping[str, OnnxDescription], options: Options) -> int | None:
    """The only number of images that the files take; None for any. Raises ArgumentError where another is asked for."""
    fixed = {path: file.batch for path, file in files.items() if file.batch is not None}
    for path, batch in fixed.items():
        if set(options.batches) != {batch}:
            raise ArgumentError(
                f"{path} takes batches of {batch} only; give that batch size (--batch {batch}), or export it anew"
            )
    return next(iter(fixed.values()), None)


def _noise(preprocessing: Preprocessing) -> Batches:
    """One image to be timed on, where there are no labelled ones."""
    noise = torch.randn((1, *preprocessing.input_size), generator=torch.Generator().manual_seed(0))
    return [(noise, torch.zeros(1, dtype=torch.int64))]


def _file(runtime: str, path: str, file: OnnxDescription, batch: int | None) -> Contender:
    where, precision = Path(path).absolute(), "int8" if file.quantized else "float32"
    return Contender(runtime, precision, "qzoo", where, where.stat().st_size, batch=batch)
