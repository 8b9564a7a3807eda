"""TensorQuantizer: stages, state, ranges, messages."""

import copy
import logging

import numpy as np
import pytest
import quant_oracle as oracle
import torch

from qzoo.errors import MissingRangeError, NonFiniteError
from qzoo.quant import calib
from qzoo.quant import tensor_quant as tq
from qzoo.quant.nn import Clip, TensorQuantizer
from qzoo.quant.tensor_quant import QuantDescriptor


def data(shape=(4, 3, 5, 5), seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# State


@pytest.mark.parametrize(
    ("desc", "keys"),
    [
        (QuantDescriptor(), []),
        (QuantDescriptor(amax=1.0), ["_amax"]),
        (QuantDescriptor(learn_amax=True), ["clip.clip_value_min", "clip.clip_value_max"]),
    ],
)
def test_state_dict_keys(desc, keys):
    quantizer = TensorQuantizer(desc)
    assert list(quantizer.state_dict()) == keys
    assert hasattr(quantizer, "_amax") == ("_amax" in keys)


def test_loading_creates_overwrites_and_reports(caplog):
    full = TensorQuantizer(QuantDescriptor(amax=2.0))
    full.pre_quant_scale = [0.5]
    empty = TensorQuantizer()
    empty.load_state_dict(full.state_dict())
    assert empty.amax.item() == 2.0
    assert empty.pre_quant_scale.tolist() == [0.5]
    other = TensorQuantizer(QuantDescriptor(amax=3.0))
    other.pre_quant_scale = [0.25]
    empty.load_state_dict(other.state_dict())
    assert empty.amax.item() == 3.0
    with pytest.raises(RuntimeError, match="Missing key"), caplog.at_level(logging.ERROR):
        full.load_state_dict({})
    assert "_amax" in caplog.text
    with pytest.raises(RuntimeError, match="size mismatch"):
        empty.load_state_dict({"_amax": torch.ones(3), "_pre_quant_scale": torch.ones(1)})


def test_amax_setter():
    quantizer = TensorQuantizer()
    assert quantizer.amax is None
    quantizer.amax = None
    assert quantizer.amax is None
    source = np.array([[1.0], [2.0]])
    quantizer.amax = source
    source[0] = 9
    assert quantizer.amax.tolist() == [[1.0], [2.0]]
    assert quantizer.amax.dtype == torch.float32
    with pytest.raises(RuntimeError, match="Changing shape when setting amax is not allowed"):
        quantizer.amax = 3.0
    quantizer.amax = [[4.0], [5.0]]
    assert quantizer.amax.tolist() == [[4.0], [5.0]]


def test_amax_from_a_tensor_is_copied_with_a_warning(caplog):
    quantizer = TensorQuantizer()
    source = torch.tensor(2.0)
    with caplog.at_level(logging.WARNING):
        quantizer.amax = source
    source.fill_(5)
    assert quantizer.amax.item() == 2.0
    assert "tensor" in caplog.text


def test_assigning_the_buffer_itself_sets_the_range():
    for quantizer in (TensorQuantizer(), TensorQuantizer(QuantDescriptor(amax=1.0))):
        quantizer._amax = torch.tensor(3.0, dtype=torch.float64)
        assert quantizer(torch.tensor([5.0])).item() == pytest.approx(3.0)
        assert list(quantizer.state_dict()) == ["_amax"]


def test_step_size_and_maxbound():
    quantizer = TensorQuantizer(QuantDescriptor(4, unsigned=True))
    assert quantizer.maxbound == 15
    assert quantizer.step_size is None
    quantizer.amax = 3.0
    assert quantizer.step_size.item() == pytest.approx(0.2)
    assert TensorQuantizer(QuantDescriptor((4, 3))).maxbound == 448.0


def test_half_keeps_the_range_in_float32():
    quantizer = TensorQuantizer(QuantDescriptor(amax=1.2345678)).half()
    assert quantizer.amax.dtype == torch.float32
    assert quantizer.amax.item() == np.float32(1.2345678)


# Forward


@pytest.mark.parametrize(
    ("desc", "shape"),
    [
        (QuantDescriptor(), ()),
        (QuantDescriptor(axis=1), (1, 3, 1, 1)),
        (QuantDescriptor(axis=-3), (1, 3, 1, 1)),
        (QuantDescriptor(axis=(0, 1)), (4, 3, 1, 1)),
        (QuantDescriptor(4, axis=(0, -3), narrow_range=True), (4, 3, 1, 1)),
    ],
)
def test_dynamic_range(desc, shape):
    x = data()
    quantizer = TensorQuantizer(desc)
    axes = tuple(d for d in range(4) if not shape or shape[d] == 1)
    amax = np.abs(x.numpy()).max(axes, keepdims=True)
    expected = oracle.fake_quantize(x.numpy(), amax, desc.num_bits, narrow=desc.narrow_range)
    np.testing.assert_array_equal(quantizer(x).numpy(), expected)
    assert tuple(quantizer._get_amax(x).shape) == shape
    assert quantizer.amax is None


def test_scale_amax_leaves_the_buffer_alone():
    x = data()
    quantizer = TensorQuantizer(QuantDescriptor(amax=1.0, scale_amax=0.5))
    np.testing.assert_array_equal(quantizer(x).numpy(), oracle.fake_quantize(x, 0.5, narrow=False))
    assert quantizer.amax.item() == 1.0


def test_real_quantization_returns_integers_and_keeps_the_scale():
    quantizer = TensorQuantizer(QuantDescriptor(amax=1.0, fake_quant=False))
    x = data()
    q, scale = tq.tensor_quant(x, torch.tensor(1.0), 8)
    assert torch.equal(quantizer(x), q)
    assert torch.equal(quantizer.scale, scale)


def test_fake_scale_is_one_and_logged(caplog):
    with caplog.at_level(logging.ERROR):
        assert TensorQuantizer().scale == 1.0
    assert "scale" in caplog.text


@pytest.mark.parametrize(
    ("kwargs", "name"), [({"num_bits": (4, 3)}, "e4m3"), ({"float_format": "e5m2"}, "e5m2")]
)
def test_floating_point_formats(kwargs, name):
    x = data()
    dtype, limit = {"e4m3": (torch.float8_e4m3fn, 448.0), "e5m2": (torch.float8_e5m2, 57344.0)}[name]
    scale = limit / x.abs().amax((0, 2, 3), keepdim=True)
    expected = (x * scale).clamp(-limit, limit).to(dtype).float() / scale
    quantizer = TensorQuantizer(QuantDescriptor(axis=1, **kwargs))
    torch.testing.assert_close(quantizer(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("fixed", [False, True])
def test_block_ranges(fixed):
    x = data((6, 8, 3, 3))
    quantizer = TensorQuantizer(QuantDescriptor(4, axis=0, block=(1, 4), narrow_range=True))
    if fixed:
        quantizer.enable_calib()
        quantizer.disable_quant()
        quantizer(x)
        quantizer.load_calib_amax()
        quantizer.enable_quant()
        assert tuple(quantizer.amax.shape) == (6, 2, 1, 1)
    amax = np.abs(x.numpy()).reshape(6, 2, 4, 9).max((2, 3))
    expected = oracle.fake_quantize(x.numpy(), amax.repeat(4, axis=1)[:, :, None, None], 4)
    np.testing.assert_array_equal(quantizer(x).numpy(), expected)


def test_block_that_does_not_divide():
    with pytest.raises(ValueError, match="blocks of 3"):
        TensorQuantizer(QuantDescriptor(4, axis=0, block=(1, 3)))(data((6, 8)))


def test_pre_quant_scale_comes_first_and_when_disabled():
    x = data()
    quantizer = TensorQuantizer(QuantDescriptor(amax=1.0), disabled=True)
    quantizer.pre_quant_scale = 0.5
    assert torch.equal(quantizer(x), x * 0.5)
    quantizer.enable()
    np.testing.assert_array_equal(quantizer(x).numpy(), oracle.fake_quantize(x * 0.5, 1.0, narrow=False))
    with pytest.raises(RuntimeError, match="Changing shape when setting pre_quant_scale is not allowed"):
        quantizer.pre_quant_scale = [1.0, 2.0]


def test_stages_off_return_the_input():
    x = data()
    assert TensorQuantizer(if_quant=False)(x) is x
    assert TensorQuantizer(disabled=True)(x) is x


def test_unsigned_refuses_negative_values_unless_the_author_stated_the_sign():
    quantizer = TensorQuantizer(QuantDescriptor(amax=1.0, unsigned=True))
    with pytest.raises(TypeError, match="Negative values encountered in unsigned quantization"):
        quantizer(torch.tensor([-0.5, 0.5]))
    quantizer.dynamic = False
    assert quantizer(torch.tensor([-0.5, 1.0])).tolist() == [0.0, 1.0]


def test_negative_range_is_refused_after_each_change():
    quantizer = TensorQuantizer(QuantDescriptor(amax=1.0))
    quantizer(data())
    quantizer.amax = -1.0
    with pytest.raises(ValueError, match="Negative values in amax"):
        quantizer(data())
    quantizer.amax = 1.0
    quantizer(data())
    quantizer.amax.fill_(-2.0)
    with pytest.raises(ValueError, match="Negative values in amax"):
        quantizer(data())


def test_negative_range_is_refused_where_memory_is_used_again():
    quantizer = TensorQuantizer(QuantDescriptor(amax=1.0))
    for _ in range(20):
        quantizer.amax = 1.0
        quantizer(data())
        quantizer.amax = 2.0
        quantizer.amax = -1.0  # may lie where the first one did
        with pytest.raises(ValueError, match="Negative values in amax"):
            quantizer(data())


def test_no_range_and_not_dynamic_names_the_module():
    quantizer = TensorQuantizer()
    quantizer.dynamic = False
    quantizer.name = "layer1.0.conv1._input_quantizer"
    with pytest.raises(MissingRangeError, match=r"layer1\.0\.conv1\._input_quantizer"):
        quantizer(data())
    quantizer.disable_quant()
    quantizer.enable_calib()
    quantizer(data())  # calibrating needs no range


def test_the_range_gets_no_gradient():
    x = data().requires_grad_()
    TensorQuantizer(QuantDescriptor(axis=0))(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


# Clip


def test_learned_range():
    quantizer = TensorQuantizer(QuantDescriptor(amax=1.0, learn_amax=True))
    assert isinstance(quantizer.clip, Clip)
    assert quantizer._if_clip
    x = torch.tensor([-2.0, -0.4, 0.3, 3.0], requires_grad=True)
    y = quantizer(x)
    np.testing.assert_array_equal(
        y.detach().numpy(), oracle.fake_quantize([-1, -0.4, 0.3, 1], 1.0, narrow=False)
    )
    y.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]
    assert quantizer.clip.clip_value_min.grad.item() == 1
    assert quantizer.clip.clip_value_max.grad.item() == 1


def test_init_learn_amax_takes_the_largest_channel():
    quantizer = TensorQuantizer(QuantDescriptor(learn_amax=True))
    assert quantizer.clip.clip_value_max.item() == 1.0
    quantizer.amax = [[1.0], [3.0]]
    quantizer.init_learn_amax()
    assert quantizer.clip.clip_value_min.item() == -3.0
    with pytest.raises(RuntimeError):
        TensorQuantizer().init_learn_amax()


def test_clip_needs_learn_amax_and_switches_gradients():
    with pytest.raises(ValueError, match=r"learn_amax is False\. Cannot enable clip"):
        TensorQuantizer(if_clip=True)
    with pytest.raises(ValueError, match=r"learn_amax is False\. Cannot enable clip"):
        TensorQuantizer().enable_clip()
    quantizer = TensorQuantizer(QuantDescriptor(learn_amax=True))
    quantizer.disable_clip()
    assert not quantizer.clip.clip_value_min.requires_grad
    quantizer.enable_clip()
    assert quantizer.clip.clip_value_max.requires_grad


# Calibration


def test_calibrators():
    assert isinstance(TensorQuantizer()._calibrator, calib.MaxCalibrator)
    histogram = TensorQuantizer(QuantDescriptor(calib_method="histogram"))
    assert isinstance(histogram._calibrator, calib.HistogramCalibrator)
    for desc in ({"axis": 0}, {"block": (1, 4)}):
        with pytest.raises(NotImplementedError):
            TensorQuantizer(QuantDescriptor(calib_method="histogram", **desc))


def test_load_calib_amax():
    quantizer = TensorQuantizer(QuantDescriptor(calib_method="histogram"), if_quant=False, if_calib=True)
    x = data()
    assert quantizer(x) is x
    quantizer.load_calib_amax("percentile", percentile=50)
    low = quantizer.amax.item()
    quantizer.load_calib_amax("max")
    assert low < quantizer.amax.item() == x.abs().max().item()


def test_load_without_data(caplog):
    quantizer = TensorQuantizer()
    with pytest.raises(RuntimeError, match="Calibrator returned None"):
        quantizer.load_calib_amax()
    with caplog.at_level(logging.WARNING):
        quantizer.load_calib_amax(strict=False)
    assert torch.isnan(quantizer.amax)
    assert caplog.records


def test_without_calibrator():
    quantizer = TensorQuantizer()
    quantizer._calibrator = None
    with pytest.raises(ValueError, match="Calibrator was not created"):
        quantizer.enable_calib()
    with pytest.raises(RuntimeError, match="Calibrator not created"):
        quantizer.load_calib_amax()
    assert "calibrator" not in repr(quantizer)


@pytest.mark.parametrize("method", ["max", "histogram"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_data_names_the_module(method, bad):
    quantizer = TensorQuantizer(QuantDescriptor(calib_method=method), if_quant=False, if_calib=True)
    quantizer.name = "stem._input_quantizer"
    quantizer(torch.ones(3))
    with pytest.raises(NonFiniteError, match=r"stem\._input_quantizer"):
        quantizer(torch.tensor([1.0, bad]))
    quantizer.load_calib_amax("max")
    assert quantizer.amax.item() == 1.0


def test_calibrating_in_inference_mode_then_training():
    quantizer = TensorQuantizer(if_calib=True)
    with torch.inference_mode():
        quantizer(data())
        quantizer.load_calib_amax()
    x = data().requires_grad_()
    quantizer(x).sum().backward()
    assert x.grad is not None


# Text


@pytest.mark.parametrize(
    ("quantizer", "text"),
    [
        (TensorQuantizer(), "8bit fake per-tensor amax=dynamic calibrator=MaxCalibrator scale=1.0 quant"),
        (TensorQuantizer(disabled=True), "disabled"),
        (
            TensorQuantizer(QuantDescriptor(4, unsigned=True, axis=0, amax=[1.0, 2.0], scale_amax=0.5)),
            "unsigned 4bit fake axis=0 amax=[1.0000, 2.0000](2) *0.5 "
            "calibrator=MaxCalibrator scale=1.0 quant",
        ),
        (
            TensorQuantizer(QuantDescriptor(amax=1.5, narrow_range=True, learn_amax=True), if_calib=True),
            "8bit narrow fake per-tensor amax=1.5000 learned "
            "calibrator=MaxCalibrator scale=1.0 quant clip calib",
        ),
    ],
)
def test_repr(quantizer, text):
    assert repr(quantizer) == f"TensorQuantizer({text})"


def test_copies_do_not_share_ranges():
    quantizer = TensorQuantizer(QuantDescriptor(amax=1.0))
    other = copy.deepcopy(quantizer)
    other.amax = 2.0
    assert quantizer.amax.item() == 1.0
