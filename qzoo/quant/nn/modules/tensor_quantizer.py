"""``TensorQuantizer``: the module that calibrates, clips and quantizes one tensor."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

from qzoo.errors import ArgumentError, MissingRangeError, NonFiniteError
from qzoo.quant import block as blocks
from qzoo.quant import calib, ops
from qzoo.quant.descriptor import FLOAT_FORMATS, Axis, Bits, QuantDescriptor
from qzoo.quant.nn.modules import _quantizer_export as export
from qzoo.quant.nn.modules._quantizer_repr import describe
from qzoo.quant.nn.modules._quantizer_state import QuantizerState, Range
from qzoo.quant.nn.modules.clip import Clip
from qzoo.quant.ops.schema import require_real, require_tensor
from qzoo.quant.tensor_quant import check_amax, check_nonnegative, is_traced, tensor_quant
from qzoo.quant.utils.reduce_amax import normalize_axes, reduce_amax

__all__ = ["Range", "TensorQuantizer"]

logger = logging.getLogger(__name__)


class TensorQuantizer(QuantizerState):
    """Quantizer of a tensor: any shape in, the same shape, dtype and memory format out.

    Stages, in this order: multiply by ``pre_quant_scale``; stop when disabled; collect statistics (calib);
    clip; quantize. State is at most ``_amax``, ``_limits``, ``_pre_quant_scale`` and the two bounds of ``clip``; a
    quantizer without a range has no buffers, so that state dicts of uncalibrated models equal those of float
    models.

    Attributes beyond the contract, plain values that no state dict holds:
        role: what the quantizer is for in its model, such as ``"residual"``; the zoo's targets switch by it.
        nonnegative: its input is never below zero.
        symmetric: no scheme gives it a zero point: OpenVINO has no int8 kernel with one for what reads it (a product of
            two activations, a transposed convolution).
        group: quantizers of one group are calibrated together and have one range; "" is none.
        dynamic: without a range, True takes each tensor's own; False raises MissingRangeError.
        name: its place in the model, for error messages.

    Values are checked in eager mode only. A negative range is looked for once after each change. Negative
    input of an unsigned quantizer costs a pass over the tensor, so it is looked for only where ``dynamic`` is
    True: with False the model's author has stated the sign, and what is below zero becomes zero.

    Args:
        quant_desc: bits, granularity, range.
        disabled: pass the input through.
        if_quant, if_clip, if_calib: the stages that are on.

    Raises:
        ValueError: ``if_clip`` without ``learn_amax``; real quantization to floating point.

    Example:
        >>> from qzoo.quant import QuantDescriptor
        >>> quantizer = TensorQuantizer(QuantDescriptor(num_bits=4, amax=7.0))
        >>> quantizer(torch.tensor([1.2, 5.4, 9.0]))
        tensor([1., 5., 7.])
    """

    _enable_onnx_export = False
    use_fb_fake_quant = False
    """Old scripts set this before an ONNX export; it leads to the same Q/DQ pairs as enable_onnx_export()."""

    def __init__(
        self,
        quant_desc: QuantDescriptor = QuantDescriptor(),  # noqa: B008 - immutable
        disabled: bool = False,
        if_quant: bool = True,
        if_clip: bool = False,
        if_calib: bool = False,
    ) -> None:
        super().__init__()
        self.role = ""
        self.nonnegative = False
        self.symmetric = False
        self.group = ""
        self.dynamic = True
        self.name = ""
        self._num_bits: Bits = quant_desc.num_bits
        if isinstance(quant_desc.num_bits, tuple) and not quant_desc.fake_quant:
            raise ArgumentError(
                f"num_bits={quant_desc.num_bits} has no integers for real quantization to give; use fake_quant=True"
            )
        self._fake_quant = quant_desc.fake_quant
        self._axis: Axis = quant_desc.axis
        self._block = quant_desc.block
        self._scale_amax = quant_desc.scale_amax
        self._learn_amax = quant_desc.learn_amax
        self._unsigned = quant_desc.unsigned
        self._narrow_range = quant_desc.narrow_range
        self._two_ended = self._affine = quant_desc.affine
        self._scale: Any = None if not quant_desc.fake_quant else 1.0
        self._disabled = disabled
        self._if_quant = if_quant
        self._if_clip = False
        self._if_calib = if_calib
        self._checked: tuple[int, int] | None = None
        if quant_desc.amax is not None:
            self.register_buffer("_amax", torch.tensor(quant_desc.amax, dtype=torch.float32))
        if self._learn_amax:
            start = 1.0 if quant_desc.amax is None else float(np.max(quant_desc.amax))
            self.clip = Clip(-start, start, learn_min=True, learn_max=True)
            self.enable_clip()
        if if_clip:
            self.enable_clip()
        self._calib_method = quant_desc.calib_method
        self._calibrator: Any = self._new_calibrator()

    def _new_calibrator(self) -> Any:
        kind = calib.MaxCalibrator if self._calib_method == "max" else calib.HistogramCalibrator
        return kind(self._num_bits, self._calib_axis(), self._unsigned, two_ended=self._two_ended)

    def _calib_axis(self) -> Axis:
        # Naming the axis of the blocks makes the histogram calibrator refuse, as it does for channels.
        return self._axis if self._block is None else self._block[0]

    # Switches

    def enable(self) -> None:
        """Undo :meth:`disable`."""
        self._disabled = False

    def disable(self) -> None:
        """Pass the input through (after ``pre_quant_scale``)."""
        self._disabled = True

    def enable_quant(self) -> None:
        """Turn the quantization stage on."""
        self._if_quant = True

    def disable_quant(self) -> None:
        """Turn the quantization stage off."""
        self._if_quant = False

    def enable_calib(self) -> None:
        """Collect statistics. Raises ValueError without a calibrator."""
        if self._calibrator is None:
            raise ArgumentError("Calibrator was not created, cannot enable calibration.")
        self._if_calib = True

    def disable_calib(self) -> None:
        """Stop collecting statistics."""
        self._if_calib = False

    def enable_clip(self) -> None:
        """Clip to the learned bounds and train them. Raises ValueError without ``learn_amax``."""
        self._switch_clip(True)

    def disable_clip(self) -> None:
        """Stop clipping and freeze the bounds."""
        self._switch_clip(False)

    def _switch_clip(self, on: bool) -> None:
        if not self._learn_amax:
            raise ArgumentError(f"learn_amax is False. Cannot {'enable' if on else 'disable'} clip.")
        self._if_clip = on
        self.clip.clip_value_min.requires_grad_(on)
        self.clip.clip_value_max.requires_grad_(on)

    # The range in use

    def range_for(self, inputs: torch.Tensor) -> torch.Tensor:
        """Get the range that ``inputs`` are quantized with: the stored one, or their own where there is none."""
        return self._get_amax(inputs)

    def range_of(self, inputs: torch.Tensor) -> torch.Tensor:
        """Compute the largest magnitudes in ``inputs`` themselves, in the shape that this quantizer's ranges have."""
        return self._own_range(inputs)

    def _get_amax(self, inputs: torch.Tensor) -> torch.Tensor:
        """The range for this input: stored, or the input's own; with ``scale_amax``; float32, no gradient."""
        amax = self._buffers.get("_amax")
        if amax is None:
            if not self.dynamic:
                raise MissingRangeError(
                    f"{self._place()} has no range (amax): calibrate the model, load a calibrated "
                    "checkpoint, or disable the quantizer"
                )
            amax = self._own_range(inputs)
        else:
            if isinstance(inputs, torch.Tensor) and amax.device != inputs.device and not is_traced():
                amax = self._buffers["_amax"] = amax.to(inputs.device)
            if amax.dim() == 1 and inputs.dim() > 1 and self._axis is not None:
                amax = self._along_axis(amax, inputs.dim())
        if self._scale_amax is not None:
            amax = amax * self._scale_amax
        if amax.requires_grad:
            amax = amax.detach()
        return amax if amax.dtype in (torch.float32, torch.float64) else amax.float()

    def _own_range(self, inputs: torch.Tensor) -> torch.Tensor:
        rank = inputs.dim()
        if self._block is not None:
            axes = blocks.kept_axes(self._axis, self._block, rank)
            amax = ops.reduce_amax_op(blocks.split(inputs.detach(), self._block), axes)
            return blocks.squeeze(amax, self._block, rank)
        if self._axis is None:
            return ops.reduce_amax_op(inputs, [])
        kept_axes = normalize_axes(self._axis, rank)
        return reduce_amax(inputs.detach(), [d for d in range(rank) if d not in kept_axes])

    def _along_axis(self, amax: torch.Tensor, rank: int) -> torch.Tensor:
        axes = normalize_axes(self._axis, rank)  # type: ignore[arg-type]
        shape = [1] * rank
        shape[axes[0]] = -1
        return amax.reshape(shape) if len(axes) == 1 else amax

    # Forward

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Run the stages that are on. Any shape; the result has the shape and dtype of ``inputs``.

        Raises:
            MissingRangeError: no range and ``dynamic=False``.
            NonFiniteError: NaN or infinity while calibrating.
            ValueError, TypeError: see :func:`qzoo.quant.tensor_quant.fake_tensor_quant`.
        """
        factor = self._buffers.get("_pre_quant_scale")
        if factor is not None:
            inputs = inputs * factor.to(inputs)
        if self._disabled:
            return inputs
        if self._enable_onnx_export:
            export.check_ready(self)
        if self._if_calib:
            self._collect(inputs)
        outputs = self.clip(inputs) if self._if_clip else inputs
        if self._if_quant:
            outputs = self.quantize(outputs)
        return outputs

    def _collect(self, inputs: torch.Tensor) -> None:
        if self._calibrator is None:
            raise RuntimeError("Calibrator was not created.")
        try:
            if self._block is None:
                self._calibrator.collect(inputs)
            else:
                ranges = self._own_range(inputs)
                self._calibrator._axis = tuple(range(ranges.dim()))
                self._calibrator.collect(ranges)
        except NonFiniteError as error:
            raise NonFiniteError(f"{self._place()}: {error}") from error

    def quantize(self, inputs: torch.Tensor) -> torch.Tensor:
        """Quantize a tensor with the range in use, whichever stages are switched on."""
        # torch.fx records with a stand-in for the tensor; it has no values to look at either.
        traced = is_traced()
        if not isinstance(inputs, torch.Tensor):
            require_tensor(inputs, f"the input of {self._place()}")
            traced = True
        learner = self._modules.get("learner")
        if learner is not None:  # the range is being trained (qzoo.qat)
            return learner(inputs, self._num_bits, self._unsigned, self._narrow_range)
        if traced and export.in_onnx_export():
            export.check_calibrated(self)
            if torch.jit.is_tracing() and not (self._enable_onnx_export or self.use_fb_fake_quant):
                export.refuse_tracing(self)
        if self._affine:
            return self._quantize_affine(inputs, traced)
        if self._learn_amax:
            inputs = self.clip(inputs)
            amax = torch.max(-self.clip.clip_value_min, self.clip.clip_value_max).detach()
        else:
            amax = self._get_amax(inputs)
        if not traced:
            self._check(inputs, amax)
        elif (self._enable_onnx_export or self.use_fb_fake_quant) and export.in_onnx_export():
            return export.quantize_dequantize(self, inputs, amax)
        if self._block is None:
            return self._round(inputs, amax, traced)
        grouped, ranges = blocks.split(inputs, self._block), blocks.spread(amax, self._block, inputs.dim())
        return self._round(grouped, ranges, traced).reshape(inputs.shape)

    def _quantize_affine(self, inputs: torch.Tensor, traced: bool) -> torch.Tensor:
        limits, bits = self._limits_for(inputs), self._num_bits
        if not traced:
            if not inputs.dtype.is_floating_point:
                require_real(inputs, f"the input of {self._place()}")
            self._check_limits(limits)
        elif (self._enable_onnx_export or self.use_fb_fake_quant) and export.in_onnx_export():
            return export.quantize_dequantize_affine(self, inputs, limits)
        return ops.fake_quantize_affine(inputs, limits, bits)  # type: ignore[arg-type]

    def _limits_for(self, inputs: torch.Tensor) -> torch.Tensor:
        limits = self._buffers.get("_limits")
        if limits is not None:
            if isinstance(inputs, torch.Tensor) and limits.device != inputs.device and not is_traced():
                limits = self._buffers["_limits"] = limits.to(inputs.device)
            return limits
        if self.dynamic and self._buffers.get("_amax") is None:
            return torch.stack(inputs.detach().aminmax()).float()
        raise MissingRangeError(
            f"{self._place()} has no ends of its range (limits), which an affine quantizer needs: calibrate the model, "
            "load a checkpoint that has them, or set affine = False to use amax"
        )

    def _check_limits(self, limits: torch.Tensor) -> None:
        mark = (id(limits), 0 if limits.is_inference() else limits._version)
        if mark == self._checked or limits.is_meta:
            return
        low, high = limits.tolist()
        if low > high:
            raise ArgumentError(
                f"the limits of {self._place()} are the wrong way round: [{low:.6g}, {high:.6g}]"
            )
        self._checked = mark

    def _round(self, inputs: torch.Tensor, amax: torch.Tensor, traced: bool) -> torch.Tensor:
        bits = self._num_bits
        if isinstance(bits, tuple):
            return ops.fake_quantize_fp8(inputs, amax, FLOAT_FORMATS[bits])
        if self._fake_quant:
            return ops.fake_quantize(inputs, amax, bits, self._unsigned, self._narrow_range)
        quantized, scale = tensor_quant(inputs, amax, bits, self._unsigned)
        if not traced:
            self._scale = (
                scale if self._block is None else blocks.squeeze(scale, self._block, inputs.dim() - 1)
            )
        return quantized

    def _check(self, inputs: torch.Tensor, amax: torch.Tensor) -> None:
        if not inputs.dtype.is_floating_point:
            require_real(inputs, f"the input of {self._place()}")
        stored = self._buffers.get("_amax")
        if self._learn_amax or self._scale_amax is not None:
            check_amax(amax)
        elif stored is not None:
            # Looking at a value waits for the device: once for each version of the buffer is enough.
            mark = (id(stored), 0 if stored.is_inference() else stored._version)
            if mark != self._checked:
                check_amax(stored)
                self._checked = mark
        if self._unsigned and self.dynamic:
            check_nonnegative(inputs)

    def extra_repr(self) -> str:
        return describe(self)

    def __repr__(self) -> str:
        return f"TensorQuantizer({describe(self)})"
