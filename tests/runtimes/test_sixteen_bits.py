"""What runtimes execute of operators between Q and DQ of 8 and of 16 bits: the table of docs/export.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from qdq_graphs import read_precision

import qzoo
from qzoo.errors import ArgumentError

IMAGE, MATRIX = [1, 16, 14, 14], [4, 64]
OPERATORS: dict[str, tuple[list[int], dict[str, Any], int]] = {  # shape, attributes, number of activations
    "Conv": (IMAGE, {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, 1),
    "Gemm": (MATRIX, {}, 1),
    "MatMul": (MATRIX, {}, 1),
    "Add": (IMAGE, {}, 2),
    "Mul": (IMAGE, {}, 2),
    "Concat": (IMAGE, {"axis": 1}, 2),
    "AveragePool": (IMAGE, {"kernel_shape": [2, 2]}, 1),
    "GlobalAveragePool": (IMAGE, {}, 1),
    "Sigmoid": (IMAGE, {}, 1),
}
WEIGHTS = {"Conv": (16, 16, 3, 3), "Gemm": (64, 32), "MatMul": (64, 32)}
MOVES = {"Transpose", "ReorderInput", "ReorderOutput", "QuantizeLinear", "DequantizeLinear"}


def write(path: Path, op: str, dtype: type, domain: str = "") -> Path:
    """One operator between Q and DQ."""
    shape, attributes, count = OPERATORS[op]
    nodes: list[onnx.NodeProto] = []
    stored: dict[str, np.ndarray] = {}
    zero = np.array(1 << (8 * np.dtype(dtype).itemsize - 1) if np.dtype(dtype).kind == "u" else 0, dtype)
    scale = np.float32(8 / (1 << (8 * np.dtype(dtype).itemsize)))

    def pair(name: str, source: str) -> str:
        stored[f"{name}_scale"], stored[f"{name}_zero"] = scale, zero
        around = [f"{name}_scale", f"{name}_zero"]
        nodes.append(helper.make_node("QuantizeLinear", [source, *around], [f"{name}_q"], domain=domain))
        nodes.append(
            helper.make_node("DequantizeLinear", [f"{name}_q", *around], [f"{name}_dq"], domain=domain)
        )
        return f"{name}_dq"

    inputs = [f"x{i}" for i in range(count)]
    operands = [pair(f"input{i}", name) for i, name in enumerate(inputs)]
    if op in WEIGHTS:
        axis = 0 if op == "Conv" else 1
        stored["w"] = np.random.default_rng(0).integers(-127, 128, WEIGHTS[op]).astype(np.int8)
        stored["w_zero"] = np.zeros(WEIGHTS[op][axis], np.int8)  # without it ONNX Runtime makes no QGemm
        stored["w_scale"] = np.full(WEIGHTS[op][axis], 0.01, np.float32)
        nodes.append(helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["w_dq"], axis=axis))
        operands.append("w_dq")
    nodes.append(helper.make_node(op, operands, ["y"], name="it", **attributes))
    nodes.append(helper.make_node("Identity", [pair("output", "y")], ["out"]))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in inputs]
    result = [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)]
    constants = [numpy_helper.from_array(np.asarray(array), name) for name, array in stored.items()]
    graph = helper.make_graph(nodes, "g", values, result, constants)
    opsets = [helper.make_opsetid("", 21), *([helper.make_opsetid(domain, 1)] if domain else [])]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def executed_by_onnxruntime(path: Path) -> set[str]:
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return {node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node} - MOVES


def read_by_openvino(path: Path) -> set[str]:
    """Types of the values that the operator itself reads."""
    ov = pytest.importorskip("openvino")
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(ov.Core().read_model(path), "CPU", hint)
    kinds = ("Convolution", "FullyConnected", "Concatenation", "Pooling", "Reduce")
    for op in compiled.get_runtime_model().get_ordered_ops():
        if op.get_rt_info()["layerType"].astype(str) in kinds:
            return {read_precision(op)}
    return {"f32"}  # fused elementwise operators, whose types the graph does not tell apart


@pytest.mark.parametrize("op", OPERATORS)
def test_onnxruntime_computes_16_bits_in_float(op: str, tmp_path: Path) -> None:
    assert executed_by_onnxruntime(write(tmp_path / "a.onnx", op, np.uint8)) == {
        "QGemm" if op == "Gemm" else f"QLinear{op}"
    }
    for dtype, domain in ((np.uint16, ""), (np.int16, ""), (np.uint16, "com.microsoft")):
        found = executed_by_onnxruntime(write(tmp_path / "a.onnx", op, dtype, domain))
        assert found == {"MatMulNBits" if op in ("Gemm", "MatMul") else op}


@pytest.mark.parametrize("op", OPERATORS)
def test_openvino_computes_16_bits_in_float(op: str, tmp_path: Path) -> None:
    in_int8 = op not in ("Add", "Mul", "Sigmoid")
    assert read_by_openvino(write(tmp_path / "a.onnx", op, np.uint8)) == {"u8" if in_int8 else "f32"}
    assert read_by_openvino(write(tmp_path / "a.onnx", op, np.uint16)) == {"f32"}


def test_the_scheme_says_so() -> None:
    for refused in (
        lambda: qzoo.Scheme.parse("w8a16"),
        lambda: qzoo.create_model("resnet20", quantize="w8a16"),
    ):
        with pytest.raises(
            ArgumentError, match="activation_bits is 16, for which no runtime here has kernels"
        ):
            refused()
