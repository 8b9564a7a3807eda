"""ONNX Runtime: on the CPU, or with its CUDA or TensorRT provider on a GPU."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qzoo.errors import ExportError
from qzoo.runtimes.base import Runner, check_ends, check_images, opening, plain
from qzoo.runtimes.sessions import onnxruntime_session

_TYPES = {
    "tensor(float)": (torch.float32, np.float32),
    "tensor(float16)": (torch.float16, np.float16),
    "tensor(double)": (torch.float64, np.float64),
}


class OnnxRuntimeRunner(Runner):
    """A session on an ONNX file. It reads contiguous images where they are, on the CPU and on the GPU.

    Args:
        provider: the execution provider. The CUDA and TensorRT ones have not been run by the project.
        optimized, level: see :func:`qzoo.runtimes.sessions.onnxruntime_session`.

    Raises:
        ExportError: the session can't load the file, or it has not one input and one output; in a call, it failed.
    """

    dtype: torch.dtype

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
        with opening("ONNX Runtime", path):
            self._session: Any = onnxruntime_session(
                path, threads, provider=provider, level=level, optimized=optimized
            )
        self._device = torch.device("cpu" if provider == "CPUExecutionProvider" else "cuda:0")
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        check_ends(path, [value.name for value in inputs], [value.name for value in outputs])
        source, result = inputs[0], outputs[0]
        self._input, self._shape, self._type = source.name, source.shape, _type_of(source)
        self.dtype = self._type[0]
        self._output, self._result_shape, self._result_type = result.name, result.shape, _type_of(result)

    def __call__(self, images: Tensor) -> Tensor:
        # On a GPU the session is handed an address only: what lies there has to be right.
        check_images(images, self.dtype, self._shape)
        x = images.detach().to(self._device).contiguous()
        try:
            if self._device.type != "cpu":
                return self._run_on_device(x).to(images.device)
            # numpy shares the tensors' memory, and takes half the time of a binding
            return torch.from_numpy(self._session.run(None, {self._input: x.numpy()})[0]).to(images.device)
        except Exception as error:  # its types have no common base
            raise ExportError(f"ONNX Runtime could not run images {list(x.shape)}: {plain(error)}") from error

    def _run_on_device(self, x: Tensor) -> Tensor:
        """Run on tensors of the GPU, without a copy to the host: the session is handed the addresses of the tensors."""
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
        return torch.from_numpy(binding.copy_outputs_to_cpu()[0]) if shape is None else y

    def _shape_of_result(self, batch: int) -> tuple[int, ...] | None:
        """The result's shape where the input tells it: all sizes fixed, or the first one that of the batch."""
        first, *rest = self._result_shape
        if not all(isinstance(size, int) for size in rest):
            return None
        if isinstance(first, int):
            return (first, *rest)
        return (batch, *rest) if first == self._shape[0] else None


def _type_of(value: Any) -> tuple[torch.dtype, Any]:
    """The type of an input or output, for torch and for numpy."""
    if value.type not in _TYPES:
        raise ExportError(f"{value.name!r} is a {value.type}; expected one of {', '.join(_TYPES)}")
    return _TYPES[value.type]
