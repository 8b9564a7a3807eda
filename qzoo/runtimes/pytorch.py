"""PyTorch: float models and the fake-quantized simulation, eager or compiled."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from qzoo.runtimes.base import Runner


class TorchRunner(Runner):
    """A copy of a module in eval mode, channels last (PyTorch's faster layout for convolutions), on its device."""

    runtime = "pytorch"

    def __init__(self, module: nn.Module, threads: int = 1) -> None:
        super().__init__(threads)
        self.module = copy.deepcopy(module).eval().to(memory_format=torch.channels_last)
        parameter = next(self.module.parameters(), None)
        self._device = torch.device("cpu") if parameter is None else parameter.device

    def __call__(self, images: Tensor) -> Tensor:
        before = torch.get_num_threads()
        if before != self.threads:
            torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                x = images.detach().to(self._device, memory_format=_layout(images))
                return self._run(x).to(images.device)
        finally:
            if before != self.threads:
                torch.set_num_threads(before)

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
