"""The operators of ONNX, and what each runtime does with one between Q/DQ pairs: a table, without torch.

Quantizers are placed by it, the rewrites of an export and the rules of lint read it, and so does the matrix in the
docs. What it says of ONNX Runtime (1.32) and OpenVINO (2026.4) was seen in the graphs that they make of small files
(``tests/export/test_operators.py``); of TensorRT it says what is documented.

| how | the runtime |
|---|---|
| ``INT8`` | has an integer kernel, from a DQ before each operand to a Q behind; their ranges may differ |
| ``FUSED`` | computes it with the layer before, or with the Q behind: no pair between that layer and it |
| ``CARRIED`` | moves Q and DQ across it: one pair, on the side of the input, is enough |
| ``SHARED`` | computes it on integers between pairs of one range: on all its inputs, and behind it |
| ``FLOAT`` | computes it in float, and converts the tensor before and behind |
"""

from __future__ import annotations

from dataclasses import dataclass

INT8, FUSED, CARRIED, SHARED, FLOAT = "int8", "fused", "carried", "shared", "float"

_FIRST, _BOTH, _ALL = (0,), (0, 1), None


@dataclass(frozen=True)
class Operator:
    """An operator of ONNX.

    Attributes:
        name: its type, such as ``"Conv"``.
        kind: ``"layer"`` (has weights, or multiplies matrices), ``"move"`` (hands values on as they are, some of them,
            or in another order), ``"clamp"``, ``"average"``, ``"extremum"`` (the largest or smallest of several
            values), ``"join"`` (of tensors), ``"arithmetic"``, ``"activation"``, ``"norm"`` or ``"other"``.
        onnxruntime, openvino, tensorrt: how the runtime takes it, one of :data:`INT8`, :data:`FUSED`,
            :data:`CARRIED`, :data:`SHARED` and :data:`FLOAT`.
        operands: positions of the inputs that hold data, and no sizes, axes or conditions; None for all.
        note: the form that this holds for, in words; "" for every form.

    Example:
        >>> from qzoo.runtimes.operators import OPERATORS
        >>> OPERATORS["Concat"].on("onnxruntime"), OPERATORS["Concat"].on("openvino")
        ('int8', 'shared')
    """

    name: str
    kind: str
    onnxruntime: str
    openvino: str
    tensorrt: str
    operands: tuple[int, ...] | None = _FIRST
    note: str = ""

    def on(self, target: str) -> str:
        """Look up how the runtime of a target takes it."""
        return {"onnxruntime": self.onnxruntime, "openvino": self.openvino, "tensorrt": self.tensorrt}[target]

    @property
    def keeps_range(self) -> bool:
        """Whether it gives only values that it was given, so that its output has its inputs' range."""
        return self.kind in ("move", "extremum", "join")


_NORMS = ("InstanceNormalization", "LayerNormalization", "GroupNormalization")
_ELEMENTWISE = (
    "Tanh",
    "Gelu",
    "Elu",
    "PRelu",
    "HardSwish",
    "Mish",
    "Softplus",
    "Erf",
    "Exp",
    "Sqrt",
    "Abs",
    "Neg",
)
_ROWS = (
    Operator("Conv", "layer", INT8, INT8, INT8, _BOTH),
    Operator("ConvTranspose", "layer", FLOAT, INT8, INT8, _BOTH),
    Operator("Gemm", "layer", INT8, INT8, INT8, _BOTH),
    Operator("MatMul", "layer", INT8, INT8, INT8, _BOTH),
    Operator("MaxPool", "move", CARRIED, CARRIED, CARRIED),
    Operator("Reshape", "move", CARRIED, CARRIED, CARRIED),
    Operator("Flatten", "move", SHARED, CARRIED, CARRIED),
    Operator("Transpose", "move", CARRIED, CARRIED, CARRIED),
    Operator("Squeeze", "move", CARRIED, CARRIED, CARRIED),
    Operator("Unsqueeze", "move", CARRIED, CARRIED, CARRIED),
    Operator("Identity", "move", CARRIED, CARRIED, CARRIED),
    Operator("Dropout", "move", CARRIED, CARRIED, CARRIED),
    Operator("DepthToSpace", "move", SHARED, CARRIED, CARRIED),
    Operator("SpaceToDepth", "move", FLOAT, FLOAT, CARRIED),
    Operator("Slice", "move", CARRIED, CARRIED, CARRIED),
    Operator("Gather", "move", SHARED, CARRIED, CARRIED),
    Operator("Split", "move", SHARED, CARRIED, CARRIED),
    Operator("Expand", "move", SHARED, CARRIED, CARRIED),
    Operator("Tile", "move", SHARED, FLOAT, CARRIED),
    Operator("Pad", "move", FLOAT, CARRIED, CARRIED),
    Operator("Relu", "clamp", FUSED, FUSED, FUSED),
    Operator("Clip", "clamp", FUSED, FUSED, FUSED, note="ONNX Runtime: where Q clips as tightly"),
    Operator("AveragePool", "average", INT8, INT8, INT8),
    Operator("GlobalAveragePool", "average", INT8, INT8, INT8),
    Operator("ReduceMean", "average", FLOAT, INT8, FLOAT),
    Operator("ReduceMax", "extremum", SHARED, CARRIED, FLOAT),
    Operator("ReduceMin", "extremum", SHARED, CARRIED, FLOAT),
    Operator("GlobalMaxPool", "extremum", FLOAT, CARRIED, CARRIED),
    Operator("Resize", "other", SHARED, CARRIED, CARRIED, note="mode nearest; float in others"),
    Operator("Concat", "join", INT8, SHARED, SHARED, _ALL),
    Operator("Where", "other", INT8, FUSED, FUSED, (1, 2)),
    Operator("Add", "arithmetic", INT8, FUSED, FUSED, _BOTH),
    Operator("Mul", "arithmetic", INT8, FUSED, FUSED, _BOTH),
    Operator("Sub", "arithmetic", FLOAT, FUSED, FUSED, _BOTH),
    Operator("Div", "arithmetic", FLOAT, FUSED, FUSED, _BOTH),
    Operator("Sigmoid", "activation", INT8, FUSED, FUSED),
    Operator("LeakyRelu", "activation", INT8, FUSED, FUSED),
    *(Operator(name, "activation", FLOAT, FUSED, FUSED) for name in _ELEMENTWISE),
    Operator("HardSigmoid", "activation", FLOAT, FLOAT, FUSED),
    Operator(
        "Softmax", "activation", INT8, FLOAT, FLOAT, note="fused within attention in OpenVINO and TensorRT"
    ),
    Operator("LogSoftmax", "activation", FLOAT, FLOAT, FLOAT),
    Operator("BatchNormalization", "norm", FLOAT, FUSED, FUSED),
    *(Operator(name, "norm", FLOAT, FLOAT, FLOAT) for name in _NORMS),
    *(Operator(name, "other", FLOAT, FLOAT, FLOAT) for name in ("LRN", "CumSum", "TopK")),
)

OPERATORS = {operator.name: operator for operator in _ROWS}
"""All operators that are known, by type. Nothing is known of others, which is as much as ``FLOAT``."""


def of_kind(*kinds: str) -> tuple[str, ...]:
    """List the types of the operators of some kinds.

    Example:
        >>> of_kind("layer")
        ('Conv', 'ConvTranspose', 'Gemm', 'MatMul')
    """
    return tuple(row.name for row in _ROWS if row.kind in kinds)


def taken(target: str, *how: str) -> tuple[str, ...]:
    """List the types of the operators that a target's runtime takes in one of these ways.

    Example:
        >>> "Sub" in taken("onnxruntime", FLOAT), "Sub" in taken("openvino", FLOAT)
        (True, False)
    """
    return tuple(row.name for row in _ROWS if row.on(target) in how)


WEIGHTED = of_kind("layer")
CONVOLUTIONS = ("Conv", "ConvTranspose")
MOVES = of_kind("move")
CLAMPS = of_kind("clamp")
POOLS = ("AveragePool", "GlobalAveragePool")
EXTREMA = of_kind("extremum")
NORMS = _NORMS
ARITHMETIC = of_kind("arithmetic")
PAIR = ("QuantizeLinear", "DequantizeLinear")
# Moves that ONNX Runtime carries Q and DQ across; it drops Identity and Dropout.
CARRIED_IN_ORT = tuple(name for name in taken("onnxruntime", CARRIED) if name in MOVES)
# With all operands from DQ and one Q behind, ONNX Runtime has int8 kernels for these; Resize keeps the type.
KERNELS = (*(name for name in taken("onnxruntime", INT8) if name not in WEIGHTED), "Resize")

# Layers that are integers as they are written, with the places of their two operands.
INTEGER_LAYERS = {
    "QLinearConv": (0, 3),
    "QLinearMatMul": (0, 3),
    "QGemm": (0, 3),
    "MatMulIntegerToFloat": (0, 1),
    "ConvInteger": (0, 1),
    "MatMulInteger": (0, 1),
    "DynamicQuantizeMatMul": (0, 1),
}
# Operators of ONNX Runtime that quantize an activation anew in each run, and those that store integer weights alone.
DYNAMIC = ("DynamicQuantizeMatMul", "DynamicQuantizeLSTM")
WEIGHTS_ALONE = ("MatMulNBits", "MatMulBnb4", "GatherBlockQuantized", "QMoE")
