"""The operator library `qzoo`: how an operator is declared, and the arithmetic its reference shares.

Every operator is declared once, here in Python: schema, reference implementation (plain torch, any device),
fake kernel (shapes only) and, where it has one, the gradient. The native libraries only add faster kernels
for single devices, so nothing depends on them being there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qzoo.quant.ops.numbers import TINY, bounds

_DISPATCH_KEY = "CompositeExplicitAutograd"  # every device that has no kernel of its own

references: dict[str, Callable[..., Any]] = {}
"""The reference implementation of every operator, by name: what the native kernels are tested against."""


def declare(
    name: str, signature: str, reference: Callable[..., Any], fake: Callable[..., Any]
) -> torch._ops.OpOverload:
    """Declare operator `qzoo::name` and return the callable that dispatches it."""
    qualified = f"qzoo::{name}"
    torch.library.define(qualified, signature, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, _DISPATCH_KEY, reference)
    torch.library.register_fake(qualified, fake)
    references[name] = reference
    overload: torch._ops.OpOverload = getattr(torch.ops.qzoo, name).default
    return overload


def compute_dtype(x: Tensor) -> torch.dtype:
    """The precision the arithmetic runs in: float64 stays, everything else is computed in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def levels(amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`(scale, lowest, highest)` for a range, all of the shape of `amax`.

    A range that is too small to divide by, or a format without a positive level, keeps only the level 0: both
    limits become 0 and the scale 1, so that no infinity appears and a NaN in the input still comes through.
    """
    low, high = bounds(num_bits, unsigned, narrow_range)
    amax = amax.to(torch.float32)
    usable = ~(amax <= TINY) if high > 0 else torch.zeros_like(amax, dtype=torch.bool)
    scale = torch.where(usable, divide(high, amax), 1.0)
    return scale, usable * float(low), usable * float(high)


def divide(numerator: float, amax: Tensor) -> Tensor:
    """`numerator / amax`, rounded once: torch makes a reciprocal and a product of a number over a tensor."""
    return torch.full_like(amax, numerator).div_(amax)


def is_plain(x: Tensor) -> bool:
    """Whether `x` is an ordinary eager tensor: nothing records the operators that are applied to it."""
    # is_compiling comes first: a compiler that traces this function stops here and never sees the rest
    return not torch.compiler.is_compiling() and type(x) in _PLAIN and torch._C._get_tracing_state() is None


_PLAIN = (Tensor, torch.nn.Parameter)
