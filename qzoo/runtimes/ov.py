"""OpenVINO on the CPU."""

from __future__ import annotations

import os
import threading
from typing import Any

import torch
from torch import Tensor

from qzoo.runtimes.base import Runner, existing


class OpenVinoRunner(Runner):
    """A compiled ONNX file; one inference request per calling thread.

    What is not int8 is computed in float32: OpenVINO's own default is bfloat16 where the processor has it, which
    would compare an int8 model with a bfloat16 one under the name of float.
    """

    runtime = "openvino"

    def __init__(self, path: str | os.PathLike[str], threads: int = 1) -> None:
        super().__init__(threads)
        import openvino

        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.compiled: Any = openvino.Core().compile_model(str(existing(path)), "CPU", settings)
        self._local = threading.local()

    def __call__(self, images: Tensor) -> Tensor:
        request = getattr(self._local, "request", None)
        if request is None:
            request = self._local.request = self.compiled.create_infer_request()
        result = request.infer([images.detach().contiguous().numpy()], share_inputs=True)
        return torch.from_numpy(result[0])
