"""Where Q/DQ stand in the file, by target."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

from qzoo.export import export_onnx, lint


class Graph:
    """Producers and readers by tensor name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        graph = onnx.load(path).graph
        self.nodes = list(graph.node)
        self.producer = {name: n for n in graph.node for name in n.output}
        self.constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}

    def of_type(self, op_type: str) -> list[onnx.NodeProto]:
        return [n for n in self.nodes if n.op_type == op_type]

    def readers(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        return [n for n in self.nodes if node.output[0] in n.input]


@pytest.fixture(scope="module", params=["tensorrt", "onnxruntime", "openvino"])
def case(request, build, tmp_path_factory) -> tuple[str, Graph]:
    model, images = build("tf_efficientnet_lite0", 36)
    path = export_onnx(
        model, tmp_path_factory.mktemp(request.param) / "m.onnx", example=images, target=request.param
    )
    return request.param, Graph(path)


def test_every_convolution_reads_quantized_operands(case) -> None:
    target, graph = case
    convs = graph.of_type("Conv")
    assert len(convs) == 49
    for conv in convs:
        assert [graph.producer[name].op_type for name in conv.input[:2]] == ["DequantizeLinear"] * 2
    assert not graph.of_type("BatchNormalization")
    pads = [list(graph.constants[pad.input[1]]) for pad in graph.of_type("Pad")]
    channel = [[0, 0, 0, 0, 0, 1, 0, 0]] if target == "onnxruntime" else []
    assert pads == channel, "the lopsided padding of TensorFlow must be the convolution's own"


def test_nothing_for_lint(case) -> None:
    target, graph = case
    assert [str(finding) for finding in lint(graph.path, target)] == []


def test_adds(case) -> None:
    """The skip is quantized everywhere; the branch for ONNX Runtime only: the others fuse convolution and add."""
    target, graph = case
    adds = graph.of_type("Add")
    assert len(adds) == 9
    for add in adds:
        kinds = sorted(graph.producer[name].op_type for name in add.input)
        assert kinds == (
            ["DequantizeLinear"] * 2 if target == "onnxruntime" else ["Conv", "DequantizeLinear"]
        )


def test_types(case) -> None:
    """TensorRT takes int8 with zero point 0 only; ONNX Runtime uint8 only."""
    target, graph = case
    zeros = {
        (z.dtype.name, int(z)) for z in (graph.constants[n.input[2]] for n in graph.of_type("QuantizeLinear"))
    }
    assert (
        zeros
        == {
            "tensorrt": {("int8", 0)},
            "onnxruntime": {("uint8", 0), ("uint8", 128)},
            "openvino": {("uint8", 0), ("int8", 0)},
        }[target]
    )


def test_one_pair_per_tensor(case) -> None:
    """A tensor with several readers is quantized once where the ranges are equal."""
    _, graph = case
    keys = [(n.input[0], graph.constants[n.input[1]].tobytes()) for n in graph.of_type("QuantizeLinear")]
    assert len(set(keys)) == len(keys)


def test_pool_and_classifier(case) -> None:
    target, graph = case
    (pool,), (fc,) = graph.of_type("GlobalAveragePool"), graph.of_type("Gemm")
    pooled = graph.producer[pool.input[0]].op_type
    assert pooled == ("DequantizeLinear" if target != "tensorrt" else "Clip")
    source = graph.producer[fc.input[0]]
    if target == "openvino":  # which makes one operator of a pooling and the Q right behind it
        assert source.op_type == "Reshape"
        source = graph.producer[source.input[0]]
        assert graph.producer[source.input[0]].input[0] == pool.output[0]
    assert [source.op_type, graph.producer[fc.input[1]].op_type] == ["DequantizeLinear"] * 2
    behind = ["QuantizeLinear"] if target == "onnxruntime" else []
    assert [node.op_type for node in graph.readers(fc)] == behind


def test_lopsided_padding(case) -> None:
    """36 pixels, kernel 3, stride 2: 18 outputs need 37 inputs, and the one zero goes to the bottom and the right."""
    _, graph = case
    (stem,) = [n for n in graph.of_type("Conv") if n.name == "conv_stem/Conv"]
    assert next(list(a.ints) for a in stem.attribute if a.name == "pads") == [0, 0, 1, 1]
