"""Which number formats a file can hold: by operator set and by target, checked before anything is exported.

| format | in the file | opset |
|---|---|---|
| integers of 2 to 8 bits | int8 / uint8 with the format's own scale | 18 |
| weights of at most 4 bits with ``weights="int4"`` | int4, two to a byte | 21 |
| E4M3, E5M2 | float8e4m3fn, float8e5m2 | 19 |
| integers of 9 to 16 bits | int16 / uint16 with the format's own scale | 21 |
| weights with a range per block | integers with a DequantizeLinear of ``block_size`` | 21 |

ONNX has no types of 2, 3, 5, 6 or 7 bits, and ONNX Runtime's CPU no int4 activations. Narrow weights use the inner
levels of int8 only, which is exact; narrow activations are clipped to their range (a Clip before the QuantizeLinear;
for ONNX Runtime a Clip of integers behind it, so that the layer before still runs in int8), which is exact too.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from torch import nn

from qzoo.errors import ExportError
from qzoo.quant.nn import TensorQuantizer

LOWEST_OPSET = 18
"""The lowest that the exporter writes, and enough for int8: the widest choice of runtimes."""


def choose_opset(model: nn.Module, target: str, opset: int | None, weights: str) -> int:
    """The operator set to write: the one asked for, or the lowest that has all formats of the model.

    Args:
        model: its quantizers that are on are looked at.
        weights: as in :func:`qzoo.export.export_onnx`.

    Raises:
        ExportError: there is no such opset, it has not all formats, or the target's runtime does not take one; names
            the quantizer.
    """
    wanted, reason = LOWEST_OPSET, "the exporter writes 18 and higher"
    if weights == "int4":
        wanted, reason = 21, "int4 weights"
    for name, quantizer in active(model):
        _check_target(name, quantizer, target)
        needed, what = _opset_of(quantizer)
        if needed > wanted:
            wanted, reason = needed, f"{what} ({name})"
    if opset is not None and opset < wanted:
        raise ExportError(f"opset {opset} was asked for, but needs to be {wanted} or higher: {reason}")
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and opset > newest:
        raise ExportError(f"opset {opset} was asked for, but onnx {onnx.__version__} has none above {newest}")
    return opset or wanted


def active(model: nn.Module) -> Iterator[tuple[str, TensorQuantizer]]:
    """The quantizers that quantize, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and is_on(module):
            yield name, module


def is_on(quantizer: TensorQuantizer) -> bool:
    """Whether the quantizer quantizes, as far as its switches say."""
    return not quantizer._disabled and quantizer._if_quant


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
    elif isinstance(bits, tuple):
        if bits != (4, 3) and target == "tensorrt":
            refusal = "is E5M2; TensorRT takes E4M3"
        elif target == "openvino":
            refusal = "is 8-bit floating point, which OpenVINO rounds in another way on CPUs"
    elif not 2 <= bits <= 16:
        refusal = f"has {bits} bits; ONNX has integers of 2 to 16 bits"
    elif bits > 8 and target != "onnxruntime":
        refusal = f"has {bits} bits; of the targets only onnxruntime computes with more than 8"
    if refusal:
        raise ExportError(f"target {target!r} can't be exported: {name} {refusal}")
