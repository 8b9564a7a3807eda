"""``create_model``: a name to a module. Registry, float weights and checkpoints come together here."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable
from typing import Literal

from torch import nn

from qzoo.config import WEIGHTS, Arguments, Config, config_of
from qzoo.data.sets import DATA_SETS
from qzoo.errors import ArgumentError, CheckpointError, UnknownModelError
from qzoo.preprocessing import Preprocessing
from qzoo.quantizers import set_layer_bits
from qzoo.registry import (
    FloatWeights,
    ModelEntry,
    ModelName,
    architecture,
    list_architectures,
    natural_key,
    parse_name,
    suggest,
)
from qzoo.scheme import Scheme, as_scheme, target_named, with_target
from qzoo.zoo import hub
from qzoo.zoo.checkpoint import empty_model, load_pretrained
from qzoo.zoo.sources import load_float_weights
from qzoo.zoo.tensors import assign_state, name_quantizers

CLASSES = {name: known.classes for name, known in DATA_SETS.items() if known.classes is not None}

Pretrained = bool | Literal["float"]
Quantize = bool | str | Scheme | None


def create_model(
    name: str,
    pretrained: Pretrained = False,
    quantize: Quantize = None,
    *,
    target: str | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
) -> nn.Module:
    """Build a model by name, with or without weights.

    Args:
        name: ``arch``, ``arch.tag`` or ``arch.tag-scheme``: ``"resnet50"``, ``"resnet50.tv_in1k"``,
            ``"resnet50.tv_in1k-w8a8"``. Without a tag the architecture's first one is meant.
        pretrained: False gives random weights. True gives the float weights, or for a quantized model its
            calibrated checkpoint. ``"float"`` puts the float weights into a quantized model, to calibrate.
        quantize: True (W8A8), a text such as ``"w4a8"``, or a Scheme; what the name says by default.
        target: the runtime that quantizers simulate; the Scheme's by default, else the one that the
            checkpoint was tuned for, else "tensorrt".
        num_classes, in_channels: of a model with random weights; by default what the tag's data have.

    Returns:
        The module with its :class:`~qzoo.config.Config` as ``qzoo_config``; in eval mode when pretrained.

    Raises:
        UnknownModelError: no such architecture, tag, or checkpoint (with near names, and how to build it).
        HubError, CheckpointError: the weights can't be had, or are not what they should be.
        ValueError: arguments that contradict each other.
    """
    if pretrained not in (True, False, "float"):
        raise ArgumentError(f"pretrained must be True, False or 'float', not {pretrained!r}")
    if "/" in name:
        raise UnknownModelError(
            f"{name!r} is no name of the zoo; qzoo.load_pretrained loads folders and repositories of the Hub"
        )
    parsed = parse_name(name)
    entry = architecture(parsed.arch)
    _check_tag(parsed, entry)
    scheme = _scheme(parsed, quantize, target)
    if pretrained:
        parsed = dataclasses.replace(parsed, tag=parsed.tag or entry.default_tag)
    parsed = dataclasses.replace(parsed, scheme=str(scheme) if scheme else None)
    is_checkpoint = scheme is not None or str(parsed) in hub.checkpoints()
    if pretrained is True and is_checkpoint:
        asked = quantize.target if isinstance(quantize, Scheme) else None
        model = load_pretrained(hub.named(_checkpoint_name(parsed)), target=target or asked)
        _check_arguments(config_of(model), num_classes, in_channels)
        return model
    config = _new_config(parsed, entry, scheme, num_classes, in_channels)
    if not pretrained:
        model = entry.build(**dataclasses.asdict(config.arguments), quantize=scheme)
        if scheme is not None:
            set_layer_bits(model, scheme)
        name_quantizers(model)
        model.qzoo_config = config  # type: ignore[assignment]
        return model
    weights = _float_weights(parsed, entry)
    _check_arguments(_new_config(parsed, entry, scheme, None, None), num_classes, in_channels)
    model = empty_model(config, scheme)
    state, source = load_float_weights(weights, f"{parsed.arch}.{parsed.tag}", model.state_dict().keys())
    assign_state(model, state.items(), source.source)
    model.qzoo_config = dataclasses.replace(config, float_source=source)  # type: ignore[assignment]
    return model.eval()


def list_models(pattern: str = "*", pretrained: bool = False) -> list[str]:
    """Names that :func:`create_model` knows: architectures, or with ``pretrained`` all that has weights.

    Args:
        pattern: shell pattern, matched against the whole name and against its architecture.
        pretrained: list ``arch.tag`` (float weights) and ``arch.tag-scheme`` (calibrated checkpoints)
        instead.
    """
    if not pretrained:
        return list_architectures(pattern)
    known = hub.checkpoints()
    names = set(known)
    for arch in list_architectures():
        for tag, weights in architecture(arch).weights.items():
            if any(not s.startswith("qzoo:") or s.removeprefix("qzoo:") in known for s in weights.sources):
                names.add(f"{arch}.{tag}")
    chosen = [
        n for n in names if fnmatch.fnmatch(n, pattern) or fnmatch.fnmatch(n.partition(".")[0], pattern)
    ]
    return sorted(chosen, key=natural_key)


def float_model(config: Config) -> nn.Module:
    """The float model that a quantized checkpoint was made from, in eval mode: the reference of comparisons.

    Raises:
        UnknownModelError: its float weights are not public.
        HubError: they can't be had here; says from where, why, and what to do.
        CheckpointError: they are not those that the checkpoint was made from.
    """
    parsed = parse_name(config.name)
    model = create_model(f"{parsed.arch}.{parsed.tag}" if parsed.tag else parsed.arch, pretrained=True)
    made_from, found = config.float_source, config_of(model)
    if made_from is None:
        return model
    if made_from.source == f"qzoo:{found.name}":
        here = found.files[WEIGHTS]
    elif found.float_source is not None and found.float_source.source == made_from.source:
        here = found.float_source.sha256
    else:  # another place that holds the same weights, with a file of its own
        return model
    if here != made_from.sha256:
        raise CheckpointError(
            f"{config.name} was made from {made_from.source} with SHA-256 {made_from.sha256}, but here "
            f"that is {here}"
        )
    return model


def entry_point(arch: str) -> Callable[..., nn.Module]:
    """The function ``qzoo.<arch>``: :func:`create_model` with the architecture filled in.

    Raises:
        UnknownModelError: no such architecture.
    """
    summary = (architecture(arch).build.__doc__ or arch).partition("\n")[0]

    def build(
        pretrained: Pretrained = False,
        quantize: Quantize = None,
        *,
        target: str | None = None,
        num_classes: int | None = None,
        in_channels: int | None = None,
    ) -> nn.Module:
        return create_model(
            arch,
            pretrained=pretrained,
            quantize=quantize,
            target=target,
            num_classes=num_classes,
            in_channels=in_channels,
        )

    build.__name__ = build.__qualname__ = arch
    build.__doc__ = f"{summary}\n\nArguments as in :func:`qzoo.create_model`."
    return build


def new_config(name: str) -> Config:
    """The config of ``arch.tag-scheme`` before anything is built."""
    parsed = parse_name(name)
    return _new_config(parsed, architecture(parsed.arch), _scheme(parsed, None, None), None, None)


# ---- what a name means ----


def _check_tag(parsed: ModelName, entry: ModelEntry) -> None:
    if parsed.tag is None or parsed.tag in entry.weights:
        return
    if any(name.startswith(f"{parsed.arch}.{parsed.tag}") for name in hub.checkpoints()):
        return
    tags = ", ".join(entry.weights) or "none"
    raise UnknownModelError(
        f"{parsed.arch} has no weights with tag {parsed.tag!r} (tags: {tags})"
        f"{suggest(parsed.tag, entry.weights)}"
    )


def _scheme(parsed: ModelName, quantize: Quantize, target: str | None) -> Scheme | None:
    """The scheme that name and arguments agree on, for the target."""
    asked = as_scheme(quantize)
    if parsed.scheme is not None:
        named = Scheme.parse(parsed.scheme, asked.target if asked else "tensorrt")
        if quantize is False or (quantize not in (None, True) and str(asked) != str(named)):
            raise ArgumentError(
                f"quantize={quantize!r} contradicts the name {str(parsed)!r}; give one of them"
            )
        asked = asked if isinstance(quantize, Scheme) else named  # a Scheme may say more than its name
    if target is not None:
        target_named(target)
        asked = with_target(asked, target) if asked else None
    return asked


def _checkpoint_name(parsed: ModelName) -> str:
    """The checkpoint's full name; one that exists.

    Raises:
        UnknownModelError: none of that name.
    """
    known = hub.checkpoints()
    if parsed.tag is None:  # an architecture without public float weights may still have a checkpoint
        same = [
            n for n in known if parse_name(n).arch == parsed.arch and parse_name(n).scheme == parsed.scheme
        ]
        return same[0] if same else _raise_unknown(str(parsed))
    return str(parsed) if str(parsed) in known else _raise_unknown(str(parsed))


def _raise_unknown(name: str) -> str:
    raise UnknownModelError(hub.missing_checkpoint(name))


def _float_weights(parsed: ModelName, entry: ModelEntry) -> FloatWeights:
    if parsed.tag is None or parsed.tag not in entry.weights:
        raise UnknownModelError(
            f"{parsed.arch} has no public float weights; `qzoo train {parsed.arch}` makes some, or build it "
            "with pretrained=False and load your own state dict"
        )
    return entry.weights[parsed.tag]


def _new_config(
    parsed: ModelName,
    entry: ModelEntry,
    scheme: Scheme | None,
    num_classes: int | None,
    in_channels: int | None,
) -> Config:
    """The config of a model that is no checkpoint yet."""
    weights = entry.weights.get(parsed.tag) if parsed.tag else None
    defaults = entry.build.__kwdefaults__ or {}
    channels = in_channels or (weights.preprocessing.input_size[0] if weights else defaults["in_channels"])
    classes = num_classes or (CLASSES.get(weights.labels) if weights else None) or defaults["num_classes"]
    hint = weights or next(iter(entry.weights.values()), None)
    if hint is not None and hint.preprocessing.input_size[0] == channels:
        preprocessing = hint.preprocessing
    else:  # nobody said: the size of the architecture's own data, scaled to -1..1
        size = hint.preprocessing.input_size[1:] if hint else (32, 32)
        preprocessing = Preprocessing(
            (channels, *size), 1.0, "bilinear", (0.5,) * channels, (0.5,) * channels
        )
    same_classes = hint is not None and CLASSES.get(hint.labels) == classes and weights is not None
    return Config(
        name=str(parsed),
        architecture=entry.name,
        arguments=Arguments(classes, channels),
        scheme=scheme,
        preprocessing=preprocessing,
        labels=hint.labels if same_classes and hint else "",
    )


def _check_arguments(config: Config, num_classes: int | None, in_channels: int | None) -> None:
    for field, asked in (("num_classes", num_classes), ("in_channels", in_channels)):
        has = getattr(config.arguments, field)
        if asked is not None and asked != has:
            raise CheckpointError(
                f"{field}={asked}, but the weights {config.name} have {field}={has}; leave it out, or build with "
                "pretrained=False and load the layers that fit with load_state_dict(..., strict=False)"
            )
