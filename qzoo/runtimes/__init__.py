"""One interface over the runtimes: ``load(model_or_path, runtime)`` gives a callable from images to logits.

Importing this package imports neither torch nor a runtime: the processes that a benchmark measures in start from it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from qzoo.errors import ArgumentError, ExportError
from qzoo.runtimes.base import Runner, Runtime, check_threads

if TYPE_CHECKING:
    from torch import nn

__all__ = ["RUNTIMES", "Runner", "Runtime", "check", "installed", "load", "runtime_named"]

_ORT = ("onnxruntime", "onnxscript")  # onnxscript writes the files
_GPU = "pip install 'qzoo[onnx]' && pip uninstall onnxruntime && pip install onnxruntime-gpu"
_ALL = {
    runtime.name: runtime
    for runtime in (
        Runtime("pytorch"),
        Runtime("torch.compile", default=False),
        Runtime("onnxruntime", _ORT, "pip install 'qzoo[onnx]'", provider="CPUExecutionProvider"),
        Runtime("onnxruntime-cuda", _ORT, _GPU, provider="CUDAExecutionProvider"),
        Runtime("onnxruntime-tensorrt", _ORT, _GPU, "tensorrt", "TensorrtExecutionProvider"),
        Runtime("openvino", ("openvino", "onnxscript"), "pip install 'qzoo[onnx,openvino]'", "openvino"),
        Runtime("tensorrt", ("tensorrt", "onnxscript"), "pip install 'qzoo[onnx]' tensorrt", "tensorrt"),
    )
}
RUNTIMES = tuple(_ALL)


def runtime_named(name: str) -> Runtime:
    """The runtime of that name. Raises ValueError that lists the known ones."""
    if name not in _ALL:
        raise ArgumentError(f"no runtime {name!r}; expected one of {', '.join(RUNTIMES)}")
    return _ALL[name]


def installed() -> list[str]:
    """Names of the runtimes that can be loaded here."""
    return [name for name, runtime in _ALL.items() if not runtime.missing()]


def check(runtime: str) -> None:
    """Raise ValueError for an unknown runtime, MissingDependencyError for one that is not installed."""
    runtime_named(runtime).require()


def load(
    source: nn.Module | str | os.PathLike[str],
    runtime: str = "onnxruntime",
    threads: int = 1,
) -> Runner:
    """Load what a runtime runs: an ONNX file, or for PyTorch a module. :func:`qzoo.deploy` exports modules first.

    Args:
        source: the path of an ONNX file, or a module.
        runtime: one of :data:`RUNTIMES`.
        threads: how many threads one call may use (on the CPU).

    Raises:
        MissingDependencyError: the runtime is not installed; the message has the line that installs it.
        ExportError: the runtime can't load the file (one that is no ONNX, has several inputs or outputs, or operators
            that the runtime lacks), or PyTorch was asked to run a file.
        TypeError: neither a path nor a module that the runtime runs; threads that are no whole number.
        ValueError: an unknown runtime, or no threads.
    """
    check(runtime)
    check_threads(threads)
    chosen = runtime_named(runtime)
    if not chosen.runs_files:
        if isinstance(source, (str, os.PathLike)):
            raise ExportError(
                f"{runtime} runs modules, not ONNX files: {str(source)!r}; use runtime='onnxruntime'"
            )
        from qzoo.runtimes.pytorch import CompiledRunner, TorchRunner

        return (TorchRunner if runtime == "pytorch" else CompiledRunner)(source, threads)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"{runtime} runs ONNX files, not {type(source).__name__}; qzoo.deploy(model, {runtime!r}) exports a model"
        )
    if chosen.provider:
        from qzoo.runtimes.ort import OnnxRuntimeRunner

        return OnnxRuntimeRunner(source, threads, provider=chosen.provider, runtime=runtime)
    if runtime == "openvino":
        from qzoo.runtimes.ov import OpenVinoRunner

        return OpenVinoRunner(source, threads)
    from qzoo.runtimes.trt import TensorRtRunner

    return TensorRtRunner(source, threads)
