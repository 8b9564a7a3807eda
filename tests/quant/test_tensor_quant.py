"""tensor_quant and its siblings against NumPy."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import quant_oracle as oracle
import torch

from qzoo.errors import QuantizationError
from qzoo.quant import calib, ops
from qzoo.quant import tensor_quant as tq
from qzoo.quant.nn import TensorQuantizer
from qzoo.quant.utils import reduce_amax

BITS = [2, 3, 4, 5, 7, 8, 11, 16]
LOW_PRECISION = [torch.float16, torch.bfloat16]


def data(unsigned, shape=(5, 4, 3, 3), seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.abs() if unsigned else x


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("unsigned", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(), (5, 1, 1, 1), (5, 4, 1, 1)])
def test_fake_quantization_equals_numpy(bits, unsigned, narrow, shape):
    x = data(unsigned)
    amax = torch.full(shape, 1.7) if shape else torch.tensor(1.7)
    amax = amax * torch.linspace(0.5, 1, amax.numel()).reshape(shape)
    y = tq.fake_tensor_quant(x, amax, bits, unsigned, narrow)
    np.testing.assert_array_equal(y.numpy(), oracle.fake_quantize(x, amax, bits, unsigned, narrow))


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision_is_computed_in_float32(dtype):
    x = data(False).to(dtype)
    y = tq.fake_tensor_quant(x, torch.tensor(1.3), 8)
    assert y.dtype == dtype
    expected = torch.from_numpy(oracle.fake_quantize(x.float().numpy(), 1.3)).to(dtype)
    assert torch.equal(y, expected)


def test_float64_stays_float64_and_the_input_is_not_modified():
    x = data(False).double()
    before = x.clone()
    y = tq.fake_tensor_quant(x, x.abs().max())
    assert y.dtype == torch.float64
    assert torch.equal(x, before)


def test_non_contiguous_input():
    x = data(False).transpose(0, 2)
    expected = oracle.fake_quantize(x.numpy(), 1.1)
    np.testing.assert_array_equal(tq.fake_tensor_quant(x, torch.tensor(1.1)).numpy(), expected)


def test_integers_and_scale():
    x = data(False)
    q, scale = tq.tensor_quant(x, torch.tensor(2.0), 8)
    np.testing.assert_array_equal(q.numpy(), np.clip(np.round(x.numpy() * np.float32(63.5)), -127, 127))
    assert scale.item() == 63.5
    assert torch.equal(q / scale, tq.fake_tensor_quant(x, torch.tensor(2.0), 8))


def test_full_range_reaches_the_lowest_integer():
    x = torch.tensor([-2.0, 2.0])
    q, _ = tq.tensor_quant(x, torch.tensor(1.0), 8, False, False)
    assert q.tolist() == [-128.0, 127.0]


def test_tiny_ranges_give_zeros_and_scale_one():
    amax = torch.tensor([[2.0**-24], [1.0]])
    x = torch.full((2, 3), 0.5)
    q, scale = tq.tensor_quant(x, amax)
    assert q[0].tolist() == [0, 0, 0]
    assert scale.flatten().tolist() == [1.0, 127.0]
    y = tq.fake_tensor_quant(x, amax)
    assert torch.isfinite(y).all()
    assert not y[0].any()


def test_nan_in_input_or_range_gives_nan():
    x = torch.tensor([1.0, float("nan")])
    assert torch.isnan(tq.fake_tensor_quant(x, torch.tensor(1.0))).tolist() == [False, True]
    assert torch.isnan(tq.fake_tensor_quant(x, torch.tensor(float("nan")))).all()


@pytest.mark.parametrize("function", [tq.tensor_quant, tq.fake_tensor_quant, tq.legacy_fake_tensor_quant])
def test_refusals(function):
    x = torch.tensor([-1.0, 1.0])
    with pytest.raises(ValueError, match="Negative values in amax"):
        function(x, torch.tensor([1.0, -1.0]))
    with pytest.raises(TypeError, match="Negative values encountered in unsigned quantization"):
        function(x, torch.tensor(1.0), 8, True)


def test_scale_beyond_float16_is_refused():
    with pytest.raises(ValueError, match="scale is too large for FP16"):
        tq.tensor_quant(torch.ones(2, dtype=torch.float16), torch.tensor(1e-4))


def test_tiny_float16_ranges_stay_finite():
    x = torch.linspace(-1, 1, 7).half() * 1e-3
    y = tq.fake_tensor_quant(x, torch.tensor(1e-3), 8)
    assert torch.isfinite(y).all()
    assert (y - x).abs().max() < 1e-5


@pytest.mark.parametrize("narrow", [True, False])
def test_gradient_passes_up_to_and_including_the_range(narrow):
    x = torch.tensor([-1.5, -1.0, 0.3, 1.0, 1.5], requires_grad=True)
    amax = torch.tensor(1.0, requires_grad=True)
    tq.fake_tensor_quant(x, amax, 8, False, narrow).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    assert amax.grad is None


def test_gradient_of_the_integers():
    x = torch.tensor([-1.5, 0.3, 1.5], requires_grad=True)
    q, scale = tq.tensor_quant(x, torch.tensor(1.0))
    q.backward(torch.tensor([2.0, 3.0, 4.0]))
    assert x.grad.tolist() == [0, 3, 0]
    assert not scale.requires_grad


def test_arguments_by_name():
    x = data(True)
    a = tq.fake_tensor_quant(x, torch.tensor(1.0), 4, True, False)
    b = tq.fake_tensor_quant(inputs=x, amax=torch.tensor(1.0), num_bits=4, unsigned=True, narrow_range=False)
    assert torch.equal(a, b)


def test_legacy_is_the_same_bit_for_bit():
    x = data(False)
    amax = torch.tensor(1.234)
    assert torch.equal(tq.legacy_fake_tensor_quant(x, amax), tq.fake_tensor_quant(x, amax))


def test_affine_equals_the_definition():
    x = data(False).double()
    low, high = torch.tensor(-0.7), torch.tensor(1.9)
    step = (np.float64(high) - np.float64(low)) / 255
    zero = np.round(np.float64(low) / step) + 128
    q = np.clip(np.round(x.numpy() / step) - zero, -128, 127)
    y = tq.fake_affine_tensor_quant(x, low, high, 8)
    np.testing.assert_allclose(y.numpy(), (q + zero) * step, rtol=1e-6, atol=1e-7)


def test_affine_gradient():
    x = torch.tensor([-1.0, -0.5, 0.0, 2.0, 2.1], requires_grad=True)
    tq.fake_affine_tensor_quant(x, torch.tensor(-0.5), torch.tensor(2.0)).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


def test_e4m3_equals_the_nearest_value_of_the_format():
    x = torch.cat([data(False).flatten() * 100, torch.tensor([500.0, -1e6, 2.0**-9, 2.0**-10, 17.0, 19.0])])
    np.testing.assert_array_equal(tq.scaled_e4m3(x).numpy(), oracle.nearest_e4m3(x.numpy()))


def test_e4m3_with_a_range_and_non_contiguous():
    x = data(False).transpose(0, 1)
    amax = x.abs().max()
    scale = np.float32(448) / np.float32(amax)
    expected = oracle.nearest_e4m3((x.numpy() * scale).astype(np.float32)).astype(np.float32) / scale
    np.testing.assert_allclose(tq.scaled_e4m3(x, amax).numpy(), expected, rtol=1e-6)


def test_e4m3_refuses_other_formats():
    with pytest.raises(NotImplementedError):
        tq.scaled_e4m3(torch.ones(2), None, 5, 2)


def test_e4m3_gradient():
    x = torch.tensor([-500.0, -448.0, 1.0, 448.0, 500.0], requires_grad=True)
    tq.scaled_e4m3(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    x.grad = None
    tq.scaled_e4m3(x, torch.tensor(2.0)).sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 0, 0]


ARRAY = np.ones((2, 3), dtype=np.float32)
BYTES = torch.ones(2, 3, dtype=torch.uint8)
ONE = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ops.fake_quantize(ARRAY, ONE), r"the input must be a torch tensor, not ndarray.*from_numpy"),
        (lambda: ops.fake_quantize(BYTES, ONE), r"the input must be float32, .* not torch\.uint8"),
        (lambda: ops.fake_quantize(BYTES.float(), 1.0), r"amax must be a torch tensor, not float"),
        (lambda: ops.fake_quantize(BYTES.float(), ONE, 99), r"num_bits must be .* 0 to 31, not 99"),
        (lambda: ops.fake_quantize(BYTES.float(), ONE, "8"), r"num_bits must be .* not '8'"),
        (lambda: ops.quantize(BYTES, ONE), r"not torch\.uint8"),
        (lambda: ops.fake_quantize_fp8(BYTES, ONE), r"not torch\.uint8"),
        (lambda: ops.quantize_int4(BYTES, ONE), r"not torch\.uint8"),
        (lambda: ops.dequantize(BYTES.float(), ONE), r"the integers must be int8, .* not torch\.float32"),
        (
            lambda: ops.fake_quantize_learned_backward(BYTES, BYTES, ONE, 8, False, True, True),
            r"not torch\.uint8",
        ),
        (lambda: ops.fake_quantize_fp8(ARRAY, ONE), r"not ndarray"),
        (lambda: tq.fake_tensor_quant(ARRAY, ONE), r"not ndarray"),
        (lambda: tq.fake_tensor_quant(BYTES.float(), 1.0), r"amax must be a torch tensor"),
        (lambda: tq.tensor_quant(ARRAY, ONE), r"not ndarray"),
        (lambda: tq.scaled_e4m3(BYTES.float(), 1.0, 4, 3), r"amax must be a torch tensor"),
        (lambda: tq.fake_affine_tensor_quant(BYTES.float(), -1.0, 1.0), r"min_range must be a torch"),
        (
            lambda: TensorQuantizer()(ARRAY),
            r"input of TensorQuantizer \(no name set\) must be a torch tensor",
        ),
        (lambda: TensorQuantizer()(BYTES), r"input of TensorQuantizer .* not torch\.uint8"),
        (lambda: reduce_amax(ARRAY), r"not ndarray"),
        (
            lambda: calib.MaxCalibrator(8, None, False).collect(ARRAY),
            r"calibration data must be a torch tensor",
        ),
        (lambda: calib.HistogramCalibrator(8, None, False).collect(ARRAY), r"calibration data must be"),
    ],
)
def test_arguments_of_another_type_are_refused_in_one_line(call: Callable[[], Any], words: str) -> None:
    """Not by a line of a kernel's source, or an attribute that an array has not."""
    with pytest.raises(QuantizationError, match=words) as caught:
        call()
    assert "csrc" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "function", "arguments"),
    [
        ("tensor_quant", "TensorQuantFunction", "inputs amax num_bits unsigned narrow_range"),
        ("fake_tensor_quant", "FakeTensorQuantFunction", "inputs amax num_bits unsigned narrow_range"),
        (
            "legacy_fake_tensor_quant",
            "LegacyFakeTensorQuantFunction",
            "inputs amax num_bits unsigned narrow_range",
        ),
        ("fake_affine_tensor_quant", "FakeAffineTensorQuantFunction", "inputs min_range max_range num_bits"),
        ("scaled_e4m3", "ScaledE4M3Function", "inputs amax E M"),
    ],
)
def test_functions_show_their_arguments_and_take_them_by_name(
    name: str, function: str, arguments: str
) -> None:
    call, apply = getattr(tq, name), getattr(tq, function).apply
    shown = inspect.signature(call).parameters
    own = inspect.signature(getattr(tq, function).forward).parameters
    assert list(shown) == arguments.split()
    assert [p.default for p in shown.values()] == [p.default for p in own.values()][1:]  # after ctx
    values = {"inputs": torch.randn(3, 4), "amax": torch.tensor(1.7)}
    values |= {"min_range": torch.tensor(-1.0), "max_range": torch.tensor(2.0)}
    given = {key: value for key, value in values.items() if key in shown}
    torch.testing.assert_close(call(**given), apply(*given.values()), rtol=0, atol=0)
