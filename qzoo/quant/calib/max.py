"""``MaxCalibrator``: the range is the largest magnitude seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from qzoo.errors import ArgumentError, NonFiniteError
from qzoo.quant.calib.calibrator import _Calibrator
from qzoo.quant.descriptor import Axis, Bits
from qzoo.quant.ops.schema import require_tensor
from qzoo.quant.utils.reduce_amax import normalize_axes, reduce_amax

__all__ = ["MaxCalibrator"]


class MaxCalibrator(_Calibrator):
    """Calibrator that keeps the running maximum of ``|x|``.

    Args:
        num_bits, axis, unsigned: see :class:`_Calibrator`. With ``axis=1`` and ``[N, C, H, W]`` the range is
            ``[1, C, 1, 1]``; without an axis (or where one channel is all there is) it is 0-d.
        track_amax: also keep every batch's own maximum, see :attr:`amaxs`.
        two_ended: also keep the lowest and the highest value, see :meth:`compute_limits`; per tensor only.

    Example:
        >>> calibrator = MaxCalibrator(num_bits=8, axis=None, unsigned=False)
        >>> calibrator.collect(torch.tensor([-3.0, 2.0]))
        >>> calibrator.compute_amax()
        tensor(3.)
    """

    def __init__(
        self,
        num_bits: Bits,
        axis: Axis | list[int],
        unsigned: bool,
        track_amax: bool = False,
        two_ended: bool = False,
    ) -> None:
        super().__init__(num_bits, axis, unsigned, two_ended)
        if two_ended and axis is not None:
            raise ArgumentError(f"two ends of a range are kept per tensor only, not with axis={axis}")
        self._track_amax = track_amax
        self._ends: torch.Tensor | None = None  # [lowest, highest]
        self._amaxs: list[np.ndarray] = []
        self._calib_amax: torch.Tensor | None = None

    @property
    def amaxs(self) -> list[np.ndarray]:
        """Each batch's own maximum; empty without ``track_amax``."""
        return self._amaxs

    @torch.no_grad()
    def collect(self, x: torch.Tensor) -> None:
        """Take the maximum of one batch; an empty batch changes nothing.

        Raises:
            NonFiniteError: NaN or infinity in ``x``.
            RuntimeError: "amax shape changed!", when the range has another shape than before.
        """
        require_tensor(x, "the calibration data")
        if not x.numel():
            return
        local = self._reduce(x.detach())
        if not torch.isfinite(local).all():
            raise NonFiniteError(f"NaN or infinity in the calibration data, shape {tuple(x.shape)}")
        if self._track_amax:
            self._amaxs.append(np.array(local.cpu().numpy(), copy=True))
        self._fold(local)
        if self._two_ended:
            self._fold_ends(torch.stack(x.detach().aminmax()).float())

    def merge(self, other: MaxCalibrator) -> None:
        """Merge what another calibrator has seen, as if this one had seen it."""
        if other._calib_amax is not None:
            self._fold(other._calib_amax.clone())
        if other._ends is not None:
            self._fold_ends(other._ends)
        self._amaxs.extend(other._amaxs)

    def reset(self) -> None:
        """Forget the maximum and the list of maxima."""
        self._calib_amax = None
        self._ends = None
        self._amaxs = []

    def compute_amax(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """Get the running maximum, float32, or None before data. Arguments of other calibrators are ignored."""
        return self._calib_amax

    def compute_limits(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """Return the lowest and the highest value, float32 ``[2]``, or None before data (or without ``two_ended``)."""
        return self._ends

    def _fold_ends(self, local: torch.Tensor) -> None:
        seen = local if self._ends is None else self._ends
        local = local.to(seen.device)
        self._ends = torch.stack([torch.minimum(seen[0], local[0]), torch.maximum(seen[1], local[1])])

    def _reduce(self, x: torch.Tensor) -> torch.Tensor:
        if self._axis is None:
            return reduce_amax(x).float()
        axes = normalize_axes(self._axis, x.dim())
        return reduce_amax(x, [d for d in range(x.dim()) if d not in axes]).float()

    def _fold(self, local: torch.Tensor) -> None:
        seen = self._calib_amax
        if seen is None:
            self._calib_amax = local
            return
        if seen.shape != local.shape:
            raise RuntimeError(
                f"amax shape changed! From {tuple(seen.shape)} to {tuple(local.shape)}; "
                "an axis that varies between batches can't keep ranges of its own"
            )
        # A new tensor: the old one may have been handed out.
        self._calib_amax = torch.maximum(seen, local.to(seen.device))

    def __str__(self) -> str:
        return f"MaxCalibrator(track_amax={self._track_amax})"

    def _body(self) -> str:
        own = f"calib_amax={self._calib_amax} track_amax={self._track_amax} amaxs={self._amaxs}"
        return f"{super()._body()} {own}"
