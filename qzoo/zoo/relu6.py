"""ReLU6 as a plain ReLU: scaling channels needs it (:mod:`qzoo.ptq.equalize`), and a checkpoint's config records it."""

from __future__ import annotations

import dataclasses

from torch import nn

from qzoo.config import Config


def replace_relu6(model: nn.Module) -> int:
    """Put a ReLU in place of every ReLU6; returns how many there were. The model's config, if any, says so."""
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if isinstance(child, nn.ReLU6)
    ]
    for parent, name, child in places:
        parent._modules[name] = nn.ReLU(child.inplace)
    config = getattr(model, "qzoo_config", None)
    if places and isinstance(config, Config):
        model.qzoo_config = dataclasses.replace(config, plain_relu=True)  # type: ignore[assignment]
    return len(places)
