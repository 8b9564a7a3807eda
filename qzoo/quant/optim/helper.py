"""Choosing parameters by name, and quantizing weights in place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from qzoo.quant.calib.weights import quantized_weights

__all__ = ["freeze_parameters", "group_parameters", "match_parameters", "quant_weight_inplace"]


def match_parameters(model: nn.Module, patterns: Iterable[str]) -> Iterator[nn.Parameter]:
    """The parameters whose name a pattern finds (``re.search``); one that two patterns find comes twice."""
    for name, parameter in model.named_parameters():
        for pattern in patterns:
            if re.search(pattern, name):
                yield parameter


def group_parameters(
    model: nn.Module,
    patterns_list: Sequence[list[str]],
    lrs: Sequence[float] | None = None,
    momentums: Sequence[float] | None = None,
    weight_decays: Sequence[float] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, one for each list of patterns.

    Returns:
        Dicts with ``params`` and, where given, ``lr``, ``momentum``, ``weight_decay``.

    Raises:
        TypeError: ``patterns_list`` isn't a list of lists, or a length differs from it.
    """
    for patterns in patterns_list:
        if not isinstance(patterns, list):
            raise TypeError(
                f"patterns_list must be list of list of patterns, found {type(patterns).__name__}"
            )
    options = {"lr": lrs, "momentum": momentums, "weight_decay": weight_decays}
    for key, values in options.items():
        if values is not None and len(values) != len(patterns_list):
            raise TypeError(
                f"the number of {key} values ({len(values)}) must match patterns_list ({len(patterns_list)})"
            )
    groups = []
    for index, patterns in enumerate(patterns_list):
        group: dict[str, Any] = {"params": list(match_parameters(model, patterns))}
        group.update({key: values[index] for key, values in options.items() if values is not None})
        groups.append(group)
    return groups


def freeze_parameters(model: nn.Module, patterns: Iterable[str]) -> None:
    """``requires_grad = False`` for the parameters that a pattern finds."""
    for parameter in match_parameters(model, list(patterns)):
        parameter.requires_grad = False


@torch.no_grad()
def quant_weight_inplace(model: nn.Module) -> None:
    """Replace the weight of every quantized module by its quantized value; recurrent layers included."""
    for module in model.modules():
        own = getattr(module, "quantize_weights_", None)
        if own is not None:
            own()
            continue
        for weight, quantizer in quantized_weights(module):
            weight.copy_(quantizer(weight))
