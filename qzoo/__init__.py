"""A zoo of pre-quantized vision models.

Names are resolved on first use, so that importing the package costs next to nothing. ``qzoo.resnet50`` and
every other architecture is a function, see :func:`qzoo.create_model`.

Examples in docstrings take ``import qzoo, torch`` as given, and what a reader has at hand: a calibrated
``model``, such as ``qzoo.create_model("resnet20.fmnist-w8a8", pretrained=True)``, preprocessed ``images`` for it, a
``loader`` of such images with their labels (:func:`qzoo.data.load_data`), and the files ``photo.jpg`` and
``model.onnx``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qzoo.version import __version__ as __version__

if TYPE_CHECKING:
    from qzoo.accuracy import compare_features, evaluate
    from qzoo.analysis.inspect import inspect
    from qzoo.analysis.sensitivity import sensitivity
    from qzoo.bench.run import benchmark
    from qzoo.deployment import deploy
    from qzoo.export.lint import lint
    from qzoo.export.onnx import export_onnx
    from qzoo.hub_mixin import HubMixin
    from qzoo.pipeline.build import build
    from qzoo.placement.model import quantize
    from qzoo.prediction import predict
    from qzoo.ptq.ranges import calibrate
    from qzoo.quantizers import set_target
    from qzoo.release.publish import publish
    from qzoo.release.upload import push_to_hub
    from qzoo.release.verify import verify
    from qzoo.scheme import Scheme
    from qzoo.training.loop import train
    from qzoo.zoo.checkpoint import load_pretrained, save_pretrained
    from qzoo.zoo.create import create_model, list_models
    from qzoo.zoo.floats import load_weights
    from qzoo.zoo.legacy import load_calibrated

__all__ = [
    "create_model",
    "list_models",
    "load_pretrained",
    "load_weights",
    "save_pretrained",
    "quantize",
    "load_calibrated",
    "calibrate",
    "evaluate",
    "compare_features",
    "train",
    "export_onnx",
    "lint",
    "deploy",
    "predict",
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
    "create_model": "qzoo.zoo.create",
    "list_models": "qzoo.zoo.create",
    "load_pretrained": "qzoo.zoo.checkpoint",
    "load_weights": "qzoo.zoo.floats",
    "save_pretrained": "qzoo.zoo.checkpoint",
    "quantize": "qzoo.placement.model",
    "load_calibrated": "qzoo.zoo.legacy",
    "calibrate": "qzoo.ptq.ranges",
    "evaluate": "qzoo.accuracy",
    "compare_features": "qzoo.accuracy",
    "train": "qzoo.training.loop",
    "export_onnx": "qzoo.export.onnx",
    "lint": "qzoo.export.lint",
    "deploy": "qzoo.deployment",
    "predict": "qzoo.prediction",
    "benchmark": "qzoo.bench.run",
    "sensitivity": "qzoo.analysis.sensitivity",
    "inspect": "qzoo.analysis.inspect",
    "build": "qzoo.pipeline.build",
    "publish": "qzoo.release.publish",
    "push_to_hub": "qzoo.release.upload",
    "HubMixin": "qzoo.hub_mixin",
    "verify": "qzoo.release.verify",
    "Scheme": "qzoo.scheme",
    "set_target": "qzoo.quantizers",
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
    from qzoo.registry import known_names, suggest

    known = known_names()
    if name not in known:
        raise AttributeError(f"module 'qzoo' has no attribute {name!r}{suggest(name, [*known, *__all__])}")
    from qzoo.zoo.create import entry_point

    return entry_point(name)


def __dir__() -> list[str]:
    from qzoo.registry import list_architectures

    return sorted({*__all__, *_SUBMODULES, *list_architectures()})
