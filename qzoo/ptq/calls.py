"""Watch one forward pass: which modules ran, in which order, on which tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qzoo.quant.fold import RESHAPES, attach
from qzoo.runtimes.pytorch import run


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes:
        reads, gives: which tensor its first argument and its result are; equal numbers are the same tensor. The matrix
            that a linear layer's result is flattened to, as before LeViT's BatchNorms, is the same tensor here.
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
    rows = _Rows()

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        keep.extend((args, output))
        read = id(args[0]) if args else 0
        calls.append(Call(module, rows.source.get(read, read), id(output)))
        if isinstance(module, nn.Linear):
            rows.source[id(output)] = id(output)

    with attach([module.register_forward_hook(hook) for module in modules]), rows:
        run(model, example)
    return calls


class _Rows(TorchFunctionMode):
    """Notes the matrices that results of linear layers are flattened to."""

    def __init__(self) -> None:
        super().__init__()
        self.source: dict[int, int] = {}
        self._keep: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = func in RESHAPES and args and id(args[0]) in self.source
        if known and result.dim() == 2 and result.shape[-1] == args[0].shape[-1]:
            self.source[id(result)] = self.source[id(args[0])]
            self._keep.append(result)
        return result
