"""OpenVINO on the CPU."""

from __future__ import annotations

import os
import threading
from typing import Any

import torch
from torch import Tensor

from qzoo.errors import ExportError
from qzoo.runtimes.base import Runner, check_ends, check_images, opening, plain
from qzoo.runtimes.sessions import openvino_model

_TYPES = {"f32": torch.float32, "f16": torch.float16, "f64": torch.float64}


class OpenVinoRunner(Runner):
    """A compiled ONNX file; one inference request per calling thread. Contiguous images are read where they are.

    Raises:
        ExportError: OpenVINO can't load the file, or it has not one input and one output; in a call, it failed.
    """

    runtime = "openvino"
    dtype: torch.dtype

    def __init__(self, path: str | os.PathLike[str], threads: int = 1) -> None:
        super().__init__(threads)
        with opening("OpenVINO", path):
            self.compiled: Any = openvino_model(path, threads)
        check_ends(path, _names(self.compiled.inputs), _names(self.compiled.outputs))
        self._local = threading.local()
        source = self.compiled.inputs[0]
        kind = source.element_type.get_type_name()
        if kind not in _TYPES:
            raise ExportError(f"{str(path)!r} takes images of {kind}; expected one of {', '.join(_TYPES)}")
        self.dtype = _TYPES[kind]
        self._shape = [d.get_length() if d.is_static else "batch" for d in source.partial_shape]

    def __call__(self, images: Tensor) -> Tensor:
        check_images(images, self.dtype, self._shape)
        try:
            request = getattr(self._local, "request", None)
            if request is None:
                request = self._local.request = self.compiled.create_infer_request()
            # The request writes its next result over this one, so the result is copied out of it.
            result = request.infer([images.detach().cpu().contiguous().numpy()], share_inputs=True)
            return torch.from_numpy(result[0]).to(images.device)
        except Exception as error:  # RuntimeError with its source lines
            raise ExportError(
                f"OpenVINO could not run images {list(images.shape)}: {plain(error)}"
            ) from error


def _names(values: Any) -> list[str]:
    """Names of inputs or outputs; one without a name goes by its number."""
    return [value.any_name if value.names else f"number {i}" for i, value in enumerate(values)]
