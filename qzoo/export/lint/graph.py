"""A Q/DQ graph as the rules look at it: who makes and who reads a tensor, what is a weight, which type a Q gives."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qzoo.errors import GraphError, one_line
from qzoo.export.graph import (
    input_of,
    integer,
    is_output,
    is_stored,
    made_by,
    maker,
    nodes_within,
    number,
    readers,
    stored,
    stored_shape,
    stored_type,
)
from qzoo.export.lint.load import array_of, deserialize, read_model, type_name
from qzoo.export.lint.shapes import shapes_of
from qzoo.runtimes.operators import CLAMPS, KERNELS, MOVES, OPERATORS, PAIR, WEIGHTED

_OF_STORED = (*PAIR, "Cast", *MOVES)
# Over all questions asked of one graph: readers found, and numbers looked at.
_MAX_SINKS = 5_000_000
_MAX_NUMBERS = 300_000_000

_Value = ir.Value | None


class Graph:
    """The main graph of a file, with the functions of the file inlined. Large constants are not read.

    Questions are answered without recursion, and once for each tensor: the time grows with the size of the graph, not
    with the number of its paths.

    Raises:
        FileNotFoundError: there is no such file.
        GraphError: the file is no ONNX model, or too large or too deep (:mod:`qzoo.export.lint.load`).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._proto = read_model(path)
        self._folder = Path(path).parent
        self.model = deserialize(self._proto, path)
        self.nodes = [node for node in self.model.graph if node.op_type != "Constant"]
        self._by_type: dict[str, list[ir.Node]] = defaultdict(list)
        self._types = [node.op_type for node in self.nodes]
        for node, op_type in zip(self.nodes, self._types, strict=True):
            self._by_type[op_type].append(node)
        self._holders = {deep: node for node in self.nodes for deep in nodes_within(node)}
        self._readers: dict[ir.Node, list[ir.Node]] = {}
        self._int_types: dict[ir.Node, str] = {}
        self._known_numbers: dict[tuple[ir.Node, int], np.ndarray | None] = {}
        self._origins: dict[tuple[str, ...], dict[_Value, _Value]] = defaultdict(dict)
        self._sinks: dict[tuple[str, ...], dict[ir.Node, list[ir.Node | None]]] = defaultdict(dict)
        self._sinks_left = _MAX_SINKS
        self._arrays: dict[_Value, np.ndarray] = {}
        self._numbers_left = _MAX_NUMBERS

    @cached_property
    def shapes(self) -> dict[str, list[int]]:
        """Shapes of all tensors whose shapes are known, by name, for one image."""
        return shapes_of(self._proto)

    @property
    def has_fixed_inputs(self) -> bool:
        """Whether the file says all sizes of its inputs."""
        return all(isinstance(n, int) and n > 0 for x in self.model.graph.inputs for n in x.shape or ())

    @cached_property
    def kept_in_float(self) -> dict[ir.Node, str]:
        """The layers that qzoo's export says are in float on request, with their modules' names."""
        try:
            names = json.loads(self.model.metadata_props.get("qzoo.float_layers", "[]"))
        except (ValueError, RecursionError):
            return {}
        asked = {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()
        modules = {node: str(node.name).rpartition("/")[0] for node in self.of(*WEIGHTED)} if asked else {}
        return {node: name for node, name in modules.items() if name in asked}

    @cached_property
    def computed_at_load(self) -> set[ir.Node]:
        """The nodes that depend on no input, which a runtime computes once, when it loads the file.

        An operator without operands may be a random number, and what a Q or DQ makes of stored tensors stays, since
        the layer behind may have an integer kernel.
        """
        done: set[ir.Node] = set()
        for node in self.nodes:
            stays = not node.inputs or node.op_type in PAIR or nodes_within(node)
            if not stays and all(x is None or is_stored(x) or x.producer() in done for x in node.inputs):
                done.add(node)
        return done

    def layers(self, *op_types: str) -> Iterator[ir.Node]:
        """List the nodes of these types, in the order of the file, that run at each call."""
        return (node for node in self.of(*op_types) if node not in self.computed_at_load)

    def of(self, *op_types: str) -> Iterator[ir.Node]:
        """List the nodes of these types, in the order of the file."""
        if len(op_types) == 1:
            return iter(self._by_type[op_types[0]])
        return (node for node, kind in zip(self.nodes, self._types, strict=True) if kind in op_types)

    def readers(self, node: ir.Node) -> list[ir.Node]:
        """List the nodes that read any output of ``node``, themselves or in a body."""
        if node not in self._readers:
            nodes: list[ir.Node] = []
            for value in node.outputs:
                direct = readers(value)
                held, known = (self._holders[n] for n in direct if n in self._holders), set(direct)
                nodes += [n for n in direct if n not in self._holders]
                nodes += [n for n in dict.fromkeys(held) if n not in known]
            self._readers[node] = nodes
        return self._readers[node]

    def array(self, value: _Value) -> np.ndarray | None:
        """Read the values of a stored tensor."""
        tensor = stored(value)
        if tensor is None:
            return None
        if value not in self._arrays:
            self._arrays[value] = array_of(tensor, self._folder)
        self._numbers_left -= self._arrays[value].size
        if self._numbers_left < 0:
            raise GraphError("its scales, biases and limits are too large to be judged")
        return self._arrays[value]

    def source(self, value: _Value, through: tuple[str, ...] = MOVES) -> ir.Node | None:
        """Find the node that computed the values: the producer, looked at through some operators."""
        return maker(self._origin(value, through))

    def _origin(self, value: _Value, through: tuple[str, ...]) -> _Value:
        """The tensor that the operators of these types made this one of."""
        known, passed = self._origins[through], []
        if value in known:
            return known[value]
        while value not in known:
            passed.append(value)
            node = made_by(value, *through)
            if node is None:
                known[value] = value
            else:
                value = node.inputs[0]
        known.update(dict.fromkeys(passed, known[value]))
        return known[value]

    def sinks(self, node: ir.Node, through: tuple[str, ...] = (*MOVES, *CLAMPS)) -> list[ir.Node | None]:
        """List the nodes that read the values, looked at through some operators; None is an output of the graph."""
        known, todo = self._sinks[through], [node]
        while todo:
            top = todo[-1]
            passed = [] if top in known else self._passed(top, through)
            waiting = [reader for reader in passed if reader not in known]
            if not waiting:
                known.setdefault(top, self._sinks_behind(top, passed, known))
                todo.pop()
            todo += waiting
        return known[node]

    def _passed(self, node: ir.Node, through: tuple[str, ...]) -> list[ir.Node]:
        """The readers that hand the node's values on: as their first input."""
        nodes = (n for n in self.readers(node) if n.op_type in through and n.inputs[0] in node.outputs)
        return list(dict.fromkeys(nodes))

    def _sinks_behind(
        self, node: ir.Node, passed: list[ir.Node], known: dict[ir.Node, list[ir.Node | None]]
    ) -> list[ir.Node | None]:
        pending = set(passed)
        sinks: list[ir.Node | None] = [None] if is_output(node) else []
        for reader in self.readers(node):
            if reader in pending:  # a second mention is as a shape, say, which is read here
                pending.remove(reader)
                behind = known[reader]
                if not sinks and len(self.readers(node)) == 1:
                    return behind
                sinks += behind
            else:
                sinks.append(reader)
        self._sinks_left -= len(sinks)
        if self._sinks_left < 0:
            raise GraphError("the graph branches too often to be judged")
        return sinks

    def path_to_q(self, node: ir.Node, passes: Callable[[ir.Node], bool]) -> list[ir.Node]:
        """Follow the only reader of each tensor through nodes that ``passes`` lets by.

        Returns:
            What stands between the node and a QuantizeLinear, which ends it; [] where it does not come to one.
        """
        path: list[ir.Node] = []
        while len(readers := self.readers(node)) == 1 and not is_output(node):
            (node,) = readers
            path.append(node)
            if node.op_type == "QuantizeLinear":
                return path
            if not passes(node):
                break
        return []

    def is_quantized_once(self, node: ir.Node) -> bool:
        """Check whether the values go into one Q and nowhere else."""
        sinks = self.sinks(node)
        first = sinks[0] if sinks else None
        if first is None or first.op_type != "QuantizeLinear":
            return False
        # ONNX Runtime merges those that are written alike.
        return all(n is not None and (n is first or _is_copy(n, first)) for n in sinks)

    def is_nonnegative(self, clamp: ir.Node) -> bool:
        """Check whether a clamp is a ReLU, or a Clip whose lower limit is 0."""
        return clamp.op_type == "Relu" or self.limits(clamp)[0] == 0

    def limits(self, clip: ir.Node) -> tuple[float | None, float | None]:
        """Get the lower and upper limit of a Clip: infinite where it has none, None where it is computed."""
        ends: list[float | None] = []
        for index, name, default in ((1, "min", -np.inf), (2, "max", np.inf)):
            if limit := input_of(clip, index):
                value = self.array(limit)
                ends.append(float(value.reshape(-1)[0]) if value is not None and value.size == 1 else None)
            else:  # an attribute before opset 11
                ends.append(number(clip, name, default))
        return ends[0], ends[1]

    # Q and DQ

    def is_made_of_stored(self, value: _Value) -> bool:
        """Check whether the file holds a tensor, or one that Q, DQ, Cast or moves make it of."""
        return is_stored(self._origin(value, _OF_STORED))

    def is_weight(self, node: ir.Node) -> bool:
        """Check whether a Q or DQ is of something stored: a weight or a bias."""
        return self.is_made_of_stored(node.inputs[0])

    def is_dequantized(self, value: _Value) -> bool:
        """Check whether a DQ of an activation makes the tensor, maybe moved (see :data:`MOVES`)."""
        node = self.source(value)
        return node is not None and node.op_type == "DequantizeLinear" and not self.is_weight(node)

    def has_weight(self, node: ir.Node) -> bool:
        """Check whether the second operand is stored (and not another activation)."""
        return self.is_made_of_stored(node.inputs[1])

    def runs_quantized(self, node: ir.Node | None) -> bool:
        """Check whether a node is a weighted layer with both operands from DQ."""
        if node is None or node.op_type not in WEIGHTED or not self.is_dequantized(node.inputs[0]):
            return False
        return is_dq(self.source(node.inputs[1]))

    def is_int8_layer(self, value: _Value) -> bool:
        """Check whether a layer with both operands from DQ makes the tensor."""
        return self.runs_quantized(maker(value))

    def has_int8_kernel(self, node: ir.Node) -> bool:
        """Check whether ONNX Runtime computes a layer or operator in int8 if one Q reads the output."""
        if node.op_type not in KERNELS:
            return self.runs_quantized(node)
        places = OPERATORS[node.op_type].operands  # data, and not a condition, a size or an axis
        operands = node.inputs if places is None else [node.inputs[i] for i in places]
        quantized = [self.is_dequantized(x) for x in operands]
        return any(quantized) and all(
            q or self._fits_kernel(node, x) for q, x in zip(quantized, operands, strict=True)
        )

    def _fits_kernel(self, node: ir.Node, value: _Value) -> bool:
        """A stored operand of a kernel: uint8 with one scale, or for Where a number.

        The kernels of x86 want one type for all. ONNX Runtime makes int8 activations uint8, but not what is stored.
        """
        dq = made_by(value, "DequantizeLinear")
        if dq is None or not is_stored(dq.inputs[0]):
            is_number = is_stored(value) and stored_shape(value) == ()
            return node.op_type == "Where" and is_number and self._is_unsigned(node)
        scale = self.scale(dq)
        return self.int_type(dq) == "uint8" and scale is not None and scale.size == 1

    def _is_unsigned(self, where: ir.Node) -> bool:
        parts = (self.source(x) for x in where.inputs[1:3])
        return any(dq is not None and is_dq(dq) and self.int_type(dq) == "uint8" for dq in parts)

    def is_equal_concat(self, value: _Value) -> bool:
        """Check whether a Concat of tensors dequantized alike makes the tensor, maybe moved or with a ReLU behind.

        They have one type and one scale, and one zero point unless the Concat is one of channels: OpenVINO computes
        with a zero point per channel. Behind a ReLU the zero point must be the lowest value.
        """
        node = self.source(value, through=(*MOVES, "Relu"))
        if node is None or node.op_type != "Concat":
            return False
        kinds = {self.parameters(dq) for dq in self._dequantized_parts(node)}
        scales, zeros, types = ({kind[i] for kind in kinds} for i in range(3))
        alike = len(scales) == len(types) == 1 and b"" not in scales | zeros
        clamped = self.source(value) is not node
        lowest = types == {"uint8"} and all(not any(zero) for zero in zeros)
        return alike and (len(zeros) == 1 or integer(node, "axis", 1) == 1) and (lowest or not clamped)

    def _dequantized_parts(self, concat: ir.Node) -> list[ir.Node]:
        """The DQ nodes whose values a Concat, or Concats of Concats, joins; none if one part is not dequantized."""
        parts: list[ir.Node] = []
        seen, todo = {concat}, [concat]
        for node in todo:
            for part in (self.source(x) for x in node.inputs):
                if part is None or part.op_type not in ("Concat", "DequantizeLinear"):
                    return []
                if part not in seen:
                    seen.add(part)
                    (todo if part.op_type == "Concat" else parts).append(part)
        return parts

    def writes_float(self, node: ir.Node) -> bool:
        """Check whether a Gemm has an int8 kernel that writes float: with a bias of integers or none."""
        return node.op_type == "Gemm" and not is_stored(input_of(node, 2))

    def parameters(self, node: ir.Node) -> tuple[bytes, bytes, str]:
        """Get what makes two Q or DQ equal: scale, zero point, type."""
        scale, zero = self.scale(node), self.zero_point(node)
        return (
            b"" if scale is None else scale.tobytes(),
            b"" if zero is None else zero.astype(np.int64).tobytes(),
            self.int_type(node),
        )

    def scale(self, node: ir.Node) -> np.ndarray | None:
        """Get the scale of a Q or DQ; None when computed."""
        value = self._numbers(node, 1, "scale")
        return None if value is None else value.astype(np.float32)

    def zero_point(self, node: ir.Node) -> np.ndarray | None:
        """Get the zero point of a Q or DQ: stored values, zeros when left out, None when computed."""
        return np.zeros((), np.int64) if input_of(node, 2) is None else self._numbers(node, 2, "zero point")

    def _numbers(self, node: ir.Node, index: int, role: str) -> np.ndarray | None:
        if (node, index) not in self._known_numbers:
            value = self.array(node.inputs[index])
            if value is not None and (value.dtype.kind in "OSU" or value.size == 0):
                raise GraphError(f"the {role} of {label(node)!r} is no number")
            self._known_numbers[node, index] = value
        return self._known_numbers[node, index]

    def int_type(self, node: ir.Node) -> str:
        """Get the quantized type of a Q or DQ: ``"int8"``, ``"uint8"``, ``"float8e4m3fn"``, ...; "" if unknown."""
        if node not in self._int_types:
            self._int_types[node] = self._int_type(node)
        return self._int_types[node]

    def _int_type(self, node: ir.Node) -> str:
        if zero := input_of(node, 2):
            return stored_type(zero)
        if node.op_type == "QuantizeLinear":
            return type_name(integer(node, "output_dtype", 0) or ir.DataType.UINT8)
        q = made_by(node.inputs[0], "QuantizeLinear")
        return stored_type(node.inputs[0]) if q is None else self.int_type(q)


def is_dq(node: ir.Node | None) -> bool:
    """Check whether the node is there and a DequantizeLinear."""
    return node is not None and node.op_type == "DequantizeLinear"


def _is_copy(node: ir.Node, other: ir.Node) -> bool:
    return node.inputs == other.inputs and node.attributes == other.attributes


def label(node: ir.Node) -> str:
    """Name a node for a message: its name, or that of its first output; control characters are escaped."""
    return one_line(node.name or next((str(value.name) for value in node.outputs), node.op_type))
