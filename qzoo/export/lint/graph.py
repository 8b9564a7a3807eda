"""A Q/DQ graph as the rules look at it: who makes and who reads a tensor, what is a weight, which type a Q gives."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
from onnx import NodeProto, TensorProto

from qzoo.errors import GraphError, one_line
from qzoo.export.lint.load import array_of, constants_of, nodes_within, read_model, type_name
from qzoo.export.lint.shapes import shapes_of
from qzoo.runtimes.operators import CLAMPS, KERNELS, MOVES, OPERATORS, PAIR, WEIGHTED

_OF_STORED = (*PAIR, "Cast", *MOVES)
# Over all questions asked of one graph: readers found, and numbers looked at.
_MAX_SINKS = 5_000_000
_MAX_NUMBERS = 300_000_000


class Graph:
    """The main graph of a file, with the functions of the file inlined. Large constants are not read.

    Questions are answered without recursion, and once for each tensor: the time grows with the size of the graph, not
    with the number of its paths.

    Raises:
        FileNotFoundError: there is no such file.
        GraphError: the file is no ONNX model, or too large or too deep (:mod:`qzoo.export.lint.load`).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.model = read_model(path)
        self._folder = Path(path).parent
        graph = self.model.graph
        constants = [n for n in graph.node if n.op_type == "Constant"]
        self.nodes: list[NodeProto] = [n for n in graph.node if n.op_type != "Constant"]
        self._constants: dict[str, TensorProto | None] = {i.name: i for i in graph.initializer}
        self._constants.update((i.values.name, None) for i in graph.sparse_initializer)
        self._constants.update((node.output[0], constants_of(node)) for node in constants)
        self._by_type: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            self._by_type[node.op_type].append(node)
        self.outputs = {value.name for value in graph.output}
        self._producer = {name: node for node in self.nodes for name in node.output}
        self._readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in (*node.input, *(self._captured(node) - {*node.input})):
                self._readers[name].append(node)
        self._origins: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
        self._sinks: dict[tuple[str, ...], dict[int, list[NodeProto | None]]] = defaultdict(dict)
        self._sinks_left = _MAX_SINKS
        self._arrays: dict[str, np.ndarray] = {}
        self._numbers_left = _MAX_NUMBERS

    @cached_property
    def shapes(self) -> dict[str, list[int]]:
        """Shapes of all tensors whose shapes are known, for one image."""
        return shapes_of(self.model)

    @property
    def has_fixed_inputs(self) -> bool:
        """Whether the file says all sizes of its inputs."""
        given = [value for value in self.model.graph.input if value.name not in self._constants]
        return all(dim.dim_value > 0 for value in given for dim in value.type.tensor_type.shape.dim)

    def of(self, *op_types: str) -> Iterator[NodeProto]:
        """The nodes of these types, in the order of the file."""
        if len(op_types) == 1:
            return iter(self._by_type[op_types[0]])
        return (node for node in self.nodes if node.op_type in op_types)

    def producer(self, tensor: str) -> NodeProto | None:
        """The node that makes the tensor; None for inputs and constants."""
        return self._producer.get(tensor)

    def readers(self, node: NodeProto) -> list[NodeProto]:
        """The nodes that read any output of ``node``."""
        if len(node.output) == 1:
            return self._readers[node.output[0]]
        return [reader for name in node.output for reader in self._readers[name]]

    def is_constant(self, tensor: str) -> bool:
        """Whether the tensor is stored in the file."""
        return tensor in self._constants

    def constant_type(self, tensor: str) -> str:
        """``"int8"`` and the like, "" for a tensor that is not stored."""
        proto = self._constants.get(tensor)
        return "" if proto is None else type_name(proto.data_type)

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The shape of a stored tensor; () for others."""
        proto = self._constants.get(tensor)
        return () if proto is None else tuple(proto.dims)

    def array(self, tensor: str) -> np.ndarray | None:
        """The values of a stored tensor."""
        proto = self._constants.get(tensor)
        if proto is None:
            return None
        if tensor not in self._arrays:
            self._arrays[tensor] = array_of(proto, self._folder)
        self._numbers_left -= self._arrays[tensor].size
        if self._numbers_left < 0:
            raise GraphError("its scales, biases and limits are too large to be judged")
        return self._arrays[tensor]

    def source(self, tensor: str, through: tuple[str, ...] = MOVES) -> NodeProto | None:
        """The node that computed the values: the producer, looked at through some operators."""
        return self.producer(self._origin(tensor, through))

    def _origin(self, tensor: str, through: tuple[str, ...]) -> str:
        """The tensor that the operators of these types made this one of."""
        known, passed = self._origins[through], []
        while tensor not in known:
            passed.append(tensor)
            node = self.producer(tensor)
            if node is None or node.op_type not in through:
                known[tensor] = tensor
            else:
                tensor = node.input[0]
        known.update(dict.fromkeys(passed, known[tensor]))
        return known[tensor]

    def sinks(self, node: NodeProto, through: tuple[str, ...] = (*MOVES, *CLAMPS)) -> list[NodeProto | None]:
        """Who reads the values, looked at through some operators; None stands for an output of the graph."""
        known, todo = self._sinks[through], [node]
        while todo:
            top = todo[-1]
            passed = [] if id(top) in known else self._passed(top, through)
            waiting = [reader for reader in passed if id(reader) not in known]
            if not waiting:
                known.setdefault(id(top), self._sinks_behind(top, passed, known))
                todo.pop()
            todo += waiting
        return known[id(node)]

    def _passed(self, node: NodeProto, through: tuple[str, ...]) -> list[NodeProto]:
        """The readers that hand the node's values on: as their first input."""
        readers = {id(n): n for n in self.readers(node) if n.op_type in through and n.input[0] in node.output}
        return list(readers.values())

    def _sinks_behind(
        self, node: NodeProto, passed: list[NodeProto], known: dict[int, list[NodeProto | None]]
    ) -> list[NodeProto | None]:
        pending = {id(reader) for reader in passed}
        found: list[NodeProto | None] = [None] if self.outputs & set(node.output) else []
        for reader in self.readers(node):
            if id(reader) in pending:  # a second mention is as a shape, say, which is read here
                pending.remove(id(reader))
                behind = known[id(reader)]
                if not found and len(self.readers(node)) == 1:
                    return behind
                found += behind
            else:
                found.append(reader)
        self._sinks_left -= len(found)
        if self._sinks_left < 0:
            raise GraphError("the graph branches too often to be judged")
        return found

    def is_quantized_once(self, node: NodeProto) -> bool:
        """Whether the values go into one Q and nowhere else."""
        sinks = self.sinks(node)
        first = sinks[0] if sinks else None
        if first is None or first.op_type != "QuantizeLinear":
            return False
        # ONNX Runtime merges those that are written alike.
        return all(n is not None and (n is first or _is_copy(n, first)) for n in sinks)

    def is_nonnegative(self, clamp: NodeProto) -> bool:
        """A ReLU, or a Clip whose lower limit is 0."""
        return clamp.op_type == "Relu" or self.limits(clamp)[0] == 0

    def limits(self, clip: NodeProto) -> tuple[float | None, float | None]:
        """Lower and upper limit of a Clip: infinite where it has none, None where it is computed."""
        found: list[float | None] = []
        for index, name, default in ((1, "min", -np.inf), (2, "max", np.inf)):
            if len(clip.input) > index and clip.input[index]:
                value = self.array(clip.input[index])
                found.append(float(value.reshape(-1)[0]) if value is not None and value.size == 1 else None)
            else:  # an attribute before opset 11
                found.append(next((a.f for a in clip.attribute if a.name == name), default))
        return found[0], found[1]

    def inner(self, node: NodeProto) -> list[NodeProto]:
        """The nodes of its bodies, those of the branches of an If and so on, at any depth."""
        return nodes_within(node)

    def _captured(self, node: NodeProto) -> set[str]:
        """Tensors of this graph that its bodies read."""
        return {name for n in self.inner(node) for name in n.input if name in self._producer}

    # Q and DQ

    def is_stored(self, tensor: str) -> bool:
        """A stored tensor, or one that Q, DQ, Cast or moves make of it."""
        return self.is_constant(self._origin(tensor, _OF_STORED))

    def is_weight(self, node: NodeProto) -> bool:
        """A Q or DQ of something stored: a weight or a bias."""
        return self.is_stored(node.input[0])

    def is_dequantized(self, tensor: str) -> bool:
        """The output of a DQ of an activation, maybe moved (see :data:`MOVES`)."""
        node = self.source(tensor)
        return node is not None and node.op_type == "DequantizeLinear" and not self.is_weight(node)

    def has_weight(self, node: NodeProto) -> bool:
        """Whether the second operand is stored (and not another activation)."""
        return self.is_stored(node.input[1])

    def runs_quantized(self, node: NodeProto) -> bool:
        """A weighted layer with both operands from DQ."""
        if node.op_type not in WEIGHTED or not self.is_dequantized(node.input[0]):
            return False
        other = self.source(node.input[1])
        return other is not None and other.op_type == "DequantizeLinear"

    def is_int8_layer(self, tensor: str) -> bool:
        """The output of a layer with both operands from DQ."""
        node = self.producer(tensor)
        return node is not None and self.runs_quantized(node)

    def has_int8_kernel(self, node: NodeProto) -> bool:
        """A layer or operator that ONNX Runtime computes in int8 if one Q reads the output."""
        if node.op_type not in KERNELS:
            return self.runs_quantized(node)
        operands = self._operands(node)
        quantized = [self.is_dequantized(x) for x in operands]
        return any(quantized) and all(
            q or self._fits_kernel(node, x) for q, x in zip(quantized, operands, strict=True)
        )

    def _operands(self, node: NodeProto) -> list[str]:
        """The inputs that hold data, and not a condition, a size or an axis."""
        places = OPERATORS[node.op_type].operands
        return list(node.input if places is None else (node.input[i] for i in places))

    def _fits_kernel(self, node: NodeProto, tensor: str) -> bool:
        """A stored operand of a kernel: uint8 with one scale, or for Where a number.

        The kernels of x86 want one type for all. ONNX Runtime makes int8 activations uint8, but not what is stored.
        """
        dq = self.producer(tensor)
        if dq is None or dq.op_type != "DequantizeLinear" or not self.is_constant(dq.input[0]):
            return node.op_type == "Where" and self._is_number(tensor) and self._is_unsigned(node)
        scale = self.scale(dq)
        return self.int_type(dq) == "uint8" and scale is not None and scale.size == 1

    def _is_number(self, tensor: str) -> bool:
        return self.is_constant(tensor) and self.shape(tensor) == ()

    def _is_unsigned(self, where: NodeProto) -> bool:
        parts = (self.source(x) for x in where.input[1:3])
        return any(dq is not None and self.int_type(dq) == "uint8" for dq in parts if _is_dq(dq))

    def is_equal_concat(self, tensor: str) -> bool:
        """The output of a Concat of tensors that were dequantized alike, maybe moved or with a ReLU behind.

        They have one type and one scale, and one zero point unless the Concat is one of channels: OpenVINO computes
        with a zero point per channel. Behind a ReLU the zero point must be the lowest value.
        """
        node = self.source(tensor, through=(*MOVES, "Relu"))
        if node is None or node.op_type != "Concat":
            return False
        parts = self._dequantized_parts(node)
        kinds = {self.parameters(dq) for dq in parts}
        scales, zeros, types = ({kind[i] for kind in kinds} for i in range(3))
        alike = len(scales) == len(types) == 1 and b"" not in scales | zeros
        clamped = self.source(tensor) is not node
        lowest = types == {"uint8"} and all(not any(zero) for zero in zeros)
        return alike and (len(zeros) == 1 or attribute(node, "axis", 1) == 1) and (lowest or not clamped)

    def _dequantized_parts(self, concat: NodeProto) -> list[NodeProto]:
        """The DQ nodes whose values a Concat, or Concats of Concats, joins; none if one part is not dequantized."""
        parts: list[NodeProto] = []
        seen, todo = {id(concat)}, [concat]
        for node in todo:
            for part in (self.source(x) for x in node.input):
                if part is None or part.op_type not in ("Concat", "DequantizeLinear"):
                    return []
                if id(part) not in seen:
                    seen.add(id(part))
                    (todo if part.op_type == "Concat" else parts).append(part)
        return parts

    def writes_float(self, node: NodeProto) -> bool:
        """A Gemm whose int8 kernel can: with a bias of integers or none; a float one is quantized only before Q."""
        return node.op_type == "Gemm" and not (len(node.input) > 2 and self.is_constant(node.input[2]))

    def parameters(self, node: NodeProto) -> tuple[bytes, bytes, str]:
        """What makes two Q or DQ equal: scale, zero point, type."""
        scale, zero = self.scale(node), self.zero_point(node)
        return (
            b"" if scale is None else scale.tobytes(),
            b"" if zero is None else zero.astype(np.int64).tobytes(),
            self.int_type(node),
        )

    def scale(self, node: NodeProto) -> np.ndarray | None:
        """The scale of a Q or DQ; None when computed."""
        value = self.array(node.input[1])
        if value is None:
            return None
        if value.dtype.kind in "OSU" or value.size == 0:
            raise GraphError(f"the scale of {label(node)!r} is no number")
        return value.astype(np.float32)

    def zero_point(self, node: NodeProto) -> np.ndarray | None:
        """The zero point of a Q or DQ: stored values, zeros when left out, None when computed."""
        if len(node.input) < 3 or not node.input[2]:
            return np.zeros((), np.int64)
        value = self.array(node.input[2])
        if value is not None and (value.dtype.kind in "OSU" or value.size == 0):
            raise GraphError(f"the zero point of {label(node)!r} is no number")
        return value

    def int_type(self, node: NodeProto) -> str:
        """The quantized type of a Q or DQ: ``"int8"``, ``"uint8"``, ``"float8e4m3fn"``, ...; "" if unknown."""
        if len(node.input) > 2 and node.input[2]:
            return self.constant_type(node.input[2])
        if node.op_type == "QuantizeLinear":
            return type_name(attribute(node, "output_dtype", 0) or TensorProto.UINT8)
        maker = self.producer(node.input[0])
        if maker is not None and maker.op_type == "QuantizeLinear":
            return self.int_type(maker)
        return self.constant_type(node.input[0])


def _is_dq(node: NodeProto | None) -> bool:
    return node is not None and node.op_type == "DequantizeLinear"


def _is_copy(node: NodeProto, other: NodeProto) -> bool:
    return node.input == other.input and list(node.attribute) == list(other.attribute)


def attribute(node: NodeProto, name: str, default: int) -> int:
    """An integer attribute."""
    return next((a.i for a in node.attribute if a.name == name), default)


def label(node: NodeProto) -> str:
    """The node's name, or that of its first output where it has none; control characters are escaped."""
    name = node.name or next(iter(node.output), node.op_type)
    return one_line(name)
