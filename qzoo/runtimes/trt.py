"""TensorRT through its own Python package, on tensors of the GPU.

Written for TensorRT 10 from its documentation ("Python API", "Explicit quantization"); the project has not run it.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import torch
from torch import Tensor

from qzoo.errors import ExportError
from qzoo.runtimes.base import Runner, existing

_BATCHES = (1, 8, 64)  # least, optimal and largest batch of a file with a dynamic one
_TYPES = {"FLOAT": torch.float32, "HALF": torch.float16}


class TensorRtRunner(Runner):
    """An engine built from an ONNX file (minutes for a large network); one execution context per calling thread.

    The network is strongly typed: precisions are those of the file, int8 where its Q/DQ say so.

    Args:
        threads: of no effect; the GPU computes.

    Raises:
        ExportError: TensorRT can't parse or build the file; its own messages are in the error.
    """

    runtime = "tensorrt"

    def __init__(self, path: str | os.PathLike[str], threads: int = 1) -> None:
        super().__init__(threads)
        import tensorrt as trt

        self._logger = trt.Logger(trt.Logger.WARNING)
        plan = _plan(trt, self._logger, str(existing(path)))
        self._runtime = trt.Runtime(self._logger)
        self._engine: Any = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise ExportError(f"TensorRT could not load the engine it built from {str(path)!r}")
        self._input, self._output = (self._engine.get_tensor_name(i) for i in range(2))
        self._types = [_TYPES[self._engine.get_tensor_dtype(n).name] for n in (self._input, self._output)]
        self._local = threading.local()

    def __call__(self, images: Tensor) -> Tensor:
        context = getattr(self._local, "context", None)
        if context is None:
            context = self._local.context = self._engine.create_execution_context()
        x = images.detach().to("cuda", self._types[0]).contiguous()
        if not context.set_input_shape(self._input, tuple(x.shape)):
            raise ExportError(f"the engine does not take images of shape {list(x.shape)}")
        shape = tuple(context.get_tensor_shape(self._output))
        y = torch.empty(shape, dtype=self._types[1], device=x.device)
        context.set_tensor_address(self._input, x.data_ptr())
        context.set_tensor_address(self._output, y.data_ptr())
        stream = torch.cuda.current_stream()
        if not context.execute_async_v3(stream.cuda_stream):
            raise ExportError("TensorRT failed to run the engine; see its messages above")
        stream.synchronize()
        return y.to(images.device)


def _plan(trt: Any, logger: Any, path: str) -> Any:
    """The serialized engine."""
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(path):
        problems = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise ExportError(f"TensorRT can't parse {path!r}: {problems}")
    config = builder.create_builder_config()
    source = network.get_input(0)
    if source.shape[0] == -1:
        profile = builder.create_optimization_profile()
        profile.set_shape(source.name, *((batch, *source.shape[1:]) for batch in _BATCHES))
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(f"TensorRT can't build an engine of {path!r}; see its messages above")
    return plan
