"""Fold BatchNorm into the layer before it, without changing a single quantized weight; fold weight
standardization into the weight.

In inference BatchNorm multiplies each channel by ``g = gamma / sqrt(var + eps)`` and adds a constant. With symmetric
ranges per output channel the factor moves into the range: weight ``w g`` with range ``amax |g|`` has the integers of
``w`` with range ``amax``, up to the sign of g. Runtimes need this: a BatchNorm between a quantized convolution and
the next Q keeps the convolution in floating point.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import conv
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from qzoo.errors import QuantizationError
from qzoo.quant import ops
from qzoo.quant.nn import TensorQuantizer

_PART = 2**18  # weights that are scaled at a time
RESHAPES = (Tensor.flatten, Tensor.reshape, Tensor.view, torch.flatten, torch.reshape)
_TOLERANCE = 1e-3  # of the largest output; the fold itself is exact up to float32 rounding


class Pair(NamedTuple):
    """Names of a folded layer and of the BatchNorm that it took up."""

    layer: str
    norm: str


@dataclass
class _Trace:
    """One forward pass: who made which tensor, and how many operations read it."""

    producer: dict[int, str] = field(default_factory=dict)
    input_of: dict[str, Tensor] = field(default_factory=dict)
    output_of: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[int, Tensor] = field(default_factory=dict)  # of an output: the matrix that it was flattened to
    calls: Counter[str] = field(default_factory=Counter)
    readers: Counter[int] = field(default_factory=Counter)


class _CountReaders(TorchFunctionMode):
    """Counts the operations that read a recorded tensor and make a tensor of it (not ``x.dim()`` and the like)."""

    def __init__(self, trace: _Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            read = {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            self.trace.readers.update(read & self.trace.producer.keys())
        if func in RESHAPES and args and id(args[0]) in self.trace.producer:
            self._note_rows(args[0], result)
        return result

    def _note_rows(self, output: Tensor, matrix: Tensor) -> None:
        if output.dim() > 2 == matrix.dim() and output.shape[-1] == matrix.shape[-1]:
            self.trace.rows[id(output)] = matrix
            self.trace.producer[id(matrix)] = self.trace.producer[id(output)]


@torch.no_grad()
def fold_batchnorm_(model: nn.Module, example: Tensor) -> list[Pair]:
    """Fold every BatchNorm whose input is the output of one convolution or linear layer, in place.

    The pairs are found by running ``example``: the very tensor that the layer returned must enter the BatchNorm and
    nothing else; that of a linear layer may be flattened to a matrix before (``norm(linear(x).flatten(0, 1))``, as
    LeViT has it). The BatchNorm is replaced by ``nn.Identity`` (timm's by its activation), the layer gets a bias.
    Works for grouped, depthwise and transposed convolutions, quantized or not; each pair is checked by running both
    forms on the layer's input.
    Left as they are: layers that are called twice or share their weight, transposed convolutions with groups,
    BatchNorms without running statistics.

    Args:
        example: an input batch of any size that the model accepts.

    Returns:
        The folded pairs, in the order in which the layers ran.

    Raises:
        QuantizationError: a pair whose fold would change the result, such as a weight range that is learned.
    """
    modules = dict(model.named_modules())
    with evaluating(model):
        trace = _run(model, modules, example)
        pairs = list(_pairs(modules, trace))
        inputs = {pair.layer: trace.input_of[pair.layer] for pair in pairs}
        del trace  # all activations of the network; what follows reuses their memory
        for pair in pairs:
            layer, norm, x = modules[pair.layer], modules[pair.norm], inputs.pop(pair.layer)
            rest = _rest(norm)
            with _unquantized(rest):
                before = norm(_rows(layer, layer(x)))
                _fold_pair(pair.layer, layer, norm)
                _check_pair(pair, before, rest(_rows(layer, layer(x))))
            model.set_submodule(pair.norm, rest)
    return pairs


def standardized_types() -> tuple[type[nn.Module], ...]:
    """List timm's convolutions with weight standardization, if timm has been imported."""
    layers = sys.modules.get("timm.layers")
    names = ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")
    return () if layers is None else tuple(getattr(layers, name) for name in names)


@torch.no_grad()
def fold_weight_standardization_(model: nn.Module) -> list[str]:
    """Replace convolutions that standardize their weight in every forward by plain ones with that weight, in place.

    For timm's ``StdConv2d`` and ``ScaledStdConv2d`` (NFNet, BiT), also with "same" padding. In inference their weight
    is constant, so the outputs stay as they are, to the bit; afterwards :func:`qzoo.quant.quantize_` takes the layers.
    Training them further is another training, without standardization.

    Paper: "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization" (Qiao et al., 2019,
    arXiv:1903.10520).

    Returns:
        The names of the replaced modules.

    Raises:
        QuantizationError: ``model`` itself is such a layer (its owner has to replace it).
    """
    kinds = standardized_types()
    if isinstance(model, kinds):
        raise QuantizationError(
            f"the model is itself a {type(model).__name__} and can't be replaced in place; put it into an nn.Sequential"
        )
    plain: dict[nn.Module, nn.Module] = {}
    names = []
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, kinds):
            plain[layer] = plain[layer] if layer in plain else _with_constant_weight(layer)
            model.set_submodule(name, plain[layer])
            names.append(name)
    return names


@torch.no_grad()
def fold_parametrizations_(model: nn.Module) -> list[str]:
    """Replace weights that are computed in every forward by plain parameters with their values, in place.

    Those of ``torch.nn.utils.parametrize`` (weight and spectral norm among them), of weight and spectral norm by
    hooks, and of pruning. In inference they are constant, so the outputs stay as they are, to the bit; afterwards
    :func:`qzoo.quant.quantize_` takes the layers. Training them further is another training, without what was folded.

    Args:
        model: in eval mode.

    Returns:
        The names of the parameters.
    """
    names = []
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            values = {key: getattr(module, key) for key in module.parametrizations}  # type: ignore[union-attr]
            # By hand: torch would change the class, which a copy has in common with the original.
            module.__class__ = type(module).__bases__[0]
            del module._modules["parametrizations"]
            for key, value in values.items():
                module.register_parameter(key, nn.Parameter(value.detach().clone()))
                names.append(f"{name}.{key}".lstrip("."))
        for hook in list(module._forward_pre_hooks.values()):
            remove = next((remove for kind, remove in _BY_HOOKS.items() if isinstance(hook, kind)), None)
            if remove is not None:
                key = hook._tensor_name if isinstance(hook, prune.BasePruningMethod) else hook.name
                remove(module, key)
                names.append(f"{name}.{key}".lstrip("."))
    return names


_BY_HOOKS: dict[type, Callable[..., Any]] = {
    WeightNorm: remove_weight_norm,
    SpectralNorm: remove_spectral_norm,
    prune.BasePruningMethod: prune.remove,
}


def _with_constant_weight(layer: Any) -> nn.Module:
    same = getattr(layer, "same_pad", False)
    kind = sys.modules["timm.layers"].Conv2dSame if same else conv.Conv2d
    new: nn.Module = kind(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        stride=layer.stride,
        padding=0 if same else layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        bias=layer.bias is not None,
        device="meta",
    )
    gain = (layer.gain * layer.scale).view(-1) if hasattr(layer, "gain") else None
    rows = layer.weight.reshape(1, layer.out_channels, -1)
    weight = F.batch_norm(rows, None, None, gain, training=True, momentum=0.0, eps=layer.eps)
    new.weight = nn.Parameter(weight.reshape_as(layer.weight), layer.weight.requires_grad)
    new.bias = layer.bias
    return new.train(layer.training)


def _pairs(modules: dict[str, nn.Module], trace: _Trace) -> Iterator[Pair]:
    """Layers with the BatchNorm that alone reads their output."""
    norm_of = {
        id(trace.input_of[name]): name
        for name, m in modules.items()
        if _has_statistics(m) and trace.calls[name] == 1
    }
    uses = Counter(id(m.weight) for m in modules.values() if isinstance(m, _ConvNd | nn.Linear))
    for name, output in trace.output_of.items():
        layer = modules[name]
        entered = trace.rows.get(id(output), output)
        norm = norm_of.get(id(entered))
        if norm is None or not isinstance(layer, _ConvNd | nn.Linear) or not _foldable(layer, entered):
            continue
        once = trace.readers[id(output)] == trace.readers[id(entered)] == trace.calls[name] == 1
        if once and uses[id(layer.weight)] == 1:
            yield Pair(name, norm)


def _rows(layer: nn.Module, output: Tensor) -> Tensor:
    """What enters the BatchNorm: of a linear layer a matrix."""
    return output.flatten(0, -2) if isinstance(layer, nn.Linear) else output


def _rest(norm: nn.Module) -> nn.Module:
    """What a BatchNorm does beyond normalizing: timm's have dropout and activation as children, in this order."""
    children = list(norm.children())
    return nn.Sequential(*children) if children else nn.Identity()


@contextmanager
def _unquantized(activation: nn.Module) -> Iterator[None]:
    """No quantizer of the activation rounds within: a difference in the last place would become one of a level."""
    quantizers = [module for module in activation.modules() if isinstance(module, TensorQuantizer)]
    before = [quantizer.switches for quantizer in quantizers]
    for quantizer in quantizers:
        quantizer.switches = quantizer.switches._replace(quant=False, clip=False)
    try:
        yield
    finally:
        for quantizer, switches in zip(quantizers, before, strict=True):
            quantizer.switches = switches


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def _foldable(layer: nn.Module, output: Tensor) -> bool:
    if isinstance(layer, _ConvTransposeNd):
        return layer.groups == 1  # with groups, the channels of a group share one range
    # BatchNorm normalizes dim 1, which is a linear layer's output only in a matrix.
    return isinstance(layer, _ConvNd) or output.dim() == 2


def _run(model: nn.Module, modules: dict[str, nn.Module], example: Tensor) -> _Trace:
    trace = _Trace()

    def record(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            trace.calls[name] += 1
            if isinstance(output, Tensor) and args and isinstance(args[0], Tensor):
                trace.input_of[name], trace.output_of[name] = args[0], output
                if not isinstance(module, _BatchNorm):
                    trace.producer[id(output)] = name

        return hook

    watched = {n: m for n, m in modules.items() if isinstance(m, _ConvNd | nn.Linear | _BatchNorm)}
    hooks = [module.register_forward_hook(record(name)) for name, module in watched.items()]
    with attach(hooks), _CountReaders(trace):
        result = model(example)
    trace.readers.update(id(leaf) for leaf in tree_leaves(result) if id(leaf) in trace.producer)
    return trace


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode for a ``with`` block; afterwards each module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def attach(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Attach hooks for a ``with`` block; they are removed afterwards, also after an error."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _fold_pair(name: str, layer: Any, norm: Any) -> None:
    gamma = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
    beta = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias
    g = gamma.double() / (norm.running_var.double() + norm.eps).sqrt()
    old_bias = 0.0 if layer.bias is None else layer.bias.double()
    bias = (old_bias - norm.running_mean.double()) * g + beta.double()

    axis = 1 if isinstance(layer, _ConvTransposeNd) else 0
    factor = g.reshape([-1 if d == axis else 1 for d in range(layer.weight.dim())])
    quantizer = getattr(layer, "_weight_quantizer", None)
    if isinstance(quantizer, TensorQuantizer) and (quantizer.amax is not None or quantizer._learn_amax):
        _scale_quantized(name, quantizer, layer.weight, factor, axis)
    else:
        layer.weight.copy_(layer.weight.double() * factor)
    if layer.bias is None:
        layer.bias = nn.Parameter(
            torch.empty_like(bias, dtype=layer.weight.dtype), layer.weight.requires_grad
        )
    layer.bias.copy_(bias)


def _scale_quantized(
    name: str, quantizer: TensorQuantizer, weight: Tensor, factor: Tensor, axis: int
) -> None:
    """Scale the weight in place, its integers unchanged, and give the quantizer the range that fits it."""
    amax, bits = quantizer.amax, quantizer.num_bits
    if amax is None or quantizer.block is not None or quantizer.pre_quant_scale is not None:
        raise QuantizationError(
            f"BatchNorm after {name} can't be folded: its weight range is learned, in blocks, or has a "
            "pre_quant_scale; give the weight one fixed range per output channel"
        )
    if amax.dim() == 1:
        amax = amax.reshape(factor.shape)
    scaled = (amax.double() * factor.abs()).float()
    amax = amax.expand(scaled.shape)
    step = max(1, _PART * weight.shape[axis] // weight.numel())
    # In parts: the temporaries are in double precision, and would take several times the memory of a large weight.
    for old, low, high, g in zip(*(t.split(step, axis) for t in (weight, amax, scaled, factor)), strict=True):
        new = (old.double() * g).to(old.dtype)
        if isinstance(bits, int):
            codes = ops.quantize(old, low, bits, quantizer.unsigned, quantizer.narrow_range)
            codes = (codes.double() * g.sign()).to(old.dtype)
            # The product with g is rounded once more than the division by the range: a weight halfway between two
            # levels may tip over. Such a weight is put onto its level.
            moved = ops.quantize(new, high, bits, quantizer.unsigned, quantizer.narrow_range) != codes
            level = (codes.double() * high.double() / quantizer.maxbound).to(new.dtype)
            new = torch.where(moved & (high > ops.TINY), level, new)
        old.copy_(new)
    quantizer.reset_amax()
    quantizer._axis = axis
    quantizer.amax = scaled.cpu().numpy()
    quantizer.to(weight.device)


def _check_pair(pair: Pair, before: Tensor, after: Tensor) -> None:
    limit = _TOLERANCE * before.abs().max().item() + 1e-6
    worst = (before - after).abs().max().item() if before.shape == after.shape else float("inf")
    if not worst <= limit:
        raise QuantizationError(
            f"folding {pair.norm} into {pair.layer} changes the result by {worst:.3g} (allowed {limit:.3g}): "
            "does the layer have a forward or hooks of its own, or a weight at -128, which has no opposite "
            "(use narrow_range)?"
        )
