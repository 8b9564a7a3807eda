"""``qzoo.predict``: the most likely labels of photos, by default int8 in ONNX Runtime."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, overload

import torch

from qzoo import runtimes
from qzoo.config import Config, read_config
from qzoo.data.files import open_image
from qzoo.deployment import deploy
from qzoo.errors import ArgumentError, CheckpointError
from qzoo.export.onnx import export_onnx
from qzoo.pipeline.onnx_files import onnx_name
from qzoo.registry import parse_name
from qzoo.runtimes import Runner
from qzoo.version import __version__
from qzoo.zoo import hub, store
from qzoo.zoo.checkpoint import load_pretrained
from qzoo.zoo.request import Request

Photo = str | os.PathLike[str]
Labels = list[tuple[str, float]]


@overload
def predict(  # type: ignore[overload-overlap]  # a text is a sequence of texts, too
    image: Photo, model: str | os.PathLike[str], runtime: str = ..., k: int = ...
) -> Labels: ...
@overload
def predict(
    image: Sequence[Photo], model: str | os.PathLike[str], runtime: str = ..., k: int = ...
) -> list[Labels]: ...
def predict(
    image: Photo | Sequence[Photo],
    model: str | os.PathLike[str],
    runtime: str = "onnxruntime",
    k: int = 5,
) -> Labels | list[Labels]:
    """Label photos with a checkpoint of the zoo, or one of your own.

    The runtime opens the ONNX file of the checkpoint's folder where it has one for the runtime. Else one is exported
    and kept in the store (``QZOO_HOME``). Later calls in the process go on with the open model, until its folder
    changes.

    Args:
        image: path of an image file, or several paths.
        model: ``"arch"``, ``"arch.tag"`` (their W8A8 checkpoint) or the checkpoint's own name, such as
            ``"resnet20.fmnist-w4a4_qat"``; or a checkpoint folder, or a Hub repository.
        runtime: one of :data:`qzoo.runtimes.RUNTIMES`: ``"onnxruntime"``, ``"onnxruntime-cuda"``, ``"openvino"``, ...;
            ``"pytorch"`` and ``"torch.compile"`` simulate int8.
        k: number of labels; fewer when the model has fewer classes.

    Returns:
        ``(label, probability)``, the most likely first; probabilities of all classes add up to 1. For several photos
        a list of these. Where the names of the classes are not known, labels are ``"class 0"``, ``"class 1"``, ...

    Raises:
        DataError: a file is missing or no image.
        UnknownModelError: no such checkpoint; the message has near names.
        CheckpointError: a folder that is incomplete or altered, its ONNX file too; an image encoder's.
        MissingDependencyError: the runtime is not installed.
        ValueError: an unknown runtime, ``k`` below 1, a model that is no name or folder.

    Example:
        >>> labels = qzoo.predict("photo.jpg", "resnet20.fmnist-w8a8", runtime="pytorch", k=2)
        >>> for label, probability in labels:
        ...     print(f"{label}: {probability:.0%}")
        Ankle boot: ...%
        Dress: ...%
    """
    if k < 1:
        raise ArgumentError(f"k must be at least 1, not {k}")
    if not isinstance(model, str | os.PathLike):
        raise ArgumentError(
            f"predict takes the name or folder of a checkpoint, not {type(model).__name__}: keep a model of your own "
            "with qzoo.save_pretrained(model, folder), and give the folder"
        )
    alone = isinstance(image, str | os.PathLike) or not isinstance(image, Iterable)
    photos: list[Any] = [image] if alone else list(image)  # type: ignore[arg-type]
    for photo in photos:
        if not isinstance(photo, str | os.PathLike):
            raise ArgumentError(
                f"predict takes the path of a photo, or several paths, not {type(photo).__name__}"
            )
    runtimes.check(runtime)
    folder = _folder(os.fspath(model))
    ready = _ready(folder, hub.sha256_of(folder / "config.json"), runtime)
    labels = [_label(photo, ready, k) for photo in photos]
    return labels[0] if alone else labels


@dataclass(frozen=True)
class _RunningModel:
    """A running model and its config."""

    run: Runner
    config: Config


def _label(photo: Photo, ready: _RunningModel, k: int) -> Labels:
    preprocessing, names = ready.config.preprocessing, ready.config.class_names
    picture = open_image(photo, "L" if preprocessing.input_size[0] == 1 else "RGB")
    logits = ready.run(preprocessing.transform()(picture).unsqueeze(0))[0]
    best = torch.softmax(logits.double(), 0).topk(min(k, len(logits)))
    named = [names[i] if i < len(names) else f"class {i}" for i in best.indices.tolist()]
    return list(zip(named, best.values.tolist(), strict=True))


def _folder(where: str) -> Path:
    """The checkpoint's folder. Raises CheckpointError where it holds none, or an image encoder."""
    if (Path(where) / "config.json").is_file() or "/" in where:
        folder = hub.locate(where) if Path(where).is_dir() else _download(where)
    else:
        quantize = True if parse_name(where).scheme is None else None
        folder = Request.parse(where, pretrained=True, quantize=quantize).checkpoint()
    config = read_config(folder)  # or the error that says what is wrong
    if config.is_encoder:
        raise CheckpointError(
            f"{config.name} is an image encoder: it gives features, not labels; qzoo.deploy(model) computes them"
        )
    return folder


@cache
def _download(repository: str) -> Path:
    """A Hub repository's folder: asked for once in a process, and not for every photo."""
    return hub.locate(repository)


@lru_cache(maxsize=4)
def _ready(folder: Path, digest: str, runtime: str) -> _RunningModel:
    """The running model. ``digest``, of the config and so of the weights, tells when the folder was rebuilt."""
    config, threads = read_config(folder), os.cpu_count() or 1
    chosen = runtimes.runtime_named(runtime)
    if not chosen.runs_files:
        model = load_pretrained(folder, target=chosen.target)
        return _RunningModel(runtimes.load(model, runtime, threads), config)
    name = onnx_name(config, chosen.target)
    file = folder / name
    if name not in config.files or not file.is_file():  # one that is not listed may be of older weights
        return _RunningModel(_export(folder, digest, runtime, threads), config)
    if hub.sha256_of(file) != config.files[name]:
        raise CheckpointError(f"{file} has another SHA-256 than config.json says; remove it, or build again")
    return _RunningModel(runtimes.load(file, runtime, threads), config)


def _export(folder: Path, digest: str, runtime: str, threads: int) -> Runner:
    """The model in its runtime by way of an ONNX file in the store; written there if it is not."""
    target, cache = runtimes.runtime_named(runtime).target, _exports()
    if cache is None:
        return deploy(load_pretrained(folder, target=target), runtime, threads=threads).runner
    key = hashlib.sha256(f"{digest} {target} {__version__}".encode()).hexdigest()[:32]
    file = cache / f"{key}.onnx"
    if not file.is_file():
        export_onnx(load_pretrained(folder, target=target), file, target=target)
    return runtimes.load(file, runtime, threads)


def _exports() -> Path | None:
    """The store's folder of exported files; None where nothing can be written to it, which is said."""
    folder = store.home() / "exports"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        text = f"the exported model can't be kept in {folder} ({error.strerror}), and is exported anew in every process"
        warnings.warn(f"{text}; QZOO_HOME names another folder", stacklevel=2)
        return None
