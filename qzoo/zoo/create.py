"""Create a model by its name, with or without weights: ``qzoo.create_model``, and the list of names."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch import nn

from qzoo.config import WEIGHTS, read_config
from qzoo.errors import UnknownModelError
from qzoo.registry import architecture, list_architectures, natural_key
from qzoo.scheme import DEFAULT_TARGET, Scheme, with_target
from qzoo.zoo import hub
from qzoo.zoo.checkpoint import build, load_pretrained
from qzoo.zoo.floats import load_float
from qzoo.zoo.request import Request
from qzoo.zoo.sources import known_digests


def create_model(
    name: str,
    pretrained: bool | Literal["float"] = False,
    quantize: bool | str | Scheme | None = None,
    *,
    target: str | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
    calibrate: Literal["auto", "never"] | None = None,
) -> nn.Module:
    """Build a model by name, with or without weights.

    Args:
        name: ``arch``, ``arch.tag`` or ``arch.tag-scheme``: ``"resnet50"``, ``"resnet50.tv_in1k"``,
            ``"resnet50.tv_in1k-w8a8"``. Without a tag the architecture's first one is meant.
        pretrained: False gives random weights. True gives the float weights, or for a quantized model its
            calibrated checkpoint; where none is published, one is made of the float weights, see ``calibrate``.
            ``"float"`` puts the float weights into a quantized model, to calibrate.
        quantize: True (W8A8), a text such as ``"w4a8"``, or a Scheme; what the name says by default. A checkpoint
            must have all the bits of a Scheme, also those that its name does not tell.
        target: the runtime that quantizers simulate; the Scheme's by default, else the one that the
            checkpoint was made for, else "onnxruntime".
        num_classes: of a model with random weights; with float weights a classifier of another size is new, with
            random weights. By default what the tag's data have; 0 is an image encoder without a classifier.
        in_channels: of a model with random weights; by default what the tag's data have.
        calibrate: ``"auto"`` calibrates the float weights without data where no checkpoint is published, says so in a
            warning and keeps the result in a cache (``QZOO_HOME``); ``"never"`` raises UnknownModelError there. By
            default what the environment variable ``QZOO_CALIBRATE`` says, else "auto".

    Returns:
        The module with its :class:`~qzoo.config.Config` as ``qzoo_config``; in eval mode when pretrained.

    Raises:
        UnknownModelError: no such architecture, tag, or checkpoint (with near names, and how to build it).
        HubError, CheckpointError: the weights can't be had, are not what they should be, or have other sizes or bits.
        ArgumentError: arguments that make no sense, or contradict each other.

    Example:
        >>> model = qzoo.create_model("resnet20.fmnist-w8a8", pretrained=True)
        >>> body = qzoo.create_model("resnet20.fmnist", pretrained=True, num_classes=5)  # to fine-tune
    """
    asked = Request.parse(name, pretrained, quantize, target, num_classes, in_channels, calibrate)
    if not pretrained:
        return build(asked.config(), asked.scheme)
    if asked.scheme is None or pretrained == "float":
        return load_float(asked)
    if asked.is_to_calibrate:
        return _calibrate(asked, asked.scheme)
    return load_pretrained(asked.checkpoint(), target=asked.target)


def _calibrate(asked: Request, scheme: Scheme) -> nn.Module:
    """The quantized model, calibrated without data on this machine: now, or when it was first asked for."""
    # late: with it comes all of qzoo.ptq
    from qzoo.zoo.calibrated import load_calibrated, recipe_without_data

    if asked.float_name in hub.checkpoints():
        known = [read_config(hub.named(asked.float_name)).files[WEIGHTS]]
    else:
        known = known_digests(asked.public_weights())
    # one checkpoint for all targets
    start = dataclasses.replace(asked, scheme=with_target(scheme, DEFAULT_TARGET))
    config = start.published_config()
    asked.check_sizes(config)
    recipe = recipe_without_data(asked.entry.family.defaults, scheme)
    return load_calibrated(config, recipe, known, lambda: load_float(start), asked.target)


def open_model(where: str, target: str | None = None) -> nn.Module:
    """Open a model with its weights: a checkpoint folder's, a Hub repository's, or by name (:func:`create_model`)."""
    if (Path(where) / "config.json").is_file() or "/" in where:
        return load_pretrained(where, target=target)
    try:
        return create_model(where, pretrained=True, target=target)
    except UnknownModelError as error:
        folder = (
            "the folder of that name has no config.json"
            if Path(where).is_dir()
            else f"there is no folder {where!r}, either"
        )
        raise UnknownModelError(f"{error} ({folder})") from error


def list_models(pattern: str = "*", pretrained: bool = False) -> list[str]:
    """List the models that :func:`create_model` knows: architectures, or with ``pretrained`` all that has weights.

    Args:
        pattern: shell pattern, matched against the whole name and against its architecture; an alias of the
            architecture counts as its name.
        pretrained: list ``arch.tag`` (float weights) and ``arch.tag-scheme`` (calibrated checkpoints), of the user's
            store too, instead.

    Returns:
        The names, architecture by architecture.

    Example:
        >>> qzoo.list_models("resnet3*")
        ['resnet32', 'resnet34']
        >>> qzoo.list_models("resnet20.fmnist-w*", pretrained=True)
        ['resnet20.fmnist-w2a2_qat', 'resnet20.fmnist-w3a3_qat', 'resnet20.fmnist-w4a4_qat', 'resnet20.fmnist-w8a8']
    """
    if not pretrained:
        return list_architectures(pattern)
    known = hub.checkpoints()
    names = set(known)
    aliases = {arch: architecture(arch).aliases for arch in list_architectures()}
    for arch in aliases:
        for tag, weights in architecture(arch).weights.items():
            if any(not s.startswith("qzoo:") or s.removeprefix("qzoo:") in known for s in weights.sources):
                names.add(f"{arch}.{tag}")
    matching = list_architectures(pattern)

    def is_chosen(name: str) -> bool:
        arch, dot, rest = name.partition(".")
        spellings = [name, *(f"{alias}{dot}{rest}" for alias in aliases.get(arch, ()))]
        return arch in matching or bool(fnmatch.filter(spellings, pattern))

    return sorted(filter(is_chosen, names), key=natural_key)


def entry_point(arch: str) -> Callable[..., nn.Module]:
    """Make the function ``qzoo.<arch>``: :func:`create_model` with the architecture filled in.

    Raises:
        UnknownModelError: no such architecture.
    """

    def build(*args: Any, **options: Any) -> nn.Module:
        return create_model(arch, *args, **options)

    summary = (architecture(arch).build.__doc__ or arch).partition("\n")[0]
    read_description = (create_model.__doc__ or "").partition("    Example:")[0].rstrip()
    _, first, rest = read_description.partition("        pretrained:")  # after the name
    build.__name__ = build.__qualname__ = arch
    build.__module__ = "qzoo"
    build.__signature__ = inspect.signature(functools.partial(create_model, arch))  # type: ignore[attr-defined]
    build.__doc__ = f"{summary}\n\n    Args:\n{first}{rest}\n    "
    return build
