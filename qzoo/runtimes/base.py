"""The small interface that every runtime is behind: a callable from images to logits that knows its name."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from qzoo.errors import MissingDependencyError


class Runner(ABC):
    """A model ready to run: ``runner(images)`` with float32 images [B, C, H, W] gives float32 logits [B, classes].

    Usable in place of the module for inference; may be called from several threads at once.

    Attributes:
        runtime: the runtime's name, such as ``"onnxruntime"``.
        threads: how many threads one call may use.
    """

    runtime: str

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        self.threads = threads

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Run one batch of any size."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(runtime={self.runtime!r}, threads={self.threads})"


def require(package: str, extra: str) -> None:
    """Raise MissingDependencyError with the line that installs it, unless the package is there."""
    if find_spec(package) is None:
        raise MissingDependencyError(f"the package {package!r} is not installed: pip install 'qzoo[{extra}]'")


def existing(path: str | os.PathLike[str]) -> Path:
    """The path. Raises FileNotFoundError that names it when there is no such file."""
    found = Path(path)
    if not found.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}; qzoo.export_onnx(model, path) writes one")
    return found
