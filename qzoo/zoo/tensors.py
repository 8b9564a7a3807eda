"""Assign tensors to models: strictly, completely, without a copy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from qzoo.errors import CheckpointError
from qzoo.quant.nn import TensorQuantizer
from qzoo.quantizers import quantizers, weight_quantizers

_SHOWN = 8


def check_ranges(model: nn.Module, enabled_only: bool = False) -> None:
    """Check that quantizers a target may switch on have a finite, non-negative range, or both ends of one.

    Args:
        enabled_only: demand one only of the quantizers that are on.

    Raises:
        CheckpointError: names those that do not.
    """
    by_name = quantizers(model)
    wanted = [n for n, q in by_name.items() if not q.switches.disabled or (q.role and not enabled_only)]
    missing = [name for name in wanted if by_name[name].amax is None]
    if missing:
        raise CheckpointError(
            f"no range (amax) in {listed(missing)}; run qzoo.calibrate(model, loader) first"
        )
    _check_limits({name: by_name[name] for name in wanted if by_name[name].two_ended})
    ranges = {name: q.amax for name, q in by_name.items() if q.amax is not None}
    if not ranges:
        return
    # One reduction over all ranges: a look at each would dominate the loading time.
    flat = torch.cat([amax.reshape(-1) for amax in ranges.values()])
    if not bool((torch.isfinite(flat) & (flat >= 0)).all()):
        bad = [name for name, a in ranges.items() if not bool((torch.isfinite(a) & (a >= 0)).all())]
        raise CheckpointError(f"the range (amax) of {listed(bad)} is negative, infinite or NaN")


def _check_limits(two_ended: Mapping[str, TensorQuantizer]) -> None:
    missing = [name for name, q in two_ended.items() if q.limits is None]
    if missing:
        raise CheckpointError(
            f"no ends of the range (limits) in {listed(missing)}, which an affine scheme needs; run "
            "qzoo.calibrate(model, loader) first"
        )
    bad = [name for name, q in two_ended.items() if not _in_order(q.limits)]
    if bad:
        raise CheckpointError(
            f"the ends of the range (limits) of {listed(bad)} are out of order, infinite or NaN"
        )


def _in_order(limits: Tensor | None) -> bool:
    low, high = [0.0, 0.0] if limits is None else limits.tolist()
    return math.isfinite(low) and math.isfinite(high) and low <= high


def is_range(key: str) -> bool:
    """Check whether a key of a state dict is the range of a quantizer, which exists only once it is known."""
    return key.rpartition(".")[2] in ("_amax", "_limits")


def check_plain(state: Mapping[str, Tensor], where: str) -> None:
    """Check that tensors are dense and have values: torch's files hold sparse, nested and empty (meta) ones, too.

    Raises:
        CheckpointError: names those that are not.
    """
    odd = [key for key, t in state.items() if t.layout != torch.strided or t.is_nested or t.is_meta]
    if odd:
        raise CheckpointError(
            f"{where}: {listed(odd)} must be dense tensors with values; save tensor.to_dense()"
        )


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Check that no float tensor holds NaN or infinity, and no variance of a BatchNorm is negative: they give NaN.

    Raises:
        CheckpointError: names the tensors.
    """
    bad = []
    for key, tensor in state.items():
        if not tensor.is_floating_point() or not tensor.numel() or is_range(key):
            continue
        low, high = (float(end) for end in torch.aminmax(tensor.detach().float()))  # NaN if there is one
        if not (math.isfinite(low) and math.isfinite(high)) or (key.endswith("running_var") and low < 0):
            bad.append(key)
    if bad:
        raise CheckpointError(
            f"{listed(bad)} {'holds' if len(bad) == 1 else 'hold'} NaN, infinity or a negative variance, which "
            "would compute NaN; train or convert the model again (a mask of your own with infinities: register its "
            "buffer with persistent=False)"
        )


def assign_state(model: nn.Module, tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Make the tensors the model's parameters and buffers, and create the ranges of quantizers.

    The counter ``num_batches_tracked``, which old files lack and inference ignores, starts at 0 where
    missing.

    Args:
        model: may be on the meta device; afterwards nothing of it is.
        where: where the tensors come from, for messages.

    Raises:
        CheckpointError: lists keys that are missing, unexpected, misshaped, of another type, or not finite.
    """
    state = check_state(model, tensors, where)
    for name, quantizer in quantizers(model).items():
        if f"{name}._amax" in state:
            quantizer.reset_amax()  # loading creates the buffer, in the shape of what is loaded
    model.load_state_dict(state, strict=True, assign=True)
    left = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if left:
        raise CheckpointError(f"{where} gave no content for {listed(left)}")


def check_state(
    model: nn.Module, tensors: Iterable[tuple[str, Tensor]], where: str, *, ranges_too: bool = True
) -> dict[str, Tensor]:
    """Return the tensors as a state dict of the model; it stays as it is.

    Args:
        ranges_too: those that the model has are missing where the tensors lack them.

    Raises:
        CheckpointError: as :func:`assign_state`.
    """
    expected, required = expected_tensors(model), set(model.state_dict())
    ranges = {f"{name}._amax" for name in quantizers(model)}
    if not ranges_too:
        required -= ranges | {f"{name}._limits" for name in quantizers(model)}
    state: dict[str, Tensor] = {}
    unexpected, misshaped, other_type, seen = [], [], [], set()
    for key, tensor in tensors:
        seen.add(key)
        if key not in expected:
            unexpected.append(key)
            continue
        wanted, dtype = expected[key]
        if key in ranges and wanted.count(1) == len(wanted) and tensor.numel() == 1:
            wanted = tuple(tensor.shape)  # one range in all: the number of ones in its shape does not matter
        if tuple(tensor.shape) != wanted:
            misshaped.append(f"{key} {_describe(tensor)} (the model has {list(wanted)} {dtype})")
            continue
        if tensor.dtype != dtype:
            other_type.append(f"{key} {tensor.dtype} (the model has {dtype})")
            continue
        # Some files hold transposed views; another layout would give other rounding errors, and be slower.
        state[key] = tensor.contiguous()
    missing = []
    for key in required - seen:
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros((), dtype=torch.int64)
        else:
            missing.append(key)
    problems = {
        "missing": sorted(missing),
        "unexpected": unexpected,
        "misshaped": misshaped,
        "of another type": other_type,
    }
    if any(problems.values()):
        text = "; ".join(f"{kind}: {listed(keys)}" for kind, keys in problems.items() if keys)
        raise CheckpointError(f"{where} does not fit {type(model).__name__}: {text}")
    try:
        check_finite(state)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    return state


def expected_tensors(model: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """List shape and type of all tensors that a checkpoint of the model may hold: its state, and all ranges."""
    tensors = {key: (tuple(value.shape), value.dtype) for key, value in model.state_dict().items()}
    named = {q: f"{name}._amax" for name, q in quantizers(model).items()}
    tensors.update(dict.fromkeys(named.values(), ((), torch.float32)))
    two_ended = [f"{name}._limits" for name, q in quantizers(model).items() if q.two_ended]
    tensors.update(dict.fromkeys(two_ended, ((2,), torch.float32)))
    for weight, quantizer in weight_quantizers(model).values():
        tensors[named[quantizer]] = (_range_shape(weight, quantizer), torch.float32)
    return tensors


def _range_shape(weight: Tensor, quantizer: TensorQuantizer) -> tuple[int, ...]:
    """Shape of a weight's range: the sizes of the kept axes, groups of the blocked one, ones elsewhere."""
    axis, rank = quantizer.axis, weight.dim()
    axes = set() if axis is None else {a % rank for a in ((axis,) if isinstance(axis, int) else axis)}
    shape = [n if i in axes else 1 for i, n in enumerate(weight.shape)]
    if quantizer.block is not None:
        blocked, size = quantizer.block[0] % rank, quantizer.block[1]
        shape[blocked] = weight.shape[blocked] // size
    return tuple(shape) if axes or quantizer.block is not None else ()


def range_fits(amax: Tensor, weight: Tensor, quantizer: TensorQuantizer) -> bool:
    """Check whether a range is a single one, or has the shape that the quantizer gives it."""
    return amax.numel() == 1 or tuple(amax.shape) == _range_shape(weight, quantizer)


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"


def listed(names: list[str]) -> str:
    """List the first few names, for a message."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
