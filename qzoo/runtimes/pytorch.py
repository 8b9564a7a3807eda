"""PyTorch: float models and the fake-quantized simulation, eager or compiled."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

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
