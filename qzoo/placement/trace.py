"""What a model computes: one forward pass, recorded as a graph of functions with the modules that called them.

The model runs as it is, in eval mode, on an example: control flow in Python is followed, and nothing is rewritten.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from qzoo.placement.einsum import product_of
from qzoo.placement.functions import (
    COMPARISONS,
    FUNCTIONS,
    NO_VALUES,
    UNKNOWN,
    Constants,
    Function,
    function_of,
    is_counted,
    name_of,
    operands,
)
from qzoo.placement.scope import LAYERS, is_leaf
from qzoo.quant.fold import attach
from qzoo.quant.nn import TensorQuantizer
from qzoo.quant.nn.modules._quantizer_state import Switches
from qzoo.quantizers import restore_switches

_NONNEGATIVE = (
    "relu",
    "relu6",
    "sigmoid",
    "hardsigmoid",
    "softmax",
    "softplus",
    "exp",
    "sqrt",
    "abs",
    "square",
)


# By these Python gets a number out of a tensor, and may go another way by it.
_DECISIONS = ("__bool__", "__int__", "__float__", "__index__", "item", "tolist")


@dataclass(eq=False)
class Value:
    """A tensor that is computed from the image.

    Attributes:
        maker: what computed it; None for the image.
        readers: who reads it, each with the place among its operands; -1 for anything else that it is given.
        shape: of the example.
        returned: whether the model returns it.
    """

    maker: Operation | None
    shape: tuple[int, ...]
    readers: list[tuple[Operation, int]] = field(default_factory=list)
    returned: bool = False


@dataclass(eq=False)
class Operation:
    """A call of a function, or of a module that is looked at from outside.

    Attributes:
        function: what was called; unknown for modules other than layers.
        stack: the modules that it was called in, outermost first: names, each with the number of the call.
        operands: its operands, see :func:`qzoo.placement.functions.operands`; None for what is no :class:`Value`.
        outputs: what it made.
        layer: the name of the module, where it is one.
        weight: the name of the parameter that a layer's function was given as its weight, "" where it is none.
        attributes: what its arguments decide: ``nonnegative`` (it never gives a negative number), ``spatial`` (a mean
            of height and width), ``smooth`` (an interpolation that is not to the nearest), ``gather`` (an index),
            ``negative`` (a padding below zero), ``product`` (an einsum that is a product of matrices), ``counted``
            (see :class:`qzoo.placement.functions.Constants`), ``scale`` (a product of channels, [N, C, ...], with
            constants of their own), ``loose`` (a clamp to limits that no quantizer behind it has),
            ``repeated`` (the module, or that whose function it is, runs more than once).
    """

    function: Function
    stack: tuple[tuple[str, int], ...]
    operands: list[Value | None]
    outputs: list[Value] = field(default_factory=list)
    layer: str = ""
    weight: str = ""
    attributes: frozenset[str] = frozenset()


@dataclass
class Trace:
    """A model's operations, in the order in which they ran, those of layers on constants included.

    Attributes:
        calls: how often each module ran, by name.
        result: what the model returned.
        decisions: modules in which Python asks for values that depend on the image.
        read: the parameters and buffers that functions were given, by name.
        quantized: the values that quantizers read, by the quantizer's name; of a model that has some.
    """

    operations: list[Operation]
    calls: Counter[str]
    result: Any
    decisions: tuple[str, ...] = ()
    read: frozenset[str] = frozenset()
    quantized: Mapping[str, Value] = field(default_factory=dict)

    @property
    def leans(self) -> bool:
        """Whether there is a SiLU or a hard-swish, whole or written as a product: few of its outputs are negative."""
        return any(_leans(operation) for operation in self.operations)


def _leans(operation: Operation) -> bool:
    if operation.function.name != "mul":
        return operation.function.name in ("silu", "hardswish")
    makers = {value.maker for value in operation.operands if value is not None and value.maker is not None}
    gates = [maker for maker in makers if maker.function.name in ("sigmoid", "hardsigmoid")]
    return any(gate.operands[0] in operation.operands for gate in gates if gate.operands[0] is not None)


@torch.no_grad()
def trace(model: nn.Module, example: Tensor, opaque: set[str]) -> Trace:
    """Record the model's forward pass on an example; quantizers hand values on.

    Args:
        model: in eval mode.
        example: a batch.
        opaque: names of the modules that are recorded as one operation.
    """
    recorder = _Recorder(model, opaque)
    quantizers = {name: m for name, m in model.named_modules() if isinstance(m, TensorQuantizer)}
    with restore_switches(quantizers.values()), recorder.watching(model), recorder:
        for name, quantizer in quantizers.items():
            quantizer.calibrator = _Tap(recorder, name)
            quantizer.switches = Switches(disabled=False, quant=False, clip=False, calib=True)
        recorder.know(example)
        result = model(example)
    for leaf in tree_leaves(result):
        value = recorder.values.get(id(leaf))
        if value is not None:
            value.returned = True
    for operation in recorder.operations:
        owner = operation.layer or (operation.stack[-1][0] if operation.stack else "")
        if recorder.calls[owner] > 1:
            operation.attributes |= {"repeated"}
    return Trace(
        recorder.operations,
        recorder.calls,
        result,
        tuple(recorder.decisions),
        frozenset(recorder.read),
        recorder.quantized,
    )


class _Tap:
    """Stands where a quantizer keeps its calibrator, and notes the value that it is given."""

    _axis: Any = None  # set by quantizers with blocks

    def __init__(self, recorder: _Recorder, name: str) -> None:
        self._recorder, self._name = recorder, name

    def collect(self, x: Tensor) -> None:
        value = self._recorder.values.get(id(x))
        if value is not None:
            self._recorder.quantized.setdefault(self._name, value)


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, opaque: set[str]) -> None:
        super().__init__()
        self.opaque = opaque
        self.operations: list[Operation] = []
        self.calls: Counter[str] = Counter()
        self.values: dict[int, Value] = {}
        self.constants = Constants()
        self._hidden: list[list[Tensor]] = []
        self.quantized: dict[str, Value] = {}
        self._keep: list[Any] = []  # the identity of a freed tensor could be another's
        self._stack: list[tuple[str, int]] = []
        self._inside = 0
        self._compared: set[int] = set()
        self.decisions: list[str] = []
        self.read: set[str] = set()
        self._stored = {id(t): name for name, t in (*model.named_buffers(), *model.named_parameters())}

    def know(self, tensor: Tensor) -> None:
        self._keep.append(tensor)
        self.values[id(tensor)] = Value(None, tuple(tensor.shape))

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Hook all modules in a ``with`` block, so that it is known which of them runs."""
        handles: list[Any] = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._entering(name), with_kwargs=True))
            handles.append(
                module.register_forward_hook(self._leaving(name), with_kwargs=True, always_call=True)
            )
        with attach(handles):
            yield

    def _entering(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._stack.append((name, self.calls[name]))
            self.calls[name] += 1
            self._inside += name in self.opaque
            self._hidden.append([] if is_leaf(module) else self.constants.enter(module, (args, kwargs)))

        return hook

    def _leaving(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._inside -= name in self.opaque
            self.constants.leave(self._hidden.pop())
            if name in self.opaque and not self._inside:
                inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
                self._add(layer_function(module), tuple(self._stack[:-1]), inputs, [], output, layer=name)
            self._stack.pop()

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = self._run(func, args, kwargs)
        self.constants.follow(func, args, kwargs, result)
        return result

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = name_of(func)
        if self._inside or name in NO_VALUES or name in _DECISIONS:
            result = func(*args, **kwargs)
            if not self._inside:
                self._follow(name, args, kwargs, result)
                if name in COMPARISONS:
                    self._note(func, args, kwargs, None)
            return result
        result = func(*args, **kwargs)
        changed = args[0] if name == "__setitem__" else result
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(changed)):
            self._note(func, args, kwargs, changed)
        return result

    def _note(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        """Note a call, if it is one of a layer, counts among the calls of a site, or is given a value."""
        function = function_of(func)
        inputs = operands(function, args, kwargs) if args or kwargs else []
        others = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        values = [self.values.get(id(x)) for x in inputs]
        self.read.update(self._stored[id(x)] for x in others if id(x) in self._stored)
        counts = func in FUNCTIONS and is_counted(inputs, self.constants)
        given = any(value is not None for value in (*values, *(self.values.get(id(x)) for x in others)))
        if counts or given or function.name in LAYERS:
            attributes = _attributes(func, function, args, kwargs) | ({"counted"} if counts else set())
            attributes |= {"scale"} if function.name == "mul" and _is_scale(inputs, values) else set()
            self._add(function, tuple(self._stack), inputs, others, result, attributes)

    def _follow(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        """Note where Python asks for a value that is computed from the image, or from a comparison of such."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(id(leaf) in self.values or id(leaf) in self._compared for leaf in tensors):
            return
        if name in _DECISIONS:
            self.decisions.append(self._stack[-1][0] if self._stack else "")
        elif isinstance(result, Tensor):
            self._compared.add(id(result))
            self._keep.append(result)

    def _add(
        self,
        function: Function,
        stack: tuple[tuple[str, int], ...],
        inputs: list[Any],
        others: list[Any],
        result: Any,
        attributes: frozenset[str] = frozenset(),
        layer: str = "",
    ) -> None:
        values = [self.values.get(id(x)) for x in inputs]
        weight = self._stored.get(id(inputs[1]), "") if len(inputs) > 1 and inputs[1] is not None else ""
        operation = Operation(function, stack, values, layer=layer, weight=weight, attributes=attributes)
        for place, value in enumerate(values):
            if value is not None:
                value.readers.append((operation, place))
        rest = [self.values.get(id(tensor)) for tensor in others]
        for value in rest:
            if value is not None and value not in values and value.maker is not operation:
                value.readers.append((operation, -1))
        is_constant = all(value is None for value in (*values, *rest))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not is_constant:
                value = Value(operation, tuple(leaf.shape))
                operation.outputs.append(value)
                self.values[id(leaf)] = value
                self._keep.append(leaf)
                if function.operator.name != "Identity" and any(leaf is x for x in inputs):
                    self._change_whole(leaf, stack)
        self.operations.append(operation)

    def _change_whole(self, part: Tensor, stack: tuple[tuple[str, int], ...]) -> None:
        """Forget what is known of a tensor, such as its sign, when a part of it is changed in place."""
        whole = part._base
        before = None if whole is None else self.values.get(id(whole))
        if whole is not None and before is not None:
            change = Operation(Function("change in place", UNKNOWN), stack, [before])
            self.values[id(whole)] = Value(change, tuple(whole.shape))


def layer_function(module: nn.Module) -> Function:
    """Look up the function of a layer, quantized or not; an unknown one for any other module."""
    if isinstance(module, nn.modules.conv._ConvNd):
        kind = "conv_transpose" if module.transposed else "conv"
        return function_of(getattr(torch, f"{kind}{len(module.kernel_size)}d"))
    kinds: tuple[tuple[type, Any], ...] = (
        (nn.MultiheadAttention, nn.functional.multi_head_attention_forward),
        (nn.Linear, torch._C._nn.linear),
    )
    function = next((function for kind, function in kinds if isinstance(module, kind)), None)
    return function_of(type(module) if function is None else function)


def _attributes(
    func: Any, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> frozenset[str]:
    names = set()
    if _is_nonnegative(name_of(func).strip("_"), args, kwargs):
        names.add("nonnegative")
    if function.name == "einsum" and product_of(args[0], operands(function, args, kwargs)) is not None:
        names.add("product")
    if function.name == "mean" and _is_spatial(args, kwargs):
        names.add("spatial")
    if function.name == "interpolate" and _argument(args, kwargs, 3, "mode", "nearest") != "nearest":
        names.add("smooth")
    if function.name == "__getitem__":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        if not all(isinstance(part, slice) or part is Ellipsis for part in index):
            names.add("gather")
    if function.name == "pad":
        fill = _argument(args, kwargs, 3, "value", 0)
        if fill is not None and fill < 0:
            names.add("negative")
    if function.operator.name == "Clip" and _is_loose(*_limits(name_of(func).strip("_"), args, kwargs)):
        names.add("loose")
    return frozenset(names)


def _is_scale(inputs: list[Any], values: list[Value | None]) -> bool:
    """Whether the channels of the one operand that is a value, [N, C, ...], are multiplied by constants, C of them."""
    tensors = [value for value in values if value is not None]
    factors = next((x for x, value in zip(inputs, values, strict=True) if value is None), None)
    if len(tensors) != 1 or not isinstance(factors, Tensor) or len(tensors[0].shape) < 2:
        return False
    channels, *rest = tensors[0].shape[1:]
    shape = (channels, *(1 for _ in rest))
    return channels > 1 and tuple(factors.shape) in (shape, (1, *shape))


def _argument(args: Any, kwargs: dict[str, Any], place: int, name: str, default: Any = None) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


def _is_nonnegative(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the function never gives a negative number."""
    low, _ = _limits(name, args, kwargs)
    return name in _NONNEGATIVE or (isinstance(low, (int, float)) and low >= 0)


def _limits(name: str, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The limits that a function clamps to; None for none."""
    if name == "relu6":
        return 0, 6
    if name == "hardtanh":
        return _argument(args, kwargs, 1, "min_val", -1.0), _argument(args, kwargs, 2, "max_val", 1.0)
    if name == "clamp_max":
        return None, _argument(args, kwargs, 1, "max")
    if name in ("clamp", "clip", "clamp_min"):
        return _argument(args, kwargs, 1, "min"), _argument(args, kwargs, 2, "max")
    return None, None


def _is_loose(low: Any, high: Any) -> bool:
    """Whether a clamp's limits are none that a quantizer behind it has: from zero on, or the same on both sides."""
    numbers = [None if isinstance(limit, Tensor) else limit for limit in (low, high)]
    return numbers[0] is None or (numbers[0] != 0 and numbers != [numbers[0], -numbers[0]])


def _is_spatial(args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a mean is one of height and width of [N, C, H, W]."""
    dims = _argument(args, kwargs, 1, "dim")
    dims = (dims,) if isinstance(dims, int) else dims
    x = args[0] if args else kwargs["input"]
    return x.dim() == 4 and dims is not None and sorted(d % 4 for d in dims) == [2, 3]
