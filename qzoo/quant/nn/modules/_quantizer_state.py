"""What a quantizer holds: its settings and its ranges, and how they are set, loaded and moved."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from qzoo.errors import ArgumentError
from qzoo.quant.descriptor import FLOAT_FORMATS, Axis, Bits
from qzoo.quant.nn.modules.clip import Clip
from qzoo.quant.ops.affine import affine_parameters
from qzoo.quant.ops.numbers import FP8_LIMIT, bounds

logger = logging.getLogger(__name__)

_RANGE_BUFFERS = ("_amax", "_limits", "_pre_quant_scale")


class Switches(NamedTuple):
    """Which stages of a quantizer are on; all of them count only where it is not disabled."""

    disabled: bool
    quant: bool
    clip: bool
    calib: bool

    @property
    def quantizes(self) -> bool:
        """Whether values are rounded."""
        return self.quant and not self.disabled


class Range(NamedTuple):
    """Range of a quantizer: the largest magnitude and, where it is two-ended, both ends.

    Attributes:
        amax: float32, 0-d or broadcastable to what is quantized.
        limits: ``[low, high]`` in float32, or None.

    Example:
        >>> from qzoo.quant import QuantDescriptor
        >>> quantizer = TensorQuantizer(QuantDescriptor(affine=True))
        >>> quantizer.set_range(*Range(torch.tensor(3.0), torch.tensor([-0.3, 3.0])))
        >>> quantizer.zero_point
        23
    """

    amax: torch.Tensor
    limits: torch.Tensor | None = None


class QuantizerState(nn.Module):
    """The settings and ranges of a :class:`TensorQuantizer`, which is its only subclass.

    A range is a float32 buffer that exists only once it is known.
    """

    clip: Clip
    role: str
    group: str
    name: str
    owner = (
        ""  # what it belongs to, where its name is not known, such as "the input quantizer of a QuantConv2d"
    )
    _num_bits: Bits
    _axis: Axis
    _block: tuple[int, int] | None
    _unsigned: bool
    _narrow_range: bool
    _affine: bool
    _two_ended: bool
    _fake_quant: bool
    _learn_amax: bool
    _scale: Any
    _disabled: bool
    _if_quant: bool
    _if_clip: bool
    _if_calib: bool
    _calibrator: Any
    _checked: tuple[int, int] | None

    # Properties

    @property
    def num_bits(self) -> Bits:
        """Integer bits, or ``(4, 3)`` / ``(5, 2)`` for floating point."""
        return self._num_bits

    @num_bits.setter
    def num_bits(self, value: Bits) -> None:
        self._num_bits = value

    @property
    def unsigned(self) -> bool:
        """Whether only non-negative values are represented."""
        return self._unsigned

    @unsigned.setter
    def unsigned(self, value: bool) -> None:
        self._unsigned = value

    @property
    def narrow_range(self) -> bool:
        """Whether the lowest signed integer is left out."""
        return self._narrow_range

    @narrow_range.setter
    def narrow_range(self, value: bool) -> None:
        self._narrow_range = value

    @property
    def two_ended(self) -> bool:
        """Whether it keeps both ends of its range, ``limits``, beside ``amax``; ``affine`` says which count."""
        return self._two_ended

    @two_ended.setter
    def two_ended(self, value: bool) -> None:
        if value != self._two_ended:
            self._two_ended = value
            self._affine = self._affine and value
            self._buffers.pop("_limits", None)
            self._calibrator = self._new_calibrator()

    def _new_calibrator(self) -> Any:
        raise NotImplementedError

    @property
    def affine(self) -> bool:
        """Whether it quantizes between its ``limits``, with a zero point; else symmetrically, with ``amax``."""
        return self._affine

    @affine.setter
    def affine(self, value: bool) -> None:
        if value and not self.two_ended:
            raise ArgumentError(
                f"{self._place()} has a range of one number; make it with QuantDescriptor(affine=True)"
            )
        self._affine = value

    @property
    def axis(self) -> Axis:
        """The axes that keep a range of their own."""
        return self._axis

    @property
    def block(self) -> tuple[int, int] | None:
        """Axis and size of the groups that share a range."""
        return self._block

    @property
    def fake_quant(self) -> bool:
        """False when the integers themselves are returned."""
        return self._fake_quant

    @property
    def amax(self) -> torch.Tensor | None:
        """The range, float32, or None. A float, list, array or tensor assigned to it is copied."""
        return self._buffers.get("_amax")

    @amax.setter
    def amax(self, value: Any) -> None:
        if value is None:
            logger.error("Setting amax of %s to None does nothing; use reset_amax()", self._place())
            return
        self._set_buffer("_amax", value, "amax")

    @property
    def limits(self) -> torch.Tensor | None:
        """Both ends of the range, ``[low, high]`` in float32, or None. What is assigned to it is copied."""
        return self._buffers.get("_limits")

    @limits.setter
    def limits(self, value: Any) -> None:
        if value is None:
            logger.error("Setting limits of %s to None does nothing; use reset_amax()", self._place())
            return
        if not self.two_ended:
            raise ArgumentError(
                f"{self._place()} has a range of one number; make it with QuantDescriptor(affine=True)"
            )
        ends = torch.as_tensor(value)
        if ends.shape != (2,):
            raise ArgumentError(f"the limits of {self._place()} must be [low, high], not {value!r}")
        self._set_buffer("_limits", value, "limits")

    @property
    def range(self) -> Range | None:
        """The whole range, for :meth:`set_range`, or None."""
        return None if self.amax is None else Range(self.amax, self.limits)

    @property
    def pre_quant_scale(self) -> torch.Tensor | None:
        """A factor on the input, applied before everything else (when disabled too), or None."""
        return self._buffers.get("_pre_quant_scale")

    @pre_quant_scale.setter
    def pre_quant_scale(self, value: Any) -> None:
        if value is None:
            logger.error("Setting pre_quant_scale of %s to None does nothing", self._place())
            return
        self._set_buffer("_pre_quant_scale", value, "pre_quant_scale")

    @property
    def scale(self) -> Any:
        """Real quantization: the scale of the last call. Fake quantization: 1.0, and a logged error."""
        if self._fake_quant:
            logger.error("Fake quantize mode doesn't use scale explicitly! (%s)", self._place())
        return self._scale

    @property
    def maxbound(self) -> float:
        """The largest integer, or 448.0 (E4M3), 57344.0 (E5M2)."""
        if self._affine:
            return bounds(self._num_bits, True)[1]  # type: ignore[arg-type]
        if isinstance(self._num_bits, tuple):
            return FP8_LIMIT[FLOAT_FORMATS[self._num_bits]]
        return bounds(self._num_bits, self._unsigned)[1]

    @property
    def step_size(self) -> torch.Tensor | None:
        """``amax / maxbound``, or the scale between the limits; None (and a logged error) without a range."""
        limits = self.limits
        if self._affine and limits is not None:
            return affine_parameters(limits, self._num_bits)[0]  # type: ignore[arg-type]
        if self.amax is None or self._affine:
            logger.error("step_size is undefined under dynamic amax mode! (%s)", self._place())
            return None
        return self.amax / self.maxbound

    @property
    def zero_point(self) -> int:
        """The code of zero: 0 where the range is symmetric. Waits for the device."""
        limits = self.limits
        if not self._affine or limits is None:
            return 0
        return int(affine_parameters(limits, self._num_bits)[1])  # type: ignore[arg-type]

    @property
    def switches(self) -> Switches:
        """Which stages are on. Assigned back, they are as before; bounds that are learned keep ``requires_grad``."""
        return Switches(self._disabled, self._if_quant, self._if_clip, self._if_calib)

    @switches.setter
    def switches(self, value: Switches) -> None:
        self._disabled, self._if_quant, self._if_clip, self._if_calib = value

    @property
    def is_on(self) -> bool:
        """Whether it quantizes: not disabled, and the quantization stage on."""
        return self.switches.quantizes

    @property
    def learns_amax(self) -> bool:
        """Whether it clips to bounds that are trained (``learn_amax`` of the descriptor)."""
        return self._learn_amax

    @property
    def calibrator(self) -> Any:
        """What collects the statistics while calibration is on: anything with ``collect(x)``."""
        return self._calibrator

    @calibrator.setter
    def calibrator(self, value: Any) -> None:
        self._calibrator = value

    # Ranges

    def set_range(self, amax: torch.Tensor, limits: torch.Tensor | None = None) -> None:
        """Take a copy of ``amax`` as the range, whatever shape the one before had; learned bounds start there.

        So too of ``limits``, both ends of a two-ended range; without, the ends before are forgotten.
        """
        if self.amax is not None and self.amax.shape != amax.shape:
            self.reset_amax()
        self._set_buffer("_amax", amax, None)
        if self.two_ended and limits is not None:
            self._set_buffer("_limits", limits, None)
        else:
            self._buffers.pop("_limits", None)
        if self._learn_amax:
            self.init_learn_amax()

    def load_calib_amax(self, *args: Any, strict: bool = True, **kwargs: Any) -> None:
        """Take the range from the calibrator; the arguments go to its ``compute_amax``.

        May be called again with another method, and after the shape of the range has changed.

        Raises:
            RuntimeError: no calibrator; "Calibrator returned None" when it has seen no data and ``strict``.
                Not strict, the range becomes NaN and a warning is logged.
        """
        if self._calibrator is None:
            raise RuntimeError("Calibrator not created.")
        amax = self._calibrator.compute_amax(*args, **kwargs)
        if amax is None:
            message = (
                f"Calibrator returned None: {self._place()} has seen no data; run a batch with calibration on"
            )
            if strict:
                raise RuntimeError(message)
            logger.warning("%s; the range is set to nan", message)
            amax = torch.tensor(float("nan"))
        if self.amax is not None and self.amax.shape != amax.shape:
            self.reset_amax()
        self._set_buffer("_amax", amax, None)
        if self.two_ended:
            ends = self._calibrator.compute_limits(*args, **kwargs)
            self._set_buffer("_limits", amax.expand(2) if ends is None else ends, None)

    def reset_amax(self) -> None:
        """Forget the range; the quantizer is dynamic again (or without a range, with ``dynamic=False``)."""
        self._buffers.pop("_amax", None)
        self._buffers.pop("_limits", None)
        self._checked = None

    def init_learn_amax(self) -> None:
        """Start the learned bounds at ``-amax, +amax``, the largest over channels.

        Raises:
            RuntimeError: without ``learn_amax``, or without a range.
        """
        if not self._learn_amax:
            raise RuntimeError("Called init_learn_amax with learn_amax=False.")
        if self.amax is None:
            raise RuntimeError(f"init_learn_amax: {self._place()} has no amax yet; calibrate first")
        start = self.amax.max()
        with torch.no_grad():
            self.clip.clip_value_min.copy_(-start)
            self.clip.clip_value_max.copy_(start)

    def _set_buffer(self, key: str, value: Any, name: str | None) -> None:
        if isinstance(value, torch.Tensor) and name is not None:
            logger.warning(
                "%s of %s should be a float, list or array; the tensor is copied", name, self._place()
            )
        # A tensor born under inference_mode could not be saved for a later backward.
        with torch.inference_mode(False), torch.no_grad():
            self._checked = None  # a new tensor may have the identity of one that was freed
            tensor = value if isinstance(value, torch.Tensor) else torch.as_tensor(value)
            fresh = tensor.detach().to(torch.float32, copy=True)
            present = self._buffers.get(key)
            if present is None:
                self.register_buffer(key, fresh)
                return
            if present.shape != fresh.shape:
                raise RuntimeError(f"Changing shape when setting {name or key} is not allowed.")
            self._buffers[key] = fresh.to(present.device)

    def _place(self) -> str:
        name = self.name or _name_in_call(self)
        if name:
            return f"quantizer {name!r}"
        unnamed = self.owner or (f"the {self.role} quantizer" if self.role else "TensorQuantizer")
        return f"{unnamed} (no name set)"

    # Module plumbing

    def __setattr__(self, name: str, value: Any) -> None:
        # Scripts of the old toolkit assign `_amax` itself; as a plain attribute nothing would read it.
        if name in _RANGE_BUFFERS and name not in self._buffers and isinstance(value, torch.Tensor):
            self._set_buffer(name, value, None)
        else:
            super().__setattr__(name, value)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for key in _RANGE_BUFFERS:
            saved = state_dict.get(prefix + key)
            if key == "_limits" and not self._two_ended:
                continue  # a range of one number has no use for them: an unexpected key
            if saved is None:
                if key in self._buffers:
                    logger.error("%s%s is in the module but not in the state_dict", prefix, key)
            elif key not in self._buffers:
                self.register_buffer(key, torch.empty(saved.shape, dtype=torch.float32, device=saved.device))
        self._checked = None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizerState:
        """Move with the model, but stay float32: ``model.half()`` must not round the ranges."""
        buffers = {key: self._buffers[key] for key in _RANGE_BUFFERS if key in self._buffers}
        super()._apply(fn, recurse)
        for key, before in buffers.items():
            after = self._buffers[key]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[key] = before.to(after.device)
        self._checked = None
        return self


def _name_in_call(quantizer: nn.Module) -> str:
    """Its name in the outermost module that is being called, "" where there is none.

    A model that is built under ``initialize()`` never tells its quantizers their names; a message can still give them.
    """
    if torch.compiler.is_dynamo_compiling():  # which can't look at the stack
        return ""
    callers: list[nn.Module] = []
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, nn.Module) and not _of_an_exporter(caller):
            callers.append(caller)
        frame = frame.f_back  # type: ignore[assignment]
    for caller in reversed(callers):
        for name, module in caller.named_modules():
            if module is quantizer and name:
                return name
    return ""


def _of_an_exporter(module: nn.Module) -> bool:
    """Whether torch's exporters put it around the model for the time of the export."""
    home = type(module).__module__
    return home.startswith("torch.") and not home.startswith("torch.nn.")
