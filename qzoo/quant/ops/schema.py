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

from qzoo.errors import QuantizationError
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


REAL = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))


def require_tensor(x: Any, what: str) -> None:
    """Check that an argument is a tensor; stand-ins of tracers pass.

    Raises:
        QuantizationError: a number, a list or an array; the message says how to convert it.
    """
    if not isinstance(x, Tensor) and not hasattr(x, "__torch_function__"):
        cure = "torch.from_numpy" if type(x).__name__ == "ndarray" else "torch.tensor"
        raise QuantizationError(
            f"{what} must be a torch tensor, not {type(x).__name__}; convert it with {cure}()"
        )


def require_real(x: Any, what: str) -> None:
    """Check that an argument is a tensor that the kernels take: float32, float64, float16 or bfloat16.

    Raises:
        QuantizationError: something else; the message says how to convert it.
    """
    require_tensor(x, what)
    if x.dtype not in REAL:
        kinds = "float32, float64, float16 or bfloat16"
        raise QuantizationError(f"{what} must be {kinds}, not {x.dtype}; convert it with .float()")


def require_bits(num_bits: Any, unsigned: bool) -> None:
    """Check that the kernels have an integer format of these bits.

    Raises:
        QuantizationError: no whole number, or too large a one.
    """
    most = 30 if unsigned else 31
    if not isinstance(num_bits, int) or not 0 <= num_bits <= most:
        raise QuantizationError(f"num_bits must be a whole number from 0 to {most}, not {num_bits!r}")


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the precision the arithmetic runs in: float64 stays, everything else is computed in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def levels(amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(scale, lowest, highest)` for a range, all of the shape of `amax`.

    A range that is too small to divide by, or a format without a positive level, keeps only the level 0: both
    limits become 0 and the scale 1, so that no infinity appears and a NaN in the input still comes through.
    """
    low, high = bounds(num_bits, unsigned, narrow_range)
    amax = amax.to(torch.float32)
    usable = ~(amax <= TINY) if high > 0 else torch.zeros_like(amax, dtype=torch.bool)
    scale = torch.where(usable, divide(high, amax), 1.0)
    return scale, usable * float(low), usable * float(high)


def divide(numerator: float, amax: Tensor) -> Tensor:
    """Return `numerator / amax`, rounded once: torch makes a reciprocal and a product of a number over a tensor."""
    return torch.full_like(amax, numerator).div_(amax)


def is_plain(x: Tensor) -> bool:
    """Check whether `x` is an ordinary eager tensor: nothing records the operators that are applied to it."""
    # is_compiling comes first: a compiler that traces this function stops here and never sees the rest
    return not torch.compiler.is_compiling() and type(x) in _PLAIN and torch._C._get_tracing_state() is None


_PLAIN = (Tensor, torch.nn.Parameter)
