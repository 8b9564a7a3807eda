"""The small interface that every runtime is behind: a callable from images to logits that knows its name."""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from qzoo.errors import ArgumentError, DataError, ExportError, MissingDependencyError, QzooError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Runtime:
    """Requirements of a runtime: packages, and the placement of Q/DQ in its files.

    Attributes:
        packages: modules that must be importable.
        install: the line that brings them.
        target: whose placement of Q/DQ its files (or its simulation) have, see :mod:`qzoo.scheme`.
        provider: the execution provider, of ONNX Runtime only.
        default: measured when nothing else is asked for.

    Example:
        >>> qzoo.runtimes.runtime_named("onnxruntime").provider
        'CPUExecutionProvider'
    """

    name: str
    packages: tuple[str, ...] = ()
    install: str = ""
    target: str = "onnxruntime"
    provider: str = ""
    default: bool = True

    @property
    def runs_files(self) -> bool:
        """Whether it takes ONNX files, and not modules."""
        return bool(self.packages)

    @property
    def on_cpu(self) -> bool:
        """Whether the processor computes, so that CPU time says what a call costs."""
        return self.name != "tensorrt" and self.provider in ("", "CPUExecutionProvider")

    def missing(self) -> str:
        """Say why the runtime can't run here, and what to do; "" when it can."""
        for package in self.packages:
            if find_spec(package) is None:
                return f"the package {package!r} is not installed: {self.install}"
        if self.name == "torch.compile" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            return "torch.compile needs a C++ compiler, such as of `apt-get install g++`"
        if self.provider not in ("", "CPUExecutionProvider"):
            import onnxruntime

            if self.provider not in onnxruntime.get_available_providers():
                return f"this onnxruntime has no {self.provider}: {self.install}"
        if self.name == "tensorrt":
            import torch

            if not torch.cuda.is_available():
                return "TensorRT needs an NVIDIA GPU that torch can use; torch.cuda.is_available() is False"
        return ""

    def require(self) -> None:
        """Raise MissingDependencyError with the line that installs what is missing."""
        problem = self.missing()
        if problem:
            raise MissingDependencyError(problem)


class Runner(ABC):
    """A model ready to run: ``runner(images)`` with images [B, C, H, W] gives logits [B, classes], no gradient.

    The result is on the device of the images. May be called from several threads at once.

    Attributes:
        runtime: the runtime's name, such as ``"onnxruntime"``.
        threads: how many threads one call may use.
        dtype: of the images, where a file says it.

    Example:
        >>> runner = qzoo.runtimes.load(model, "pytorch")
        >>> runner(images).argmax(1)[:4]
        tensor([9, 2, 1, 1])
    """

    runtime: str
    dtype: torch.dtype | None = None

    def __init__(self, threads: int) -> None:
        check_threads(threads)
        self.threads = threads

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Run one batch of any size."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(runtime={self.runtime!r}, threads={self.threads})"


def check_threads(threads: int) -> None:
    """Raise TypeError for anything but a whole number, ValueError below 1."""
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise TypeError(f"threads must be a whole number of 1 or more, not {threads!r}")
    if threads < 1:
        raise ArgumentError(f"threads must be at least 1, not {threads}")


def check_tensor(images: object) -> None:
    """Raise TypeError for anything but a tensor, such as an array of NumPy."""
    import torch

    if not isinstance(images, torch.Tensor):
        hint = "; torch.from_numpy(images) makes one of it" if type(images).__name__ == "ndarray" else ""
        raise TypeError(f"images must be a tensor [B, C, H, W], not {type(images).__name__}{hint}")


def check_example(example: object, refusal: type[QzooError]) -> None:
    """Raise TypeError for anything but a tensor, and ``refusal`` for one that is no batch of floating-point images."""
    import torch

    if not isinstance(example, torch.Tensor):
        raise TypeError(
            f"example must be a tensor, such as torch.zeros(1, 3, 224, 224), not {type(example).__name__}"
        )
    if not example.is_floating_point() or example.dim() < 2 or len(example) == 0:
        raise refusal(
            f"example must be a batch of floating-point images, not {list(example.shape)} {example.dtype}"
        )


def check_ends(path: str | os.PathLike[str], inputs: list[str], outputs: list[str]) -> None:
    """Raise ExportError for a file that has not one input and one output."""
    for what, names in (("input", inputs), ("output", outputs)):
        if len(names) != 1:
            raise ExportError(
                f"{str(path)!r} has {len(names)} {what}s ({', '.join(names)}); only files from one batch of images to "
                f"one tensor are run here: write one with a single {what}, or use the runtime itself"
            )


def check_images(images: Tensor, dtype: torch.dtype, shape: list[int | str]) -> None:
    """Raise DataError where images are not what a file takes; text in ``shape`` stands for any size.

    Raises:
        DataError: another type or shape.
        TypeError: no tensor.
    """
    check_tensor(images)
    fits = images.dim() == len(shape) and all(
        not isinstance(want, int) or want == has for want, has in zip(shape, images.shape, strict=True)
    )
    if images.dtype != dtype or not fits:
        raise DataError(
            f"the model takes {dtype} {shape}, not {images.dtype} {list(images.shape)}; "
            "export it for this size, or convert the images"
        )


@contextmanager
def opening(runtime: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what a runtime raises while it opens a file into ExportError: its own types have no common base."""
    try:
        yield
    except (QzooError, FileNotFoundError):
        raise
    except Exception as error:
        raise ExportError(f"{runtime} can't load {str(path)!r}: {plain(error)}") from error


def plain(error: Exception) -> str:
    """Put the words of a runtime into one line, without the places in its own source."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(("Exception from", "Check '")))


def existing(path: str | os.PathLike[str]) -> Path:
    """Check that a file exists and return its path. Raises FileNotFoundError that names it."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}; qzoo.export_onnx(model, path) writes one")
    return file
