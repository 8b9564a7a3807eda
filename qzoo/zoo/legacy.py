"""``load_calibrated``: state dicts that the old toolkit (pytorch-quantization) calibrated, into the zoo's models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from qzoo.errors import CheckpointError
from qzoo.quant.nn import TensorQuantizer
from qzoo.zoo.sources import read_state
from qzoo.zoo.tensors import assign_state, check_ranges, quantizers

# Where the old toolkit replaced a pooling layer, its quantizer sat inside; here it is the model's own.
_RENAMED = {"avgpool._input_quantizer": "pool_quantizer"}


def load_calibrated(model: nn.Module, source: str | Path | Mapping[str, Tensor]) -> nn.Module:
    """Load weights and ranges, such as ``quant_resnet50-calibrated.pth`` of the old toolkit's examples.

    That toolkit placed quantizers as the target "tensorrt" does: the ranges of the quantizers that only other
    targets use are not in the file. They stay empty, and are an error when such a target is chosen.

    Args:
        model: of :func:`qzoo.create_model` with ``quantize``; changed in place.
        source: a ``.pth`` (only tensors are read) or safetensors file, or a state dict. A prefix ``module.``
            that data-parallel training left is dropped.

    Returns:
        The model, in eval mode.

    Raises:
        CheckpointError: the file can't be read; keys are missing, unexpected or misshaped; a quantizer that is
            on has no range, or one that is negative or not finite.
    """
    state = dict(source) if isinstance(source, Mapping) else read_state(Path(source))
    where = "the state dict" if isinstance(source, Mapping) else str(source)
    if not any(key.endswith("_amax") for key in state):
        raise CheckpointError(f"{where} has no ranges (keys that end in _amax): it was not calibrated")
    own = quantizers(model)
    if not own:
        raise CheckpointError(
            f"{where} has ranges, but {type(model).__name__} no quantizers; build the model with quantize=True"
        )
    assign_state(model, [(name, _shaped(name, value, own)) for name, value in _renamed(state).items()], where)
    check_ranges(model, enabled_only=True)
    return model.eval()


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {}
    for key, value in state.items():
        name = key.removeprefix("module.")
        for old, new in _RENAMED.items():
            if name.startswith(f"{old}."):
                name = new + name.removeprefix(old)
        names[name] = value
    return names


def _shaped(key: str, value: Tensor, own: Mapping[str, TensorQuantizer]) -> Tensor:
    """A range per tensor is 0-d here, whatever number of ones its shape had."""
    name, _, last = key.rpartition(".")
    if last == "_amax" and name in own and own[name].axis is None and value.numel() == 1:
        return value.reshape(())
    return value
