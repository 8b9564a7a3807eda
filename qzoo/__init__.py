"""A zoo of pre-quantized vision models.

Names are resolved on first use, so that importing the package costs next to nothing. ``qzoo.resnet50`` and
every other architecture is a function, see :func:`qzoo.create_model`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qzoo.benchmark import benchmark
    from qzoo.build import build
    from qzoo.calibrate import calibrate
    from qzoo.checkpoint import load_pretrained, save_pretrained
    from qzoo.deploy import deploy
    from qzoo.evaluate import evaluate
    from qzoo.export.onnx import export_onnx
    from qzoo.hub_mixin import HubMixin
    from qzoo.inspection import inspect
    from qzoo.legacy import load_calibrated
    from qzoo.publish import publish
    from qzoo.scheme import Scheme, set_target
    from qzoo.sensitivity import sensitivity
    from qzoo.train import train
    from qzoo.upload import push_to_hub
    from qzoo.verify import verify
    from qzoo.zoo import create_model, list_models

__version__ = "0.1.0"

__all__ = [
    "create_model",
    "list_models",
    "load_pretrained",
    "save_pretrained",
    "load_calibrated",
    "calibrate",
    "evaluate",
    "train",
    "export_onnx",
    "deploy",
    "benchmark",
    "sensitivity",
    "inspect",
    "build",
    "publish",
    "push_to_hub",
    "HubMixin",
    "verify",
    "Scheme",
    "set_target",
    "__version__",
]

_MODULE_OF = {
    "create_model": "qzoo.zoo",
    "list_models": "qzoo.zoo",
    "load_pretrained": "qzoo.checkpoint",
    "save_pretrained": "qzoo.checkpoint",
    "load_calibrated": "qzoo.legacy",
    "calibrate": "qzoo.calibrate",
    "evaluate": "qzoo.evaluate",
    "train": "qzoo.train",
    "export_onnx": "qzoo.export.onnx",
    "deploy": "qzoo.deploy",
    "benchmark": "qzoo.benchmark",
    "sensitivity": "qzoo.sensitivity",
    "inspect": "qzoo.inspection",
    "build": "qzoo.build",
    "publish": "qzoo.publish",
    "push_to_hub": "qzoo.upload",
    "HubMixin": "qzoo.hub_mixin",
    "verify": "qzoo.verify",
    "Scheme": "qzoo.scheme",
    "set_target": "qzoo.scheme",
}
_SUBMODULES = (
    "models",
    "quant",
    "export",
    "data",
    "ptq",
    "qat",
    "runtimes",
    "registry",
    "config",
    "distributed",
)


class _Package(ModuleType):
    """The package's own class, for names that are a function and a submodule both, such as ``qzoo.train``.

    Importing a submodule binds it to its package. Where a function has the name, the binding is dropped:
    ``qzoo.train`` is the function, whatever was imported before; ``from qzoo.train import TrainOptions``
    still finds the module.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in _MODULE_OF):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    elif name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    elif name.startswith("_"):
        raise AttributeError(f"module 'qzoo' has no attribute {name!r}")
    else:
        value = _architecture(name)
    globals()[name] = value
    return value


def _architecture(name: str) -> Any:
    from qzoo.registry import list_architectures, suggest

    known = list_architectures()
    if name not in known:
        raise AttributeError(f"module 'qzoo' has no attribute {name!r}{suggest(name, [*known, *__all__])}")
    from qzoo.zoo import entry_point

    return entry_point(name)


def __dir__() -> list[str]:
    from qzoo.registry import list_architectures

    return sorted({*globals(), *__all__, *list_architectures()})
