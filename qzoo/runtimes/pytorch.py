"""PyTorch eager: float models, and the fake-quantized simulation."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from qzoo.runtimes.base import Runner


class TorchRunner(Runner):
    """A copy of a module in eval mode, on the CPU, channels last (PyTorch's faster layout for convolutions)."""

    runtime = "pytorch"

    def __init__(self, module: nn.Module, threads: int = 1) -> None:
        super().__init__(threads)
        self.module = copy.deepcopy(module).cpu().eval().to(memory_format=torch.channels_last)

    def __call__(self, images: Tensor) -> Tensor:
        before = torch.get_num_threads()
        if before != self.threads:
            torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                return self.module(images.to(memory_format=_layout(images)))
        finally:
            if before != self.threads:
                torch.set_num_threads(before)


def _layout(images: Tensor) -> torch.memory_format:
    return torch.channels_last if images.dim() == 4 else torch.contiguous_format
