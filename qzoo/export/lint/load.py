"""Read an ONNX file of unknown origin: what is too large, too deep or not a graph is refused in one line."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from onnx_ir.passes.common import RemoveInitializersFromInputsPass

from qzoo.errors import GraphError

MAX_FILE = 2**31  # bytes of one protobuf message
MAX_NODES = 30_000  # of the graph, its bodies, and its functions where they are called
_MAX_CALLS = 50  # functions that call each other, in depth
_MAX_COPIED = 2**28  # bytes that inlining functions may add
_MAX_EXTERNAL = 2**26  # bytes of one tensor that a rule looks at
_STANDARD = ("", "ai.onnx")
_QDQ = ("QuantizeLinear", "DequantizeLinear")


def read_model(path: str | os.PathLike[str]) -> ModelProto:
    """Read an ONNX file, with its functions inlined; weights in other files are not read.

    In what is returned every node has the inputs and outputs that its operator needs, every tensor is made once and
    before it is read, and no tensor has an unknown type. Operators of other domains have the domain in their type:
    a Conv of ``own`` is an ``own::Conv``.

    Raises:
        FileNotFoundError: there is no such file.
        GraphError: not an ONNX file, or one that no runtime loads, or beyond the limits of this module.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    if file.stat().st_size > MAX_FILE:
        raise GraphError(f"{str(path)!r} is not an ONNX file: it has more than 2 GiB")
    try:
        model = onnx.load(file, format="protobuf", load_external_data=False)
    except Exception as error:  # protobuf's own error type is not public
        raise GraphError(f"{str(path)!r} is not an ONNX file: {_line(error)}") from error
    if not model.graph.node:
        raise GraphError(f"{str(path)!r} is not an ONNX file, or has no nodes")
    try:
        _check_text(model)
        model = _inline(model)
        _name_domains(model.graph.node)
        _check(model)
        _leave_out(model.graph)
    except GraphError as error:
        raise GraphError(f"{str(path)!r}: {error}") from error
    return model


def every_node(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """List nodes, each with those in its bodies (of an If, Loop or Scan) behind it, at any depth."""
    for node in nodes:
        yield node
        for body in _bodies(node):
            yield from every_node(body.node)


def _leave_out(graph: GraphProto) -> None:
    """Remove what ``onnx_ir`` does not read and no rule looks into: types of maps and the like, sparse tensors."""
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        if value.type.WhichOneof("value") != "tensor_type":
            value.ClearField("type")
    for sparse in graph.sparse_initializer:
        graph.node.add(op_type="Constant", output=[sparse.values.name])
    for node in graph.node:
        if node.op_type == "Constant" and any(a.HasField("sparse_tensor") for a in node.attribute):
            del node.attribute[:]


def deserialize(model: ModelProto, path: str | os.PathLike[str]) -> ir.Model:
    """Convert the model of :func:`read_model` to ``onnx_ir``; what has a stored value is no input.

    Raises:
        GraphError: a body, an attribute or an input is not valid.
    """
    log = logging.getLogger("onnx_ir.serde")
    before, log.disabled = (
        log.disabled,
        True,
    )  # it warns of names in bodies, and of outputs, that nothing makes
    try:
        graph: ir.Model = RemoveInitializersFromInputsPass()(ir.from_proto(model)).model
    except Exception as error:  # SerdeError, with the one that says what it is as its first cause
        while error.__cause__ is not None:
            error = error.__cause__  # type: ignore[assignment]
        raise GraphError(f"{str(path)!r}: {_line(error)}") from error
    finally:
        log.disabled = before
    return graph


def array_of(tensor: ir.TensorProtocol, folder: Path) -> np.ndarray:
    """Read the values of a stored tensor, also of one in another file.

    Raises:
        GraphError: its file is missing, too short or outside the folder, or it has other values than its shape says.
    """
    if isinstance(tensor, ir.ExternalTensor):
        tensor = _external(tensor, folder)
    try:
        # onnx, other than onnx_ir, compares the number of values with the shape.
        proto = tensor.raw if isinstance(tensor, ir.serde.TensorProtoTensor) else None
        return tensor.numpy() if proto is None else numpy_helper.to_array(proto)
    except Exception as error:  # ValueError, TypeError and others, by type
        raise GraphError(f"tensor {tensor.name!r} can't be read: {_line(error)}") from error


def _line(error: Exception) -> str:
    """The message in one line, without the native code's traces."""
    return " ".join(str(error).split())[:200]


def type_name(data_type: int) -> str:
    """Name a type, ``"int8"`` for TensorProto.INT8; "" for one that this version of onnx does not know."""
    try:
        return TensorProto.DataType.Name(data_type).lower()  # type: ignore[arg-type]
    except ValueError:
        return ""


def _bodies(node: NodeProto) -> list[GraphProto]:
    return [body for a in node.attribute for body in ((a.g,) if a.HasField("g") else a.graphs)]


def _external(tensor: ir.ExternalTensor, folder: Path) -> ir.TensorProtocol:
    location, offset, size = Path(tensor.location), tensor.offset or 0, tensor.nbytes
    file = folder / location
    if location.is_absolute() or ".." in location.parts or not location.parts:
        raise GraphError(f"tensor {tensor.name!r} lies outside the model's folder: {str(location)!r}")
    if not file.is_file():
        raise GraphError(f"tensor {tensor.name!r} lies in {str(file)!r}, which is not there")
    if tensor.length not in (None, size):
        raise GraphError(
            f"tensor {tensor.name!r} has {size} bytes by its shape, {tensor.length} at {offset} by its place"
        )
    if size > _MAX_EXTERNAL:
        raise GraphError(f"tensor {tensor.name!r} has {size} bytes, too many for a scale, bias or limit")
    if offset + size > file.stat().st_size:
        raise GraphError(f"tensor {tensor.name!r} lies beyond the end of {str(file)!r}")
    with file.open("rb") as stream:
        stream.seek(offset)
        raw = stream.read(size)
    proto = TensorProto(
        name=tensor.name, data_type=tensor.dtype.value, dims=list(tensor.shape.numpy()), raw_data=raw
    )
    return ir.serde.TensorProtoTensor(proto)


def _check_text(model: ModelProto) -> None:
    """Protobuf gives bytes for what is not UTF-8, which every runtime refuses."""
    holders = (model.graph, *model.functions)
    names: list[Any] = [f.name for f in model.functions] + [f.domain for f in model.functions]
    names += [entry for f in model.functions for entry in (*f.input, *f.output, f.overload)]
    names += [value.name for value in (*model.graph.input, *model.graph.output, *model.graph.initializer)]
    names += [entry.domain for entry in model.opset_import]
    for node in (n for holder in holders for n in every_node(holder.node)):
        names += (node.op_type, node.name, node.domain, node.overload, *node.input, *node.output)
        names += [a.name for a in node.attribute]
    for name in names:
        if not isinstance(name, str):
            raise GraphError(f"the name {bytes(name)[:40]!r} is not text in UTF-8")


# Functions


@dataclass
class _Cost:
    """What one call of a function comes to."""

    nodes: int = 0
    size: int = 0
    depth: int = 0


def _inline(model: ModelProto) -> ModelProto:
    costs = _costs(model)
    total = _cost(model.graph.node, costs, model.graph)
    if total.nodes > MAX_NODES:
        raise GraphError(f"the graph has {total.nodes} nodes; lint reads {MAX_NODES}")
    if not model.functions:
        return model
    if total.size > model.ByteSize() + _MAX_COPIED or total.depth > _MAX_CALLS:
        raise GraphError(f"its functions come to {total.size} bytes, in {total.depth} levels; too many")
    try:
        return onnx.inliner.inline_local_functions(model)
    except Exception as error:  # of the native code
        raise GraphError(f"its functions can't be inlined: {_line(error)}") from error


def _costs(model: ModelProto) -> dict[tuple[str, str, str], _Cost]:
    functions = {(f.domain, f.name, f.overload): f for f in model.functions}
    calls = {
        key: {_key(node) for node in every_node(f.node)} & functions.keys() for key, f in functions.items()
    }
    costs: dict[tuple[str, str, str], _Cost] = {}
    try:
        for key in TopologicalSorter(calls).static_order():
            costs[key] = _cost(functions[key].node, costs, functions[key])
            costs[key].depth += 1
    except CycleError as error:
        raise GraphError(f"function {error.args[1][0][1]!r} calls itself") from error
    return costs


def _key(node: NodeProto) -> tuple[str, str, str]:
    return node.domain, node.op_type, node.overload


def _cost(nodes: Any, costs: dict[tuple[str, str, str], _Cost], holder: Any) -> _Cost:
    total = _Cost(size=holder.ByteSize())
    for node in every_node(nodes):
        call = costs.get(_key(node), _Cost())
        total.nodes += 1 + call.nodes
        total.size += call.size
        total.depth = max(total.depth, call.depth)
    return total


# Operators


def _name_domains(nodes: Any) -> None:
    for node in nodes:
        if node.domain not in _STANDARD and not _is_contributed(node):
            node.op_type = f"{node.domain}::{node.op_type}"
        for body in _bodies(node):
            _name_domains(body.node)


def _is_contributed(node: NodeProto) -> bool:
    """An operator of ONNX Runtime, of which only Q and DQ may have the name of one of ONNX."""
    return node.domain == "com.microsoft" and (node.op_type in _QDQ or _schema(node.op_type, 0) is None)


@lru_cache(maxsize=1024)
def _schema(op_type: str, opset: int) -> Any:
    """ONNX's own of the operator in an opset, else the newest; None for no operator of ONNX."""
    latest = onnx.defs.onnx_opset_version()
    for version in (opset, latest):
        if 0 < version <= latest:
            try:
                return onnx.defs.get_schema(op_type, version, "")
            except onnx.defs.SchemaError:
                continue
    return None


def _check(model: ModelProto) -> None:
    opset = next((o.version for o in model.opset_import if o.domain in _STANDARD), 0)
    graph = model.graph
    for node in graph.node:
        _check_arity(node, opset)
    values = (a.t for n in graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value")
    for tensor in (*graph.initializer, *values):
        places = [entry.value for entry in tensor.external_data if entry.key in ("offset", "length")]
        if not all(place.isdecimal() and len(place) < 20 for place in places):
            raise GraphError(
                f"tensor {tensor.name!r} lies at {places} by its place, which are no numbers of bytes"
            )
        if not type_name(tensor.data_type):
            raise GraphError(
                f"tensor {tensor.name!r} has type {tensor.data_type}, unknown to onnx {onnx.__version__}"
            )
        if any(size < 0 for size in tensor.dims):
            raise GraphError(f"tensor {tensor.name!r} has the shape {list(tensor.dims)}")
    _check_order(graph)


def _check_arity(node: NodeProto, opset: int) -> None:
    schema = _schema(node.op_type, opset)
    if schema is None:
        return
    name, inputs, outputs = node.name or node.op_type, len(node.input), len(node.output)
    if not schema.min_input <= inputs <= schema.max_input:
        raise GraphError(f"node {name!r} has {inputs} inputs, which {node.op_type} does not take")
    if not max(1, schema.min_output) <= outputs <= schema.max_output:
        raise GraphError(f"node {name!r} has {outputs} outputs, which {node.op_type} does not give")
    mandatory = [formal.option == onnx.defs.OpSchema.FormalParameterOption.Single for formal in schema.inputs]
    if any(need and not given for need, given in zip(mandatory, node.input, strict=False)):
        raise GraphError(f"node {name!r} ({node.op_type}) lacks an input or output that it needs")


def _check_order(graph: GraphProto) -> None:
    """Every tensor has one maker, and none is made of itself."""
    maker: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        for name in filter(None, node.output):
            if name in maker:
                raise GraphError(f"tensor {name!r} is made by two nodes")
            maker[name] = index
    constants = {i.name for i in graph.initializer} | {i.values.name for i in graph.sparse_initializer}
    sources = {value.name for value in graph.input} | constants
    needs: dict[int, set[int]] = defaultdict(set)
    for index, node in enumerate(graph.node):
        for name in _reads(node, maker):
            if name in maker:
                needs[index].add(maker[name])
            elif name not in sources:
                raise GraphError(f"node {node.name or node.op_type!r} reads {name!r}, which nothing makes")
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        name = graph.node[error.args[1][0]].output[0]
        raise GraphError(f"tensor {name!r} is made of itself: the graph has a cycle") from error


def _reads(node: NodeProto, known: dict[str, int]) -> Iterator[str]:
    """What a node reads itself, and what its bodies read of the main graph."""
    yield from filter(None, node.input)
    for body in _bodies(node):
        yield from (name for n in every_node(body.node) for name in n.input if name in known)
