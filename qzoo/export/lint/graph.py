"""A Q/DQ graph as the rules look at it: who makes and who reads a tensor, what is a weight, which type a Q gives."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
CONVOLUTIONS = ("Conv", "ConvTranspose")
# Operators that move values without changing them: a runtime carries Q or DQ across them.
MOVES = (
    *("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Dropout"),
    *("DepthToSpace", "SpaceToDepth", "Slice", "Gather", "Split", "Expand", "Pad"),
)
CLAMPS = ("Relu", "Clip")


class Graph:
    """The main graph of a file. Large constants are not read.

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
            raise ValueError(f"{str(path)!r} is not an ONNX file: {error}") from error
        graph = self.model.graph
        if not graph.node:
            raise ValueError(f"{str(path)!r} is not an ONNX file, or has no nodes")
        self._folder = str(file.parent)
        self.nodes: list[NodeProto] = [n for n in graph.node if n.op_type != "Constant"]
        self._constants: dict[str, TensorProto] = {i.name: i for i in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant":
                self._constants.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
        self.outputs = {value.name for value in graph.output}
        self._producer = {name: node for node in self.nodes for name in node.output}
        self._readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self._readers[name].append(node)

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
        if clamp.op_type == "Relu":
            return True
        low = self.array(clamp.input[1]) if len(clamp.input) > 1 and clamp.input[1] else None
        return low is not None and low.size == 1 and not low.any()

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


def attribute(node: NodeProto, name: str, default: int) -> int:
    """An integer attribute."""
    return next((a.i for a in node.attribute if a.name == name), default)


def type_name(data_type: int) -> str:
    """``"int8"`` for TensorProto.INT8."""
    return helper.tensor_dtype_to_string(data_type).removeprefix("TensorProto.").lower()


def label(node: NodeProto) -> str:
    """The node's name; that of its first output where it has none."""
    return node.name or node.output[0]
