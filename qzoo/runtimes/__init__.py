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
    """Look up a runtime by its name.

    Args:
        name: one of :data:`RUNTIMES`.

    Returns:
        What the runtime needs, and what it wants of a file.

    Raises:
        ValueError: an unknown name; the message lists the known ones.

    Example:
        >>> runtime_named("openvino").target
        'openvino'
    """
    if name not in _ALL:
        raise ArgumentError(f"no runtime {name!r}; expected one of {', '.join(RUNTIMES)}")
    return _ALL[name]


def installed() -> list[str]:
    """List the runtimes that can be loaded here.

    Returns:
        Their names, in the order of :data:`RUNTIMES`.

    Example:
        >>> "pytorch" in installed()
        True
    """
    return [name for name, runtime in _ALL.items() if not runtime.missing()]


def check(runtime: str) -> None:
    """Check that a runtime is known and installed.

    Args:
        runtime: its name.

    Raises:
        ValueError: an unknown runtime.
        MissingDependencyError: one that is not installed; the message has the line that installs it.

    Example:
        >>> qzoo.runtimes.check("pytorch")
    """
    runtime_named(runtime).require()


def load(
    source: nn.Module | str | os.PathLike[str],
    runtime: str = "onnxruntime",
    threads: int = 1,
) -> Runner:
    """Load an ONNX file in a runtime, or a module in PyTorch. :func:`qzoo.deploy` exports modules first.

    Args:
        source: the path of an ONNX file, or a module.
        runtime: one of :data:`RUNTIMES`.
        threads: how many threads one call may use (on the CPU).

    Returns:
        A callable: images [B, C, H, W] to logits [B, classes].

    Raises:
        MissingDependencyError: the runtime is not installed; the message has the line that installs it.
        ExportError: the runtime can't load the file (one that is no ONNX, has several inputs or outputs, or operators
            that the runtime lacks), or PyTorch was asked to run a file.
        TypeError: neither a path nor a module that the runtime runs; threads that are no whole number.
        ValueError: an unknown runtime, or no threads.

    Example:
        >>> runner = qzoo.runtimes.load("model.onnx", "onnxruntime", threads=1)
        >>> runner(images).shape
        torch.Size([8, 10])
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
