"""Every rule of lint on a graph that breaks it and on the mended one; where a rule is ONNX Runtime's or OpenVINO's,
the runtime itself is asked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from qdq_graphs import (
    INT8,
    UINT8,
    Draft,
    int8_layers_of_onnxruntime,
    int8_layers_of_openvino,
    openvino_layers,
    optimized_ops,
)

from qzoo.__main__ import main
from qzoo.export import export_onnx
from qzoo.export.lint import RULES, Coverage, coverage, lint
from qzoo.export.lint.openvino import RULES as OPENVINO

MIDDLE = np.uint8(128)
F32 = np.float32
FLOAT8 = np.array(0, ml_dtypes.float8_e4m3fn)
Write = Callable[[Draft], str]


@dataclass(frozen=True)
class Case:
    """A broken graph, a mended one, and what a runtime then does.

    ort: an operator of which ONNX Runtime has more in the mended graph; ov: an OpenVINO layer that runs in f32 in the
    broken graph only; nodes: what the finding must name.
    """

    bad: Write
    good: Write
    nodes: tuple[str, ...]
    ort: str = ""
    ov: str = ""


def x(d: Draft) -> str:
    return d.pair("image", MIDDLE)


def conv_q(d: Draft, **kw) -> str:
    return d.pair(d.conv(x(d), **kw), MIDDLE)


def conv_relu_q(d: Draft, zero=UINT8) -> str:
    return d.pair(d.op("Relu", d.conv(x(d))), zero)


def norm(d: Draft, tensor: str) -> str:
    return d.op("BatchNormalization", tensor, *[d.const(np.ones(8, F32)) for _ in range(4)])


def clip6(d: Draft, scale: float) -> str:
    return d.pair(d.op("Clip", d.conv(x(d)), d.const(F32(0)), d.const(F32(6))), UINT8, F32(scale))


def residual(d: Draft, branch: bool = True, skip: bool = True, zero=MIDDLE) -> str:
    start = d.pair("image", zero)
    side, main_ = d.conv(start), d.conv(start)
    side = d.pair(side, zero) if skip else side
    main_ = d.pair(main_, zero) if branch else main_
    return d.pair(d.op("Add", main_, side), zero)


def bias32(d: Draft, scale: float) -> str:
    q = d.const(np.ones(8, np.int32))
    return conv_q(d, bias=d.dq(q, np.zeros(8, np.int32), np.full(8, scale, F32), axis=0))


def float_weight(d: Draft) -> str:
    return d.const(d.random.normal(size=(8, 8, 3, 3)).astype(F32))


def dynamic(d: Draft) -> str:
    """As quantize_dynamic writes it."""
    name = "dynamicquantizelinear0"
    d.nodes.append(
        onnx.helper.make_node("DynamicQuantizeLinear", ["image"], ["u8", "scale", "zero"], name=name)
    )
    sums = d.op("ConvInteger", "u8", d.const(np.ones((8, 8, 3, 3), np.int8)), "zero", pads=[1, 1, 1, 1])
    return d.op("Mul", d.op("Cast", sums, to=onnx.TensorProto.FLOAT), "scale")


def weight_pair(d: Draft) -> str:
    return d.pair(float_weight(d), np.zeros(8, np.int8), np.full(8, 0.01, F32), axis=0)


def per_channel(d: Draft) -> str:
    return d.pair("image", np.full(8, 128, np.uint8), np.full(8, 0.05, F32), axis=1)


def int4_weight(d: Draft, *shape: int) -> str:
    """With a scale per channel of the last axis of a matrix, of the first one of a convolution's weight."""
    axis = 0 if len(shape) == 4 else 1
    q = onnx.helper.make_tensor("w4", onnx.TensorProto.INT4, shape, np.ones(np.prod(shape), int))
    d.initializers.append(q)
    return d.op("DequantizeLinear", "w4", d.const(np.full(shape[axis], 0.01, F32)), axis=axis)


def concatenated(d: Draft, scale: np.float32) -> str:
    return d.op("Concat", d.pair("image"), d.pair(d.conv(x(d)), UINT8, scale), axis=2)


def concat(d: Draft, scale: np.float32) -> str:
    return d.pair(d.conv(concatenated(d, scale)), MIDDLE)


def transposed(d: Draft, zero) -> str:
    return d.pair(d.op("ConvTranspose", d.pair("image", zero), d.weight(8, 8, 3, 3, axis=1)), MIDDLE)


def product(d: Draft, zero) -> str:
    """Of two activations."""
    return d.pair(d.op("MatMul", d.pair("image"), d.pair("image", zero, F32(0.04))), MIDDLE)


def moved_product(d: Draft, zero) -> str:
    y = d.pair(d.op("MatMul", x(d), d.weight(8, 8, axis=1)), zero)
    return d.pair(d.op("MatMul", d.op("Transpose", y, perm=[0, 1, 3, 2]), d.weight(8, 4, axis=1)), MIDDLE)


def gap(d: Draft, tensor: str) -> str:
    return d.op("GlobalAveragePool", tensor)


def moved(d: Draft, scale: float) -> str:
    return d.pair(d.op("Transpose", x(d), perm=[0, 2, 3, 1]), MIDDLE, F32(scale))


def max_pool(d: Draft, tensor: str) -> str:
    return d.op("MaxPool", tensor, kernel_shape=[2, 2])


def shared(d: Draft, zero) -> str:
    start = d.pair("image", zero)
    return d.pair(d.op("Add", d.pair(d.conv(start), zero), start), zero)


def branches(d: Draft) -> str:
    """An If with a quantized convolution in both branches."""
    bodies = {}
    for name in ("then_branch", "else_branch"):
        inner = Draft()
        output = conv_q(inner)
        for node in inner.nodes:
            node.name = f"{name}_{node.name}"
        value = onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, [2, 8, 8, 8])
        bodies[name] = onnx.helper.make_graph(inner.nodes, name, [], [value], inner.initializers)
    return d.op("If", d.const(np.bool_(True), "condition"), **bodies)


def pad(d: Draft, tensor: str) -> str:
    return d.op("Pad", tensor, d.const(np.array([0, 0, 1, 1, 0, 0, 1, 1])))


def q_names(*numbers: int) -> tuple[str, ...]:
    return tuple(f"quantizelinear{i}" for i in numbers)


CASES: dict[str, Case] = {
    "not-quantized": Case(
        lambda d: d.conv("image", weight=float_weight(d)), conv_q, (), "QLinearConv", "Convolution"
    ),
    "body-not-read": Case(branches, conv_q, ("if0",)),
    "integer-operators": Case(
        lambda d: d.op("MatMulInteger", d.q(d.op("Flatten", "image")), d.const(np.ones((512, 4), np.int8))),
        conv_q,
        ("matmulinteger0",),
    ),
    "dynamic-ranges": Case(
        dynamic, conv_q, ("dynamicquantizelinear0", "convinteger0"), "QLinearConv", "Convolution"
    ),
    "float-input": Case(lambda d: d.pair(d.conv("image")), conv_q, ("conv0",), "QLinearConv", "Convolution"),
    "float-weight": Case(lambda d: conv_q(d, weight=float_weight(d)), conv_q, ("conv0",), ov="Convolution"),
    "weight-quantized-at-load": Case(
        lambda d: conv_q(d, weight=weight_pair(d)), conv_q, ("quantizelinear0",)
    ),
    "no-int8-kernel": Case(
        lambda d: d.pair(d.op("ConvTranspose", x(d), d.weight(8, 8, 3, 3, axis=1)), MIDDLE),
        conv_q,
        ("convtranspose0",),
        "QLinearConv",
    ),
    "channel-axis": Case(
        lambda d: conv_q(d, weight=d.weight(8, 8, 3, 3, axis=1)),
        conv_q,
        ("dequantizelinear0", "conv0"),
        "QLinearConv",
        "Convolution",
    ),
    "output-float": Case(lambda d: d.conv(x(d)), conv_q, ("conv0",), "QLinearConv"),
    "loose-bias": Case(
        lambda d: d.pair(d.op("Add", d.conv(x(d), bias=""), d.const(np.ones((1, 8, 1, 1), F32))), MIDDLE),
        conv_q,
        ("conv0", "add0"),
        "QLinearConv",
    ),
    "bias-scale": Case(
        lambda d: bias32(d, 0.1),
        lambda d: bias32(d, 0.05 * 0.01),
        ("dequantizelinear0", "conv0"),
        "QLinearConv",
    ),
    "float-concat": Case(
        lambda d: concat(d, F32(0.05)),
        lambda d: d.pair(d.conv(d.pair(concatenated(d, F32(0.05)))), MIDDLE),
        ("concat0", "conv1"),
        "QLinearConcat",
    ),
    "transposed-zero-point": Case(
        lambda d: transposed(d, MIDDLE),
        lambda d: transposed(d, UINT8),
        ("convtranspose0",),
        ov="Deconvolution",
    ),
    "product-of-activations": Case(
        lambda d: product(d, UINT8),
        lambda d: product(d, INT8),
        ("dequantizelinear1", "matmul0"),
        ov="MatMul",
    ),
    "float-product": Case(
        lambda d: d.pair(d.op("MatMul", d.op("Abs", "image"), "image"), MIDDLE),
        lambda d: product(d, INT8),
        ("matmul0",),
        ov="MatMul",
    ),
    "narrow-product": Case(
        lambda d: d.pair(d.op("MatMul", x(d), int4_weight(d, 8, 16)), MIDDLE),
        lambda d: d.pair(d.op("MatMul", x(d), d.weight(8, 16, axis=1)), MIDDLE),
        ("dequantizelinear1", "matmul0"),
        "QLinearMatMul",
    ),
    "int8-not-loaded": Case(
        lambda d: moved_product(d, INT8),
        lambda d: moved_product(d, MIDDLE),
        ("dequantizelinear2", "transpose0"),
    ),
    "int32-bias": Case(lambda d: bias32(d, 0.05 * 0.01), conv_q, ("dequantizelinear0",)),
    "bias-overflow": Case(
        lambda d: conv_q(d, bias=d.const(np.full(8, 2e6, F32))),
        lambda d: conv_q(d, bias=d.const(np.full(8, 1e6, F32))),
        ("conv0",),
    ),
    "bn-not-folded": Case(
        lambda d: d.pair(norm(d, d.conv(x(d))), MIDDLE),
        conv_q,
        ("conv0", "batchnormalization0"),
        "QLinearConv",
    ),
    "bn-after-dq": Case(
        lambda d: d.pair(norm(d, conv_q(d)), MIDDLE), conv_q, ("dequantizelinear2", "batchnormalization0")
    ),
    "q-before-relu": Case(
        lambda d: d.pair(d.op("Relu", conv_q(d))), conv_relu_q, ("conv0", "quantizelinear1", "relu0")
    ),
    "signed-after-relu": Case(
        lambda d: conv_relu_q(d, INT8), conv_relu_q, ("relu0", "quantizelinear1"), "QLinearConv"
    ),
    "clip-wider-range": Case(
        lambda d: clip6(d, 7 / 255), lambda d: clip6(d, 6 / 255), ("clip0", "quantizelinear1"), "QLinearConv"
    ),
    "add-float-input": Case(lambda d: residual(d, branch=False), residual, ("add0", "conv1"), "QLinearAdd"),
    "residual-float": Case(
        lambda d: residual(d, branch=False, skip=False, zero=INT8),
        lambda d: residual(d, branch=False, zero=INT8),
        ("add0",),
    ),
    "q-on-branch": Case(
        lambda d: residual(d, zero=INT8),
        lambda d: residual(d, branch=False, zero=INT8),
        ("conv1", "quantizelinear2", "add0"),
    ),
    "op-output-float": Case(
        lambda d: d.op("Add", x(d), x(d)),
        lambda d: d.pair(d.op("Add", x(d), x(d)), MIDDLE),
        ("add0",),
        "QLinearAdd",
    ),
    "pool-float-input": Case(
        lambda d: d.pair(gap(d, d.op("Relu", d.conv(x(d))))),
        lambda d: d.pair(gap(d, conv_relu_q(d))),
        ("conv0", "globalaveragepool0"),
        "QLinearGlobalAveragePool",
        "Reduce",
    ),
    "reduce-mean": Case(
        lambda d: d.pair(d.op("ReduceMean", x(d), d.const(np.array([2, 3])))),
        lambda d: d.pair(gap(d, x(d)), MIDDLE),
        ("reducemean0",),
        "QLinearGlobalAveragePool",
    ),
    "max-pool-before-q": Case(
        lambda d: d.pair(max_pool(d, d.op("Relu", d.conv(x(d))))),
        lambda d: d.pair(max_pool(d, conv_relu_q(d))),
        ("conv0", "maxpool0"),
        ov="Pooling",
    ),
    "double-pair": Case(
        lambda d: d.pair(d.conv(d.pair(x(d), MIDDLE, F32(0.1))), MIDDLE),
        conv_q,
        ("dequantizelinear0", "quantizelinear1"),
    ),
    "scale-changes": Case(
        lambda d: moved(d, 0.1),
        lambda d: moved(d, 0.05),
        ("dequantizelinear0", "transpose0", "quantizelinear1"),
    ),
    "move-not-crossed": Case(
        lambda d: d.pair(pad(d, d.op("Relu", d.conv(x(d))))),
        lambda d: d.pair(pad(d, conv_relu_q(d))),
        ("conv0", "relu0", "pad0"),
        "QLinearConv",
    ),
    "shared-int8": Case(
        lambda d: shared(d, INT8),
        lambda d: shared(d, MIDDLE),
        ("quantizelinear0", "conv0", "add0"),
        "QLinearConv",
    ),
    "float-island": Case(
        lambda d: d.pair(d.op("HardSwish", conv_q(d)), MIDDLE),
        lambda d: d.pair(d.op("Sigmoid", conv_q(d))),
        ("hardswish0",),
        "QLinearSigmoid",
    ),
    "float-island-openvino": Case(
        lambda d: d.pair(d.op("Softmax", conv_q(d), axis=1), MIDDLE),
        lambda d: d.pair(d.op("HardSwish", d.conv(x(d))), MIDDLE),
        ("softmax0",),
        ov="Softmax",
    ),
    "float-island-tensorrt": Case(
        lambda d: d.pair(d.op("Softmax", conv_q(d), axis=1), INT8),
        lambda d: d.pair(d.op("Relu", d.conv(x(d))), INT8),
        ("softmax0",),
    ),
    "zero-point": Case(
        lambda d: d.conv(d.pair("image", np.int8(3))),
        lambda d: d.conv(d.pair("image", INT8)),
        ("quantizelinear0",),
    ),
    "unsigned-type": Case(
        lambda d: d.conv(d.pair("image", UINT8)),
        lambda d: d.conv(d.pair("image", INT8)),
        ("quantizelinear0",),
    ),
    "weight-zero-point": Case(
        lambda d: conv_q(d, weight=d.weight(8, 8, 3, 3, zero=np.int8(3))),
        conv_q,
        ("dequantizelinear0",),
        ov="Convolution",
    ),
    "per-channel-activation": Case(
        lambda d: d.pair(d.conv(per_channel(d)), MIDDLE), conv_q, ("quantizelinear0",), "QLinearConv"
    ),
    "activation-type": Case(
        lambda d: d.pair(d.conv(d.pair("image", np.int16(0))), np.int16(0)),
        conv_q,
        ("quantizelinear0",),
        "QLinearConv",
        "Convolution",
    ),
    "relu-dropped": Case(
        lambda d: d.pair(d.op("Relu", "image"), FLOAT8),
        lambda d: d.pair(d.op("Max", "image", d.const(F32(0))), INT8),
        ("relu0", "quantizelinear0"),
        "Max",
    ),
    "activation-type-tensorrt": Case(
        lambda d: d.conv(d.pair("image", np.int16(0))),
        lambda d: d.conv(d.pair("image", INT8)),
        ("quantizelinear0",),
    ),
    "narrow-convolution": Case(
        lambda d: conv_q(d, weight=int4_weight(d, 8, 8, 3, 3)),
        conv_q,
        ("dequantizelinear0", "conv0"),
        "QLinearConv",
    ),
    "scale": Case(
        lambda d: d.conv(d.pair("image", INT8, F32(0))),
        lambda d: d.conv(d.pair("image", INT8)),
        ("quantizelinear0",),
    ),
}


def test_every_rule_has_a_case() -> None:
    assert [rule.id for rule in RULES] == list({rule.id: None for rule in RULES}), "an id twice"
    elsewhere = {
        *OPENVINO,
        *(rule for rule in RULES if rule.id.startswith("saturating-")),
    }  # test_reduce_range.py
    assert set(CASES) == {rule.id for rule in RULES if rule not in elsewhere}, (
        "those have test_lint_openvino.py"
    )


@pytest.fixture(params=list(CASES))
def case(request, tmp_path: Path) -> tuple[str, Case, Path, Path]:
    name: str = request.param
    case, files = CASES[name], []
    for kind, write in (("bad", case.bad), ("good", case.good)):
        draft = Draft()
        output = write(draft)
        files.append(draft.save(tmp_path / f"{kind}.onnx", output))
    return name, case, files[0], files[1]


def test_rule(case) -> None:
    name, expected, bad, good = case
    found = [f for f in lint(bad) if f.rule == name]
    assert found, "the broken graph is not found"
    assert found[0].nodes == expected.nodes
    (rule,) = (r for r in RULES if r.id == name)
    for target in rule.targets:
        assert name in {f.rule for f in lint(bad, target)}
        assert name not in {f.rule for f in lint(good, target)}
    for target in {"onnxruntime", "openvino", "tensorrt"} - set(rule.targets):
        assert name not in {f.rule for f in lint(bad, target)}


def test_onnxruntime_agrees(case) -> None:
    """The kernel that the rule speaks of is there in the mended graph only."""
    name, expected, bad, good = case
    (rule,) = (r for r in RULES if r.id == name)
    if "onnxruntime" in rule.targets and expected.ort:
        assert optimized_ops(bad)[expected.ort] < optimized_ops(good)[expected.ort]
        # What an extra operator costs may hide in a larger graph, but nothing else may be wrong with the mended one.
        assert {f.rule for f in lint(good, "onnxruntime")} == set()


def test_openvino_agrees(case) -> None:
    pytest.importorskip("openvino")
    _, expected, bad, good = case
    if expected.ov:
        assert expected.ov in openvino_float_layers(bad)
        assert expected.ov not in openvino_float_layers(good)


def test_layers_in_int8_are_those_that_run(case) -> None:
    name, _, *files = case
    for path in files:
        if name == "body-not-read" and path.stem == "bad":
            continue  # counted are the layers of the main graph
        if not (name == "int8-not-loaded" and path.stem == "bad"):
            found = coverage(path, "onnxruntime")
            assert found.int8 == int8_layers_of_onnxruntime(optimized_ops(path))
        pytest.importorskip("openvino")
        assert coverage(path, "openvino").int8 == int8_layers_of_openvino(path)


def test_files_that_onnxruntime_does_not_load(case) -> None:
    name, _, bad, good = case
    if name == "int8-not-loaded":
        with pytest.raises(Exception, match="output_dtype INT8 does not match"):
            optimized_ops(bad)
        assert coverage(bad, "onnxruntime").int8 == 0
        assert optimized_ops(good)["QLinearMatMul"] == 2


def openvino_float_layers(path: Path) -> set[str]:
    return {kind for kind, precision, _ in openvino_layers(path) if precision == "f32"}


# Whole files


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
def test_own_files_are_clean(build, tmp_path: Path, target: str) -> None:
    """test_placement.py and test_parity.py look at larger networks."""
    model, images = build("resnet8", 16)
    path = export_onnx(model, tmp_path / "model.onnx", example=images, target=target)
    assert [str(f) for f in lint(path, target)] == []
    others = Counter(f.rule for t in {"onnxruntime", "tensorrt"} - {target} for f in lint(path, t))
    assert sum(others.values()) > 5, "no file suits both"


class Random(CalibrationDataReader):
    def __init__(self) -> None:
        self.left = [{"image": np.random.default_rng(0).normal(size=(2, 8, 8, 8)).astype(F32)}]

    def get_next(self):
        return self.left.pop() if self.left else None


def float_net(d: Draft) -> str:
    def weight() -> str:
        return d.const(d.random.normal(size=(8, 8, 3, 3)).astype(F32) * 0.1)

    first = d.op("Relu", d.conv("image", weight=weight()))
    second = d.op("Relu", d.op("Add", d.conv(first, weight=weight()), first))
    return d.op("Flatten", gap(d, second))


def test_files_of_quantize_static(tmp_path: Path) -> None:
    draft = Draft()
    source = draft.save(tmp_path / "float.onnx", float_net(draft))
    assert {f.rule for f in lint(source)} == {"not-quantized"}
    file = tmp_path / "static.onnx"
    options = {"per_channel": True, "weight_type": QuantType.QInt8}
    quantize_static(source, file, Random(), activation_type=QuantType.QUInt8, **options)
    assert lint(file, "onnxruntime") == []
    ops = optimized_ops(file)
    assert (ops["QLinearConv"], ops["QLinearAdd"], ops["QLinearGlobalAveragePool"]) == (2, 1, 1)
    assert coverage(file, "onnxruntime") == Coverage("onnxruntime", 2, 2, 1.0)
    rules = {f.rule for f in lint(file, "tensorrt")}
    assert {"zero-point", "unsigned-type", "int32-bias", "q-on-branch"} <= rules
    # With int8 activations, its default, the skip's two readers keep everything in float.
    quantize_static(source, file, Random(), activation_type=QuantType.QInt8, **options)
    assert [f.rule for f in lint(file, "onnxruntime")] == ["shared-int8"]
    assert (optimized_ops(file)["QLinearConv"], optimized_ops(file)["Conv"]) == (0, 2)
    assert coverage(file, "onnxruntime") == Coverage("onnxruntime", 2, 0, 0.0)


def test_multiply_adds(tmp_path: Path) -> None:
    """Of one image: convolution 8x8x8 outputs of 8x3x3, transposed 8x8x8 inputs of 4x2x2, Gemm 4 x 10."""
    d = Draft()
    y = d.pair(d.conv(x(d)), MIDDLE)
    y = d.op("ConvTranspose", y, float_of(d, 8, 4, 2, 2))
    y = d.op("GlobalMaxPool", d.op("Relu", y))
    y = d.op("Gemm", d.op("Flatten", y), float_of(d, 4, 10))
    path = d.save(tmp_path / "model.onnx", y)
    model = onnx.load(path)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del model.graph.value_info[:]
    onnx.save(model, path)
    conv, transposed, gemm = 512 * 72, 512 * 16, 4 * 10
    assert coverage(path, "openvino") == Coverage("openvino", 3, 1, conv / (conv + transposed + gemm))


def float_of(d: Draft, *shape: int) -> str:
    return d.const(d.random.normal(size=shape).astype(F32))


def test_command(tmp_path: Path, capsys) -> None:
    good, bad = Draft(), Draft()
    clean = good.save(tmp_path / "good.onnx", conv_q(good))
    broken = bad.save(tmp_path / "bad.onnx", CASES["bn-not-folded"].bad(bad))
    assert main(["lint", str(clean), "--target", "onnxruntime"]) == 0
    text = capsys.readouterr().out
    assert "no findings for onnxruntime" in text
    assert text.splitlines()[-1] == "1 layer, of them in int8: 1 (100 % of the multiply-adds) in onnxruntime"
    assert main(["lint", str(broken), "--target", "onnxruntime"]) == 1
    text = capsys.readouterr().out
    assert "conv0 > batchnormalization0" in text
    assert "Fold it" in text
    assert main(["lint", str(clean), str(broken), "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert {"unsigned-type", "zero-point"} <= {row["rule"] for row in rows[str(clean)]}
    assert "bn-not-folded" in {row["rule"] for row in rows[str(broken)]}
    assert main(["lint", str(tmp_path / "none.onnx")]) == 2
    (tmp_path / "text.onnx").write_text("no protobuf")
    assert main(["lint", str(tmp_path / "text.onnx")]) == 2
    assert "not an ONNX file" in capsys.readouterr().err


def test_default_target_is_the_one_exported_for(build, tmp_path: Path) -> None:
    model, images = build("resnet8", 16)
    path = export_onnx(model, tmp_path / "model.onnx", example=images, target="tensorrt")
    assert lint(path) == lint(path, "tensorrt") == []
    assert main(["lint", str(path)]) == 0
    assert main(["lint", str(path), "--target", "onnxruntime"]) == 1


def test_unknown_target(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tensorrt"):
        lint(tmp_path / "x.onnx", "tflite")
