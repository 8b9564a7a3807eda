"""Which number formats a file can hold: by operator set and by target, checked before anything is exported.

| format | in the file | opset |
|---|---|---|
| integers of 2 to 8 bits | int8 / uint8 with the format's own scale | 18 |
| weights of at most 4 bits with ``weights="int4"`` | int4, two to a byte | 21 |
| E4M3, E5M2 | float8e4m3fn, float8e5m2 | 19 |
| float16 between Q and DQ with ``dtype="float16"`` | float16 scales | 19 |
| integers of 9 to 16 bits | int16 / uint16 with the format's own scale | 21 |
| weights with a range per block | integers with a DequantizeLinear of ``block_size`` | 21 |

ONNX has no types of 2, 3, 5, 6 or 7 bits, and ONNX Runtime's CPU no int4 activations. Narrow weights use the inner
levels of int8 only, which is exact; narrow activations are clipped to their range (a Clip before the QuantizeLinear;
for ONNX Runtime a Clip of integers behind it, so that the layer before still runs in int8), which is exact too.
"""

from __future__ import annotations

import onnx
from torch import nn

from qzoo.errors import ExportError
from qzoo.quant.nn import TensorQuantizer
from qzoo.quantizers import active_quantizers

LOWEST_OPSET = 18
"""The lowest that the exporter writes, and enough for int8: the widest choice of runtimes."""

GELU_OPSET = 20
"""The lowest with GELU as one operator, which ONNX Runtime fuses with the bias before it; below, it is five."""

NEWEST_OPSET = min(25, onnx.defs.onnx_opset_version())
"""Beyond 25 the exporter hands the model to onnx's own converter, which loses outputs of DequantizeLinear."""


def choose_opset(model: nn.Module, target: str, opset: int | None, weights: str, half: bool = False) -> int:
    """Choose the operator set to write: the one asked for, or the lowest that has all formats of the model.

    Args:
        model: its quantizers that are on are looked at.
        weights: as in :func:`qzoo.export.export_onnx`.
        half: scales are float16.

    Raises:
        ExportError: the opset has not all formats, the target's runtime does not take one, or
            ``weights="int4"`` and no weight is of that format; names the quantizer.
    """
    lowest, reason = LOWEST_OPSET, f"{LOWEST_OPSET} to {NEWEST_OPSET} can be written"
    if half:
        lowest, reason = 19, "float16 scales"
    if weights == "int4":
        lowest, reason = 21, "int4 weights"
        _check_int4(model)
    for name, quantizer in active_quantizers(model).items():
        _check_target(name, quantizer, target)
        needed, what = _opset_of(quantizer)
        if needed > lowest:
            lowest, reason = needed, f"{what} ({name})"
    if opset is not None and opset < lowest:
        raise ExportError(f"opset {opset} was asked for, but needs to be {lowest} or higher: {reason}")
    return opset or lowest


def check_opset(opset: object) -> None:
    """Check an opset: TypeError for anything but a whole number, ExportError for one that can't be written."""
    if opset is None:
        return
    if isinstance(opset, bool) or not isinstance(opset, int):
        raise TypeError(
            f"opset must be a whole number of {LOWEST_OPSET} to {NEWEST_OPSET}, or None for the lowest, not {opset!r}"
        )
    if opset > NEWEST_OPSET:
        raise ExportError(
            f"opset {opset} was asked for, but {LOWEST_OPSET} to {NEWEST_OPSET} can be written; leave opset out for "
            "the lowest that has the model's formats"
        )


def _check_int4(model: nn.Module) -> None:
    """Raise ExportError where no weight has the format that ``weights="int4"`` is for."""
    for name, quantizer in active_quantizers(model).items():
        bits = quantizer.num_bits
        if _is_weight(name, quantizer) and isinstance(bits, int) and bits <= 4 and not quantizer.unsigned:
            return
    raise ExportError(
        "weights='int4' was asked for, but no layer has weights of at most 4 bits; quantize the model so "
        "(such as quantize='w4a8'), or leave weights out"
    )


def _is_weight(name: str, quantizer: TensorQuantizer) -> bool:
    return quantizer.role == "weight" or "weight" in name.rpartition(".")[2]


def _is_activation(name: str, quantizer: TensorQuantizer) -> bool:
    """Whether the quantizer says so: one of the user's own may quantize a weight under any name."""
    return quantizer.role not in ("", "weight") or name.rpartition(".")[2].endswith("input_quantizer")


def kept_axes(quantizer: TensorQuantizer) -> tuple[int, ...]:
    """List the axes along which there are several ranges."""
    amax = quantizer.amax
    return () if amax is None else tuple(d for d, size in enumerate(amax.shape) if size > 1)


def _opset_of(quantizer: TensorQuantizer) -> tuple[int, str]:
    bits = quantizer.num_bits
    if quantizer.block is not None:
        return 21, "a range per block"
    if isinstance(bits, tuple):
        return 19, "8-bit floating point"
    return (21, f"{bits} bits") if bits > 8 else (LOWEST_OPSET, "int8")


def _check_target(name: str, quantizer: TensorQuantizer, target: str) -> None:
    bits, is_weight = quantizer.num_bits, name.endswith("_weight_quantizer")
    refusal = ""
    if quantizer.block is not None and not is_weight:
        refusal = "has a range per block, which ONNX runtimes take for weights only"
    elif kept_axes(quantizer) and _is_activation(name, quantizer):
        refusal = (
            "has several ranges; runtimes quantize activations per tensor: use axis=None, and calibrate again"
        )
    elif quantizer.block is None and len(kept_axes(quantizer)) > 1:
        refusal = (
            "has several ranges along two axes; ONNX has them along one: use axis=0, and calibrate again"
        )
    elif isinstance(bits, tuple):
        if bits != (4, 3) and target == "tensorrt":
            refusal = "is E5M2; TensorRT takes E4M3"
        elif target == "openvino":
            refusal = "is 8-bit floating point, which OpenVINO rounds in another way on CPUs"
    elif not 2 <= bits <= 16:
        refusal = f"has {bits} bits; ONNX has integers of 2 to 16 bits"
    elif bits > 8 and target != "onnxruntime":
        refusal = f"has {bits} bits; of the targets only onnxruntime takes more than 8, and computes in float"
    if refusal:
        raise ExportError(f"target {target!r} can't be exported: {name} {refusal}")
