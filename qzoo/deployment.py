"""``qzoo.deploy``: a model in a runtime, usable in place of the module."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from qzoo import runtimes
from qzoo.errors import ExportError, GraphError
from qzoo.export.order import plain_module
from qzoo.files import temporary_folder
from qzoo.runtimes.base import Runner, check_tensor, check_threads
from qzoo.runtimes.processor import saturates

logger = logging.getLogger(__name__)

_ON_CPU = ("onnxruntime", "openvino")


class DeployedModel(nn.Module):
    """A module without parameters whose forward is a runtime's. For inference: eval mode, no gradients.

    Images and logits are torch tensors; the runtime reads and writes their memory where it can. May be called from
    several threads at once.

    Attributes:
        runner: the runtime behind it.
        qzoo_config: of the zoo model it was made from (preprocessing, labels), where there is one.
    """

    def __init__(self, runner: Runner, config: Any = None) -> None:
        super().__init__()
        self.runner = runner
        self.training = False
        if config is not None:
            self.qzoo_config = config

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits [B, classes] of images [B, C, H, W], on the device of the images.

        Raises:
            DataError: images of another type or shape than the file takes.
            ExportError: the runtime failed on them.
            TypeError: no tensor.
        """
        check_tensor(images)
        return self.runner(images)

    def train(self, mode: bool = True) -> DeployedModel:
        """Stay in eval mode.

        Raises:
            ExportError: training was asked for; a runtime only infers.
        """
        if mode:
            raise ExportError(
                f"a model deployed to {self.runner.runtime} can't be trained; train the module itself"
            )
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DeployedModel:
        """What ``half()``, ``to(dtype)`` and the like come down to.

        Raises:
            ExportError: another type was asked for; that of the file stays.
        """
        dtype = self.runner.dtype
        if dtype is not None and fn(torch.zeros(1, dtype=dtype)).dtype != dtype:
            raise ExportError(
                f"a model deployed to {self.runner.runtime} stays {dtype}: deploy the module in the type that you want"
            )
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"runtime={self.runner.runtime!r}, threads={self.runner.threads}"


def deploy(
    source: nn.Module | str | os.PathLike[str],
    runtime: str = "onnxruntime",
    *,
    threads: int | None = None,
    example: Tensor | None = None,
) -> DeployedModel:
    """Deploy a model in a runtime: export it, load the file, and call it on torch tensors.

    Warns when less than half of the multiply-adds of a quantized model will run in int8 there (:func:`qzoo.lint` names
    the reasons).

    On an x86 processor without VNNI weights of 8 bits are rounded to 7 for ONNX Runtime and OpenVINO, with a warning
    (:func:`qzoo.export_onnx`, ``reduce_range``).

    Args:
        source: a module, which stays as it is (the runtime gets a copy in eval mode), or the path of an ONNX file.
        runtime: ``"onnxruntime"``, ``"onnxruntime-cuda"``, ``"onnxruntime-tensorrt"``, ``"openvino"``,
            ``"tensorrt"``, ``"torch.compile"`` or ``"pytorch"``. A quantized model gets the Q/DQ that the runtime
            wants. In the two of PyTorch it stays the simulation of the model's own target.
        threads: that one call may use on the CPU; torch's own number by default.
        example: a batch of the size to export for; not needed for zoo models.

    Returns:
        A module: images [B, C, H, W] to logits [B, classes], on the device of the images, without gradient.

    Raises:
        MissingDependencyError: the runtime is not installed; the message has the line that installs it.
        ExportError: the model can't be exported for it, or the runtime can't load the file.
        TypeError: neither a module nor a path; threads that are no whole number.
        ValueError: an unknown runtime, or no threads.

    Example:
        >>> fast = qzoo.deploy(model, runtime="onnxruntime")
        >>> fast(images).shape
        torch.Size([8, 10])
    """
    chosen = torch.get_num_threads() if threads is None else threads
    runner = load(source, runtime, chosen, example)
    if isinstance(source, (str, os.PathLike)):
        from qzoo.export.lint.coverage import warn_of_float

        with suppress(GraphError):  # too large to judge, or of OpenVINO's own format: the runtime took it
            warn_of_float(source, runtimes.runtime_named(runtime).target, os.fspath(source))
    return DeployedModel(runner, getattr(source, "qzoo_config", None))


def load(
    source: nn.Module | str | os.PathLike[str], runtime: str, threads: int = 1, example: Tensor | None = None
) -> Runner:
    """Load a model or an ONNX file into a runtime; arguments and errors as in :func:`deploy`."""
    runtimes.check(runtime)
    check_threads(threads)
    if isinstance(source, (str, os.PathLike)):
        return runtimes.load(source, runtime, threads)
    module, chosen = plain_module(source), runtimes.runtime_named(runtime)
    if not chosen.runs_files:
        return runtimes.load(module, runtime, threads)
    from qzoo.export import export_onnx

    with temporary_folder() as folder:
        reduce_range = runtime in _ON_CPU and saturates()
        if reduce_range:
            logger.warning(
                "this processor has no VNNI and cuts off sums of 8-bit products: weights of 8 bits are rounded to 7 "
                "(export_onnx(..., reduce_range=True))"
            )
        path = export_onnx(
            module,
            folder / "model.onnx",
            target=chosen.target,
            example=example,
            reduce_range=reduce_range,
        )
        try:
            return runtimes.load(path, runtime, threads)
        except ExportError as error:  # names the temporary file
            text = str(error).replace(str(path), f"the export of {type(module).__name__}")
            hint = "; it has few operators in float64: deploy model.float()" if _is_double(module) else ""
            raise ExportError(f"{text.strip()}{hint}") from error


def any_batch(run: Callable[[Tensor], Tensor], batch: int | None) -> Callable[[Tensor], Tensor]:
    """Run batches of any size, of float32 images, on what takes ``batch`` images, a runner's maybe of another type.

    An incomplete batch is filled up with its last image; None: it takes any number.
    """
    dtype = run.dtype if isinstance(run, Runner) else None

    def run_all(images: Tensor) -> Tensor:
        outputs = []
        for part in (images if dtype is None else images.to(dtype)).split(batch or len(images)):
            missing = (batch or len(part)) - len(part)
            padded = torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part
            outputs.append(run(padded)[: len(part)].float())
        return torch.cat(outputs)

    return run_all


def _is_double(module: nn.Module) -> bool:
    return any(parameter.dtype == torch.float64 for parameter in module.parameters())
