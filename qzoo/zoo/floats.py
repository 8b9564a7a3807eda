"""Use float weights of the user's own: a checkpoint folder to quantize, to tune and to compare with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from qzoo.config import WEIGHTS, Config, FloatSource, config_of, fresh, read_config
from qzoo.errors import CheckpointError, UnknownModelError
from qzoo.quantizers import quantizers
from qzoo.registry import architecture, parse_name
from qzoo.scheme import Scheme
from qzoo.zoo.checkpoint import empty_model, load_pretrained
from qzoo.zoo.create import create_model, float_model, new_config
from qzoo.zoo.sources import read_state, under_own_names
from qzoo.zoo.tensors import assign_state, check_plain, checked_state


def load_weights(model: nn.Module, source: str | Path | Mapping[str, Tensor]) -> nn.Module:
    """Load float weights under qzoo's, torchvision's or timm's parameter names, all of them or none.

    Ranges of quantizers that the source does not have are forgotten: they were those of the old weights.

    Args:
        model: of the zoo, float or quantized (:func:`qzoo.create_model`); changed in place.
        source: a safetensors file, a ``.pth`` file (only tensors are read), or a state dict.

    Returns:
        The model, in the mode that it was in.

    Raises:
        CheckpointError: the file can't be read; tensors are missing, unexpected, misshaped or not finite, which the
            message lists. The model stays as it was.

    Example:
        >>> weights = model.state_dict()  # or the path of a file
        >>> network = qzoo.load_weights(qzoo.resnet20(num_classes=10, in_channels=1, quantize=True), weights)
    """
    given = isinstance(source, Mapping)
    where = "the state dict" if given else str(source)
    state = dict(source) if isinstance(source, Mapping) else read_state(Path(source))
    check_plain(state, where)
    config = getattr(model, "qzoo_config", None)
    key_map = architecture(config.architecture).key_map if config is not None and not config.factory else None
    found = quantizers(model)
    ranges = {f"{name}.{end}" for name in found for end in ("_amax", "_limits")}
    weights = {key: value for key, value in state.items() if key not in ranges}
    own = model.state_dict().keys() - ranges
    weights = under_own_names(weights, own, key_map)
    weights |= {key: value for key, value in state.items() if key in ranges}
    checked = checked_state(model, weights.items(), where, ranges_too=False)
    for quantizer in found.values():
        quantizer.reset_amax()
    model.load_state_dict(checked)
    return model


def open_model(where: str, target: str | None = None) -> nn.Module:
    """A model with its weights: of a checkpoint folder or Hub repository, or by name (:func:`qzoo.create_model`)."""
    if (Path(where) / "config.json").is_file() or "/" in where:
        return load_pretrained(where, target=target)
    try:
        return create_model(where, pretrained=True, target=target)
    except UnknownModelError as error:
        folder = (
            "the folder of that name has no config.json"
            if Path(where).is_dir()
            else f"nor is there a folder {where!r}"
        )
        raise UnknownModelError(f"{error} ({folder})") from error


def quantized_from(
    name: str, float_weights: str | Path | None, scheme: Scheme
) -> tuple[nn.Module, nn.Module]:
    """The model ``name`` with quantizers, without ranges, on float weights; and the float model beside it.

    Args:
        name: ``arch.tag-scheme``.
        float_weights: a folder with a float checkpoint of the architecture; None: what the name's tag means.
        scheme: of the quantizers, and the target that is switched on.

    Raises:
        CheckpointError: the folder holds a quantized model, or another architecture.
        UnknownModelError, HubError: the name's weights can't be had.
    """
    if float_weights is None:
        model = create_model(name, pretrained="float", quantize=scheme)
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
    """The config of ``arch.tag-scheme`` before anything is built; labels and images are those of the float weights.

    Raises:
        CheckpointError: the folder holds a quantized model, or another architecture.
    """
    if float_weights is None:
        return new_config(name)
    config, scheme = read_config(float_weights), parse_name(name).scheme
    _check(name, config, float_weights)
    return dataclasses.replace(fresh(config, name), scheme=Scheme.parse(scheme) if scheme else None)


def reference_of(config: Config, float_weights: str | Path | None) -> nn.Module:
    """The float model that a quantized one is compared with.

    Args:
        float_weights: its folder; None: the weights that the config names.

    Raises:
        CheckpointError: the folder's weights are not those that the model was made from.
        UnknownModelError, HubError: see :func:`qzoo.zoo.create.float_model`.
    """
    source = config.float_source
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
