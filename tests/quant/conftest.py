"""Operators by each of their implementations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qzoo.quant.ops.schema import references

BACKENDS = ["reference", "dispatched", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(params=BACKENDS)
def run(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`run(name, *args)`: an operator by its reference, by what the dispatcher takes here, or on the GPU."""

    def call(name: str, *args: Any) -> Any:
        if request.param == "reference":
            return references[name](*args)
        if request.param == "cuda":
            args = tuple(a.cuda() if isinstance(a, Tensor) else a for a in args)
            found = getattr(torch.ops.qzoo, name)(*args)
            return tuple(y.cpu() for y in found) if isinstance(found, tuple) else found.cpu()
        return getattr(torch.ops.qzoo, name)(*args)

    return call
