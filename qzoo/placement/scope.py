"""The quantized module at run time: quantizers on what a module computes itself, between its children.

``x + y`` in a ``forward`` is no module that could be replaced. A module with such sites, and each module below it, is
of a class derived from its own, whose ``forward`` says whose call this is; and the outermost one looks on, by a torch
function mode, and hands the operands of the function at a site to its quantizers. A site is the name of a function
and how often the same call of the module has called it before, constants left out: Python's control flow,
``train()``, hooks, parameters and the module tree stay as they are. A forward that calls a function with sites in
another order than on the example, in training or for another image, would move the sites; it is refused. What tells
one call from another is the child that ran last before it.
"""

from __future__ import annotations

import functools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qzoo.errors import QuantizationError
from qzoo.placement.einsum import product_of
from qzoo.placement.functions import FUNCTIONS, Constants, Function, is_counted, operands, replaced
from qzoo.quantizers import is_idle

LAYERS = ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


@dataclass(frozen=True)
class Site:
    """A call of a function in a module's own code.

    Attributes:
        function: its name, see :mod:`qzoo.placement.functions`.
        index: how many calls of it come before, in the same call of the module; -1 for a layer's function, which is
            known by its weight.
        weight: the weight's name in the module; "" for anything else.
    """

    function: str
    index: int
    weight: str = ""


OUTPUT = Site("", 0)
"""What the module returns."""


@dataclass
class Sites:
    """What a scope knows of its own code.

    Attributes:
        names: of the quantizers in the module, one for each operand ("" for none), by site.
        path: the module's name in the model.
        orders: for every function with sites, the scopes that ran last before its calls; one order for each way that
            a call of the module went on the example.
    """

    names: dict[Site, tuple[str, ...]] = field(default_factory=dict)
    path: str = ""
    orders: dict[str, set[tuple[str, ...]]] = field(default_factory=dict)


_Result = TypeVar("_Result")


@dataclass
class _Frame:
    """A call of a module.

    Attributes:
        constants: one for all calls that this one is in.
        orders: for every function, the scope that ran last before each call of it.
        last: the scope below that ran last.
    """

    module: Any
    constants: Constants
    orders: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    last: str = ""


class _Calls(threading.local):
    """The calls of modules that this thread is in, outermost first, and whether their orders are learnt."""

    def __init__(self) -> None:
        self.frames: list[_Frame] = []
        self.learning = False


_calls = _Calls()


@contextmanager
def orders_learnt(model: nn.Module) -> Iterator[None]:
    """Learn the order of calls in every scope of a model from what runs in the block, in place of a former one."""
    for name, module in model.named_modules():
        if isinstance(module, Scope):
            module.qzoo_sites.path, module.qzoo_sites.orders = name, {}
    _calls.learning = True
    try:
        yield
    finally:
        _calls.learning = False


def passed_over(module: Any) -> None:
    """Note a module as run that does not run, since its result is known."""
    if _calls.frames and isinstance(module, Scope):
        _calls.frames[-1].last = module.qzoo_sites.path


_NOWHERE = SimpleNamespace(qzoo_sites=Sites())
"""In place of a module, for what has no sites."""


def unseen(hook: Callable[..., _Result]) -> Callable[..., _Result]:
    """Decorate a hook of a layer: what it computes is no call of the module that the layer runs in.

    Else the additions of a hook would count among those of a block, whose sites are known by their numbers.
    """

    @functools.wraps(hook)
    def run(*args: Any, **kwargs: Any) -> _Result:
        if not _calls.frames:
            return hook(*args, **kwargs)
        _calls.frames.append(_Frame(_NOWHERE, _calls.frames[-1].constants))
        try:
            return hook(*args, **kwargs)
        finally:
            _calls.frames.pop()

    return run


class Scope:
    """What a module's class is derived from, beside its own class, to have sites.

    Its names begin with ``qzoo_``: all others may be the module's own.

    Attributes:
        qzoo_sites: the sites.
        qzoo_float_class: the module's own class.
        qzoo_forward: a forward that the module itself has, and not its class.
    """

    qzoo_sites: Sites
    qzoo_float_class: type[nn.Module]
    qzoo_forward: Callable[..., Any] | None

    def qzoo_call(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, looked on."""
        if torch.compiler.is_dynamo_compiling() and torch.compiler.is_exporting():
            # It would leave out every quantizer that is no layer's, without a word.
            raise QuantizationError(
                "torch.export can't see the quantizers with strict=True; use strict=False, its default"
            )
        frames = _calls.frames
        passed_over(self)
        constants = frames[-1].constants if frames else Constants()
        frames.append(_Frame(self, constants))
        module: Any = self
        try:
            hidden = [] if is_leaf(module) else constants.enter(module, (args, kwargs))
            forward = self.qzoo_forward or functools.partial(self.qzoo_float_class.forward, module)
            if len(frames) > 1:
                result = forward(*args, **kwargs)
            else:
                with _Watch(frames):
                    result = forward(*args, **kwargs)
            constants.leave(hidden)
            _end(frames[-1])
        finally:
            frames.pop()
        names = self.qzoo_sites.names.get(OUTPUT)
        if names is None:
            return result
        quantizer = self.get_submodule(names[0])  # type: ignore[attr-defined]
        if not isinstance(result, Tensor) and not is_idle(quantizer):
            raise QuantizationError(
                f"{self.qzoo_float_class.__name__} returns a {type(result).__name__}, and one tensor on the example "
                "that it was quantized on; let it return one in training too"
            )
        return quantizer(result)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class has no name to be imported by.
        state: Any = object.__reduce_ex__(self, protocol)[2]
        return _restore, (self.qzoo_float_class,), state


class _Container:
    """A scope whose own class goes through its children: they are those without the quantizers of its sites."""

    _modules: dict[str, Any]
    qzoo_sites: Sites

    def qzoo_children(self) -> dict[str, Any]:
        """The children of the module's own."""
        own = {name for names in self.qzoo_sites.names.values() for name in names}
        return {name: child for name, child in self._modules.items() if name not in own}

    def __len__(self) -> int:
        return len(self.qzoo_children())

    def __iter__(self) -> Any:
        children = self.qzoo_children()
        return iter(children if isinstance(self, nn.ModuleDict) else children.values())

    def keys(self) -> Any:
        return self.qzoo_children().keys()

    def items(self) -> Any:
        return self.qzoo_children().items()

    def values(self) -> Any:
        return self.qzoo_children().values()


def scoped(module: nn.Module) -> Any:
    """Make a module a scope, in place; one that is a scope stays as it is. Returns the module."""
    if not isinstance(module, Scope):
        module.__class__ = _class_of(type(module))  # type: ignore[arg-type]
        module.__dict__.update(qzoo_sites=Sites(), qzoo_forward=module.__dict__.pop("forward", None))
    return module


@functools.cache
def _class_of(float_class: Any) -> type[nn.Module]:
    """The class of a scope; like the module's own in name, so that a printed model reads as before."""

    @functools.wraps(float_class.forward)  # exporters ask for the names of its arguments
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.qzoo_call(*args, **kwargs)

    members = {
        "forward": forward,
        "qzoo_float_class": float_class,
        "__module__": float_class.__module__,
        "__qualname__": float_class.__qualname__,
    }
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    bases = (Scope, _Container) if issubclass(float_class, containers) else (Scope,)
    return type(float_class.__name__, (*bases, float_class), members)


def _restore(float_class: type[nn.Module]) -> Any:
    kind: Any = _class_of(float_class)  # type: ignore[arg-type]
    return kind.__new__(kind)


class _Watch(TorchFunctionMode):
    """Hands operands to the quantizers of the innermost scope."""

    def __init__(self, frames: list[_Frame]) -> None:
        super().__init__()
        self.frames = frames

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        function = FUNCTIONS.get(func) if self.frames else None
        result = func(*args, **kwargs) if function is None else self._run(func, function, args, kwargs)
        if self.frames and isinstance(result, (Tensor, tuple, list, type(None))):
            self.frames[-1].constants.follow(func, args, kwargs, result)
        return result

    def _run(self, func: Any, function: Function, args: Any, kwargs: dict[str, Any]) -> Any:
        frame = self.frames[-1]
        names = _names(frame, function, args, kwargs)
        if names is None:
            return func(*args, **kwargs)
        quantizers = [frame.module.get_submodule(name) if name else None for name in names]
        special = _SPECIAL.get(function.name)
        if special is not None and None not in quantizers:
            return special(func, quantizers, args, kwargs)
        values = [
            value if quantizer is None else quantizer(value)
            for quantizer, value in zip(quantizers, operands(function, args, kwargs), strict=True)
        ]
        args, kwargs = replaced(function, values, args, kwargs)
        return func(*args, **kwargs)


def _names(frame: _Frame, function: Function, args: Any, kwargs: dict[str, Any]) -> tuple[str, ...] | None:
    """The names of the quantizers at this call, None where it is no site."""
    module: Any = frame.module
    sites: Sites = module.qzoo_sites
    if not sites.names:
        return None
    inputs = operands(function, args, kwargs)
    if function.name in LAYERS:
        weight = inputs[1]
        for site, names in sites.names.items():
            if site.weight and weight is parameter_of(module, site.weight):
                return names
        return None
    if not is_counted(inputs, frame.constants):
        return None
    order = frame.orders[function.name]
    order.append(frame.last)
    known = sites.orders.get(function.name)
    if known is not None and not _fits(module, order, [other[: len(order)] for other in known]):
        where = f"after {frame.last}" if frame.last else "before any other module"
        raise _moved(module, f"{function.name}-like call {len(order)} comes {where}")
    return sites.names.get(Site(function.name, len(order) - 1))


def _end(frame: _Frame) -> None:
    """Learn the orders of a call that ends, or refuse one that left out calls which can't be told from those made."""
    module: Any = frame.module
    sites: Sites = module.qzoo_sites
    if _calls.learning:
        for name in {site.function for site in sites.names} & frame.orders.keys():
            sites.orders.setdefault(name, set()).add(tuple(frame.orders[name]))
        return
    for name, known in sites.orders.items():
        order = frame.orders[name]
        if not _fits(module, order, known):
            raise _moved(module, f"{len(order)} {name}-like call(s) are made, not {max(map(len, known))}")


def _fits(module: Any, order: list[str], known: Iterable[tuple[str, ...]]) -> bool:
    """Whether an order agrees with one that is known; by number alone where a module below was replaced."""
    if any(_agree(order, other) for other in known):
        return True
    below = {
        name for other in known for name in other if name.startswith(f"{module.qzoo_sites.path}.".lstrip("."))
    }
    if all(isinstance(_below(module, name), Scope) for name in below):
        return False
    return any(_agree([""] * len(order), ("",) * len(other)) for other in known)


def _below(module: Any, name: str) -> Any:
    """The module of a name in the model, from one above it; None where there is none."""
    for part in name.removeprefix(module.qzoo_sites.path).strip(".").split("."):
        module = getattr(module, part, None)
    return module


def _agree(order: list[str], known: tuple[str, ...]) -> bool:
    """Whether one order goes on where the other ends, with calls that differ from all before."""
    both = min(len(order), len(known))
    return order[:both] == list(known[:both]) and not {*order[both:], *known[both:]} & {*known[:both]}


def is_leaf(module: nn.Module) -> bool:
    """Check whether a module is one of torch's own without children: part of what calls it."""
    own = type(module).__module__.startswith("torch.nn.")
    return own and all(child is None for child in module._modules.values())


def _moved(module: Any, how: str) -> QuantizationError:
    name = module.qzoo_sites.path or type(module).__name__
    mode = "in training" if module.training else "in inference"
    return QuantizationError(
        f"{name}: {mode} {how}, unlike on the example that the model was quantized on, so that its quantizers would be "
        "at other tensors; compute what only one mode or size needs in a module of its own, or leave this one in float "
        "by exclude="
    )


def parameter_of(module: nn.Module, name: str) -> Any:
    """Return the parameter of a module or of one below it, by its dotted name."""
    path, _, key = name.rpartition(".")
    return getattr(module.get_submodule(path) if path else module, key)


def _silu(func: Callable[..., Any], quantizers: list[Any], args: Any, kwargs: dict[str, Any]) -> Tensor:
    """x * sigmoid(x), of which ONNX Runtime computes both parts in int8."""
    source, gate = quantizers
    x = source(args[0] if args else kwargs["input"])
    if is_idle(gate):
        return func(x, *args[1:], **{name: value for name, value in kwargs.items() if name != "input"})
    return x * gate(torch.sigmoid(x))


def _attention(func: Callable[..., Any], quantizers: list[Any], args: Any, kwargs: dict[str, Any]) -> Tensor:
    """The two products of attention, written out where their operands are quantized."""
    if all(is_idle(quantizer) for quantizer in quantizers):
        return func(*args, **kwargs)
    return _products(quantizers, *args, **kwargs)


def _products(
    quantizers: list[Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    for_query, for_key, for_softmax, for_value = quantizers
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(groups, -3) for t in (key, value))
    query = for_query(query * (query.shape[-1] ** -0.5 if scale is None else scale))
    scores = query @ for_key(key).transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(attn_mask.logical_not(), float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = torch.dropout(scores.softmax(-1), dropout_p, dropout_p > 0)
    return for_softmax(weights) @ for_value(value)


def _einsum(func: Callable[..., Any], quantizers: list[Any], args: Any, kwargs: dict[str, Any]) -> Tensor:
    """A product of two tensors, as the product of matrices that runtimes have a kernel for."""
    if all(is_idle(quantizer) for quantizer in quantizers):
        return func(*args, **kwargs)
    values = operands(FUNCTIONS[func], args, kwargs)
    values = [quantizer(value) for quantizer, value in zip(quantizers, values, strict=True)]
    product = product_of(args[0], values)
    return func(args[0], *values) if product is None else product(*values)


_SPECIAL: dict[str, Callable[..., Any]] = {
    "silu": _silu,
    "scaled_dot_product_attention": _attention,
    "einsum": _einsum,
}
