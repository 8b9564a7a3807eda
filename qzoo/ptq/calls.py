"""Watch one forward pass: which modules ran, in which order, on which tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qzoo.quant.fold import attach
from qzoo.runtimes.pytorch import run


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes:
        reads, gives: which tensor its first argument and its result are; equal numbers are the same tensor.
    """

    module: nn.Module
    reads: int
    gives: int


def calls_of(model: nn.Module, example: Tensor, modules: Iterable[nn.Module]) -> list[Call]:
    """Record the calls of ``modules`` while ``model`` runs on ``example``, in the order in which they end.

    A module that works in place gives the tensor that it reads.
    """
    calls: list[Call] = []
    keep: list[Any] = []  # a freed tensor's id could be another's

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        keep.extend((args, output))
        calls.append(Call(module, id(args[0]) if args else 0, id(output)))

    with attach([module.register_forward_hook(hook) for module in modules]):
        run(model, example)
    return calls
