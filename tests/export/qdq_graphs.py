"""Small Q/DQ graphs written by hand, for the tests of lint, and what the runtimes make of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

SCALE = np.float32(0.05)
UINT8, INT8 = np.uint8(0), np.int8(0)


class Draft:
    """Writes a graph node by node; every method returns the name of the tensor that it makes.

    The input ``image`` is float32 [2, 8, 8, 8].
    """

    def __init__(self, opset: int = 21) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(0)

    def const(self, array: np.ndarray, name: str | None = None) -> str:
        name = name or f"const{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def op(self, op_type: str, *inputs: str, name: str | None = None, **attributes) -> str:
        name = name or f"{op_type.lower()}{sum(n.op_type == op_type for n in self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=name, **attributes))
        return name

    def q(self, x: str, zero=UINT8, scale=SCALE, **attributes) -> str:
        return self.op("QuantizeLinear", x, self.const(scale), self.const(zero), **attributes)

    def dq(self, x: str, zero=UINT8, scale=SCALE, **attributes) -> str:
        return self.op("DequantizeLinear", x, self.const(scale), self.const(zero), **attributes)

    def pair(self, x: str, zero=UINT8, scale=SCALE, **attributes) -> str:
        return self.dq(self.q(x, zero, scale, **attributes), zero, scale, **attributes)

    def weight(self, *shape: int, zero=INT8, axis: int = 0) -> str:
        """An int8 initializer with a DQ per channel of ``axis``."""
        q = self.random.integers(-100, 100, shape).astype(np.asarray(zero).dtype)
        zeros = np.full(shape[axis], zero)
        return self.dq(self.const(q), zeros, np.full(shape[axis], 0.01, np.float32), axis=axis)

    def conv(
        self, x: str, channels: int = 8, *, weight: str | None = None, bias: str | None = None, **kw
    ) -> str:
        weight = weight or self.weight(channels, 8, 3, 3)
        bias = bias if bias is not None else self.const(np.zeros(channels, np.float32))
        return self.op("Conv", x, weight, *([bias] if bias else []), pads=[1, 1, 1, 1], **kw)

    def save(self, path: Path, output: str, checked: bool = True) -> Path:
        graph = helper.make_graph(
            self.nodes,
            "draft",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, [2, 8, 8, 8])],
            [onnx.ValueInfoProto(name=output)],
            self.initializers,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        if checked:
            model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
            onnx.checker.check_model(model)
        onnx.save(model, path)
        return path


def optimized_ops(path: Path) -> Counter[str]:
    """Operators of the graph as ONNX Runtime optimized it for the CPU."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node)


def openvino_layers(path: Path) -> list[tuple[str, str, str]]:
    """Type, precision and the first tensor or layer of origin of what OpenVINO runs on the CPU."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    infos = [op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops()]
    return [
        (
            info["layerType"].astype(str),
            info["runtimePrecision"].astype(str),
            info["originalLayersNames"].astype(str).split(",")[0],
        )
        for info in infos
    ]


_INT8_KERNELS = (
    "QLinearConv",
    "QLinearMatMul",
    "QGemm",
    "MatMulIntegerToFloat",
    "ConvInteger",
    "MatMulInteger",
)
_OPENVINO_LAYERS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")


def int8_layers_of_onnxruntime(ops: Counter[str]) -> int:
    """How many layers the optimized graph (:func:`optimized_ops`) computes in int8."""
    return sum(ops[kind] for kind in (*_INT8_KERNELS, "DynamicQuantizeMatMul"))


def int8_layers_of_openvino(path: Path) -> int:
    """How many layers OpenVINO runs on 8-bit input: a layer's own precision may be that of its weights alone."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    model = openvino.Core().compile_model(str(path), "CPU", settings).get_runtime_model()
    found = 0
    for op in model.get_ordered_ops():
        if op.get_rt_info()["layerType"].astype(str) in _OPENVINO_LAYERS:
            found += read_precision(op) in ("u8", "i8")
    return found


def read_precision(op: Any) -> str:
    """Type of what an operator of OpenVINO's executed graph reads first, by its kernel: ``brgemm_avx512_f32``.

    ``outputPrecisions`` of the operator before has an entry for each edge where they differ, in an order of its own.
    """
    suffix = op.get_rt_info()["primitiveType"].astype(str).rpartition("_")[2]
    return {"I8": "u8"}.get(suffix, suffix)
