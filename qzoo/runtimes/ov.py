"""OpenVINO on the CPU."""

from __future__ import annotations

import os
import threading
from typing import Any

import torch
from torch import Tensor

from qzoo.runtimes.base import Runner
from qzoo.runtimes.sessions import openvino_model


class OpenVinoRunner(Runner):
    """A compiled ONNX file; one inference request per calling thread. Contiguous images are read where they are."""

    runtime = "openvino"

    def __init__(self, path: str | os.PathLike[str], threads: int = 1) -> None:
        super().__init__(threads)
        self.compiled: Any = openvino_model(path, threads)
        self._local = threading.local()

    def __call__(self, images: Tensor) -> Tensor:
        request = getattr(self._local, "request", None)
        if request is None:
            request = self._local.request = self.compiled.create_infer_request()
        # The request writes its next result over this one, so the result is copied out of it.
        result = request.infer([images.detach().cpu().contiguous().numpy()], share_inputs=True)
        return torch.from_numpy(result[0]).to(images.device)
