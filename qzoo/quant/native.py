"""The native libraries: which are loaded, and why one is not.

`qzoo/_C*.so` holds the CPU kernels, `qzoo/_C_cuda*.so` the CUDA ones; both are optional. Loading registers
their kernels for operators that are declared in Python, nothing else. `QZOO_NATIVE=0` in the environment
keeps them out.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from dataclasses import dataclass

import torch

_LIBRARIES = {"cpu": "qzoo._C", "cuda": "qzoo._C_cuda"}


@dataclass(frozen=True)
class _Status:
    loaded: bool
    reason: str


_status: dict[str, _Status] = {}


def load() -> None:
    """Load what is there; called when `qzoo.quant.ops` is imported, and harmless to repeat."""
    for device, module in _LIBRARIES.items():
        if device not in _status:
            _status[device] = _load(device, module)
            if device == "cpu" and not _status[device].loaded and _wanted():
                warnings.warn(
                    f"qzoo runs without its native CPU kernels ({_status[device].reason}); "
                    "results are the same, quantization and calibration are several times slower",
                    RuntimeWarning,
                    stacklevel=2,
                )


def _wanted() -> bool:
    return os.environ.get("QZOO_NATIVE", "1") != "0"


def _load(device: str, module: str) -> _Status:
    if not _wanted():
        return _Status(False, "switched off by QZOO_NATIVE=0")
    if device == "cuda" and torch.version.cuda is None:
        return _Status(False, "this torch is built without CUDA")
    if importlib.util.find_spec(module) is None:
        how = "QZOO_BUILD_CUDA=1 " if device == "cuda" else ""
        return _Status(False, f"not built: `{how}pip install` with a compiler builds it")
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        return _Status(False, f"could not be loaded: {error}")
    return _Status(True, "loaded")


def is_loaded(device: str = "cpu") -> bool:
    """Check whether the native kernels of a device ("cpu" or "cuda") are loaded; otherwise the reference runs."""
    load()
    return device in _status and _status[device].loaded


def describe() -> dict[str, dict[str, str | bool]]:
    """Describe the kernels of each device: `loaded`, and the `reason` why they are or are not."""
    load()
    return {device: {"loaded": s.loaded, "reason": s.reason} for device, s in _status.items()}
