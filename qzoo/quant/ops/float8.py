"""Fake quantization to the 8-bit floating-point formats E4M3 and E5M2 (OCP FP8:
https://arxiv.org/abs/2209.05433).

    scale = limit / amax            limit = 448 (E4M3) or 57344 (E5M2); scale = 1 without a range
    y     = fp8(x * scale) / scale  round to nearest, ties to even, saturating

All arithmetic is in float32, whatever the type of `x`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qzoo.errors import QuantizationError
from qzoo.quant.ops.integer import check_broadcast, fake_quantize_backward, trim
from qzoo.quant.ops.numbers import FP8_LIMIT, TINY
from qzoo.quant.ops.schema import REAL, divide, is_plain, require_real, require_tensor
from qzoo.quant.ops.straight_through import declare_fake_quantization

_STORAGE = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def _fake_quantize_fp8(x: Tensor, amax: Tensor | None, e5m2: bool) -> Tensor:
    fmt = "e5m2" if e5m2 else "e4m3"
    limit = FP8_LIMIT[fmt]
    scale = torch.ones((), device=x.device)
    usable = torch.ones((), dtype=torch.bool, device=x.device)
    if amax is not None:
        amax = trim(x, amax).to(torch.float32)
        usable = ~(amax <= TINY)
        scale = torch.where(usable, divide(limit, amax), 1.0)
    wide = x.to(torch.float32)
    top = usable * limit
    # torch's own conversion turns what is too large into NaN or infinity; the formats saturate here
    y = torch.mul(wide, scale).clamp_(-top, top).to(_STORAGE[fmt]).to(torch.float32).div_(scale)
    return torch.empty_like(x).copy_(y.masked_fill_(wide.abs() < TINY, 0.0))


def _kept(x: Tensor, amax: Tensor | None, e5m2: bool) -> tuple[Tensor, Tensor]:
    if amax is not None:
        return x, amax
    return x, torch.full((), FP8_LIMIT["e5m2" if e5m2 else "e4m3"], dtype=torch.float32, device=x.device)


_fp8_op, _eager = declare_fake_quantization(
    "fake_quantize_fp8",
    "(Tensor x, Tensor? amax, bool e5m2) -> Tensor",
    _fake_quantize_fp8,
    fake_quantize_backward,
    _kept,
)


def fake_quantize_fp8(x: Tensor, amax: Tensor | None = None, fmt: str = "e4m3") -> Tensor:
    """Round `x` to an 8-bit floating-point format and return it in its own type and memory format.

    Args:
        x: floating-point tensor.
        amax: the value that maps to the format's largest; broadcasts to `x`. None: no scaling.
        fmt: "e4m3" or "e5m2".

    Magnitudes below `2**-24`, and everything in a range at or below it, become 0. NaN stays NaN. The gradient
    passes where `|x| <= amax`, or within the format's limit without a range.

    Raises:
        QuantizationError: unknown format, or `amax` does not broadcast to `x`.
    """
    if fmt not in FP8_LIMIT:
        raise QuantizationError(
            f"fmt={fmt!r} is not an 8-bit floating-point format: use one of {list(FP8_LIMIT)}"
        )
    e5m2 = fmt == "e5m2"
    if not is_plain(x):
        require_tensor(x, "the input")
        return _fp8_op(x, amax, e5m2)
    if x.dtype not in REAL:
        require_real(x, "the input")
    if amax is not None:
        if not isinstance(amax, Tensor):
            require_tensor(amax, "amax")
        check_broadcast(x, amax)
        amax = amax.detach()
    return _eager(x, amax, e5m2)
