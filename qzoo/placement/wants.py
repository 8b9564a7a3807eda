"""Where quantizers go: what each runtime wants of the operations of a trace, by the table of operators.

A quantizer sits on an edge, from a value to an operation that reads it, with a role by which targets switch it:

* ``input``: of layers and matrix products; of multiplications, concatenations, and what moves values between those.
* ``residual`` and ``branch``: of additions. The branch is what TensorRT and OpenVINO compute together with the add.
* ``stream``: of additions beside a LayerNorm. They stay in float: the next LayerNorm reads them so.
* ``product``: of the two products of attention in a network with LayerNorms, which gain nothing in ONNX Runtime; where
  an integer kernel makes an operand, it is an ``input`` as elsewhere.
* ``pool``: of averages, and of a BatchNorm that reads what layers read (RepVGG), so that nothing needs the floats.
* ``activation``: what only ONNX Runtime wants: its integer kernels need a Q right behind them, where the others
  compute an activation or a BatchNorm with the layer before, or in float.
* ``norm``: of a LayerNorm behind a convolution, as in ConvNeXt. TensorRT wants it too: by NVIDIA's Model Optimizer
  (pull request 1117) its convolutions are faster where they write int8.
* ``output``: of the last layer.

Values that an operation only hands on, or joins, have one range together with what they are made of: a class.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from qzoo.placement.scope import LAYERS
from qzoo.placement.trace import Operation, Trace, Value
from qzoo.runtimes.operators import CARRIED, FLOAT, FUSED, INT8, OPERATORS, Operator

Edge = tuple[Operation, int]
_PRODUCTS = ("einsum", "addmm", "baddbmm", "addbmm", "tensordot")
_SIGN_KEPT = ("average", "extremum", "join", "move")


@dataclass(frozen=True)
class Want:
    """A quantizer on an edge.

    Attributes:
        role: one of :data:`qzoo.scheme.ROLES`.
        edge: it has 8 bits where others have few (:attr:`qzoo.scheme.Scheme.edge_bits`).
    """

    role: str
    edge: bool = False


@dataclass
class Wants:
    """Quantizers that the runtimes want in a trace.

    Attributes:
        edges: the quantizers, by edge.
        result: of the value that the model returns; None where it wants none.
        left: what stays in float against the user's wish: names and reasons.
        integers: the values that a runtime has as integers only.
    """

    edges: dict[Edge, Want] = field(default_factory=dict)
    integers: set[Value] = field(default_factory=set)
    result: Value | None = None
    left: dict[str, str] = field(default_factory=dict)


def wants_of(trace: Trace, skipped: Iterable[str] = ()) -> Wants:
    """Decide where quantizers go.

    Args:
        trace: of the float model.
        skipped: modules that stay in float: names of layers, and of modules with all below them. They have quantizers
            only where they read what an integer kernel made, which would run in float without.
    """
    return _Decision(trace, set(skipped)).wants


class _Decision:
    """The decision in two steps: what is wanted anyway, then what follows from that, from the image to the logits."""

    def __init__(self, trace: Trace, skipped: set[str]) -> None:
        self.trace, self.skipped = trace, skipped
        self.wants = Wants()
        self.signs: dict[Value, bool] = {}
        self.depth = _depths(trace)
        self.has_norms = any(_is_layer_norm(operation) for operation in trace.operations)
        self.streams = {operation for operation in trace.operations if _is_stream(operation)}
        for operation in trace.operations:
            self._want_operands(operation)
        for operation in trace.operations:
            if operator_of(operation).name in ("Add", "Mul", "Concat"):
                self._want_of_several(operation)
            # A product of matrices may write float.
            if self.is_kernel(operation) and operator_of(operation).name != "MatMul":
                for value in operation.outputs:
                    self._quantize(self._chain_end(value))
        self._want_result()
        given = {value for operation in trace.operations for value in operation.operands if value is not None}
        self.wants.integers = {value for value in given if self.needs_q(value)}

    def _set(self, operation: Operation, place: int, role: str, edge: bool = False) -> None:
        if not self._is_skipped(operation) and operation.operands[place] is not None:
            self.wants.edges[operation, place] = Want(role, edge)

    def _is_skipped(self, operation: Operation) -> bool:
        owner = operation.weight.rpartition(".")[0]
        return not self.skipped.isdisjoint((operation.layer, owner, *(name for name, _ in operation.stack)))

    def _want_operands(self, operation: Operation) -> None:
        """What an operation wants whatever is around it."""
        operator, name = operator_of(operation), operation.function.name
        if name in LAYERS:
            if operation.layer or operation.weight:
                self._set(operation, 0, "input", self._is_first(operation) or self._is_last(operation))
        elif name == "multi_head_attention_forward" and not operation.layer:
            if not self._is_skipped(operation):
                self._leave(
                    operation, "attention as one function; call an nn.MultiheadAttention, or write it out"
                )
        elif operator.name == "MatMul":
            if all(value is not None for value in operation.operands):
                integers = any(self.needs_q(value) for value in operation.operands)
                role = "product" if self.has_norms and not integers else "input"
                for place in range(len(operation.operands)):
                    self._set(operation, place, role)
            elif any(value is not None for value in operation.operands) and not self._is_skipped(operation):
                form = "a product with a tensor of no layer; write it as nn.Linear, or F.linear with a module's weight"
                self._leave(operation, form)
        elif operator.name in ("AveragePool", "GlobalAveragePool"):
            self._set(operation, 0, "pool", True)
        elif name in _PRODUCTS and not self._is_skipped(operation):
            self._leave(
                operation, "a product in a form that qzoo does not place quantizers in; write it as matmul"
            )

    def _want_of_several(self, operation: Operation) -> None:
        values = operation.operands
        if len(values) < 2 or any(value is None for value in values):
            return
        if operation in self.streams:
            for place in range(2):
                if not self.needs_q(values[place]):
                    self._set(operation, place, "stream", True)
        elif operator_of(operation).name == "Add":
            branch = self._branch(operation)
            for place in range(2):
                self._set(operation, place, "branch" if place == branch else "residual", True)
        elif any(self.needs_q(value) for value in values) and not self._is_regrouped(operation):
            for place in range(len(values)):
                self._set(operation, place, "input", operator_of(operation).name == "Mul")

    def _is_regrouped(self, operation: Operation) -> bool:
        """A concatenation of parts of one tensor that no layer of integers reads, as Swin merges patches."""
        if operator_of(operation).name != "Concat":
            return False
        sources = {id(_source(value)) for value in operation.operands if value is not None}
        return len(sources) == 1 and not any(self._leads(value) for value in operation.outputs)

    def _leads(self, value: Value) -> bool:
        """Whether a quantizer reads the value, maybe behind what moves or clamps it."""
        for edge in value.readers:
            if edge in self.wants.edges:
                return True
            passes = operator_of(edge[0]).kind in ("move", "clamp", "extremum") and edge[1] == 0
            if passes and any(self._leads(out) for out in edge[0].outputs):
                return True
        return False

    def _branch(self, operation: Operation) -> int:
        """Which operand is a layer's output that only this add reads, of two the one behind more layers; -1: none."""
        ends = [
            place
            for place, value in enumerate(operation.operands)
            if value is not None and self._is_fused(value)
        ]
        return max(ends, key=lambda place: (self.depth[operation.operands[place]], -place), default=-1)  # type: ignore[index]

    def _is_fused(self, value: Value) -> bool:
        """The output of a layer, through BatchNorm, scale, ReLU and moves, that has one reader.

        OpenVINO computes all of these with the add, and leaves out a Q between.
        """
        while len(value.readers) == 1 and not value.returned and value.maker is not None:
            maker = value.maker
            if maker.function.name in LAYERS:
                return True
            passes = (
                operator_of(maker).kind in ("move", "clamp")
                or operator_of(maker).name == "BatchNormalization"
            )
            scales = (
                operator_of(maker).kind == "arithmetic" and sum(v is not None for v in maker.operands) == 1
            )
            source = next((v for v in maker.operands if v is not None), None)
            if source is None or not (passes or scales):
                return False
            value = source
        return False

    def _is_first(self, operation: Operation) -> bool:
        value = operation.operands[0]
        return value is not None and self.depth[value] == 0

    def _is_last(self, operation: Operation) -> bool:
        return any(_reaches_result(value) for value in operation.outputs)

    def is_kernel(self, operation: Operation) -> bool:
        """Check whether ONNX Runtime has an integer kernel for it: all operands are quantized."""
        places = range(1 if operator_of(operation).kind == "layer" else len(operation.operands))
        wants = [self.wants.edges.get((operation, place)) for place in places]
        wanted = bool(wants) and all(want is not None and want.role != "product" for want in wants)
        if operation in self.streams or self._is_skipped(operation):
            return False
        return operator_of(operation).onnxruntime == INT8 and wanted

    def needs_q(self, value: Value | None) -> bool:
        """Check whether a kernel of ONNX Runtime that writes integers only made it, moved, clamped, or activated."""
        while value is not None and value.maker is not None:
            maker = value.maker
            if self.is_kernel(maker):
                return operator_of(maker).name != "MatMul"
            operator = operator_of(maker)
            if operator.kind == "activation" and (maker, 0) in self.wants.edges:
                return True
            if _is_folded(maker):
                value = _operand(maker)
                continue
            if operator.kind not in ("move", "clamp", "extremum") and operator.name != "BatchNormalization":
                return False
            value = maker.operands[0] if maker.operands else None
        return False

    def _chain_end(self, value: Value) -> Value:
        """The value behind what a runtime computes with the operation before: BatchNorm or a scale, then ReLU."""
        while len(value.readers) == 1 and not value.returned:
            reader, place = value.readers[0]
            operator = operator_of(reader)
            passed = place == 0 and (operator.kind == "clamp" or operator.name == "Identity")
            if not (passed or _is_folded(reader)) or len(reader.outputs) != 1:
                break
            if (
                operator.kind == "clamp"
                and value.maker is not None
                and operator_of(value.maker).kind == "activation"
            ):
                break
            value = reader.outputs[0]
        return value

    def _quantize(self, value: Value) -> None:
        """See to it that all that read a kernel's output read it quantized."""
        for edge in list(value.readers):
            reader, place = edge
            operator = operator_of(reader)
            if edge in self.wants.edges:
                continue
            if place < 0:
                self._note_reader(reader)
                continue
            if self._is_skipped(reader) and (reader.function.known or reader.layer):
                self._end_integers(edge, value)
                continue
            # The export merges a Pad of zeros with the convolution behind.
            carried = operator.onnxruntime == CARRIED or operator.name == "Pad"
            if carried and len(value.readers) == 1 and not value.returned:
                if any(self._joins_signed(output) for output in reader.outputs):
                    self._set(reader, place, "activation", True)
                for output in reader.outputs:
                    self._quantize(output)
            elif operator.kind in ("move", "extremum") or operator.name == "Resize":
                leads = any(self._leads(output) for output in reader.outputs)
                self._set(reader, place, "input" if leads else "activation", not leads)
                for output in reader.outputs if leads else ():
                    self._quantize(output)
            elif (
                operator.kind == "norm" and value.maker is not None and operator_of(value.maker).name == "Add"
            ):
                continue  # the residual stream of a transformer: a Q before each norm would bring no speed
            elif reader.function.known or reader.layer:
                self._set(reader, place, self._role_in_float(reader, value), True)
            else:
                self._note_reader(reader)

    def _note_reader(self, reader: Operation) -> None:
        """Note what reads a kernel's output where no quantizer can be, so that the layer before runs in float, too."""
        if reader.function.name == "setitem":
            self._leave(
                reader, "a change in place, and the layer before; write it with torch.cat or torch.where"
            )
        elif not reader.function.known and not reader.layer:
            self._leave(reader, "an operation that qzoo does not know, between layers in int8")
        elif operator_of(reader).kind != "move" and not self._is_skipped(
            reader
        ):  # such as view_as, for its shape
            self._leave(reader, "an operand that qzoo does not quantize, and the layer before")

    def _end_integers(self, edge: Edge, value: Value) -> None:
        """Quantize a kernel's output before what stays in float; OpenVINO wants it where an int8 layer reads it too."""
        if (
            operator_of(edge[0]).kind == "norm"
            and value.maker is not None
            and operator_of(value.maker).name == "Add"
        ):
            return  # as everywhere on the residual stream of a transformer
        others = (self.wants.edges.get(other) for other in value.readers)
        shared = any(want is not None and want.role == "input" for want in others)
        self.wants.edges[edge] = Want("input" if shared else "activation", True)

    def _role_in_float(self, reader: Operation, value: Value) -> str:
        """The role of what a runtime reads as integers to compute with it in float."""
        maker = _source(value).maker
        if _is_layer_norm(reader) and maker is not None and operator_of(maker).name == "Conv":
            return "norm"
        beside = any(edge in self.wants.edges and edge[0].function.name in LAYERS for edge in value.readers)
        return "pool" if beside and operator_of(reader).name == "BatchNormalization" else "activation"

    def _leave(self, operation: Operation, reason: str) -> None:
        where = operation.stack[-1][0] if operation.stack else ""
        self.wants.left.setdefault(f"{where}.{operation.function.name}".strip("."), reason)

    def _joins_signed(self, value: Value) -> bool:
        """Whether a value that is never negative is joined with others that may be.

        Their common range is signed, and ONNX Runtime computes a ReLU with its layer only before an unsigned one: it
        needs a Q of its own before the values are moved.
        """
        return is_nonnegative(value, self.signs) and any(
            operator_of(reader).kind == "join"
            and not all(v is None or is_nonnegative(v, self.signs) for v in reader.operands)
            for reader, _ in value.readers
        )

    def _want_result(self) -> None:
        for operation in reversed(self.trace.operations):
            for value in operation.outputs:
                if value.returned and (self.needs_q(value) or self._is_product(value)):
                    self.wants.result = value
                    return

    def _is_product(self, value: Value) -> bool:
        maker = _source(value).maker
        return maker is not None and self.is_kernel(maker)


def operator_of(operation: Operation) -> Operator:
    """Find the ONNX operator that an operation becomes."""
    operator, value = operation.function.operator, operation.operands[0] if operation.operands else None
    if operation.function.name == "einsum" and "product" not in operation.attributes:
        return Operator("Einsum", "other", FLOAT, FLOAT, FLOAT)
    rank = len(value.shape) if value is not None else 0
    if operation.function.name == "linear" and rank != 2:
        return OPERATORS["MatMul"]
    if "spatial" in operation.attributes:
        return OPERATORS["GlobalAveragePool"]
    if operator.kind == "average" and rank != 4:
        return OPERATORS["ReduceMean"]
    if (
        operator.name == "GlobalAveragePool"
        and value is not None
        and operation.outputs[0].shape == value.shape
    ):
        return OPERATORS["Identity"]
    if "gather" in operation.attributes:
        return OPERATORS["Gather"]
    if "loose" in operation.attributes:
        return Operator("Clip", "activation", FLOAT, FUSED, FUSED)
    if "smooth" in operation.attributes:
        return Operator("Resize", "other", FLOAT, FLOAT, FLOAT)
    return operator


def _is_folded(operation: Operation) -> bool:
    """Whether the export folds it into the layer before: a BatchNorm, or what multiplies channels by constants."""
    is_norm = operator_of(operation).name == "BatchNormalization"
    value = _operand(operation)
    if is_norm and "repeated" in operation.attributes:
        return False
    while (is_norm or "scale" in operation.attributes) and value is not None and len(value.readers) == 1:
        maker = value.maker
        if maker is None or value.returned:
            return False
        name = operator_of(maker).name
        if "repeated" in maker.attributes and maker.function.name in LAYERS:
            return False
        if maker.function.name in LAYERS or is_norm:
            return maker.function.name in LAYERS and (is_norm or name in ("Conv", "Gemm"))
        before = _operand(maker)
        if name == "BatchNormalization":
            layer = None if before is None else before.maker
            return layer is not None and operator_of(layer).name in ("Conv", "Gemm") and _is_folded(maker)
        if name != "Identity" and "scale" not in maker.attributes:
            return False
        value = before
    return False


def _operand(operation: Operation) -> Value | None:
    """The one operand that is computed from the image."""
    return next((value for value in operation.operands if value is not None), None)


def _source(value: Value) -> Value:
    """The value that this one is a part of, or is in another shape."""
    while value.maker is not None and operator_of(value.maker).kind in ("move", "extremum"):
        before = value.maker.operands[0]
        if before is None:
            break
        value = before
    return value


def _is_layer_norm(operation: Operation) -> bool:
    return operator_of(operation).name == "LayerNormalization"


def _is_stream(add: Operation) -> bool:
    """Whether a LayerNorm reads the sum, or made an operand, maybe with moves between."""
    if operator_of(add).name != "Add":
        return False
    makers = (_source(value).maker for value in add.operands if value is not None)
    return _feeds_norm(add.outputs) or any(maker is not None and _is_layer_norm(maker) for maker in makers)


def _feeds_norm(values: list[Value]) -> bool:
    readers = [reader for value in values for reader, _ in value.readers]
    moved = (reader for reader in readers if operator_of(reader).kind in ("move", "join"))
    return any(map(_is_layer_norm, readers)) or any(_feeds_norm(reader.outputs) for reader in moved)


def _reaches_result(value: Value) -> bool:
    """Whether the model returns it: as it is, pooled as after a convolution, or averaged with another head's."""
    while not value.returned:
        kinds = ("move", "clamp", "average", "arithmetic")
        if len(value.readers) != 1 or operator_of(value.readers[0][0]).kind not in kinds:
            return False
        outputs = value.readers[0][0].outputs
        if len(outputs) != 1:
            return False
        value = outputs[0]
    return True


def _depths(trace: Trace) -> dict[Value, int]:
    """How many layers are before each value, on the longest way."""
    depth: dict[Value, int] = {}
    for operation in trace.operations:
        before = [depth.get(value, 0) for value in operation.operands if value is not None]
        count = max(before, default=0) + (operation.function.name in LAYERS)
        depth.update(dict.fromkeys(operation.outputs, count))
        for value in operation.operands:
            if value is not None:
                depth.setdefault(value, 0)
    return depth


def is_nonnegative(value: Value, known: dict[Value, bool]) -> bool:
    """Check whether a value is never below zero, by what made it."""
    if value not in known:
        known[value] = False
        known[value] = _is_nonnegative(value, known)
    return known[value]


def _is_nonnegative(value: Value, known: dict[Value, bool]) -> bool:
    maker = value.maker
    if maker is None or "negative" in maker.attributes:
        return False
    if "nonnegative" in maker.attributes:
        return True
    operator = operator_of(maker)
    keeps = operator.kind in (*_SIGN_KEPT, "clamp") or operator.name in ("Add", "Mul", "Resize")
    keeps = keeps or maker.function.name == "sum"
    smooth = "smooth" in maker.attributes
    return (
        keeps
        and not smooth
        and bool(maker.operands)
        and all(v is not None and is_nonnegative(v, known) for v in maker.operands)
    )
