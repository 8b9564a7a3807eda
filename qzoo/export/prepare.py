"""The model as it will be written: a copy with the target's placement, BatchNorm folded, weights on their levels."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from qzoo.errors import ExportError
from qzoo.export.blocks import store_blocks_
from qzoo.export.formats import GELU_OPSET, choose_opset, kept_axes
from qzoo.export.order import Order, check_output, plain_module
from qzoo.quant import ops
from qzoo.quant.fold import attach, fold_batchnorm_
from qzoo.quant.nn import QuantMultiheadAttention, TensorQuantizer
from qzoo.quant.nn.modules._utils import input_quantizer_of, replace_weight_quantizer, weight_quantizer_of
from qzoo.quantizers import active_quantizers, switch_target

_INT32_ROOM = 2.0**30  # runtimes round a bias to int32 in units of input scale x weight scale


@dataclass(frozen=True)
class Draft:
    """Copy of a model that computes what the exported file will.

    Attributes:
        module: on the CPU, in eval mode, float32 where anything is quantized.
        image: the example in the type of the module.
        opset: that has its formats and operators.
        quantized: whether any quantizer is on.
    """

    module: nn.Module
    image: Tensor
    opset: int
    quantized: bool


def prepare(order: Order) -> Draft:
    """Copy the model, switch the target's quantizers on, fold BatchNorm, and put weights on their levels.

    Raises:
        ExportError: quantizers that have no range, are still calibrating, or can't be written; an opset that has not
            all formats; a module that does not run the example, or gives no tensor.
    """
    ready = copy_for(order.model, order.target)
    if order.reduce_range:
        reduce_weights_(ready)
    quantized = is_quantized(ready)
    image = order.image.float() if quantized else order.image
    opset = choose_opset(ready, order.target, order.opset, order.weights, order.half)
    operators = check_output(ready, image)
    if order.opset is None and "aten::gelu" in operators:
        opset = max(opset, GELU_OPSET)
    fold_and_store_(ready, image, half=order.half)
    return Draft(ready, image, opset, quantized)


def copy_for(model: nn.Module, target: str) -> nn.Module:
    """Copy a model to the CPU, in eval mode, with the target's quantizers on; float32 where anything is quantized.

    Scales are float32, and int8 kernels make float32 of their sums, so a half-precision model is widened.

    Raises:
        ExportError: the module can't be copied, or its quantizers can't be written.
    """
    try:
        ready = copy.deepcopy(plain_module(model)).cpu().eval()
    except (RuntimeError, ValueError, TypeError) as error:  # locks, tensors with a history, a deployed model
        raise ExportError(
            f"{type(model).__name__} can't be copied, which export and check begin with: {error}"
        ) from error
    switch_target(ready, target)
    check_ranges(ready)
    return ready.float() if is_quantized(ready) else ready


def reduce_weights_(ready: nn.Module) -> None:
    """Give weights of 8-bit integers 7 bits, in place: two products with a uint8 then fit into 16 bits."""
    for module in ready.modules():
        quantizer = weight_quantizer_of(module)
        if quantizer is not None and quantizer.num_bits == 8:
            quantizer.num_bits = 7


@torch.no_grad()
def fold_and_store_(ready: nn.Module, example: Tensor, *, half: bool = False) -> nn.Module:
    """Fold BatchNorm and put weights on their levels, in place. Returns the model.

    Args:
        half: widen ranges until their steps are float16 numbers, before weights are rounded to them.

    Raises:
        ExportError: a BatchNorm that can't be folded, or quantizers that can't be written.
    """
    _fold(ready, example[:1])
    if half:
        _round_steps_up(ready)
    uses = _Uses(ready, example[:1].float() if is_quantized(ready) else example[:1])
    for module in list(ready.modules()):
        quantizer = weight_quantizer_of(module)
        if quantizer is not None and quantizer in uses.ran:
            _store_weight(module, quantizer, shared=uses.is_shared(module, quantizer))
    _clip_to_narrow_range(ready)
    return ready


def _round_steps_up(ready: nn.Module) -> None:
    """Give every range the least step that is a float16 number and no smaller, so that nothing more is clipped."""
    for quantizer in active_quantizers(ready).values():
        amax = quantizer.amax
        if amax is None or quantizer.block is not None:
            continue
        step = amax.double() / quantizer.maxbound
        near = step.half()
        higher = torch.nextafter(near, torch.full_like(near, torch.inf))
        near = torch.where(near.double() < step, higher, near)
        quantizer.reset_amax()
        quantizer.amax = (near.double() * quantizer.maxbound).float().numpy()


def _store_weight(layer: Any, quantizer: TensorQuantizer, shared: bool) -> None:
    """Put a layer's weight on its levels, in place; a copy of it where something else reads the weight as it is."""
    if quantizer.block is not None:
        store_blocks_(layer, quantizer)
        return
    weight = _parameters(layer)[0]
    if shared:
        weight = weight.detach().clone()
        replace_weight_quantizer(layer, _OwnWeight(weight, quantizer))
    if isinstance(quantizer.num_bits, int):
        _put_on_levels(layer, quantizer, quantizer.num_bits, weight)
    else:
        weight.copy_(quantizer(weight))


class _OwnWeight(nn.Module):
    """Stands for a weight quantizer: quantizes a weight of its own, whatever it is given."""

    weight: Tensor

    def __init__(self, weight: Tensor, quantizer: TensorQuantizer) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.quantizer = quantizer

    def forward(self, weight: Tensor) -> Tensor:
        result: Tensor = self.quantizer(self.weight)
        return result


class _Uses(TorchFunctionMode):
    """Who reads the weights of quantized layers in one forward pass.

    A layer's weight may be read past its quantizer: torchvision's Swin calls ``F.linear(x, self.qkv.weight)``, and an
    embedding may share its weight with the classifier.

    Attributes:
        ran: the weight quantizers that were called.
    """

    def __init__(self, model: nn.Module, image: Tensor) -> None:
        super().__init__()
        self.ran: set[nn.Module] = set()
        self._readers: Counter[int] = Counter()
        self._inside = 0
        layers = [(m, q) for m in model.modules() if (q := weight_quantizer_of(m)) is not None and q.is_on]
        self._weights = {id(p) for m, _ in layers for p in m.parameters(recurse=False)}
        quantizers = {quantizer: None for _, quantizer in layers}
        handles = [q.register_forward_pre_hook(self._enter) for q in quantizers]
        handles += [q.register_forward_hook(self._leave) for q in quantizers]
        with attach(handles), self:
            model(image)

    def is_shared(self, layer: Any, quantizer: TensorQuantizer) -> bool:
        """Check whether anything but this quantizer reads the layer's weight."""
        return self._readers[id(_parameters(layer)[0])] > 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._inside and any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            self._readers.update({id(leaf) for leaf in tree_leaves((args, kwargs))} & self._weights)
        return result

    def _enter(self, quantizer: nn.Module, args: tuple[Any, ...]) -> None:
        if quantizer not in self.ran:  # a layer that is called twice reads its weight once
            self._readers[id(args[0])] += 1
        self.ran.add(quantizer)
        self._inside += 1

    def _leave(self, quantizer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._inside -= 1


def _clip_to_narrow_range(ready: nn.Module) -> None:
    """Clip what an activation quantizer of narrow range is given: ONNX's integers have one level more below zero."""
    weights = {id(weight_quantizer_of(module)) for module in ready.modules()}
    for quantizer in active_quantizers(ready).values():
        amax, bits = quantizer.amax, quantizer.num_bits
        narrow = quantizer.narrow_range and not quantizer.unsigned and bits in (8, 16)
        if narrow and id(quantizer) not in weights and amax is not None and amax.numel() == 1:
            quantizer.register_forward_pre_hook(_Clip(amax.item()))


@dataclass(frozen=True)
class _Clip:
    """A hook that clips a module's first argument to ``-limit`` to ``limit``."""

    limit: float

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].clamp(-self.limit, self.limit), *args[1:])


def _fold(ready: nn.Module, image: Tensor) -> None:
    try:
        fold_batchnorm_(ready, image.float() if is_quantized(ready) else image)
    except Exception as error:  # a hook of a layer may raise anything
        raise ExportError(f"{type(ready).__name__} can't be exported: {error}") from error
    # The BatchNorm has given each range over input channels one over output channels beside it.
    names = [n for n, q in active_quantizers(ready).items() if q.block is None and len(kept_axes(q)) > 1]
    if names:
        raise ExportError(
            f"BatchNorm can't be folded into a layer with a weight range per input channel: {', '.join(names)}; "
            "use a range per output channel (axis=0), and calibrate again"
        )


def is_quantized(model: nn.Module) -> bool:
    """Check whether any quantizer of the model is on."""
    return any(isinstance(m, TensorQuantizer) and m.is_on for m in model.modules())


def check_ranges(model: nn.Module) -> None:
    """Raise ExportError that names the quantizers without a finite range, or that are still calibrating."""
    quantizers = {
        n: m for n, m in model.named_modules() if isinstance(m, TensorQuantizer) and not m.switches.disabled
    }
    active = {n: q for n, q in quantizers.items() if q.is_on}
    problems = {
        "have no range (amax); calibrate the model first, or load a calibrated checkpoint": [
            n for n, q in active.items() if q.amax is None and not q.learns_amax
        ],
        "have a zero point, but not both ends of the range (limits); calibrate the model with this scheme first": [
            n for n, q in active.items() if q.affine and q.limits is None
        ],
        "have a range that is not finite; calibrate again": [
            n
            for n, q in active.items()
            if any(r is not None and not r.isfinite().all() for r in (q.amax, q.limits))
        ],
        "are still calibrating; call disable_calib() first": [
            n for n, q in quantizers.items() if q.switches.calib
        ],
        "give integers, not fake-quantized values; use fake_quant=True": [
            n for n, q in active.items() if not q.fake_quant
        ],
    }
    for text, names in problems.items():
        if names:
            more = f" and {len(names) - 6} more" if len(names) > 6 else ""
            raise ExportError(
                f"{len(names)} of {len(active)} quantizers {text}: {', '.join(names[:6])}{more}"
            )


def _put_on_levels(layer: Any, quantizer: TensorQuantizer, bits: int, weight: Tensor) -> None:
    """Replace a weight, the layer's or a copy, by its quantized value: every way of rounding finds the same integers.

    ONNX divides by ``amax / bound`` where the simulation multiplies by ``bound / amax``, and its int8 reaches -128.
    """
    amax = quantizer.amax
    if amax is None:
        raise ExportError(
            f"{quantizer.name or 'a weight quantizer'} needs one fixed range per channel or tensor"
        )
    narrow = quantizer.narrow_range
    weight.copy_(ops.fake_quantize(weight, amax, bits, quantizer.unsigned, narrow))
    wide = torch.maximum(amax, _smallest_range(layer, quantizer, amax))
    if not torch.equal(wide, amax):
        weight.copy_(ops.fake_quantize(weight, wide, bits, quantizer.unsigned, narrow))
    # The file's weights are int8 (int16) whatever the bits: the same step, of which only the inner levels occur.
    quantizer.num_bits = 8 if bits <= 8 else 16
    quantizer.reset_amax()
    quantizer.amax = (wide * (quantizer.maxbound / ops.bounds(bits, quantizer.unsigned)[1])).numpy()


def _parameters(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer; of attention those of its three projections together.

    Raises:
        ExportError: a layer with several weights.
    """
    if isinstance(layer, QuantMultiheadAttention):
        return layer.in_proj_weight, layer.in_proj_bias
    if not isinstance(getattr(layer, "weight", None), Tensor):
        raise ExportError(
            f"{type(layer).__name__} has several quantized weights, which are not exported; disable its quantizers"
        )
    return layer.weight, layer.bias


def _smallest_range(layer: Any, quantizer: TensorQuantizer, amax: Tensor) -> Tensor:
    """The least weight range of each channel with which the bias fits an int32.

    A channel of (nearly) zero weights is all bias, and its tiny range would make the bias overflow in runtimes that
    round it to multiples of input scale x weight scale. A channel of exactly zero weights takes the widest range.
    """
    dead = torch.where(amax <= ops.TINY, amax.max(), torch.zeros_like(amax))
    source, bias = input_quantizer_of(layer), _parameters(layer)[1]
    if bias is None or source is None or not source.is_on or source.amax is None:
        return dead
    if amax.dim() and amax.numel() != bias.numel():
        return dead
    between = source.step_size if source.affine else None
    step = source.amax.max().clamp(min=ops.TINY) / source.maxbound if between is None else between
    least = bias.abs() * quantizer.maxbound / (step * _INT32_ROOM)
    return torch.maximum(dead, least.reshape(amax.shape) if amax.dim() else least.max())
