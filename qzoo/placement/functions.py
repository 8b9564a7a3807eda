"""The functions of torch that a forward pass is made of, and the ONNX operator that each is written as.

What a runtime does with an operator is in :mod:`qzoo.runtimes.operators`; this table only leads there. A function
that is not in it is unknown: nothing is placed around it.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qzoo.runtimes.operators import OPERATORS, Operator

UNKNOWN = Operator("", "other", "float", "float", "float")
_FLOAT = Operator("", "other", "float", "fused", "fused")  # known, and without an integer kernel


@dataclass(frozen=True)
class Function:
    """A function, in all its spellings (``x + y``, ``torch.add``, ``Tensor.add_``).

    Attributes:
        name: as sites and reports call it.
        operator: the ONNX operator that torch's exporter makes of it.
    """

    name: str
    operator: Operator

    @property
    def known(self) -> bool:
        """Whether it is in the table."""
        return self.operator is not UNKNOWN


# Operator, then the function's name and its other spellings. An operator that the other table has no row for is "".
_ROWS: tuple[tuple[str, str], ...] = (
    ("Conv", "conv1d"),
    ("Conv", "conv2d"),
    ("Conv", "conv3d"),
    ("ConvTranspose", "conv_transpose1d"),
    ("ConvTranspose", "conv_transpose2d"),
    ("ConvTranspose", "conv_transpose3d"),
    ("Gemm", "linear"),
    ("MatMul", "matmul __matmul__ bmm mm"),
    ("MatMul", "scaled_dot_product_attention"),
    ("MatMul", "einsum"),
    ("MatMul", "multi_head_attention_forward"),
    ("Add", "add __add__ __radd__ __iadd__ add_"),
    ("Mul", "mul __mul__ __rmul__ __imul__ mul_ multiply"),
    ("Sub", "sub __sub__ __rsub__ rsub __isub__ sub_ subtract"),
    ("Div", "div __truediv__ __rtruediv__ __itruediv__ div_ true_divide"),
    ("Concat", "cat concat concatenate"),
    ("Concat", "stack"),
    ("MaxPool", "max_pool1d max_pool2d max_pool3d"),
    ("GlobalMaxPool", "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"),
    ("ReduceMax", "amax"),
    ("ReduceMin", "amin"),
    ("AveragePool", "avg_pool1d avg_pool2d avg_pool3d"),
    ("GlobalAveragePool", "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"),
    ("ReduceMean", "mean"),
    ("Relu", "relu relu_"),
    ("Clip", "relu6 hardtanh hardtanh_ clamp clamp_ clip clamp_min clamp_min_ clamp_max"),
    ("Sigmoid", "sigmoid sigmoid_"),
    ("Sigmoid", "silu"),
    ("LeakyRelu", "leaky_relu leaky_relu_"),
    ("HardSwish", "hardswish"),
    ("HardSigmoid", "hardsigmoid"),
    ("Softmax", "softmax"),
    ("LogSoftmax", "log_softmax"),
    ("Gelu", "gelu"),
    ("Tanh", "tanh tanh_"),
    ("Mish", "mish"),
    ("Softplus", "softplus"),
    ("Elu", "elu elu_"),
    ("PRelu", "prelu"),
    ("Exp", "exp exp_"),
    ("Sqrt", "sqrt sqrt_"),
    ("Abs", "abs abs_"),
    ("Neg", "neg __neg__"),
    ("Erf", "erf"),
    (
        "",
        "selu celu logsigmoid square pow __pow__ rsqrt norm normalize glu sum var std prod cumsum logsumexp",
    ),
    ("", "masked_fill masked_fill_ where maximum minimum log log1p reciprocal sin cos sign round floor ceil"),
    ("", "softsign softshrink hardshrink tanhshrink threshold threshold_ lerp addcmul addcdiv"),
    ("", "eq ne gt lt ge le"),
    ("BatchNormalization", "batch_norm"),
    ("LayerNormalization", "layer_norm rms_norm"),
    ("GroupNormalization", "group_norm"),
    ("InstanceNormalization", "instance_norm"),
    ("LRN", "local_response_norm"),
    ("Resize", "interpolate upsample"),
    ("Pad", "pad"),
    ("DepthToSpace", "pixel_shuffle"),
    ("Reshape", "reshape reshape_as view view_as flatten unflatten channel_shuffle native_channel_shuffle"),
    ("Transpose", "permute transpose transpose_ movedim swapaxes swapdims t T mT"),
    ("Squeeze", "squeeze squeeze_"),
    ("Unsqueeze", "unsqueeze unsqueeze_"),
    ("Slice", "__getitem__ narrow select"),
    ("Split", "chunk split tensor_split split_with_sizes unbind roll flip index_select"),
    ("Expand", "expand expand_as broadcast_to"),
    ("Tile", "repeat tile repeat_interleave"),
    (
        "Identity",
        "contiguous clone detach to float type_as requires_grad_ dropout dropout_ dropout2d dropout3d data",
    ),
)
_PLACES: tuple[Any, ...] = (torch, Tensor, F, torch._C._nn, torch.special)
# These give no values that could be quantized; those who read them read no activation.
_NO_VALUES = """
size dim shape dtype device numel item __len__
new_zeros new_ones new_full new_empty zeros_like ones_like full_like empty_like
"""
COMPARISONS = frozenset(("eq", "ne", "gt", "lt", "ge", "le"))
NO_VALUES = frozenset((*_NO_VALUES.split(), "__eq__", "__ne__", *COMPARISONS))


def name_of(function: Callable[..., Any]) -> str:
    """Get the name of a function; of a getter such as ``Tensor.T`` the attribute's."""
    name = getattr(function, "__name__", "")
    return getattr(getattr(function, "__self__", None), "__name__", name) if name == "__get__" else name


def _table() -> tuple[dict[Any, Function], dict[str, Function]]:
    by_function: dict[Any, Function] = {}
    by_name: dict[str, Function] = {}
    for operator, names in _ROWS:
        spellings = names.split()
        row = Function(spellings[0], OPERATORS.get(operator, _FLOAT))
        if operator == "":
            by_name.update({name: Function(name, _FLOAT) for name in spellings})
            continue
        by_name.update(dict.fromkeys(spellings, row))
    for name, row in by_name.items():
        for place in _PLACES:
            function = getattr(place, name, None)
            if isinstance(function, (types.GetSetDescriptorType, property)):  # such as Tensor.T
                function = function.__get__
            if callable(function):
                by_function[function] = row
    return by_function, by_name


FUNCTIONS, _BY_NAME = _table()


def function_of(function: Callable[..., Any]) -> Function:
    """Look up the row of a function; one without a row is unknown."""
    row = FUNCTIONS.get(function)
    name = name_of(function)
    return row or _BY_NAME.get(name) or Function(name.strip("_"), UNKNOWN)


class Constants:
    """The tensors that do not depend on what the innermost running module was called with.

    These are parameters, buffers, and what is computed from them alone. What a module is called with is hidden while
    it runs: the same tensors are constants in it where it runs alone, in a model, or where a model is recorded.
    """

    def __init__(self) -> None:
        # Kept, as the identity of a freed tensor could be another's.
        self._known: dict[int, Tensor] = {}

    def __contains__(self, tensor: Tensor) -> bool:
        # Most tensors are neither, and the second question is slow.
        return id(tensor) in self._known or (type(tensor) is not Tensor and isinstance(tensor, nn.Parameter))

    def enter(self, module: nn.Module, arguments: Any) -> list[Tensor]:
        """Begin the call of a module. Returns what is hidden meanwhile, for :meth:`leave`."""
        tensors = _tensors(arguments) if self._known else ()
        hidden = [self._known.pop(id(tensor)) for tensor in tensors if id(tensor) in self._known]
        own = (tensor for tensor in module._buffers.values() if tensor is not None)
        self._known.update({id(tensor): tensor for tensor in own})
        return hidden

    def leave(self, hidden: list[Tensor]) -> None:
        """End the call of a module."""
        self._known.update({id(tensor): tensor for tensor in hidden})

    def follow(self, function: Callable[..., Any], args: Any, kwargs: dict[str, Any], result: Any) -> None:
        """Note what a function made, or changed in place, of constants alone or of other tensors too."""
        if function is Tensor.__setitem__:
            result = args[0]
        first = args[0] if args else None
        depends = isinstance(first, Tensor) and first not in self
        if not depends and all(tensor in self for tensor in _tensors((args, kwargs))):
            self._known.update({id(tensor): tensor for tensor in _tensors(result)})
        elif self._known:
            for tensor in _tensors(result):
                self._known.pop(id(tensor), None)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def is_counted(inputs: list[Any], constants: Constants) -> bool:
    """Check whether a call with these operands counts among the calls of its function, by which a site is known.

    Integers don't: in training, BatchNorm counts its batches by an ``add_``. Constants don't either: timm resizes
    position embeddings, and torch.export runs that for every size.
    """
    return any(
        isinstance(value, Tensor) and value.is_floating_point() and value not in constants for value in inputs
    )


def operands(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """List the operands of a call: tensors, and numbers in their place; no sizes or axes.

    A site has a quantizer for each of them.
    """
    if function.name in ("cat", "stack"):
        tensors = args[0] if args else kwargs.get("tensors", ())
        return list(tensors)
    if function.name == "einsum":
        return list(args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:])
    names = _OPERANDS.get(function.name, ("input",))
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


def replaced(
    function: Function, values: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replace the operands among the arguments."""
    if function.name in ("cat", "stack"):
        return ((values, *args[1:]), kwargs) if args else (args, {**kwargs, "tensors": values})
    if function.name == "einsum":
        return (args[0], *values), kwargs
    names = _OPERANDS.get(function.name, ("input",))
    count = min(len(args), len(names))
    rest = {name: value for name, value in zip(names[count:], values[count:], strict=True) if name in kwargs}
    return (*values[:count], *args[count:]), {**kwargs, **rest}


_LAYER = ("input", "weight")
_OPERANDS = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "linear"), _LAYER),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _LAYER),
    **dict.fromkeys(
        ("add", "mul", "sub", "div", "matmul", "maximum", "minimum", *COMPARISONS), ("input", "other")
    ),
    "where": ("condition", "input", "other"),
    "lerp": ("input", "end"),
    **dict.fromkeys(("addcmul", "addcdiv"), ("input", "tensor1", "tensor2")),
    "scaled_dot_product_attention": ("query", "key", "value"),
}
