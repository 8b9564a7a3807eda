"""A Q/DQ graph as the rules look at it: who makes and who reads a tensor, what is a weight, which type a Q gives."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from qzoo.errors import ArgumentError

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
CONVOLUTIONS = ("Conv", "ConvTranspose")
# Operators that move values without changing them: a runtime carries Q or DQ across them.
MOVES = (
    *("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Dropout"),
    *("DepthToSpace", "SpaceToDepth", "Slice", "Gather", "Split", "Expand", "Pad"),
)
# Those that ONNX Runtime carries them across; it drops Identity and Dropout.
CARRIED = ("MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Identity", "Dropout")
CLAMPS = ("Relu", "Clip")
POOLS = ("AveragePool", "GlobalAveragePool")
# With all operands from DQ and one Q behind, ONNX Runtime has int8 kernels for these.
KERNELS = ("Add", "Mul", "Concat", "Sigmoid", "LeakyRelu", "Softmax", "Where", "Resize", *POOLS)


class Graph:
    """The main graph of a file, with the functions of the file inlined. Large constants are not read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no ONNX model.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"no file {str(path)!r}")
        try:
            self.model = onnx.load(file, load_external_data=False)
        except Exception as error:  # protobuf's own error type is not public
            raise ArgumentError(f"{str(path)!r} is not an ONNX file: {error}") from error
        if self.model.functions:
            self.model = onnx.inliner.inline_local_functions(self.model)
        graph = self.model.graph
        if not graph.node:
            raise ArgumentError(f"{str(path)!r} is not an ONNX file, or has no nodes")
        self._folder = str(file.parent)
        self.nodes: list[NodeProto] = [n for n in graph.node if n.op_type != "Constant"]
        self._constants: dict[str, TensorProto] = {i.name: i for i in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant":
                self._constants.update((node.output[0], tensor) for tensor in _value(node))
        self.outputs = {value.name for value in graph.output}
        self._producer = {name: node for node in self.nodes for name in node.output}
        self._readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in dict.fromkeys((*node.input, *self._captured(node))):
                self._readers[name] += [node] * max(1, list(node.input).count(name))

    def of(self, *op_types: str) -> Iterator[NodeProto]:
        """The nodes of these types, in the order of the file."""
        return (node for node in self.nodes if node.op_type in op_types)

    def producer(self, tensor: str) -> NodeProto | None:
        """The node that makes the tensor; None for inputs and constants."""
        return self._producer.get(tensor)

    def readers(self, node: NodeProto) -> list[NodeProto]:
        """The nodes that read any output of ``node``."""
        return [reader for name in node.output for reader in self._readers[name]]

    def is_constant(self, tensor: str) -> bool:
        """Whether the tensor is stored in the file."""
        return tensor in self._constants

    def constant_type(self, tensor: str) -> str:
        """``"int8"`` and the like, "" for a tensor that is not stored."""
        proto = self._constants.get(tensor)
        return "" if proto is None else type_name(proto.data_type)

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Of a stored tensor; () for others."""
        proto = self._constants.get(tensor)
        return () if proto is None else tuple(proto.dims)

    def array(self, tensor: str) -> np.ndarray | None:
        """The values of a stored tensor."""
        proto = self._constants.get(tensor)
        return None if proto is None else numpy_helper.to_array(proto, self._folder)

    def source(self, tensor: str, through: tuple[str, ...] = MOVES) -> NodeProto | None:
        """The node that computed the values: the producer, looked at through some operators."""
        node = self.producer(tensor)
        while node is not None and node.op_type in through:
            node = self.producer(node.input[0])
        return node

    def sinks(self, node: NodeProto, through: tuple[str, ...] = (*MOVES, *CLAMPS)) -> list[NodeProto | None]:
        """Who reads the values, looked at through some operators; None stands for an output of the graph."""
        found: list[NodeProto | None] = [None] if self.outputs & set(node.output) else []
        for reader in self.readers(node):
            found += self.sinks(reader, through) if reader.op_type in through else [reader]
        return found

    def is_quantized_once(self, node: NodeProto) -> bool:
        """Whether the values go into one Q and nowhere else."""
        sinks = self.sinks(node)
        return len(sinks) == 1 and sinks[0] is not None and sinks[0].op_type == "QuantizeLinear"

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
        return [deep for body in _bodies(node) for n in body.node for deep in (n, *self.inner(n))]

    def _captured(self, node: NodeProto) -> list[str]:
        """Tensors of this graph that its bodies read."""
        return [name for n in self.inner(node) for name in n.input if name in self._producer]

    # Q and DQ

    def is_stored(self, tensor: str) -> bool:
        """A stored tensor, or one that Q, DQ, Cast or moves make of it."""
        if self.is_constant(tensor):
            return True
        maker = self.producer(tensor)
        kinds = ("QuantizeLinear", "DequantizeLinear", "Cast", *MOVES)
        return maker is not None and maker.op_type in kinds and self.is_stored(maker.input[0])

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
        operands = [x for x in node.input if x and not self.is_constant(x)]
        return bool(operands) and all(self.is_dequantized(x) for x in operands)

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
        """Of a Q or DQ."""
        return self.array(node.input[1])

    def zero_point(self, node: NodeProto) -> np.ndarray | None:
        """Of a Q or DQ: stored values, zeros when left out, None when computed."""
        if len(node.input) < 3 or not node.input[2]:
            return np.zeros((), np.int64)
        return self.array(node.input[2])

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


def _value(node: NodeProto) -> Iterator[TensorProto]:
    """What a Constant holds: a tensor, or numbers in an attribute of their own."""
    for a in node.attribute:
        if a.name == "value":
            yield a.t
        elif a.name in ("value_float", "value_floats"):
            yield numpy_helper.from_array(np.array(helper.get_attribute_value(a), np.float32))
        elif a.name in ("value_int", "value_ints"):
            yield numpy_helper.from_array(np.array(helper.get_attribute_value(a), np.int64))


def _bodies(node: NodeProto) -> list[GraphProto]:
    return [body for a in node.attribute for body in ((a.g,) if a.HasField("g") else a.graphs)]


def attribute(node: NodeProto, name: str, default: int) -> int:
    """An integer attribute."""
    return next((a.i for a in node.attribute if a.name == name), default)


def type_name(data_type: int) -> str:
    """``"int8"`` for TensorProto.INT8."""
    return helper.tensor_dtype_to_string(data_type).removeprefix("TensorProto.").lower()


def label(node: NodeProto) -> str:
    """The node's name; that of its first output where it has none."""
    return node.name or node.output[0]
