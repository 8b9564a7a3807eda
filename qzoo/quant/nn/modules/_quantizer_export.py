"""What a quantizer does while its model is written as ONNX: readiness checks and the Q/DQ pair."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from qzoo.errors import ExportError, MissingRangeError

if TYPE_CHECKING:
    from qzoo.quant.nn.modules.tensor_quantizer import TensorQuantizer

logger = logging.getLogger(__name__)


# The newest exporter of torch swallows what a module raises and tries another way of tracing; so that the
# reason isn't lost, enable_onnx_export() looks here.
refusals: list[Exception] = []


class NotExportableError(ExportError, AssertionError):
    """A quantizer that ONNX can't express as asked."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        if not refusals:
            refusals.append(self)


class UncalibratedExportError(MissingRangeError, AssertionError):
    """A quantizer without a range in a model that is exported."""


def in_onnx_export() -> bool:
    """Check whether ``torch.onnx.export`` records the model."""
    recording = torch.compiler.is_exporting() or torch.jit.is_tracing()
    return recording and _writes_onnx()


def _writes_onnx() -> bool:
    # Asked directly, dynamo takes the answer to be False, and the exporter's second try (strict) goes on.
    return torch.onnx.is_in_onnx_export()


# torch.compiler.assume_constant_result does this, and imports dynamo for it, which takes longer than all of qzoo.
_writes_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_calibrated(q: TensorQuantizer) -> None:
    """Raise UncalibratedExportError without a range: it would be the example input's, for ever."""
    stored = q._buffers.get("_limits" if q._affine else "_amax")
    if stored is None and not q._learn_amax:
        missing = "limits" if q._affine else "amax"
        raise UncalibratedExportError(
            f"Quantizer has not been calibrated: {q._place()} has no {missing}, and ONNX needs a constant; "
            "calibrate the model or disable the quantizer before the export"
        )


def refuse_tracing(q: TensorQuantizer) -> None:
    """Refuse the TorchScript exporter, which knows no ``qzoo::fake_quantize`` and names no way out."""
    raise NotExportableError(
        f"{q._place()} can't be written by torch.onnx.export(dynamo=False) as it is; call it inside "
        "`with qzoo.quant.enable_onnx_export():`, or use qzoo.export_onnx"
    )


def check_ready(q: TensorQuantizer) -> None:
    """Check, inside ``enable_onnx_export()``, a quantizer that isn't disabled.

    Raises:
        UncalibratedExportError: no range.
        NotExportableError: E4M3 with more than one range.
    """
    if q._if_calib:
        logger.warning("%s is still calibrating during the export", q._place())
    if not q._if_quant:
        return
    check_calibrated(q)
    amax = q.amax
    if isinstance(q._num_bits, tuple) and amax is not None and amax.numel() > 1:
        raise NotExportableError("E4M3 supports ONNX export only for per-tensor quantization")


def quantize_dequantize(q: TensorQuantizer, inputs: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """Write the Q/DQ pair as nodes of the graph being recorded.

    Raises:
        NotExportableError: a format that the pair doesn't have.
    """
    from qzoo.quant import onnx_translation as onnx

    wide = inputs if inputs.dtype == torch.float32 else inputs.to(torch.float32)
    if isinstance(q._num_bits, tuple):
        if q._num_bits != (4, 3):
            raise NotExportableError(f"{q._place()}: of the floating point formats only E4M3 can be exported")
        if torch.jit.is_tracing() and isinstance(inputs, torch.nn.Parameter) and inputs.dim() > 2:
            # It has no shape for the outputs of TensorRT's operators, and wants the kernel's.
            raise NotExportableError(
                f"{q._place()}: the TorchScript exporter can't write E4M3 convolutions; use dynamo=True"
            )
        return _narrow(onnx.fp8_pair(wide, amax), inputs)
    if q._num_bits != 8:
        raise NotExportableError(f"Only INT8 ONNX export is supported; {q._place()} has {q._num_bits} bits")
    if q._narrow_range and not q._unsigned:
        raise NotExportableError(
            f"{q._place()} has a narrow range, which ONNX's int8 doesn't; set narrow_range = False, "
            "or use qzoo.export_onnx, which clamps the weights"
        )
    if not q._fake_quant or q._block is not None:
        raise NotExportableError(f"{q._place()}: only fake quantizers without blocks export as int8 pairs")
    axes = [d for d, n in enumerate(amax.shape) if int(n) != 1]
    if len(axes) > 1:
        raise NotExportableError(
            f"{q._place()} has a range of shape {tuple(amax.shape)}; ONNX has one axis per pair"
        )
    return _narrow(onnx.int8_pair(wide, amax, q._unsigned, axes[0] if axes else None), inputs)


def quantize_dequantize_affine(
    q: TensorQuantizer, inputs: torch.Tensor, limits: torch.Tensor
) -> torch.Tensor:
    """Write the Q/DQ pair with a zero point, uint8, as nodes of the graph being recorded.

    Raises:
        NotExportableError: another number of bits than 8.
    """
    from qzoo.quant import onnx_translation as onnx

    if q._num_bits != 8:
        raise NotExportableError(f"Only INT8 ONNX export is supported; {q._place()} has {q._num_bits} bits")
    wide = inputs if inputs.dtype == torch.float32 else inputs.to(torch.float32)
    return _narrow(onnx.affine_pair(wide, limits), inputs)


def _narrow(y: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    # The TorchScript exporter writes a Cast even for the type that is already there.
    return y if y.dtype == like.dtype else y.to(like.dtype)
