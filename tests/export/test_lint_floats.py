"""What lint says will run in float is what ONNX Runtime and OpenVINO run in float, pattern by pattern."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from qdq_graphs import (
    INT8,
    SCALE,
    UINT8,
    Draft,
    int8_layers_of_onnxruntime,
    int8_layers_of_openvino,
    openvino_layers,
    optimized_ops,
)

from qzoo.export.lint import coverage, lint
from qzoo.runtimes.sessions import onnxruntime_session

F32 = np.float32
MIDDLE = np.uint8(128)
INTEGER = ("QLinear", "QGemm", "MatMulInteger", "DynamicQuantizeMatMul")


def x(d: Draft) -> str:
    return d.pair("image", MIDDLE)


def write(path: Path, make: Callable[[Draft], str], opset: int = 21) -> Path:
    draft = Draft(opset)
    return draft.save(path / "model.onnx", make(draft), checked=False)


def rules(path: Path, target: str = "onnxruntime") -> set[str]:
    return {finding.rule for finding in lint(path, target)}


def runs_in_int8(path: Path) -> bool:
    ops = optimized_ops(path)
    assert coverage(path, "onnxruntime").int8 == int8_layers_of_onnxruntime(ops)
    return any(kind.startswith(INTEGER) for kind in ops)


def conv(d: Draft) -> str:
    return d.conv(x(d))


def linear(d: Draft, bias: str = "") -> str:
    flat = d.op("Reshape", x(d), d.const(np.array([2, 512])))
    return d.op("Gemm", flat, d.weight(512, 16, axis=1), *([bias] if bias else []))


def linear_float_bias(d: Draft) -> str:
    return linear(d, d.const(np.ones(16, F32)))


def linear_int32_bias(d: Draft) -> str:
    scale = np.full(16, 0.05 * 0.01, F32)
    return linear(d, d.dq(d.const(np.ones(16, np.int32)), np.zeros(16, np.int32), scale, axis=0))


def matmul(d: Draft) -> str:
    return d.op("MatMul", x(d), d.weight(8, 16, axis=1))


def add(d: Draft) -> str:
    return d.op("Add", x(d), d.pair("image", np.uint8(120)))


# Linear layers


def q_and_float(d: Draft, y: str) -> str:
    return d.op("Add", d.pair(y), d.op("HardSwish", y))


def heads(d: Draft, y: str) -> str:
    """Of what is cut into heads and moved, one part is quantized, the other is not."""
    moved = d.op("Transpose", d.op("Reshape", y, d.const(np.array([2, 4, -1, 2]))), perm=[2, 0, 3, 1])
    first, second = (d.op("Gather", moved, d.const(np.array([i])), axis=0) for i in (0, 1))
    return d.op("Concat", d.pair(first), d.op("HardSwish", second), axis=0)


@pytest.mark.parametrize("layer", [linear, linear_int32_bias, linear_float_bias, conv])
@pytest.mark.parametrize(
    "behind",
    [
        lambda d, y: y,
        lambda d, y: d.op("Relu", y),
        lambda d, y: d.op("Softmax", y),
        lambda d, y: d.pair(d.op("HardSwish", y)),
        lambda d, y: d.pair(d.op("Relu", y)),
        q_and_float,
        heads,
    ],
    ids=["output", "relu", "softmax", "hardswish", "relu-q", "q-and-float", "heads"],
)
def test_float_output(tmp_path: Path, layer, behind) -> None:
    """QGemm writes float, unless the bias is float or a Q is among the readers."""
    path = write(tmp_path, lambda d: behind(d, layer(d)))
    assert ("output-float" in rules(path)) == (not runs_in_int8(path))


# Clip

LIMITS = [
    *[(-1.0, 1.0, INT8, 0.01), (-1.28, 1.27, INT8, 0.01), (-1.27, 1.27, INT8, 0.01), (-1.3, 1.3, INT8, 0.01)],
    *[(0.5, 6.0, UINT8, 6 / 255), (0.0, 6.0, UINT8, 6 / 255), (-0.1, 6.0, UINT8, 6 / 255)],
    *[(0.0, 6.0, UINT8, 5 / 255), (0.0, 6.0, UINT8, 7 / 255), (0.0, 6.0, np.int8(-128), 6 / 255)],
    *[(None, 6.0, np.uint8(100), 0.05), (None, 7.75, np.uint8(100), 0.05), (None, 8.0, np.uint8(100), 0.05)],
    *[(0.0, None, UINT8, 0.05), (-5.0, None, np.uint8(100), 0.05), (-4.9, None, np.uint8(100), 0.05)],
    # Within half a level, and with an upper limit that overflows there.
    *[(0.0, 25.47, UINT8, 0.1), (0.0, 25.44, UINT8, 0.1), (0.03, 25.5, UINT8, 0.1), (0.06, 25.5, UINT8, 0.1)],
    *[(0.03, None, UINT8, 0.1), (None, 25.47, UINT8, 0.1), (None, None, UINT8, 0.1)],
]


@pytest.mark.parametrize("layer", [conv, linear, linear_float_bias, matmul, add])
@pytest.mark.parametrize(("low", "high", "zero", "scale"), LIMITS)
def test_clip(tmp_path: Path, layer, low, high, zero, scale) -> None:
    def make(d: Draft) -> str:
        limits = ["" if end is None else d.const(F32(end)) for end in (low, high)]
        return d.pair(d.op("Clip", layer(d), *limits), zero, F32(scale))

    path = write(tmp_path, make)
    assert ("clip-wider-range" in rules(path)) == (not runs_in_int8(path))


@pytest.mark.parametrize("scale", [6 / 255, 8 / 255])
def test_limits_as_attributes(tmp_path: Path, scale: float) -> None:
    """As Clip has them before opset 11."""

    def make(d: Draft) -> str:
        weight = d.op("DequantizeLinear", d.const(np.ones((8, 8, 3, 3), np.int8)), d.const(F32(0.01)))
        return d.pair(d.op("Clip", d.op("Conv", x(d), weight), min=0.0, max=6.0), UINT8, F32(scale))

    path = write(tmp_path, make, opset=10)
    assert ("clip-wider-range" in rules(path)) == (not runs_in_int8(path))


def test_computed_limit(tmp_path: Path) -> None:
    def make(d: Draft) -> str:
        high = d.op("ReduceMax", "image", keepdims=0)
        return d.pair(d.op("Clip", conv(d), d.const(F32(0)), high))

    path = write(tmp_path, make)
    assert "clip-wider-range" in rules(path)
    assert not runs_in_int8(path)


@pytest.mark.parametrize("zero", [INT8, np.int8(-128), UINT8, np.uint8(5)])
def test_relu_is_dropped_at_the_lowest_zero_point(tmp_path: Path, zero) -> None:
    path = write(tmp_path, lambda d: d.pair(d.op("Relu", conv(d)), zero))
    assert ("signed-after-relu" in rules(path)) == (not runs_in_int8(path))


# Operators that move values


def axes(d: Draft, *values: int) -> str:
    return d.const(np.array(values))


def split(d: Draft, y: str) -> str:
    d.nodes.append(helper.make_node("Split", [y], ["s0", "s1"], name="split0", axis=2, num_outputs=2))
    return "s0"


def padding(d: Draft, y: str, *channels: int, **attributes) -> str:
    return d.op("Pad", y, axes(d, 0, *channels, 1, 1, 0, 0, 1, 1), **attributes)


MOVED: dict[str, Callable[[Draft, str], str]] = {
    "max-pool": lambda d, y: d.op("MaxPool", y, kernel_shape=[2, 2]),
    "reshape": lambda d, y: d.op("Reshape", y, axes(d, 2, 8, 4, -1)),
    "transpose": lambda d, y: d.op("Transpose", y, perm=[0, 1, 3, 2]),
    "slice": lambda d, y: d.op("Slice", y, axes(d, 0), axes(d, 4), axes(d, 2)),
    "identity": lambda d, y: d.op("Identity", y),
    "depth-to-space": lambda d, y: d.op("DepthToSpace", y, blocksize=2),
    "space-to-depth": lambda d, y: d.op("SpaceToDepth", y, blocksize=2),
    "gather": lambda d, y: d.op("Gather", y, axes(d, 1, 0, 3), axis=2),
    "pad": lambda d, y: padding(d, y, 0),
    "pad-channels": lambda d, y: padding(d, y, 8),
    "pad-reflect": lambda d, y: padding(d, y, 0, mode="reflect"),
    "split": split,
}
CHANNELS = {"depth-to-space": 2, "space-to-depth": 32, "pad-channels": 16}
CLASSES = {
    "flatten": lambda d, y: d.op("Flatten", y),
    "expand": lambda d, y: d.op("Expand", y, axes(d, 3, 2, 8, 8, 8)),
    "unsqueeze": lambda d, y: d.op("Unsqueeze", y, axes(d, 4)),
    **MOVED,
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("order", ["move", "relu-move", "move-relu"])
@pytest.mark.parametrize("layer", [conv, add])
def test_move_before_q(tmp_path: Path, name: str, order: str, layer) -> None:
    def make(d: Draft) -> str:
        y = layer(d)
        for step in order.split("-"):
            y = d.op("Relu", y) if step == "relu" else CLASSES[name](d, y)
        return d.pair(y)

    path = write(tmp_path, make)
    assert ("move-not-crossed" in rules(path)) == (not runs_in_int8(path))


@pytest.mark.parametrize("name", MOVED)
def test_move_behind_dq(tmp_path: Path, name: str) -> None:
    def make(d: Draft) -> str:
        y = MOVED[name](d, x(d))
        return d.pair(d.conv(y, weight=d.weight(8, CHANNELS.get(name, 8), 3, 3)))

    path = write(tmp_path, make)
    assert ("move-not-crossed" in rules(path)) == (not runs_in_int8(path))


# Float between int8 layers, in OpenVINO


def norm(kind: str) -> Callable[[Draft, str], str]:
    return lambda d, y: d.op(kind, y, d.const(np.ones(8, F32)), d.const(np.zeros(8, F32)))


def group_norm(d: Draft, y: str) -> str:
    return d.op("GroupNormalization", y, d.const(np.ones(8, F32)), d.const(np.zeros(8, F32)), num_groups=2)


def resize(mode: str) -> Callable[[Draft, str], str]:
    return lambda d, y: d.op("Resize", y, "", d.const(np.array([1, 1, 2, 2], F32)), mode=mode)


def reduced(kind: str) -> Callable[[Draft, str], str]:
    return lambda d, y: d.op(kind, y, axes(d, 2, 3))


def alone(kind: str) -> Callable[[Draft, str], str]:
    return lambda d, y: d.op(kind, y)


# With the OpenVINO layer that each becomes.
BETWEEN: dict[str, tuple[Callable[[Draft, str], str], str]] = {
    "softmax": (lambda d, y: d.op("Softmax", y, axis=1), "Softmax"),
    "instance-norm": (norm("InstanceNormalization"), "MVN"),
    "layer-norm": (norm("LayerNormalization"), "RMS"),
    "log-softmax": (lambda d, y: d.op("LogSoftmax", y, axis=1), "Eltwise"),
    "group-norm": (group_norm, "MVN"),
    "cumsum": (lambda d, y: d.op("CumSum", y, d.const(np.int64(2))), "CumSum"),
    "lrn": (lambda d, y: d.op("LRN", y, size=3), "Lrn"),
    "linear": (resize("linear"), "Interpolate"),
    "nearest": (resize("nearest"), "Interpolate"),
    "reduce-max": (reduced("ReduceMax"), "Reduce"),
    "reduce-min": (reduced("ReduceMin"), "Reduce"),
    "reduce-mean": (reduced("ReduceMean"), "Reduce"),
    "global-max": (alone("GlobalMaxPool"), "Reduce"),
    "hard-swish": (alone("HardSwish"), "Subgraph"),
    "sigmoid": (alone("Sigmoid"), "Subgraph"),
    "elu": (alone("Elu"), "Subgraph"),
}


@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize("pair", [False, True], ids=["float-input", "pair"])
def test_float_between_layers_in_openvino(tmp_path: Path, name: str, pair: bool) -> None:
    """The rule for averages is pool-float-input."""
    pytest.importorskip("openvino")
    between, kind = BETWEEN[name]

    def make(d: Draft) -> str:
        y = d.pair(conv(d), MIDDLE) if pair else conv(d)
        return d.pair(d.conv(d.pair(between(d, y), MIDDLE)), MIDDLE)

    path = write(tmp_path, make)
    said = bool({"float-island-openvino", "pool-float-input"} & rules(path, "openvino"))
    # The first Q, of the image, is a Subgraph of its own, in float.
    layers = [
        (layer, precision)
        for layer, precision, origin in openvino_layers(path)
        if not origin.startswith("quantizelinear")
    ]
    assert said == ((kind, "f32") in layers)


def test_attention_is_no_island(tmp_path: Path) -> None:
    """OpenVINO makes one operator of the products and the Softmax between; ONNX Runtime's product writes float."""

    def make(d: Draft) -> str:
        q, k = d.pair(matmul(d), MIDDLE), d.pair("image", MIDDLE)
        scores = d.op("MatMul", d.op("Transpose", q, perm=[0, 1, 3, 2]), k)
        return d.pair(d.op("MatMul", d.pair(d.op("Softmax", scores)), d.pair("image", MIDDLE)), MIDDLE)

    path = write(tmp_path, make)
    for target in ("onnxruntime", "openvino", "tensorrt"):
        assert not [rule for rule in rules(path, target) if rule.startswith("float-island")]


# Stored operands, Concat, copies of Q, products


def executed_in_openvino(path: Path) -> list[str]:
    """The types of the nodes that a call executes; the runtime's graph lists constants, too."""
    openvino = pytest.importorskip("openvino")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERF_COUNT": True}
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    request.infer({0: np.ones((2, 8, 8, 8), F32)})
    return [node.node_type for node in request.get_profiling_info()]


@pytest.mark.parametrize("quantized", [False, True])
def test_layer_of_stored_tensors_is_a_constant(tmp_path: Path, quantized: bool) -> None:
    """A position encoding from a layer: computed when the file is loaded, unless Q/DQ are in it."""
    places = np.random.default_rng(0).random((1, 8, 8, 8), F32)

    def make(d: Draft) -> str:
        stored, weight = d.const(places), d.const(np.full((8, 8, 3, 3), 0.1, F32))
        encoding = d.op("Relu", d.conv(d.pair(stored) if quantized else stored, weight=weight))
        return d.pair(d.op("Add", d.pair(conv(d), MIDDLE), encoding), MIDDLE)

    path = write(tmp_path, make)
    ops = optimized_ops(path)
    assert ops["Conv"] + ops["FusedConv"] == int(quantized)
    assert ops["QLinearConv"] == 1
    for target in ("onnxruntime", "openvino", "tensorrt"):
        assert ("float-input" in rules(path, target)) == quantized
        assert coverage(path, target).layers == 1 + quantized
    if not quantized:
        assert executed_in_openvino(path).count("Convolution") == 1


def join(d: Draft, kind: str, a: str, b: str) -> str:
    if kind == "Concat":
        return d.op("Concat", a, b, axis=2)
    return d.op(kind, *([d.const(np.ones((1, 1, 1, 8), np.bool_))] if kind == "Where" else []), a, b)


OPERANDS: dict[str, Callable[[Draft], str]] = {
    "uint8": lambda d: d.dq(d.const(np.ones((2, 8, 8, 8), np.uint8))),
    "int8": lambda d: d.dq(d.const(np.ones((2, 8, 8, 8), np.int8)), INT8),
    "per-channel": lambda d: d.dq(
        d.const(np.ones((2, 8, 8, 8), np.uint8)), np.zeros(8, np.uint8), np.full(8, 0.1, F32), axis=1
    ),
    "float": lambda d: d.const(np.ones((2, 8, 8, 8), F32)),
    "float-scalar": lambda d: d.const(F32(1)),
    "moved": lambda d: d.op("Reshape", d.dq(d.const(np.ones((2, 8, 64), np.uint8))), axes(d, 2, 8, 8, 8)),
}


@pytest.mark.parametrize("activation", [MIDDLE, INT8])
@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("kind", ["Add", "Mul", "Concat", "Where"])
def test_stored_operand(tmp_path: Path, kind: str, operand: str, activation) -> None:
    if (kind, operand) in (("Concat", "float-scalar"), ("Where", "per-channel")):
        pytest.skip("not a model: a Concat broadcasts nothing, and ONNX Runtime fails in this Where")

    def make(d: Draft) -> str:
        return d.pair(join(d, kind, d.pair("image", activation), OPERANDS[operand](d)), MIDDLE)

    path = write(tmp_path, make)
    assert bool({"float-island", "add-float-input"} & rules(path)) == (not runs_in_int8(path))


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("between", ["", "Relu", "MaxPool", "Concat"])
@pytest.mark.parametrize(
    ("scale", "first", "second"),
    [
        (0.05, UINT8, UINT8),
        (0.05, UINT8, MIDDLE),
        (0.05, INT8, UINT8),
        (0.05, INT8, INT8),
        (0.1, UINT8, UINT8),
    ],
)
def test_layer_behind_a_concat(tmp_path: Path, scale: float, first, second, between: str, axis: int) -> None:
    """OpenVINO carries equal scales across it; ONNX Runtime does not."""
    pytest.importorskip("openvino")

    def make(d: Draft) -> str:
        parts = d.pair("image", first), d.pair(d.op("HardSwish", "image"), second, F32(scale))
        y = d.op("Concat", *parts, axis=axis)
        if between == "Concat":
            y = d.op("Concat", y, d.pair("image", first), axis=axis)
        elif between:
            y = d.op(between, y, **({"kernel_shape": [2, 2]} if between == "MaxPool" else {}))
        channels = 8 if axis == 2 else 24 if between == "Concat" else 16
        return d.pair(d.conv(y, weight=d.weight(8, channels, 3, 3)), MIDDLE)

    path = write(tmp_path, make)
    assert not runs_in_int8(path)
    assert {"float-input", "float-concat"} & rules(path)
    found = int8_layers_of_openvino(path)
    assert coverage(path, "openvino").int8 == found
    assert ("float-input" in rules(path, "openvino")) == (found == 0)


@pytest.mark.parametrize("copies", ["same", "other-scale"])
def test_two_q_on_one_tensor(tmp_path: Path, copies: str) -> None:
    """ONNX Runtime merges what has the same initializers."""

    def make(d: Draft) -> str:
        y, scale, zero = conv(d), d.const(SCALE), d.const(MIDDLE)
        other = scale if copies == "same" else d.const(SCALE * 2)
        parts = [
            d.op("DequantizeLinear", d.op("QuantizeLinear", y, s, zero), s, zero) for s in (scale, other)
        ]
        return d.op("Concat", *parts, axis=1)

    path = write(tmp_path, make)
    assert ("output-float" in rules(path)) == (not runs_in_int8(path)) == (copies != "same")


@pytest.mark.parametrize("right", [INT8, UINT8, MIDDLE, np.int8(-3)])
@pytest.mark.parametrize("left", [INT8, UINT8, MIDDLE, np.int8(-3)])
def test_product_of_activations_in_openvino(tmp_path: Path, left, right) -> None:
    pytest.importorskip("openvino")
    path = write(
        tmp_path,
        lambda d: d.pair(d.op("MatMul", d.pair("image", left), d.pair("image", right, F32(0.04))), MIDDLE),
    )
    found = int8_layers_of_openvino(path)
    assert coverage(path, "openvino").int8 == found
    assert ("product-of-activations" in rules(path, "openvino")) == (found == 0)
    assert runs_in_int8(path)


@pytest.mark.parametrize("zero", [INT8, UINT8, MIDDLE, np.int8(-3)])
def test_transposed_convolution(tmp_path: Path, zero) -> None:
    pytest.importorskip("openvino")
    path = write(
        tmp_path,
        lambda d: d.pair(d.op("ConvTranspose", d.pair("image", zero), d.weight(8, 8, 3, 3, axis=1)), MIDDLE),
    )
    found = int8_layers_of_openvino(path)
    assert coverage(path, "openvino").int8 == found
    assert ("transposed-zero-point" in rules(path, "openvino")) == (found == 0)
    assert "no-int8-kernel" in rules(path)
    assert not runs_in_int8(path)


def narrow(d: Draft, *shape: int) -> str:
    proto = helper.make_tensor("w4", TensorProto.INT4, shape, np.ones(np.prod(shape), int))
    d.initializers.append(proto)
    return d.op("DequantizeLinear", "w4", d.const(np.full(shape[1], 0.01, F32)), axis=1)


@pytest.mark.parametrize("kind", ["MatMul", "Gemm"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("behind", ["", "q"])
def test_narrow_weights_of_a_product(tmp_path: Path, kind: str, bits: int, behind: str) -> None:
    pytest.importorskip("openvino")

    def make(d: Draft) -> str:
        flat = d.pair(d.op("Flatten", "image"))
        y = d.op(kind, flat, narrow(d, 512, 16) if bits == 4 else d.weight(512, 16, axis=1))
        return d.pair(y, MIDDLE) if behind else y

    path = write(tmp_path, make)
    assert ("narrow-product" in rules(path)) == (not runs_in_int8(path)) == (bits == 4)
    assert coverage(path, "openvino").int8 == int8_layers_of_openvino(path) == (bits == 8)
    assert ("narrow-product" in rules(path, "openvino")) == (bits == 4)


@pytest.mark.parametrize("behind", ["", "q", "relu"])
@pytest.mark.parametrize("open_batch", [False, True])
@pytest.mark.parametrize("rank", [2, 3])
def test_product_with_a_loose_bias(tmp_path: Path, rank: int, open_batch: bool, behind: str) -> None:
    """ONNX Runtime makes a Gemm of a product of matrices, which needs a Q behind."""

    def make(d: Draft) -> str:
        flat = d.pair(d.op("Reshape", "image", axes(d, -1, *([64] * (rank - 2)), 8)))
        y = d.op("Add", d.op("MatMul", flat, d.weight(8, 16, axis=1)), d.const(np.ones(16, F32)))
        return d.pair(y, MIDDLE) if behind == "q" else d.op("Relu", y) if behind else y

    path = write(tmp_path, make)
    if open_batch:
        model = onnx.load(path)
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
        onnx.save(model, path)
    assert ("output-float" in rules(path)) == (not runs_in_int8(path))


def loads(path: Path) -> bool:
    """Whether ONNX Runtime loads the file."""
    try:
        optimized_ops(path)
    except Exception:  # it has a type for each of its codes
        return False
    return True


@pytest.mark.parametrize("zero", [INT8, MIDDLE])
@pytest.mark.parametrize("opset", [20, 21])
@pytest.mark.parametrize("behind", ["layer", "output", "q", "reshape-q", "two"])
@pytest.mark.parametrize("move", ["transpose", "reshape", "max-pool", "slice", "identity", "gather"])
def test_int8_behind_which_onnxruntime_fails(
    tmp_path: Path, move: str, behind: str, opset: int, zero
) -> None:
    def make(d: Draft) -> str:
        y = MOVED[move](d, d.pair(conv(d), zero))
        if behind == "layer":
            return d.op("HardSwish", y)
        if behind == "two":
            return d.op("Concat", d.pair(y, zero), y, axis=0)
        y = d.op("Reshape", y, axes(d, -1)) if behind == "reshape-q" else y
        return y if behind == "output" else d.pair(y, zero)

    path = write(tmp_path, make, opset)
    assert ("int8-not-loaded" in rules(path)) == (not loads(path))


@pytest.mark.parametrize("scale", [SCALE, np.full(1, SCALE)], ids=["scalar", "vector"])
@pytest.mark.parametrize("opset", [20, 21, 22])
@pytest.mark.parametrize("readers", ["convolution", "two", "relu", "q"])
def test_pooled_int8_that_onnxruntime_does_not_load(tmp_path: Path, readers: str, opset: int, scale) -> None:
    """Q to int8, DQ, MaxPool, Conv: from opset 21 on the Q that it puts behind the pooling has two types."""

    def make(d: Draft) -> str:
        y = MOVED["max-pool"](d, d.pair("image", INT8, scale))
        if readers == "two":
            return d.op("Concat", d.conv(y), d.op("HardSwish", y), axis=2)
        y = {"relu": lambda: d.pair(d.op("Relu", y)), "q": lambda: d.pair(y, INT8, scale)}.get(
            readers, lambda: y
        )()
        return d.pair(d.conv(y), MIDDLE)

    path = write(tmp_path, make, opset)
    loaded = loads(path)
    assert loaded == (opset < 21 or readers in ("two", "q"))
    assert ("int8-not-loaded" in rules(path)) == (not loaded)


@pytest.mark.parametrize("sign", [1, -1])
def test_negative_scales_are_legal(tmp_path: Path, sign: int) -> None:
    def make(d: Draft) -> str:
        scale = np.tile([0.01, 0.01 * sign], 4)
        q = d.random.integers(-100, 100, (8, 8, 3, 3)).astype(np.int8)
        return d.pair(
            d.conv(x(d), weight=d.dq(d.const(q), np.zeros(8, np.int8), scale.astype(F32), axis=0)), MIDDLE
        )

    path = write(tmp_path, make)
    assert rules(path) == rules(path, "openvino") == set()
    assert runs_in_int8(path)
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 8)).astype(np.float32)
    results = [
        onnxruntime_session(path, level=level).run(None, {"image": images})[0] for level in ("none", "all")
    ]
    assert np.abs(results[0] - results[1]).max() <= SCALE * 1.01


@pytest.mark.parametrize("kind", ["MatMulNBits", "DynamicQuantizeMatMul"])
def test_operators_of_onnxruntime_are_quantized(tmp_path: Path, kind: str) -> None:
    def make(d: Draft) -> str:
        flat = d.op("Reshape", "image", axes(d, 64, 16))
        if kind == "MatMulNBits":
            packed = d.const(np.ones((16, 1, 8), np.uint8)), d.const(np.full(16, 0.01, F32))
            return d.op(kind, flat, *packed, domain="com.microsoft", K=16, N=16, bits=4, block_size=16)
        weight = d.const(np.ones((16, 4), np.int8)), d.const(F32(0.1)), d.const(np.int8(0))
        return d.op(kind, flat, *weight, domain="com.microsoft")

    path = write(tmp_path, make)
    model = onnx.load(path)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, path)
    assert rules(path) == ({"dynamic-ranges"} if kind.startswith("Dynamic") else set())
    assert runs_in_int8(path) == kind.startswith("Dynamic")
    assert rules(path, "tensorrt") == {"integer-operators"}


# How a file holds its nodes and numbers


@pytest.mark.parametrize("held", ["initializer", "value", "value_float", "value_floats"])
def test_scales_of_constants(tmp_path: Path, held: str) -> None:
    """A scale of zero is seen wherever it is stored."""

    def make(d: Draft) -> str:
        if held == "initializer":
            scale = d.const(F32(0))
        elif held == "value":
            scale = d.op("Constant", value=onnx.numpy_helper.from_array(F32(0)))
        else:
            scale = d.op("Constant", **{held: [0.0] if held == "value_floats" else 0.0})
        return d.conv(d.op("DequantizeLinear", d.op("QuantizeLinear", "image", scale), scale))

    assert "scale" in rules(write(tmp_path, make), "tensorrt")


def test_amounts_of_integer_constants(tmp_path: Path) -> None:
    """Which Pad a convolution takes over depends on them."""

    def make(d: Draft, channels: int) -> str:
        amounts = d.op("Constant", value_ints=[0, channels, 1, 1, 0, 0, 1, 1])
        weight = d.weight(8, 8 + channels, 3, 3)
        return d.pair(d.conv(d.op("Pad", x(d), amounts), weight=weight))

    for channels in (0, 8):
        path = write(tmp_path, lambda d, n=channels: make(d, n))
        assert ("move-not-crossed" in rules(path)) == (not runs_in_int8(path)) == (channels > 0)


def with_function(path: Path) -> Path:
    """Q and DQ of the convolutions' inputs are one function, called twice."""
    draft = Draft()
    opset = helper.make_opsetid("", 21)
    body = [
        helper.make_node("Constant", [], ["scale"], value_float=0.05),
        helper.make_node("Constant", [], ["zero"], value=onnx.numpy_helper.from_array(MIDDLE)),
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    first = draft.op("Pair", "image", domain="own", name="first")
    output = draft.op("Pair", draft.conv(first), domain="own", name="second")
    file = draft.save(path / "function.onnx", output, checked=False)
    model = onnx.load(file)
    model.functions.append(helper.make_function("own", "Pair", ["x"], ["y"], body, [opset]))
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info(output, TensorProto.FLOAT, [2, 8, 8, 8]))
    onnx.checker.check_model(model)
    onnx.save(model, file)
    return file


def test_functions_are_read(tmp_path: Path) -> None:
    path = with_function(tmp_path)
    assert runs_in_int8(path)
    assert rules(path) == set()
    assert "zero-point" in rules(path, "tensorrt")


def test_bodies_are_named_and_not_judged(tmp_path: Path) -> None:
    """An If whose result a layer of the main graph reads: no word on whether it is quantized."""

    def branch(name: str) -> onnx.GraphProto:
        inner = Draft()
        output = inner.pair("image", MIDDLE)
        value = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, [2, 8, 8, 8])
        nodes = [*inner.nodes, helper.make_node("Identity", [output], [value.name])]
        return helper.make_graph(nodes, name, [], [value], inner.initializers)

    def make(d: Draft) -> str:
        condition = d.const(np.bool_(True), "condition")
        chosen = d.op("If", condition, then_branch=branch("a"), else_branch=branch("b"))
        return d.conv(chosen)

    path = write(tmp_path, make)
    assert [(f.rule, f.nodes) for f in lint(path, "openvino")] == [("body-not-read", ("if0",))]


def test_what_a_body_reads_counts_as_a_reader(tmp_path: Path) -> None:
    def make(d: Draft) -> str:
        y = conv(d)
        value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 8, 8, 8]) for name in "ab"]
        bodies = [helper.make_graph([helper.make_node("Neg", [y], [v.name])], v.name, [], [v]) for v in value]
        seen = d.op("If", d.const(np.bool_(True), "condition"), then_branch=bodies[0], else_branch=bodies[1])
        return d.op("Mul", d.pair(y, MIDDLE), seen)

    path = write(tmp_path, make)
    assert "output-float" in rules(path)
    assert not runs_in_int8(path)


@pytest.mark.parametrize("move", ["", "MaxPool", "Dropout"])
@pytest.mark.parametrize("op_type", ["Relu", "Max"])
@pytest.mark.parametrize(
    "kind", [np.int8, np.uint8, np.int16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
)
def test_a_relu_that_is_dropped_changes_the_results(tmp_path: Path, kind, op_type: str, move: str) -> None:
    d = Draft()
    out = d.op(op_type, "image", *([d.const(np.float32(0))] if op_type == "Max" else []))
    if move:
        out = d.op(move, out, **({"kernel_shape": [2, 2]} if move == "MaxPool" else {}))
    path = d.save(tmp_path / "m.onnx", d.pair(out, np.array(0, kind)))
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 8)).astype(np.float32)
    results = [
        onnxruntime_session(path, level=level).run(None, {"image": images})[0] for level in ("none", "all")
    ]
    assert np.array_equal(*results) is not ("relu-dropped" in rules(path))
