"""The layers that the definitions share."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from qzoo.models.layers import Conv2dSame, QuantConv2dSame, conv2d, init_weights, linear, pad_same
from qzoo.quant.nn import QuantConv2d, QuantLinear
from qzoo.scheme import Scheme


def onnx_same(x: np.ndarray, weight: np.ndarray, stride: int) -> np.ndarray:
    """The convolution by ONNX Runtime, whose SAME_UPPER is TensorFlow's rule."""
    onnxruntime = pytest.importorskip("onnxruntime")
    node = helper.make_node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER", strides=[stride, stride])
    graph = helper.make_graph(
        [node],
        "same",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, v.shape) for n, v in (("x", x), ("w", weight))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x, "w": weight})[0]


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (5, 4)])
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_same_padding_is_tensorflows(size: tuple[int, int], kernel_size: int, stride: int) -> None:
    rng = np.random.default_rng(0)
    # Small integers: float32 sums of them are exact, in any order.
    x = rng.integers(-8, 9, (2, 3, *size)).astype(np.float32)
    layer = conv2d(3, 4, kernel_size, stride=stride, padding="same")
    weight = rng.integers(-8, 9, layer.weight.shape).astype(np.float32)
    layer.weight.data.copy_(torch.from_numpy(weight))
    with torch.no_grad():
        actual = layer(torch.from_numpy(x)).numpy()
    assert actual.shape[2:] == tuple(math.ceil(n / stride) for n in size)
    np.testing.assert_array_equal(actual, onnx_same(x, weight, stride))


def test_same_padding_needs_no_layer_of_its_own_at_stride_1() -> None:
    assert type(conv2d(3, 4, 5, padding="same")) is nn.Conv2d
    assert type(conv2d(3, 4, 5, stride=2, padding="same")) is Conv2dSame
    assert type(conv2d(3, 4, 5, padding="same", quantize=Scheme())) is QuantConv2d
    assert type(conv2d(3, 4, 5, stride=2, padding="same", quantize=Scheme())) is QuantConv2dSame


def test_pad_same_puts_the_odd_zero_last() -> None:
    padded = pad_same(torch.ones(1, 1, 4, 5), (3, 3), (2, 2))
    assert padded[0, 0].tolist() == [
        [0, 1, 1, 1, 1, 1, 0],
        [0, 1, 1, 1, 1, 1, 0],
        [0, 1, 1, 1, 1, 1, 0],
        [0, 1, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ]


def test_padding_stands_between_quantizer_and_convolution() -> None:
    layer = conv2d(3, 4, 3, stride=2, padding="same", quantize=Scheme())
    layer.input_quantizer.amax = 2.0
    layer.weight_quantizer.amax = np.ones((4, 1, 1, 1), np.float32)
    program = torch.export.export(layer, (torch.randn(1, 3, 8, 8),))
    convolution = next(n for n in program.graph.nodes if "conv2d" in str(n.target))
    pad = convolution.args[0]
    assert "pad" in str(pad.target)
    assert "fake_quantize" in str(pad.args[0].target)


@pytest.mark.parametrize("nonnegative", [False, True])
def test_conv2d_states_what_it_is_told(nonnegative: bool) -> None:
    layer = conv2d(
        4,
        6,
        3,
        stride=2,
        padding=1,
        groups=2,
        bias=True,
        quantize=Scheme(4, 6, "openvino"),
        nonnegative=nonnegative,
    )
    plain = conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=True)
    plain.load_state_dict(layer.state_dict(), strict=True)
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    assert (weights.num_bits, weights.axis, weights.narrow_range, weights.unsigned) == (4, 0, True, False)
    assert (inputs.num_bits, inputs.axis, inputs.narrow_range) == (6, None, False)
    assert inputs.nonnegative is inputs.unsigned is nonnegative
    weights.disable()
    inputs.disable()
    x = torch.randn(2, 4, 9, 9)
    assert torch.equal(layer(x), plain(x))


def test_linear_states_what_it_is_told() -> None:
    layer = linear(4, 6, quantize=Scheme(4, 6, "onnxruntime"), nonnegative=True)
    assert isinstance(layer, QuantLinear)
    assert (layer.weight_quantizer.num_bits, layer.weight_quantizer.axis) == (4, 0)
    assert (layer.input_quantizer.num_bits, layer.input_quantizer.unsigned) == (6, True)
    assert isinstance(linear(4, 6), nn.Linear)


@pytest.mark.parametrize("groups", [1, 4, 32])
def test_init_weights_keeps_the_backward_signal(groups: int) -> None:
    torch.manual_seed(0)
    layer = conv2d(32, 64, 3, groups=groups)
    before = nn.Linear(3, 4)
    kept = before.weight.clone()
    init_weights(nn.Sequential(layer, before))
    fan_out = 9 * 64 // groups  # outputs that one input reaches
    assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.1)
    assert layer.weight.mean().abs() < 0.2 * layer.weight.std()
    assert torch.equal(before.weight, kept)
