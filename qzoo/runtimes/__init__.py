"""One interface over the runtimes: ``load(model_or_path, runtime)`` gives a callable from images to logits."""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor, nn

from qzoo.errors import ExportError
from qzoo.runtimes.base import Runner, require

__all__ = ["RUNTIMES", "Runner", "check", "installed", "load"]

# For each runtime the packages it needs, and the extra of qzoo that brings them. Files are written by onnxscript.
_NEEDS = {
    "pytorch": ((), ""),
    "onnxruntime": (("onnxruntime", "onnxscript"), "onnx"),
    "openvino": (("openvino", "onnxscript"), "onnx,openvino"),
}
RUNTIMES = tuple(_NEEDS)


def installed() -> list[str]:
    """Names of the runtimes that can be loaded here."""
    return [name for name, (packages, _) in _NEEDS.items() if all(find_spec(p) is not None for p in packages)]


def check(runtime: str) -> None:
    """Raise ValueError for an unknown runtime, MissingDependencyError for one that is not installed."""
    if runtime not in RUNTIMES:
        raise ValueError(f"no runtime {runtime!r}; expected one of {', '.join(RUNTIMES)}")
    packages, extra = _NEEDS[runtime]
    for package in packages:
        require(package, extra)


def load(
    source: nn.Module | str | os.PathLike[str],
    runtime: str = "onnxruntime",
    threads: int = 1,
    *,
    example: Tensor | None = None,
) -> Runner:
    """Make a model ready to run.

    Args:
        source: a module, or the path of an ONNX file. A module for another runtime than PyTorch is exported for it.
        runtime: one of :data:`RUNTIMES`.
        threads: how many threads one call may use.
        example: for a module, an input batch of the size to export for; not needed for zoo checkpoints.

    Raises:
        MissingDependencyError: the runtime is not installed; the message has the line that installs it.
        ExportError: the module can't be exported, or PyTorch was asked to run a file.
        ValueError: an unknown runtime.
    """
    check(runtime)
    if runtime == "pytorch":
        from qzoo.runtimes.pytorch import TorchRunner

        if not isinstance(source, nn.Module):
            raise ExportError(
                f"PyTorch runs modules, not ONNX files: {str(source)!r}; use runtime='onnxruntime'"
            )
        return TorchRunner(source, threads)
    if isinstance(source, nn.Module):
        from qzoo.export import export_onnx

        with tempfile.TemporaryDirectory(prefix="qzoo-") as folder:
            path = export_onnx(source, Path(folder) / "model.onnx", target=runtime, example=example)
            return load(path, runtime, threads)
    if runtime == "onnxruntime":
        from qzoo.runtimes.ort import OnnxRuntimeRunner

        return OnnxRuntimeRunner(source, threads)
    from qzoo.runtimes.ov import OpenVinoRunner

    return OpenVinoRunner(source, threads)
