"""``load_calibrated``: state dicts that the old toolkit (pytorch-quantization) calibrated, into the zoo's models."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from qzoo.errors import CheckpointError
from qzoo.quant.nn import TensorQuantizer
from qzoo.quantizers import quantizers, switch_target, weight_quantizers
from qzoo.scheme import TARGETS
from qzoo.zoo.sources import named_tensors, read_state
from qzoo.zoo.tensors import assign_state, check_ranges, listed

logger = logging.getLogger(__name__)

# Where the old toolkit replaced a pooling layer, its quantizer sat inside; here it is the model's own.
_RENAMED = {"avgpool._input_quantizer": "pool_quantizer"}
_OPTIONAL = {"residual", "branch", "pool", "output"}
"""Roles of which the old toolkit's files may have no ranges at all; every layer needs those of its input and weight."""


def load_calibrated(model: nn.Module, source: str | Path | Mapping[str, Tensor]) -> nn.Module:
    """Load weights and ranges of the old toolkit, such as ``quant_resnet50-calibrated.pth`` of its examples.

    The model computes what it did in the old toolkit, which placed quantizers much as the target "tensorrt" does. The
    quantizers of other roles have no ranges in the file: they stay off and empty, which a warning says, and are an
    error when a target is chosen that needs them. Where the file's placement differs from that target's (no quantizers
    at the skips of adds, one before the average pooling), the file's counts, also for the export: these quantizers lose
    their role, so that no target switches them.

    Args:
        model: of :func:`qzoo.create_model` with ``quantize``; changed in place.
        source: a ``.pth`` (only tensors are read) or safetensors file, or a state dict. A prefix ``module.``
            that data-parallel training left is dropped.

    Returns:
        The model, in eval mode.

    Raises:
        CheckpointError: the file can't be read; keys are missing, unexpected or misshaped; a quantizer that is
            on has no range, or one that is negative or not finite.

    Example:
        >>> saved = model.state_dict()  # or the path of a .pth file
        >>> network = qzoo.resnet20(num_classes=10, in_channels=1, quantize=True)
        >>> model = qzoo.load_calibrated(network, saved)
    """
    where = "the state dict" if isinstance(source, Mapping) else str(source)
    state = named_tensors(source, where) if isinstance(source, Mapping) else read_state(Path(source))
    if not any(key.endswith("_amax") for key in state):
        raise CheckpointError(f"{where} has no ranges (keys that end in _amax): it was not calibrated")
    own = quantizers(model)
    if not own:
        raise CheckpointError(
            f"{where} has ranges, but {type(model).__name__} no quantizers; build the model with quantize=True"
        )
    renamed = _rename(state)
    assign_state(model, [(name, _reshape(name, value, own)) for name, value in renamed.items()], where)
    moved = {new for old, new in _RENAMED.items() if any(_of(old, key) for key in state)}
    _place_as_in(renamed, moved, model, where)
    check_ranges(model, enabled_only=True)
    return model.eval()


def _of(module: str, key: str) -> bool:
    return key.removeprefix("module.").startswith(f"{module}.")


def _place_as_in(state: Mapping[str, Tensor], moved: set[str], model: nn.Module, where: str) -> None:
    """Switch the quantizers as the old toolkit had them, where the file lacks roles and so is one of its files.

    Args:
        state: with the model's names.
        moved: quantizers that the file has inside of a pooling layer, which is on there.
    """
    own = quantizers(model)
    held = {quantizer.role for name, quantizer in own.items() if f"{name}._amax" in state}
    absent = {name: q for name, q in own.items() if q.role in _OPTIONAL - held}
    if not absent:
        return
    switch_target(model, "tensorrt")
    for name, quantizer in own.items():
        if name in moved:
            quantizer.enable()
            quantizer.role = ""
        elif name in absent and quantizer.role in TARGETS["tensorrt"].roles:
            quantizer.disable()
            quantizer.role = ""
    for weight, quantizer in weight_quantizers(model).values():
        if quantizer.narrow_range and quantizer.amax is not None and quantizer.block is None:
            # The old toolkit's integers reach -128, which counts where a weight lies beyond its range.
            lowest = (weight.detach() * (quantizer.maxbound / quantizer.amax)).min()
            quantizer.narrow_range = not lowest < -quantizer.maxbound - 0.5
    logger.warning(
        "%s has no ranges for %d quantizers, which stay off: %s; other targets than tensorrt and save_pretrained need "
        "them: calibrate a new model with these weights for that",
        where,
        len(absent),
        listed(list(absent)),
    )


def _rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {}
    for key, value in state.items():
        name = key.removeprefix("module.")
        for old, new in _RENAMED.items():
            if name.startswith(f"{old}."):
                name = new + name.removeprefix(old)
        names[name] = value
    return names


def _reshape(key: str, value: Tensor, own: Mapping[str, TensorQuantizer]) -> Tensor:
    """A range per tensor is 0-d here, whatever number of ones its shape had."""
    name, _, last = key.rpartition(".")
    if last == "_amax" and name in own and own[name].axis is None and value.numel() == 1:
        return value.reshape(())
    return value
