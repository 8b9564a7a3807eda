"""What a packed checkpoint's file holds: weights as integers or 8-bit floats, everything else in columns.

*Weights* keep their name: int8 in the weight's shape, int16 beyond 8 bits; two values a byte, uint8
``[(numel + 1) // 2]``, up to 4 bits; float8_e4m3fn or float8_e5m2 in the weight's shape.

*Columns* hold the many small tensors, since a name costs a file more than a range does. Column ``"*.bias"`` is
1-D: all tensors whose name ends in ``.bias``, in the order of their names. Which they are, and their shapes, the
architecture says. A column is float16 where that changes no value, else float32. The counter
``num_batches_tracked`` is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from qzoo.errors import CheckpointError
from qzoo.quant import block as blocks
from qzoo.quant import ops
from qzoo.quant.descriptor import FLOAT_FORMATS, Bits
from qzoo.quant.nn import TensorQuantizer
from qzoo.quant.ops.schema import divide
from qzoo.quantizers import weight_quantizers
from qzoo.zoo.tensors import expected_tensors

_FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_CHUNK = 1 << 15  # values unpacked at a time: temporaries stay small beside the model

Shapes = dict[str, tuple[int, ...]]


# ---- weights ----


def pack_weight(weight: Tensor, quantizer: TensorQuantizer) -> Tensor:
    """Pack a weight as its file stores it, see above.

    Raises:
        CheckpointError: the quantizer has no range, or the weight holds NaN or infinity.
    """
    amax, block, bits = quantizer.amax, quantizer.block, quantizer.num_bits
    if amax is None or not bool(torch.isfinite(weight).all()):
        raise CheckpointError("has no range (amax), or holds NaN or infinity; it can't be packed")
    x, ranges = weight.detach(), amax
    if block is not None:
        x, ranges = blocks.split(x, block), blocks.spread(amax, block, weight.dim())
    if isinstance(bits, tuple):
        return _to_float8(x, ranges, FLOAT_FORMATS[bits]).reshape(weight.shape)
    q = ops.quantize(x, ranges, bits, narrow_range=quantizer.narrow_range).reshape(weight.shape)
    return ops.pack_int4(q) if bits <= 4 else q


def unpack_weight(
    packed: Tensor, shape: torch.Size, amax: Tensor, num_bits: Bits, block: tuple[int, int] | None = None
) -> Tensor:
    """Undo :func:`pack_weight`, up to rounding: float32 values that the quantizer does not change.

    Args:
        shape: of the weight.
        amax: its range: 0-d, or one dimension per weight dimension.
        num_bits, block: of its quantizer.

    Raises:
        CheckpointError: another type or size than ``pack_weight`` gives, or values that it never gives.
    """
    form = _storage(shape, num_bits)
    if (packed.dtype, tuple(packed.shape)) != form:
        raise CheckpointError(
            f"holds {packed.dtype} {list(packed.shape)}; {num_bits} bits of shape {list(shape)} need "
            f"{form[0]} {list(form[1])}"
        )
    out = torch.empty(shape)
    if not out.numel():
        return out
    rows = 2 * max(1, _CHUNK // (2 * out[0].numel()))  # an even number of 4-bit values fills its bytes
    for start in range(0, shape[0], rows):
        part = out[start : start + rows]
        first, stop = start * out[0].numel(), start * out[0].numel() + part.numel()
        if form[0] == torch.uint8:
            q = ops.unpack_int4(packed[first // 2 : (stop + 1) // 2], part.shape)
        else:
            q = packed[start : start + rows]
        ranges = amax[start : start + rows] if amax.dim() and amax.shape[0] == shape[0] else amax
        part.copy_(_dequantize(q, ranges, num_bits, block))
    return out


def _storage(shape: torch.Size, num_bits: Bits) -> tuple[torch.dtype, tuple[int, ...]]:
    if isinstance(num_bits, tuple):
        return _FLOAT8[FLOAT_FORMATS[num_bits]], tuple(shape)
    packed = (torch.uint8, ((shape.numel() + 1) // 2,))
    return packed if num_bits <= 4 else (ops.integer_dtype(num_bits), tuple(shape))


def _dequantize(q: Tensor, amax: Tensor, num_bits: Bits, block: tuple[int, int] | None) -> Tensor:
    shape, rank = q.shape, q.dim()
    if isinstance(num_bits, int):
        bound = 2 ** (num_bits - 1) - 1
        if not -bound <= int(q.amin()) <= int(q.amax()) <= bound:
            raise CheckpointError(f"holds integers beyond -{bound} to {bound}, the range of {num_bits} bits")
    if block is not None:
        q, amax = blocks.split(q, block), blocks.spread(amax, block, rank)
    if isinstance(num_bits, tuple):
        return _from_float8(q, amax, FLOAT_FORMATS[num_bits]).reshape(shape)
    return ops.dequantize(q, amax, num_bits).reshape(shape)


def _scale(amax: Tensor, fmt: str) -> Tensor:
    return torch.where(amax <= ops.TINY, 1.0, divide(ops.FP8_LIMIT[fmt], amax))


def _to_float8(x: Tensor, amax: Tensor, fmt: str) -> Tensor:
    """The floats that ``ops.fake_quantize_fp8`` rounds to, before it divides by the scale."""
    top = ops.FP8_LIMIT[fmt] * (amax > ops.TINY)
    y = (x * _scale(amax, fmt)).clamp(-top, top).to(_FLOAT8[fmt]).float()
    y = y.masked_fill(
        (x.abs() < ops.TINY) | (y == 0), 0.0
    )  # one zero, as integers have: its sign says nothing
    return y.to(_FLOAT8[fmt])


def _from_float8(stored: Tensor, amax: Tensor, fmt: str) -> Tensor:
    values = stored.float()
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(f"holds NaN or infinity, which no weight in {fmt} has")
    y = values / _scale(amax, fmt)
    # The quantizer turns what is below TINY into zero; a value that it rounded to from above stays above.
    small = (values != 0) & (y.abs() < ops.TINY)
    return torch.where(small, torch.copysign(torch.tensor(ops.TINY), y), y)


# ---- columns ----


def column_of(key: str) -> str:
    """Choose the column of a tensor: ranges of weights have one, ranges of activations another."""
    ending = "_weight_quantizer._amax"
    return f"*.{ending if key.endswith(ending) else key.rpartition('.')[2]}"


def columns(model: nn.Module) -> dict[str, Shapes]:
    """List the columns of a model's packed file: the tensors in each, in order, with their shapes."""
    packed = weight_quantizers(model)
    shapes: dict[str, Shapes] = {}
    for key, (shape, dtype) in sorted(expected_tensors(model).items()):
        if key not in packed and dtype == torch.float32:
            shapes.setdefault(column_of(key), {})[key] = shape
    return shapes


def packed_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pack the state of a model: packed weights, columns, and what fits in neither.

    Raises:
        CheckpointError: a weight that can't be packed, or a range of another shape than the quantizer has.
    """
    left = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    tensors: dict[str, Tensor] = {}
    for key, (_, quantizer) in weight_quantizers(model).items():
        try:
            tensors[key] = pack_weight(left.pop(key), quantizer)
        except CheckpointError as error:
            raise CheckpointError(f"{key} {error}") from error
    for column, shapes in columns(model).items():
        for key, shape in shapes.items():
            if left[key].numel() != torch.Size(shape).numel():
                raise CheckpointError(f"{key} has the shape {list(left[key].shape)}, not {list(shape)}")
        tensors[column] = _narrow(torch.cat([left.pop(key).reshape(-1) for key in shapes]))
    return {**tensors, **left}


def _narrow(values: Tensor) -> Tensor:
    half = values.half()
    same = torch.equal(half.float().view(torch.int32), values.view(torch.int32))
    return half if same else values


def expand(column: str, values: Tensor, shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
    """Unpack the tensors of a column, float32.

    Raises:
        CheckpointError: another type, or another number of values than the model needs.
    """
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    if values.dtype not in (torch.float16, torch.float32) or list(values.shape) != [sum(sizes)]:
        raise CheckpointError(
            f"column {column} holds {values.dtype} {list(values.shape)}; the model needs float16 or float32 "
            f"{[sum(sizes)]}"
        )
    parts = values.split(sizes)
    for (key, shape), part in zip(shapes.items(), parts, strict=True):
        # A tensor of its own: a view would keep, and save, the whole column.
        yield key, part.to(torch.float32, copy=True).reshape(shape)
