"""ONNX Runtime: on the CPU, or with its CUDA or TensorRT provider on a GPU."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qzoo.errors import DataError
from qzoo.runtimes.base import Runner
from qzoo.runtimes.sessions import onnxruntime_session

_TYPES = {
    "tensor(float)": (torch.float32, np.float32),
    "tensor(float16)": (torch.float16, np.float16),
    "tensor(double)": (torch.float64, np.float64),
}


class OnnxRuntimeRunner(Runner):
    """A session on an ONNX file. It reads contiguous images where they are and writes into the result's memory.

    Args:
        provider: the execution provider. The CUDA and TensorRT ones have not been run by the project.
        optimized, level: see :func:`qzoo.runtimes.sessions.onnxruntime_session`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        threads: int = 1,
        *,
        provider: str = "CPUExecutionProvider",
        runtime: str = "onnxruntime",
        optimized: str | os.PathLike[str] | None = None,
        level: str = "all",
    ) -> None:
        super().__init__(threads)
        self.runtime = runtime
        self._session: Any = onnxruntime_session(
            path, threads, provider=provider, level=level, optimized=optimized
        )
        self._device = torch.device("cpu" if provider == "CPUExecutionProvider" else "cuda:0")
        source, result = self._session.get_inputs()[0], self._session.get_outputs()[0]
        self._input, self._shape, self._type = source.name, source.shape, _TYPES[source.type]
        self._output, self._result_shape, self._result_type = result.name, result.shape, _TYPES[result.type]

    def __call__(self, images: Tensor) -> Tensor:
        x = images.detach().to(self._device).contiguous()
        self._check(x)
        place = (self._device.type, self._device.index or 0)
        binding = self._session.io_binding()  # one a call: bindings are not shared between threads
        binding.bind_input(self._input, *place, self._type[1], tuple(x.shape), x.data_ptr())
        shape = self._shape_of_result(len(x))
        if shape is None:
            binding.bind_output(self._output)
        else:
            y = torch.empty(shape, dtype=self._result_type[0], device=self._device)
            binding.bind_output(self._output, *place, self._result_type[1], shape, y.data_ptr())
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the session has a stream of its own
        self._session.run_with_iobinding(binding)
        if shape is None:
            y = torch.from_numpy(binding.copy_outputs_to_cpu()[0])
        return y.to(images.device)

    def _check(self, x: Tensor) -> None:
        # The session is handed an address: what the tensor is has to be right.
        fits = x.dim() == len(self._shape) and all(
            not isinstance(want, int) or want == has for want, has in zip(self._shape, x.shape, strict=True)
        )
        if x.dtype != self._type[0] or not fits:
            raise DataError(
                f"the model takes {self._type[0]} {self._shape}, not {x.dtype} {list(x.shape)}; "
                "export it for this size, or convert the images"
            )

    def _shape_of_result(self, batch: int) -> tuple[int, ...] | None:
        """The result's shape where the input tells it: all sizes fixed, or the first one that of the batch."""
        first, *rest = self._result_shape
        if not all(isinstance(size, int) for size in rest):
            return None
        if isinstance(first, int):
            return (first, *rest)
        return (batch, *rest) if first == self._shape[0] else None
