"""ONNX Runtime on the CPU."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from qzoo.runtimes.base import Runner, existing


class OnnxRuntimeRunner(Runner):
    """A session on an ONNX file. Tensors are passed without a copy where they are contiguous.

    Args:
        optimized: where to write the graph as the runtime optimized it (to see which kernels run), or None.
    """

    runtime = "onnxruntime"

    def __init__(
        self,
        path: str | os.PathLike[str],
        threads: int = 1,
        *,
        optimized: str | os.PathLike[str] | None = None,
        level: str = "all",
    ) -> None:
        super().__init__(threads)
        import onnxruntime as ort

        levels = ort.GraphOptimizationLevel
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        options.graph_optimization_level = {
            "none": levels.ORT_DISABLE_ALL,
            "basic": levels.ORT_ENABLE_BASIC,
            "extended": levels.ORT_ENABLE_EXTENDED,
            "all": levels.ORT_ENABLE_ALL,
        }[level]
        if optimized is not None:
            options.optimized_model_filepath = os.fspath(optimized)
        self._session: Any = ort.InferenceSession(
            str(existing(path)), options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name

    def __call__(self, images: Tensor) -> Tensor:
        array = images.detach().contiguous().numpy()
        return torch.from_numpy(self._session.run(None, {self._input: array})[0])
