"""Run a model again from a point inside it: what finished before that point is taken from memory, not computed.

For studies that change one layer at a time. Calls of submodules are told apart by their place in the tree of calls,
so a module that is called several times (a shared ReLU) is no problem; only the outermost finished calls are kept.
What is taken from memory is a copy, because the code around may change it in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qzoo.placement.scope import passed_over
from qzoo.runtimes.pytorch import output_of

Key = tuple[tuple[int, int], ...]


class _Stop(Exception):
    """The layer to stop before has been reached."""


class Replay:
    """One input's run of a model, remembered up to a layer.

    Args:
        model: its forward must be a function of its input and state; randomness differs between runs.
        leaves: modules whose inside is not looked at, such as quantized layers.
    """

    def __init__(self, model: nn.Module, leaves: set[nn.Module]) -> None:
        self.model = model
        inside = {part for leaf in leaves for part in leaf.modules() if part is not leaf}
        self._modules = [m for m in model.modules() if m not in inside and m is not model]
        self._finished: dict[Key, Any] = {}
        self._stack: list[tuple[Key, dict[int, int]]] = []
        self._recording = False
        self._stop: nn.Module | None = None
        self._order: list[nn.Module] | None = None

    @contextmanager
    def attached(self) -> Iterator[Replay]:
        """Send calls of the model through this object in a ``with`` block; it starts with nothing remembered."""
        self._finished.clear()
        before = {m: m.__dict__.get("forward") for m in self._modules}
        for module in self._modules:
            module.forward = self._wrap(module, module.forward)  # type: ignore[method-assign]
        try:
            yield self
        finally:
            self._finished.clear()
            for module, own in before.items():
                del module.__dict__["forward"]
                if own is not None:
                    module.__dict__["forward"] = own

    def order(self, images: Tensor) -> list[nn.Module]:
        """List the modules in the order of their first call."""
        self._order = []
        try:
            self.run(images)
            return list(dict.fromkeys(self._order))
        finally:
            self._order = None

    def advance(self, images: Tensor, to: nn.Module) -> None:
        """Advance to just before the first call of ``to``, in the model's present state."""
        self._recording, self._stop = True, to
        try:
            self.run(images)
        except _Stop:
            pass
        finally:
            self._recording, self._stop = False, None

    def run(self, images: Tensor) -> Tensor:
        """Run the model from the remembered layer on."""
        self._stack = [((), {})]
        return output_of(self.model, images)

    def _wrap(self, module: nn.Module, forward: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            parent, counts = self._stack[-1]
            number = counts.get(id(module), 0)
            counts[id(module)] = number + 1
            key = (*parent, (id(module), number))
            if key in self._finished:
                passed_over(module)
                return _copy(self._finished[key])
            if module is self._stop:
                raise _Stop
            if self._order is not None:
                self._order.append(module)
            self._stack.append((key, {}))
            result = forward(*args, **kwargs)
            self._stack.pop()
            if self._recording:
                for other in [k for k in self._finished if k[: len(key)] == key]:
                    del self._finished[other]
                self._finished[key] = _copy(result)
            return result

        return call


def _copy(value: Any) -> Any:
    return tree_map(lambda part: part.clone() if isinstance(part, torch.Tensor) else part, value)
