"""Choose parameters by name, and quantize weights in place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from qzoo.quant.calib.weights import quantized_weights

__all__ = ["freeze_parameters", "group_parameters", "match_parameters", "quant_weight_inplace"]


def match_parameters(model: nn.Module, patterns: Iterable[str]) -> Iterator[nn.Parameter]:
    """Find the parameters whose name matches one of some patterns (``re.search``).

    Args:
        model: any module.
        patterns: regular expressions; a parameter that two of them find comes twice.

    Returns:
        An iterator over the parameters.

    Example:
        >>> sum(1 for parameter in match_parameters(model, [r"conv1.weight$"]))
        10
    """
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
    """Group the parameters of a model for an optimizer, one group for each list of patterns.

    Args:
        model: any module.
        patterns_list: a list of regular expressions for each group.
        lrs, momentums, weight_decays: values of each group.

    Returns:
        Dicts with ``params`` and, where given, ``lr``, ``momentum``, ``weight_decay``.

    Raises:
        TypeError: ``patterns_list`` isn't a list of lists, or a length differs from it.

    Example:
        >>> groups = group_parameters(model, [["weight"], ["bias"]], lrs=[0.1, 0.01])
        >>> [group["lr"] for group in groups]
        [0.1, 0.01]
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
    """Freeze the parameters whose name matches a pattern: ``requires_grad = False``.

    Args:
        model: any module.
        patterns: regular expressions, see :func:`match_parameters`.

    Example:
        >>> freeze_parameters(model, ["^conv1"])
        >>> model.conv1.weight.requires_grad
        False
    """
    for parameter in match_parameters(model, list(patterns)):
        parameter.requires_grad = False


@torch.no_grad()
def quant_weight_inplace(model: nn.Module) -> None:
    """Quantize the weights of a model in place: each gets its quantizer's values; recurrent layers included.

    Args:
        model: calibrated.

    Example:
        >>> quant_weight_inplace(model)
    """
    for module in model.modules():
        own = getattr(module, "quantize_weights_", None)
        if own is not None:
            own()
            continue
        for weight, quantizer in quantized_weights(module):
            weight.copy_(quantizer(weight))
