"""The base of all calibrators."""

from __future__ import annotations

from typing import Any

import torch

from qzoo.quant.descriptor import Axis, Bits


class _Calibrator:
    """Collects statistics of tensors and computes a range from them.

    Args:
        num_bits: bits of the quantizer, an int or ``(4, 3)``.
        axis: the axes that keep a range of their own.
        unsigned: whether the quantizer is unsigned.
        two_ended: whether it keeps both ends of the range, see ``compute_limits``.
    """

    def __init__(
        self, num_bits: Bits, axis: Axis | list[int], unsigned: bool, two_ended: bool = False
    ) -> None:
        self._num_bits = num_bits
        self._axis = axis
        self._unsigned = unsigned
        self._two_ended = two_ended

    @property
    def num_bits(self) -> Bits:
        """Bits of the quantizer."""
        return self._num_bits

    @property
    def axis(self) -> Axis | list[int]:
        """The axes that keep a range of their own."""
        return self._axis

    @property
    def unsigned(self) -> bool:
        """Whether the quantizer is unsigned."""
        return self._unsigned

    @unsigned.setter
    def unsigned(self, value: bool) -> None:
        self._unsigned = value

    @property
    def two_ended(self) -> bool:
        """Whether it keeps both ends of the range."""
        return self._two_ended

    def collect(self, x: torch.Tensor) -> None:
        """Take the statistics of one batch."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget everything collected."""
        raise NotImplementedError

    def compute_amax(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """Compute the range, float32; None before any data."""
        raise NotImplementedError

    def _body(self) -> str:
        return f"num_bits={self._num_bits} axis={self._axis} unsigned={self._unsigned}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._body()})"
