"""PyTorch eager: float models, and the fake-quantized simulation."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from qzoo.runtimes.base import Runner


class TorchRunner(Runner):
    """A copy of a module in eval mode, on the CPU."""

    runtime = "pytorch"

    def __init__(self, module: nn.Module, threads: int = 1) -> None:
        super().__init__(threads)
        self.module = copy.deepcopy(module).cpu().eval()

    def __call__(self, images: Tensor) -> Tensor:
        before = torch.get_num_threads()
        if before != self.threads:
            torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                return self.module(images)
        finally:
            if before != self.threads:
                torch.set_num_threads(before)
