"""Where a network of one's own comes from: ``timm:NAME``, ``torchvision:NAME`` or ``FILE.py:FACTORY``.

A checkpoint names it, and is loaded without more only where it is an installed package's: code of a file runs when
its user names the file, and never because a checkpoint does.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qzoo.config import Arguments, Config
from qzoo.errors import ArgumentError, CheckpointError, MissingDependencyError, shown
from qzoo.placement.model import quantize
from qzoo.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from qzoo.registry import import_models
from qzoo.scheme import Scheme

_PACKAGES = ("timm", "torchvision")


def build_float(factory: str, pretrained: bool = False, num_classes: int | None = None) -> nn.Module:
    """Build the float network that a factory names.

    Args:
        factory: ``"timm:resnet18"``, ``"torchvision:resnet18"``, or ``"net.py:make"``, a function without arguments.
        pretrained: with the package's own default weights, which it may download; a file's function decides itself.
        num_classes: None for the package's default.

    Returns:
        The module, in eval mode.

    Raises:
        ArgumentError: a factory of another form, or one that does not exist or gives no module.
        MissingDependencyError: the package is not installed.

    Example:
        >>> type(build_float("torchvision:resnet18")).__name__
        'ResNet'
    """
    where, _, name = factory.rpartition(":")
    if where.endswith(".py") and name.isidentifier():
        model = _from_file(where, name)
    elif where in _PACKAGES and name:
        model = _from_package(where, name, pretrained, num_classes)
    else:
        raise ArgumentError(
            f"{shown(factory)} names no network; expected timm:NAME, torchvision:NAME or FILE.py:FACTORY"
        )
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{factory} gives a {type(model).__name__}, not a torch.nn.Module")
    return model.eval()


def _from_file(path: str, name: str) -> Any:
    import_models(path)
    function = getattr(importlib.import_module(Path(path).stem), name, None)
    if not callable(function):
        raise ArgumentError(f"{path} has no function {name!r} that makes the network")
    return function()


def _from_package(package: str, name: str, pretrained: bool, num_classes: int | None) -> Any:
    try:
        module: Any = importlib.import_module(package)
    except ImportError as error:
        raise MissingDependencyError(f"{package}:{name} needs {package}: pip install {package}") from error
    known = module.list_models() if package == "timm" else module.models.list_models()
    if name.partition(".")[0] not in known:
        raise ArgumentError(f"{package} {module.__version__} has no network {shown(name)}")
    classes = {} if num_classes is None else {"num_classes": num_classes}
    if package == "timm":
        return module.create_model(name, pretrained=pretrained, **classes)
    if pretrained:
        return module.models.get_model(
            name, weights="DEFAULT", **({} if num_classes in (None, 1000) else classes)
        )
    quiet = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return module.models.get_model(name, weights=None, **quiet, **classes)


def preprocessing_of(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> Preprocessing:
    """Return the preprocessing that a model of timm says, else ImageNet's; for images of ``input_size``."""
    told: Any = getattr(model, "pretrained_cfg", None)
    told = told if isinstance(told, dict) else {}
    size = input_size or tuple(told.get("input_size") or (3, 224, 224))
    mean, std = tuple(told.get("mean") or IMAGENET_MEAN), tuple(told.get("std") or IMAGENET_STD)
    if len(mean) != size[0]:
        mean, std = (0.5,) * size[0], (0.5,) * size[0]
    interpolation = told.get("interpolation")
    interpolation = interpolation if interpolation in ("bilinear", "bicubic") else "bilinear"
    crop = float(told.get("crop_pct") or 0.875)
    return Preprocessing(size, crop if 0.1 <= crop <= 1 else 0.875, interpolation, mean, std)


def quantize_factory(
    factory: str,
    scheme: str | Scheme = "w8a8",
    target: str | None = None,
    *,
    size: int | None = None,
    pretrained: bool = True,
    exclude: tuple[str, ...] = (),
) -> nn.Module:
    """Quantize the network that a factory names: build it, place quantizers, and note in a config where it is from.

    Args:
        factory, pretrained: see :func:`build_float`.
        scheme, target, exclude: see :func:`qzoo.quantize`.
        size: of the images; by default what timm says of the network, else 224.

    Returns:
        The quantized model, to be calibrated, with its config as ``qzoo_config``.

    Raises:
        see :func:`build_float` and :func:`qzoo.quantize`.

    Example:
        >>> model = quantize_factory("torchvision:squeezenet1_1", size=64, pretrained=False)
        >>> model.qzoo_config.name
        'squeezenet1_1.torchvision-w8a8'
    """
    model = build_float(factory, pretrained)
    preprocessing = preprocessing_of(model)
    if size is not None:
        preprocessing = preprocessing_of(model, (preprocessing.input_size[0], size, size))
    example = torch.zeros(1, *preprocessing.input_size)
    with torch.no_grad():
        classes = model(example).shape[1]
    made = quantize(model, example, scheme, target, exclude=exclude)
    made.qzoo_config = _config(factory, made, preprocessing, classes, exclude)  # type: ignore[assignment]
    return made


def _config(
    factory: str, made: Any, preprocessing: Preprocessing, classes: int, exclude: tuple[str, ...]
) -> Config:
    where, _, name = factory.rpartition(":")
    arch = re.sub("[^a-z0-9_]", "_", name.partition(".")[0].lower())
    tag = re.sub("[^a-z0-9_]", "_", Path(where).stem.lower())
    scheme: Scheme = made.qzoo_scheme
    return Config(
        name=f"{arch}.{tag}-{scheme}",
        architecture=arch,
        arguments=Arguments(classes, preprocessing.input_size[0]),
        scheme=scheme,
        preprocessing=preprocessing,
        labels="imagenet-1k" if classes == 1000 else "folders",
        factory=factory if where in _PACKAGES else f"{Path(where).name}:{name}",
        exclude=exclude,
    )


def rebuild(config: Config, scheme: Scheme | None, model: nn.Module | None = None) -> nn.Module:
    """Build the quantized network of a config, with random weights.

    Args:
        config: with a ``factory``.
        scheme: with the target that it is to simulate; None for the float network.
        model: the float network, as a checkpoint whose network is of a file needs it.

    Raises:
        CheckpointError: the network is of a file, and no model is given.
    """
    if model is None:
        if config.factory.partition(":")[0] not in _PACKAGES:
            raise CheckpointError(
                f"{config.name} is of the network {config.factory}, code that a checkpoint does not run: build the "
                "float network yourself, and pass it, load_pretrained(folder, model=network)"
            )
        model = build_float(config.factory, num_classes=config.arguments.num_classes)
    if scheme is None:
        return model
    return quantize(model, torch.zeros(1, *config.preprocessing.input_size), scheme, exclude=config.exclude)
