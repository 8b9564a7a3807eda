"""Where a network of one's own comes from: ``timm:NAME``, ``torchvision:NAME`` or ``FILE.py:FACTORY``.

A checkpoint names it, and is loaded without more only where it is an installed package's: code of a file runs when
its user names the file, and never because a checkpoint does.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qzoo.config import Arguments, Config, FloatSource
from qzoo.data.sets import label_set
from qzoo.errors import ArgumentError, CheckpointError, MissingDependencyError, shown
from qzoo.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from qzoo.registry import function_of_file, import_models
from qzoo.scheme import Scheme

_PACKAGES = ("timm", "torchvision")


def build_float(
    factory: str, pretrained: bool = False, arguments: Arguments | None = None, size: int | None = None
) -> nn.Module:
    """Build the float network that a factory names.

    Args:
        factory: ``"timm:resnet18"``, ``"torchvision:resnet18"``, or ``"net.py:make"``, a function without arguments.
        pretrained: with the package's own default weights, which it may download; a file's function decides itself.
        arguments: classes and channels of one with random weights; None for the package's default.
        size: of the images, for networks of timm that are built for one size.

    Returns:
        The module, in eval mode.

    Raises:
        ArgumentError: a factory of another form, or one that does not exist or gives no module.
        CheckpointError: weights that can't be downloaded.
        MissingDependencyError: the package is not installed.

    Example:
        >>> type(build_float("torchvision:resnet18")).__name__
        'ResNet'
    """
    where, name = _parts(factory)
    if where in _PACKAGES:
        model = _from_package(where, name, pretrained, arguments, size)
    else:
        model = _from_file(where, name)
    return _module_of(factory, model)


def _module_of(factory: str, network: Any) -> nn.Module:
    if not isinstance(network, nn.Module):
        raise ArgumentError(f"{factory} gives a {type(network).__name__}, not a torch.nn.Module")
    return network.eval()


def is_factory(text: str) -> bool:
    """Check whether a text has the form of a factory."""
    where, _, name = text.rpartition(":")
    return (where in _PACKAGES and bool(name)) or (where.endswith(".py") and name.isidentifier())


def _parts(factory: str) -> tuple[str, str]:
    """Package or file, and the name in it."""
    if not is_factory(factory):
        raise ArgumentError(
            f"{shown(factory)} names no network; expected timm:NAME, torchvision:NAME or FILE.py:FACTORY"
        )
    where, _, name = factory.rpartition(":")
    return where, name


def _from_file(path: str, name: str) -> Any:
    import_models(path)
    function = function_of_file(Path(path).name, name)
    if function is None:
        raise ArgumentError(f"{path} has no function {name!r} that makes the network")
    return function()


def _from_package(
    package: str, name: str, pretrained: bool, arguments: Arguments | None, size: int | None
) -> Any:
    try:
        module: Any = importlib.import_module(package)
    except ImportError as error:
        raise MissingDependencyError(f"{package}:{name} needs {package}: pip install {package}") from error
    known = module.list_models() if package == "timm" else module.models.list_models()
    if name.partition(".")[0] not in known:
        raise ArgumentError(f"{package} {module.__version__} has no network {shown(name)}")
    build = module.create_model if package == "timm" else module.models.get_model
    options: dict[str, Any] = {} if arguments is None else {"num_classes": arguments.num_classes}
    if package == "timm":
        options |= {"pretrained": pretrained} | (
            {} if arguments is None else {"in_chans": arguments.in_channels}
        )
        settings = module.get_pretrained_cfg(name)
        if size is not None and settings is not None and settings.fixed_input_size:
            options["img_size"] = size
    else:
        options["weights"] = "DEFAULT" if pretrained else None
        if not pretrained and name in ("googlenet", "inception_v3"):
            options["init_weights"] = False
    try:
        return build(name, **options)
    except OSError as error:  # of the download
        raise CheckpointError(f"{package}:{name}: its weights can't be had: {error}") from error


def preprocessing_of(model: nn.Module, size: int | tuple[int, int, int] | None = None) -> Preprocessing:
    """Choose the preprocessing: what a model of timm says, else ImageNet's; for images of another size or shape."""
    settings: Any = getattr(model, "pretrained_cfg", None)
    settings = settings if isinstance(settings, dict) else {}
    own = tuple(settings.get("input_size") or (3, 224, 224))
    size = own if size is None else (own[0], size, size) if isinstance(size, int) else size
    mean, std = tuple(settings.get("mean") or IMAGENET_MEAN), tuple(settings.get("std") or IMAGENET_STD)
    if len(mean) != size[0]:
        mean, std = (0.5,) * size[0], (0.5,) * size[0]
    interpolation = settings.get("interpolation")
    interpolation = interpolation if interpolation in ("bilinear", "bicubic") else "bilinear"
    crop = float(settings.get("crop_pct") or 0.875)
    return Preprocessing(size, crop if 0.1 <= crop <= 1 else 0.875, interpolation, mean, std)


def known_factory(model: nn.Module) -> str:
    """Find the factory that a model of timm names, ``"timm:NAME"``; "" for any other model."""
    settings: Any = getattr(model, "pretrained_cfg", None)
    if not isinstance(settings, dict) or not type(model).__module__.startswith("timm."):
        return ""
    name = settings.get("architecture")
    if not isinstance(name, str):
        return ""
    return f"timm:{name}.{settings['tag']}" if settings.get("tag") else f"timm:{name}"


def weights_digest(model: nn.Module) -> str:
    """Compute the SHA-256 of a float model's parameters and buffers, by name."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def factory_config(
    factory: str, model: nn.Module, scheme: Scheme, image: Tensor, result: Tensor, exclude: tuple[str, ...]
) -> Config:
    """Make the config of what :func:`qzoo.quantize` makes of a network, so that it can be saved.

    Args:
        factory: see :func:`build_float`; of a file, its path is left out.
        model: the float network.
        scheme: of the quantizers.
        image, result: what it was run on, [1, C, H, W], and what it gave, [1, classes, ...].
        exclude: patterns of the modules that stay in float.

    Raises:
        ArgumentError: a factory of another form, or a network of something else than images.
    """
    where, name = _parts(factory)
    if image.dim() != 4 or result.dim() < 2:
        raise ArgumentError(
            f"factory={factory!r}: a checkpoint is of a network from images [N, C, H, W] to [N, classes], not from "
            f"{list(image.shape)} to {list(result.shape)}"
        )
    channels, height, width = image.shape[1:]
    arch = re.sub("[^a-z0-9_]", "_", name.partition(".")[0].lower())
    tag = re.sub("[^a-z0-9_]", "_", Path(where).stem.lower())
    named = factory if where in _PACKAGES else f"{Path(where).name}:{name}"
    return Config(
        name=f"{arch}.{tag}-{scheme}",
        architecture=arch,
        arguments=Arguments(result.shape[1], channels),
        scheme=scheme,
        preprocessing=preprocessing_of(model, (channels, height, width)),
        labels=label_set(result.shape[1]),
        float_source=None if image.is_meta else FloatSource(named, "", weights_digest(model), ""),
        factory=named,
        exclude=exclude,
    )


def factory_float(config: Config, factory: str | None = None) -> nn.Module:
    """Build the float network that a quantized one was made from, with its weights: the reference of comparisons.

    Args:
        config: with a ``factory``.
        factory: where it is from; the config's by default, if that is no file.

    Raises:
        CheckpointError: the network is of a file that was not named, or its weights are others.
    """
    chosen = factory or config.factory
    model = _named(config) if factory is None else build_float(chosen, pretrained=True)
    named = "name a function that gives the float network with its weights, --float FILE.py:FACTORY"
    if model is None:
        try:
            model = build_float(chosen, True, size=config.preprocessing.input_size[1])
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {named}") from error
    if config.float_source is not None and weights_digest(model) != config.float_source.sha256:
        raise CheckpointError(f"{config.name} was made from other weights than {chosen} has; {named}")
    return model


def network_of(config: Config) -> nn.Module:
    """Build the float network of a config with a ``factory``, with random weights.

    Raises:
        CheckpointError: the network is of a file that was not named.
    """
    named = _named(config)
    if named is not None:
        return named
    return build_float(config.factory, False, config.arguments, config.preprocessing.input_size[1])


def _named(config: Config) -> nn.Module | None:
    """The network of a file that the user has named in this process; None for a package's."""
    file, name = _parts(config.factory)
    if file in _PACKAGES:
        return None
    function = function_of_file(file, name)
    if function is None:
        raise CheckpointError(
            f"{config.name} is of the network {config.factory}, code that a checkpoint does not run: name the file, "
            f"--import PATH/{file}, or pass the float network, load_pretrained(folder, model=network)"
        )
    return _module_of(config.factory, function())
