"""Load float weights: public ones, a float checkpoint's, or the user's own; with quantizers, or as the reference."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from qzoo.config import WEIGHTS, Arguments, Config, FloatSource, config_of, fresh, read_config
from qzoo.errors import CheckpointError
from qzoo.placement.factory import factory_float, is_factory
from qzoo.quantizers import quantizers
from qzoo.registry import FloatWeights, ModelEntry, architecture, parse_name
from qzoo.scheme import Scheme
from qzoo.zoo import hub
from qzoo.zoo.checkpoint import build, empty_model, load_pretrained
from qzoo.zoo.request import Request, new_config
from qzoo.zoo.sources import load_float_weights, named_tensors, read_state, under_own_names
from qzoo.zoo.tensors import assign_state, check_state


def load_weights(model: nn.Module, source: str | Path | Mapping[str, Tensor]) -> nn.Module:
    """Load float weights under qzoo's, torchvision's or timm's parameter names, all of them or none.

    Ranges of quantizers that the source does not have are forgotten: they were those of the old weights.

    Args:
        model: of the zoo, float or quantized (:func:`qzoo.create_model`); changed in place.
        source: a safetensors file, a ``.pth`` file (only tensors are read), or a state dict. It may lie in
            another dict as ``"state_dict"`` or ``"model"``. float16 and bfloat16 become what the model has.

    Returns:
        The model, in the mode that it was in.

    Raises:
        CheckpointError: the file can't be read; there are other things than named tensors; tensors are missing,
            unexpected, misshaped, of another type or not finite, which the message lists. The model stays as it was.
        TypeError: neither a state dict nor a path.

    Example:
        >>> weights = model.state_dict()  # or the path of a file
        >>> network = qzoo.load_weights(qzoo.resnet20(num_classes=10, in_channels=1, quantize=True), weights)
    """
    if not isinstance(source, (str, os.PathLike, Mapping)):
        raise TypeError(f"source must be a state dict, or a file of one, not a {type(source).__name__}")
    in_memory = isinstance(source, Mapping)
    where = "the state dict" if in_memory else str(source)
    state = named_tensors(source, where) if isinstance(source, Mapping) else read_state(Path(source))
    config = getattr(model, "qzoo_config", None)
    key_map = architecture(config.architecture).key_map if config is not None and not config.factory else None
    by_name = quantizers(model)
    ranges = {f"{name}.{end}" for name in by_name for end in ("_amax", "_limits")}
    weights = {key: value for key, value in state.items() if key not in ranges}
    own = {key: value for key, value in model.state_dict().items() if key not in ranges}
    weights = _widened(weights, {value.dtype for value in own.values()})
    try:
        weights = under_own_names(weights, own, key_map)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    weights |= {key: value for key, value in state.items() if key in ranges}
    checked = check_state(model, weights.items(), where, ranges_too=False)
    for quantizer in by_name.values():
        quantizer.reset_amax()
    model.load_state_dict(checked)
    return model


def _widened(state: Mapping[str, Tensor], dtypes: set[torch.dtype]) -> dict[str, Tensor]:
    """Convert float16 and bfloat16 to float32, which has all their values, where the model has none of them."""
    narrow = {torch.float16, torch.bfloat16} - dtypes
    return {key: value.float() if value.dtype in narrow else value for key, value in state.items()}


def load_float(asked: Request) -> nn.Module:
    """Load the float weights ``arch.tag``, with or without quantizers, and with a classifier of the size asked for."""
    if asked.float_name in hub.checkpoints():
        exact = load_pretrained(hub.named(asked.float_name))
        config = config_of(exact)
        asked.check_channels(config)
        if asked.scheme is None and asked.num_classes in (None, config.arguments.num_classes):
            return exact
        state = exact.state_dict()
        config = dataclasses.replace(
            fresh(config, str(asked.name)), scheme=asked.scheme, float_source=_source_of(config, asked.entry)
        )
    else:
        weights = asked.public_weights()
        config = asked.published_config()
        asked.check_channels(config)
        config, state = _load(config, weights)
    return filled(config, state, asked.num_classes)


def _load(config: Config, weights: FloatWeights) -> tuple[Config, dict[str, Tensor]]:
    """The config with the source that was found, and its tensors."""
    expected = empty_model(config, None).state_dict()
    name = dataclasses.replace(parse_name(config.name), scheme=None, qat=False)
    state, source = load_float_weights(weights, str(name), expected, architecture(name.arch).key_map)
    return dataclasses.replace(config, float_source=source), state


def filled(config: Config, state: dict[str, Tensor], num_classes: int | None = None) -> nn.Module:
    """Build the config's model with the float weights, in eval mode.

    Args:
        num_classes: another number of classes: what depends on it starts from random values, and nothing else. With 0
            the classifier's tensors are left out.
    """
    where = config.float_source.source if config.float_source else config.name
    model = empty_model(config, config.scheme)
    if num_classes not in (None, config.arguments.num_classes):
        shapes = {key: value.shape for key, value in model.state_dict().items()}
        arguments = Arguments(num_classes or 0, config.arguments.in_channels)
        model = build(dataclasses.replace(config, arguments=arguments, labels="", classes=()), config.scheme)
        new = model.state_dict()
        start = {key: value for key, value in new.items() if value.shape != shapes.get(key)}
        gone = shapes.keys() - new.keys()
        state = {**{key: value for key, value in state.items() if key not in gone}, **start}
    assign_state(model, state.items(), where)
    return model.eval()


def _source_of(config: Config, entry: ModelEntry) -> FloatSource:
    """A float checkpoint, as the place that others are made from."""
    weights = entry.weights.get(parse_name(config.name).tag or "")
    if weights is not None:
        return FloatSource(f"qzoo:{config.name}", "", config.files[WEIGHTS], weights.license)
    return FloatSource(f"folder:{config.name}", "", config.files[WEIGHTS], config.license)


def float_model(config: Config) -> nn.Module:
    """Load the float model that a quantized checkpoint was made from, in eval mode: the reference of comparisons.

    Raises:
        UnknownModelError: its float weights are not public, and in no store.
        HubError: they can't be had here; says from where, why, and what to do.
        CheckpointError: they are not those that the checkpoint was made from.
    """
    name = str(dataclasses.replace(parse_name(config.name), scheme=None, qat=False))
    made_from = config.float_source
    if made_from is None:
        return load_float(Request.parse(name, pretrained=True))
    kind, _, checkpoint = made_from.source.partition(":")
    if kind in ("qzoo", "folder"):
        return _float_checkpoint(config.name, made_from, checkpoint)
    asked = Request.parse(name, pretrained=True)
    origin, state = _load(asked.published_config(), asked.public_weights())
    source = origin.float_source
    if source is not None and source.source == made_from.source:  # other places have files of their own
        _check_same(config.name, made_from, source.sha256)
    return filled(origin, state)


def _float_checkpoint(name: str, made_from: FloatSource, checkpoint: str) -> nn.Module:
    """The float checkpoint that ``name`` was made from: of those that have its name, the one with its SHA-256."""
    for folder in hub.local_folders(checkpoint):
        if read_config(folder).files.get(WEIGHTS) == made_from.sha256:
            return load_pretrained(folder)
    if made_from.source.startswith("folder:"):
        raise CheckpointError(
            f"{name} was made from the float weights of a folder ({checkpoint}); name the folder with --float"
        )
    model = load_pretrained(hub.named(checkpoint))
    _check_same(name, made_from, config_of(model).files[WEIGHTS])
    return model


def _check_same(name: str, made_from: FloatSource, here: str) -> None:
    if here != made_from.sha256:
        raise CheckpointError(
            f"{name} was made from {made_from.source} with SHA-256 {made_from.sha256}, but here that is {here}"
        )


def quantized_from(
    name: str, float_weights: str | Path | None, scheme: Scheme
) -> tuple[nn.Module, nn.Module]:
    """Load the model ``name`` with quantizers, without ranges, on float weights; and the float model beside it.

    Args:
        name: ``arch.tag-scheme``.
        float_weights: a folder with a float checkpoint of the architecture; None: what the name's tag means.
        scheme: of the quantizers, and the target that is switched on.

    Raises:
        CheckpointError: the folder holds a quantized model, or another architecture.
        UnknownModelError, HubError: the name's weights can't be had.
    """
    if float_weights is None:
        model = load_float(Request.parse(name, "float", scheme))
        return model, float_model(config_of(model))
    exact = load_pretrained(float_weights)
    config = config_of(exact)
    _check(name, config, float_weights)
    source = FloatSource(f"folder:{config.name}", "", config.files[WEIGHTS], config.license)
    config = dataclasses.replace(fresh(config, name), scheme=scheme, float_source=source)
    model = empty_model(config, scheme)
    state = ((key, value.clone()) for key, value in exact.state_dict().items())
    assign_state(model, state, str(float_weights))
    return model.eval(), exact


def planned_config(name: str, float_weights: str | Path | None) -> Config:
    """Make the config of ``arch.tag-scheme`` before anything is built, for the images of the float weights.

    Raises:
        CheckpointError: the folder holds a quantized model, or another architecture.
    """
    if float_weights is None:
        return new_config(name)
    config, parsed = read_config(float_weights), parse_name(name)
    _check(name, config, float_weights)
    scheme = architecture(parsed.arch).scheme(parsed.scheme) if parsed.scheme else None
    return dataclasses.replace(fresh(config, name), scheme=scheme)


def reference_of(config: Config, float_weights: str | Path | None) -> nn.Module:
    """Load the float model that a quantized one is compared with.

    Args:
        float_weights: its folder, or the factory of a network of one's own (``"FILE.py:FUNCTION"``); None: the
            weights that the config names.

    Raises:
        CheckpointError: the folder's weights are not those that the model was made from.
        UnknownModelError, HubError: see :func:`float_model`.
    """
    source = config.float_source
    if config.factory and (float_weights is None or is_factory(str(float_weights))):
        return factory_float(config, None if float_weights is None else str(float_weights))
    if float_weights is None:
        return float_model(config)
    exact = load_pretrained(float_weights)
    _check(config.name, config_of(exact), float_weights)
    here = config_of(exact).files[WEIGHTS]
    if source is not None and source.source.startswith("folder:") and source.sha256 != here:
        raise CheckpointError(
            f"{config.name} was made from weights with SHA-256 {source.sha256}; those in {float_weights} have {here}"
        )
    return exact


def _check(name: str, config: Config, where: str | Path) -> None:
    if config.scheme is not None:
        raise CheckpointError(f"{where} holds the quantized {config.name}; give the folder of a float model")
    if config.architecture != parse_name(name).arch:
        raise CheckpointError(f"{where} holds {config.name}, whose architecture is not that of {name}")
