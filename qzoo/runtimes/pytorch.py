"""Run a model in PyTorch: a float one or the fake-quantized simulation, eager or compiled."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.errors import DataError, QuantizationError, QzooError
from qzoo.runtimes.base import Runner

_ANOTHER_NUMBER = threading.RLock()


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """torch's number of threads, changed and put back.

    The number is the process's, and what a new thread begins with: two that changed it at once would put back each
    other's. Calls that want another number than torch has take turns therefore; the others run side by side.
    """
    with _ANOTHER_NUMBER:
        before = torch.get_num_threads()
        if before != number:
            torch.set_num_threads(number)
            try:
                yield
            finally:
                torch.set_num_threads(before)
            return
    yield


class TorchRunner(Runner):
    """A copy of a module in eval mode, channels last (PyTorch's faster layout for convolutions), on its device.

    May be called from several threads at once; where ``threads`` is not torch's own number, they take turns.
    """

    runtime = "pytorch"

    def __init__(self, module: nn.Module, threads: int = 1) -> None:
        super().__init__(threads)
        self.module = copy.deepcopy(module).eval().to(memory_format=torch.channels_last)
        parameter = next(self.module.parameters(), None)
        self._device = torch.device("cpu") if parameter is None else parameter.device

    def __call__(self, images: Tensor) -> Tensor:
        with _threads(self.threads), torch.inference_mode():
            x = images.detach().to(self._device, memory_format=_layout(images))
            return self._run(x).to(images.device)

    def _run(self, images: Tensor) -> Tensor:
        return self.module(images)


class CompiledRunner(TorchRunner):
    """The same through ``torch.compile``; the first call of each kind of shape compiles, which takes a while."""

    runtime = "torch.compile"

    def __init__(self, module: nn.Module, threads: int = 1) -> None:
        super().__init__(module, threads)
        self._compiled = torch.compile(self.module)

    def _run(self, images: Tensor) -> Tensor:
        result: Tensor = self._compiled(images)
        return result


def _layout(images: Tensor) -> torch.memory_format:
    return torch.channels_last if images.dim() == 4 else torch.contiguous_format


def run(model: Callable[[Tensor], Any], images: Tensor) -> Any:
    """Run a model on a batch of images; an error says in plain words what it can't take.

    Args:
        model: a module, or any callable.
        images: [B, C, H, W].

    Returns:
        What the model returns.

    Raises:
        DataError: a model with more inputs than one, or images of a type that its weights don't have; other errors of
            the model are raised as they are.

    Example:
        >>> run(model, images).shape
        torch.Size([8, 10])
    """
    try:
        return model(images)
    except (TypeError, RuntimeError, ValueError) as error:
        is_clear = isinstance(error, QzooError) and not isinstance(error, QuantizationError)
        problem = None if is_clear else _misfit(model, images)
        if problem is None:
            raise
        raise DataError(problem) from error


def output_of(model: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    """Run a model that returns one tensor.

    Args:
        model: a module, or any callable.
        images: [B, C, H, W].

    Returns:
        The tensor.

    Raises:
        DataError: it returns something else, such as a dictionary or a pair; see :func:`run`.

    Example:
        >>> output_of(model, images).shape
        torch.Size([8, 10])
    """
    result = run(model, images)
    if isinstance(result, Tensor):
        return result
    kind = type(result).__name__
    if isinstance(result, Mapping):
        kind += f" of {', '.join(map(repr, result))}"
    elif isinstance(result, tuple | list):
        kind += f" of {len(result)}"
    raise DataError(
        f"{_name(model)} returned a {kind}; expected one tensor of logits [B, classes]. Wrap the model in a module "
        "whose forward returns only these"
    )


def logits_of(model: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    """Run a classifier.

    Args:
        model: a module, or any callable.
        images: [B, C, H, W].

    Returns:
        The logits [B, classes].

    Raises:
        DataError: it returns something else, such as a dictionary, or logits of every pixel; see :func:`run`.

    Example:
        >>> logits_of(model, images).argmax(1)[:4]
        tensor([9, 2, 1, 1])
    """
    logits = output_of(model, images)
    if logits.dim() != 2 or len(logits) != len(images) or not logits.shape[1]:
        raise DataError(
            f"{_name(model)} returned a tensor {list(logits.shape)} for {len(images)} images; top-1 and top-5 need the "
            "logits [B, classes] of a classifier"
        )
    return logits


def _misfit(model: Callable[[Tensor], Any], images: Tensor) -> str | None:
    """Why a model failed on images, where it is plain to see."""
    name, shape, kind = _name(model), list(images.shape), str(images.dtype).removeprefix("torch.")
    if isinstance(model, nn.Module):
        needed = _required(model.forward)
        if len(needed) > 1:
            return (
                f"the forward of {name} takes {len(needed)} inputs ({', '.join(needed)}); it is called with one "
                "tensor, the images. Wrap the model in a module that takes only these"
            )
    if not images.dtype.is_floating_point:
        return (
            f"{name} can't take {kind} images {shape}; preprocess them as for training: to float32, scaled and "
            "normalized"
        )
    if isinstance(model, nn.Module):
        weight = next((p for p in model.parameters() if p.dtype.is_floating_point), images)
        if weight.dtype != images.dtype:
            want = str(weight.dtype).removeprefix("torch.")
            return f"the images {shape} are {kind}, the weights of {name} {want}; convert the images, or the model"
    if images.dim() == 3:
        return (
            f"{name} failed on a tensor {shape}; the loader must give batches [B, C, H, W], such as [images]"
        )
    return None


def _required(function: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # compiled functions have none
        return []
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind in positional]


def _name(model: Any) -> str:
    return type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", "the model")
