"""``qzoo.quantize``: any float network as a quantized module of its own classes."""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.errors import ArgumentError, QuantizationError
from qzoo.placement.factory import factory_config, known_factory
from qzoo.placement.float_layers import keep_in_float
from qzoo.placement.groups import Classes
from qzoo.placement.scope import LAYERS, OUTPUT, Scope, Site, is_leaf, orders_learnt, scoped
from qzoo.placement.trace import Operation, Trace, Value, trace
from qzoo.placement.wants import Want, Wants, wants_of
from qzoo.quant.fold import attach, evaluating, fold_parametrizations_, fold_weight_standardization_
from qzoo.quant.nn import QuantMultiheadAttention, TensorQuantizer
from qzoo.quant.nn.modules._utils import QuantMixin
from qzoo.quant.swap import keep_from_fused_kernels, quantized_layer, replacement_of
from qzoo.quantizers import (
    activation_descriptor,
    adopt,
    device_of,
    float_layers,
    name_quantizers,
    quantizers,
    restore_switches,
    set_layer_bits,
    weight_descriptor,
    weight_quantizers,
)
from qzoo.runtimes.base import check_example
from qzoo.scheme import DEFAULT_TARGET, Scheme, as_scheme, target_named, with_target

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """Record of where :func:`qzoo.quantize` placed quantizers; the model has it as ``qzoo_placement``.

    Attributes:
        left: what stays in float although it was not excluded, with the reason, by name.
        unreached: layers that the forward pass does not reach in inference, such as an auxiliary head.
        excluded: layers that were left in float on request.
    """

    left: tuple[tuple[str, str], ...] = ()
    unreached: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()

    @property
    def reasons(self) -> list[tuple[str, str]]:
        """All that stays in float: names, each with the reason."""
        return [
            *self.left,
            *((name, "as asked for") for name in self.excluded),
            *((name, "which inference does not reach") for name in self.unreached),
        ]

    def __str__(self) -> str:
        return "\n".join(f"in float: {name}, {reason}" for name, reason in self.reasons)


def quantize(
    model: nn.Module,
    example: Tensor,
    scheme: bool | str | Scheme = "w8a8",
    target: str | None = None,
    *,
    exclude: str | Iterable[str] = (),
    factory: str = "",
) -> nn.Module:
    """Quantize any float model: copy it, with a quantizer wherever a runtime needs one.

    The model runs once on the example, in eval mode; every operation that is seen is looked up in the table of
    operators (:mod:`qzoo.runtimes.operators`), and gets quantizers with the roles of the zoo's own models
    (:mod:`qzoo.scheme`). Weighted layers become those of :mod:`qzoo.quant`. What a module computes between its
    children, such as the add of a residual block, gets quantizers as submodules of that module. Parameters keep their
    names. The ranges are still to be found, by :func:`qzoo.calibrate`.

    Args:
        model: a float module of one input, images, and one output, logits. It stays as it is.
        example: a batch of images of the size that the model is for; one image is enough.
        scheme: as ``quantize`` of :func:`qzoo.create_model`. A text gives activations zero points where the model
            computes SiLU or hard-swish, which symmetric ranges cost most; a Scheme is taken as it is.
        target: the runtime that the quantizers simulate; the Scheme's by default, else "onnxruntime".
        exclude: shell patterns on names of modules that stay in float with all below them: ``"head"``, ``"*.attn"``.
        factory: where the float model is from: ``"torchvision:NAME"``, ``"timm:NAME"``, or ``"FILE.py:FUNCTION"``.
            :func:`qzoo.save_pretrained` asks for it, as a checkpoint has to be built again; models of timm know theirs.

    Returns:
        The quantized copy, in the mode of the model, with its :class:`Placement` as ``qzoo_placement`` and the Scheme
        as ``qzoo_scheme``; with a factory, also its :class:`~qzoo.config.Config` as ``qzoo_config``. What could not
        be placed is named in a warning.

    Raises:
        QuantizationError: a model that can't be copied, run on the example, or followed.
        ArgumentError: an unknown scheme or target, a pattern that names no module, or arguments of another type.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.SiLU(), torch.nn.Conv2d(8, 4, 1))
        >>> quantized = qzoo.quantize(network, torch.zeros(1, 1, 28, 28))
        >>> qzoo.calibrate(quantized, loader, progress=False).images
        16
    """
    chosen = _scheme(scheme, target)
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    return quantize_as(
        model, example, chosen, patterns, factory, choose_affine=not isinstance(scheme, Scheme)
    )


def quantize_as(
    model: nn.Module,
    example: Tensor,
    scheme: Scheme,
    exclude: tuple[str, ...],
    factory: str,
    *,
    choose_affine: bool,
) -> nn.Module:
    """Quantize by a scheme; :func:`quantize` behind its arguments, which see.

    Args:
        choose_affine: as of :func:`with_quantizers`.
    """
    network, image, result = with_quantizers(model, example, scheme, exclude, choose_affine=choose_affine)
    origin = factory or known_factory(model)
    if factory or (origin and image.dim() == 4 and result.dim() > 1):
        config = factory_config(origin, model, network.qzoo_scheme, image, result, exclude)  # type: ignore[arg-type]
        network.qzoo_config = config  # type: ignore[assignment]
    return network


def with_quantizers(
    model: nn.Module,
    example: Tensor,
    scheme: Scheme,
    exclude: tuple[str, ...] = (),
    *,
    choose_affine: bool = False,
) -> tuple[nn.Module, Tensor, Tensor]:
    """Copy a float model with quantizers; what :func:`quantize` does, but for the config.

    Args:
        choose_affine: activations have zero points if the model computes SiLU or hard-swish
            (:attr:`qzoo.placement.trace.Trace.leans`), whatever the scheme says.

    Returns:
        The copy, the image that the model ran on, and its result.
    """
    _check(model, example)
    excluded = _matching(model, exclude)
    quantized = _copy(model)
    keep_from_fused_kernels(quantized)
    fold_weight_standardization_(quantized)
    with evaluating(quantized):
        fold_parametrizations_(quantized)
    image = example[:1].detach().to(device_of(quantized), _dtype(quantized))
    with evaluating(quantized):
        graph = _trace(quantized, image)
        if choose_affine:
            scheme = replace(scheme, affine=graph.leans)
        builder = _Builder(quantized, graph, wants_of(graph, excluded), scheme, excluded)
        builder.build()
    network = keep_in_float(set_layer_bits(builder.model, scheme), scheme, image)
    name_quantizers(network)
    _check_same(network, image, graph.result)
    placement = builder.placement()
    if placement.left:
        text = "; ".join(f"{name}: {reason}" for name, reason in placement.left)
        logger.warning("%s: left in float: %s", type(model).__name__, text)
    network.qzoo_placement = placement  # type: ignore[assignment]
    network.qzoo_scheme = scheme  # type: ignore[assignment]
    return network, image, graph.result


def _scheme(scheme: bool | str | Scheme, target: str | None) -> Scheme:
    result = as_scheme(scheme)
    if result is None:
        raise ArgumentError(f"scheme must be a scheme such as 'w8a8', not {scheme!r}")
    if target is None:
        return result if isinstance(scheme, Scheme) else with_target(result, DEFAULT_TARGET)
    target_named(target)
    return with_target(result, target)


def _check(model: Any, example: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise QuantizationError(
            "the model is what torch.compile gave; quantize the module that it was given, and compile the result"
        )
    if replacement_of(model) is not None:
        raise QuantizationError(f"the model is itself a {type(model).__name__}; put it into an nn.Sequential")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise QuantizationError(
                f"{name or 'the model'} is TorchScript, whose operations can't be seen; quantize the module that it "
                "was scripted from"
            )
    check_example(example, ArgumentError)
    if any(isinstance(module, TensorQuantizer) for module in model.modules()):
        raise QuantizationError(f"{type(model).__name__} has quantizers already; pass the float model")
    devices = {p.device for p in (*model.parameters(), *model.buffers())}
    if len(devices) > 1:
        raise QuantizationError(
            f"the parameters of {type(model).__name__} are on {', '.join(sorted(map(str, devices)))}; move the model "
            "to one device first"
        )


def _matching(model: nn.Module, patterns: tuple[str, ...]) -> set[str]:
    names = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ArgumentError(
                f"exclude must be patterns of names, such as 'head' or '*.attn', not {pattern!r}"
            )
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ArgumentError(f"exclude: {pattern!r} names no module of {type(model).__name__}")
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except (RuntimeError, ValueError, TypeError) as error:
        raise QuantizationError(f"{type(model).__name__} can't be copied: {error}") from error


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _trace(model: nn.Module, image: Tensor) -> Trace:
    opaque = {name for name, m in model.named_modules() if replacement_of(m) is not None or _is_closed(m)}
    try:
        graph = trace(model, image, opaque)
    except Exception as error:  # of the model: it may raise anything
        raise QuantizationError(
            f"{type(model).__name__} can't run the example, {list(image.shape)} {image.dtype}, as its only input: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(graph.result, Tensor):
        kind = type(graph.result).__name__
        raise QuantizationError(
            f"{type(model).__name__} returns a {kind}; to be quantized it has to return one tensor: wrap it in a "
            "module that picks one"
        )
    return graph


def _is_closed(module: nn.Module) -> bool:
    """Whether its operations are no functions that are known."""
    return isinstance(module, (nn.RNNBase, nn.RNNCellBase))


class _Builder:
    """Puts the wanted quantizers into a model, in place."""

    def __init__(
        self, model: nn.Module, graph: Trace, wants: Wants, scheme: Scheme, excluded: set[str]
    ) -> None:
        self.model, self.trace, self.wants, self.scheme, self.excluded = model, graph, wants, scheme, excluded
        self.classes = Classes(graph, wants)
        self.modules = dict(model.named_modules())
        self.left = dict(wants.left)
        way = "asks for values of its tensors; the quantizers are those of the way that the example goes"
        self.left.update({name or type(model).__name__: way for name in graph.decisions})
        self.members: dict[Value, list[TensorQuantizer]] = defaultdict(list)
        self.kinds: dict[str, set[str]] = defaultdict(set)
        self.names: dict[tuple[str, Site], tuple[str, ...]] = {}
        self.sites = self._sites()

    def build(self) -> None:
        layers = [operation for operation in self.trace.operations if operation.layer]
        for operation in layers:
            self._replace(operation)
        for (scope, site), operations in self.sites.items():
            if any((op, place) in self.wants.edges for op in operations for place in range(len(op.operands))):
                self._place(scope, site, operations)
        if self.wants.result is not None:
            root = scoped(self.model)
            name = _unused(root, "output_quantizer")
            root.add_module(name, self._quantizer(Want("output", True), [self.wants.result]))
            root.qzoo_sites.names[OUTPUT] = (name,)
        self._close_scopes()
        self._tie()

    # Which call of a function is where

    def _sites(self) -> dict[tuple[str, Site], list[Operation]]:
        """The calls of functions by the module and the place in its code; a module that runs twice has two calls."""
        counts: dict[tuple[str, int, str], int] = defaultdict(int)
        sites: dict[tuple[str, Site], list[Operation]] = defaultdict(list)
        for operation in self.trace.operations:
            if operation.layer:
                continue
            scope, number = self._scope_of(operation)
            name = operation.function.name
            if name in LAYERS:
                if operation.weight:
                    weight = operation.weight.removeprefix(f"{scope}.") if scope else operation.weight
                    sites[scope, Site(name, -1, weight)].append(operation)
                continue
            if "counted" not in operation.attributes:
                continue
            index = counts[scope, number, name]
            counts[scope, number, name] += 1
            sites[scope, Site(name, index)].append(operation)
        return sites

    def _scope_of(self, operation: Operation) -> tuple[str, int]:
        """The innermost module whose call this is; a layer of torch that runs several times is part of its caller."""
        for name, number in reversed(operation.stack):
            if self._is_scope(name):
                return name, number
        return "", 0

    def _is_scope(self, name: str) -> bool:
        return name == "" or not is_leaf(self.modules[name]) or self.trace.calls[name] == 1

    # Quantizers

    def _bits(self, want: Want) -> Scheme:
        return self.scheme.edge if want.edge else self.scheme

    def _quantizer(self, want: Want, values: list[Value], symmetric: bool = False) -> TensorQuantizer:
        nonnegative = all(self.classes.is_nonnegative(value) for value in values)
        quantizer = TensorQuantizer(activation_descriptor(self._bits(want)))
        quantizer.symmetric = symmetric and not nonnegative
        adopt(self.scheme, quantizer, want.role, nonnegative)
        for value in values:
            # The signed range of a concatenation is none of a part that is never negative.
            if self.classes.is_nonnegative(value) == nonnegative:
                self.members[self.classes.of(value)].append(quantizer)
        return quantizer

    def _replace(self, operation: Operation) -> None:
        """A layer that is a module becomes the quantized one, under the same name."""
        name = operation.layer
        layer = self.modules[name]
        calls = [op for op in self.trace.operations if op.layer == name]
        wants = [self.wants.edges.get((op, 0)) for op in calls]
        if isinstance(layer, QuantMixin) or name in self.left or any(want is None for want in wants):
            self._explain(operation)
            return
        kind = replacement_of(layer)
        want = wants[0]
        if kind is None:
            self._explain(operation)
        if want is None or kind is None or (self._is_excluded(operation) and not _is_layer(layer)):
            return
        bits = self._bits(want)
        try:
            new = quantized_layer(layer, kind, activation_descriptor(bits), _weight_descriptor(bits, layer))
        except ValueError as error:
            self.left[name] = str(error)
            return
        self._adopt(new, [value for op in calls if (value := op.operands[0]) is not None], want)
        if self._is_excluded(operation):
            new.add_module("_weight_quantizer", nn.Identity())
        self._swap(name, layer, new)

    def _adopt(self, layer: Any, values: list[Value], want: Want) -> None:
        if isinstance(layer, QuantMultiheadAttention):
            for name, quantizer in quantizers(layer).items():
                product = name.endswith("_heads_quantizer") or name == "_softmax_quantizer"
                role = "weight" if name.endswith("_weight_quantizer") else want.role if product else "input"
                adopt(self.scheme, quantizer, role, quantizer.nonnegative)
            return
        nonnegative = all(self.classes.is_nonnegative(value) for value in values)
        source, weight = (layer.get_submodule(f"_{part}_quantizer") for part in ("input", "weight"))
        adopt(self.scheme, source, want.role, nonnegative)
        adopt(self.scheme, weight, "weight")
        for value in values:
            self.members[self.classes.of(value)].append(source)

    def _swap(self, name: str, layer: nn.Module, new: nn.Module) -> None:
        """Put a module where another one is, under all its names."""
        for _, parent in list(self.model.named_modules(remove_duplicate=False)):
            for key, child in parent._modules.items():
                if child is layer:
                    parent._modules[key] = new
        if self.model is layer:
            self.model = new
        self.modules[name] = new

    def _place(self, scope: str, site: Site, operations: list[Operation]) -> None:
        """Quantizers for one call of a function."""
        module = self.modules[scope]
        if site.weight:
            names = self._functional_layer(scope, site, operations)
            if names is None:
                return
        else:
            names = self._site_quantizers(scope, module, site, operations)
        scoped(module).qzoo_sites.names[site] = names
        self.kinds[scope].add(site.function)

    def _site_quantizers(
        self, scope: str, module: nn.Module, site: Site, operations: list[Operation]
    ) -> tuple[str, ...]:
        places = range(len(operations[0].operands))
        wanted = {
            place: want
            for place in places
            for op in operations
            if (want := self.wants.edges.get((op, place)))
        }
        values = {p: [v for op in operations if (v := op.operands[p]) is not None] for p in places}
        if site.function in ("cat", "stack") and len(wanted) == len(places):
            name = self._free(scope, site, wanted[0], 0)
            module.add_module(name, self._quantizer(wanted[0], [v for p in places for v in values[p]]))
            return (name,) * len(places)
        names = []
        for place in places:
            name = ""
            if place in wanted:
                name = self._free(scope, site, wanted[place], place)
                product = site.function in ("matmul", "einsum", "scaled_dot_product_attention")
                module.add_module(name, self._quantizer(wanted[place], values[place], symmetric=product))
            names.append(name)
        for extra in _INSIDE.get(site.function, ()) if len(wanted) == len(places) else ():
            name = self._number(scope, site, extra)
            role = wanted[0].role
            bits = self.scheme.edge if role == "activation" else self.scheme
            quantizer = TensorQuantizer(activation_descriptor(bits))
            module.add_module(name, adopt(self.scheme, quantizer, role, nonnegative=True))
            names.insert(_INSIDE_PLACE[site.function], name)
        return tuple(names)

    def _functional_layer(
        self, scope: str, site: Site, operations: list[Operation]
    ) -> tuple[str, ...] | None:
        """A layer's function on a weight that a module holds: its quantizers are those of that module."""
        path, _, key = site.weight.rpartition(".")
        owner = f"{scope}.{path}".strip(".")
        full = operations[0].weight
        if f"{owner}.{key}".strip(".") != full or owner not in self.modules:
            self.left[full] = "a weight that another module uses"
            return None
        if key != "weight":
            self.left[full] = "a weight that its module holds under another name than weight"
            return None
        holder, want = self.modules[owner], self.wants.edges[operations[0], 0]
        bits = self._bits(want)
        kind = replacement_of(holder)
        values = [value for op in operations if (value := op.operands[0]) is not None]
        if kind is not None:
            new = quantized_layer(holder, kind, activation_descriptor(bits), _weight_descriptor(bits, holder))
            self._swap(owner, holder, new)
            holder = new
        else:
            holder.add_module("_input_quantizer", TensorQuantizer(activation_descriptor(bits)))
            holder.add_module("_weight_quantizer", TensorQuantizer(_weight_descriptor(bits, holder)))
        self._adopt(holder, values, want)
        if self._is_excluded(operations[0]):
            holder.add_module("_weight_quantizer", nn.Identity())
        prefix = f"{path}." if path else ""
        return f"{prefix}_input_quantizer", f"{prefix}_weight_quantizer"

    def _free(self, scope: str, site: Site, want: Want, place: int) -> str:
        return self._number(scope, site, _name(site.function, want.role, place))

    def _number(self, scope: str, site: Site, base: str) -> str:
        """``residual_quantizer``, with a number where the module has several."""
        same = [
            other
            for (where, other), ops in self.sites.items()
            if where == scope
            and not other.weight
            and any(
                _name(other.function, want.role, place) == base or base in _INSIDE.get(other.function, ())
                for op in ops
                for place in range(len(op.operands))
                if (want := self.wants.edges.get((op, place)))
            )
        ]
        name = base if len(same) == 1 else f"{base}{same.index(site) + 1}"
        return _unused(self.modules[scope], name)

    # Afterwards

    def _close_scopes(self) -> None:
        """Make scopes of what is below a scope, so that what it computes is not taken for its parent's."""
        inside: dict[str, set[str]] = defaultdict(set)
        for (scope, site), _ in self.sites.items():
            inside[scope].add(site.function)
        for name, module in list(self.model.named_modules()):
            above = [path for path in self.kinds if path == "" or name.startswith(f"{path}.")]
            if not above or isinstance(module, (Scope, TensorQuantizer)):
                continue
            if name in self.modules and not self._is_scope(name):
                continue
            kinds = set().union(*(self.kinds[path] for path in above))
            if is_leaf(module) and not (inside.get(name, set()) & kinds):
                continue
            if isinstance(module, (nn.ModuleList, nn.ModuleDict)) or _belongs_to_quantizer(self.model, name):
                continue
            scoped(module)

    def _tie(self) -> None:
        """Quantizers of different values of a class are calibrated together."""
        for members in self.members.values():
            alone = list(dict.fromkeys(members))
            if len(alone) > 1:
                names = {q: n for n, q in self.model.named_modules() if isinstance(q, TensorQuantizer)}
                nonnegative = all(quantizer.nonnegative for quantizer in alone)
                for quantizer in alone:
                    quantizer.group = names[alone[0]]
                    adopt(self.scheme, quantizer, quantizer.role, nonnegative)

    def _explain(self, operation: Operation) -> None:
        name = operation.layer
        if all(value is None for value in operation.operands):
            return  # computed from constants, as positions are: an exported file holds the result
        if not self._is_excluded(operation) and not isinstance(self.modules[name], QuantMixin):
            self.left.setdefault(
                name, f"{type(self.modules[name]).__name__}, whose steps no runtime computes in int8"
            )

    def _is_excluded(self, operation: Operation) -> bool:
        return not self.excluded.isdisjoint((operation.layer, *(path for path, _ in operation.stack)))

    def placement(self) -> Placement:
        """Get the record of what was placed and what was left in float."""
        kept = [name for name, m in self.modules.items() if _is_layer(m) and not isinstance(m, QuantMixin)]
        placed = weight_quantizers(self.model)
        for operation in self.trace.operations:
            if operation.function.name not in LAYERS or operation.layer or operation.weight in placed:
                continue
            if operation.operands[0] is None or operation.weight in self.left:
                continue  # computed from constants, or named already
            where = operation.stack[-1][0] if operation.stack else ""
            if not self._is_excluded(operation):
                reason = (
                    "a weight that is computed in forward"
                    if not operation.weight
                    else "its weight has no owner"
                )
                self.left.setdefault(f"{where}.{operation.function.name}".strip("."), reason)
        floats = {*kept, *float_layers(self.model)}
        excluded = [
            n
            for n in self.modules
            if n in floats and any(n == e or n.startswith(f"{e}.") for e in self.excluded)
        ]
        inner = {n for n, m in self.modules.items() if isinstance(m, QuantMixin) or self.trace.calls[n]}
        unreached = [
            n
            for n in kept
            if n not in inner
            and n not in excluded
            and f"{n}.weight" not in self.trace.read
            and self._parent_runs(n)
        ]
        return Placement(tuple(self.left.items()), tuple(unreached), tuple(excluded))

    def _parent_runs(self, name: str) -> bool:
        """Whether it is no part of a layer that was replaced, such as the projection of an attention."""
        return not any(
            isinstance(self.modules.get(name[:i]), QuantMixin) for i, c in enumerate(name) if c == "."
        )


# Quantizers of what a function computes inside, and where their names are among the operands'.
_INSIDE = {"silu": ("sigmoid_quantizer",), "scaled_dot_product_attention": ("softmax_quantizer",)}
_INSIDE_PLACE = {"silu": 1, "scaled_dot_product_attention": 2}
_ATTENTION = ("query_quantizer", "key_quantizer", "value_quantizer")


def _name(function: str, role: str, place: int) -> str:
    if (function, role) == ("batch_norm", "pool"):
        return "norm_quantizer"
    if role in ("residual", "branch", "pool", "activation", "norm"):
        return f"{role}_quantizer"
    if role == "stream":
        return ("residual_quantizer", "branch_quantizer")[place]
    if function == "scaled_dot_product_attention":
        return _ATTENTION[place]
    if function in ("cat", "stack"):
        return "concat_quantizer"
    if function in ("mul", "matmul", "einsum"):
        return ("left_quantizer", "right_quantizer")[place]
    return "move_quantizer"


def _unused(module: nn.Module, name: str) -> str:
    """The name, with a line behind it where the module has something of that name."""
    while hasattr(module, name):
        name += "_"
    return name


def _weight_descriptor(scheme: Scheme, layer: Any) -> Any:
    shape = layer.weight.shape if hasattr(layer, "weight") else layer.in_proj_weight.shape
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    return weight_descriptor(scheme, shape[1], axis=1 if transposed else 0)


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))


def _belongs_to_quantizer(model: nn.Module, name: str) -> bool:
    parts = name.split(".")
    return any(
        isinstance(model.get_submodule(".".join(parts[:i])), TensorQuantizer) for i in range(1, len(parts))
    )


@torch.no_grad()
def _check_same(model: nn.Module, image: Tensor, expected: Tensor) -> None:
    """Refuse a result that does not compute what the float model does, where its quantizers hand values on.

    What runs on the way is also the order of calls that the sites are known by.
    """
    all_quantizers = list(quantizers(model).values())
    # In place of quantizers: copies, as they give, with the values as they are.
    copies = [
        quantizer.register_forward_hook(lambda module, args, output: output.clone())
        for quantizer in all_quantizers
    ]
    with attach(copies), evaluating(model), restore_switches(all_quantizers), orders_learnt(model):
        for quantizer in all_quantizers:
            quantizer.switches = quantizer.switches._replace(quant=False)
        actual = model(image)
    if image.is_meta:
        return
    limit = 1e-4 * expected.abs().max().item() + 1e-6
    worst = (actual - expected).abs().max().item() if actual.shape == expected.shape else float("inf")
    if not worst <= limit and expected.isfinite().all():
        raise QuantizationError(
            f"{type(model).__name__} with its quantizers off differs from the float model by {worst:.3g}: does its "
            "forward change a tensor in place that it reads again, or draw random numbers?"
        )
