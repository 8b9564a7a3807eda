"""reduce_amax, logging, optimizer helpers, the names of the old extension."""

import logging

import numpy as np
import pytest
import quant_oracle as oracle
import torch
from torch import nn

from qzoo.quant import cuda_ext, quantize_, utils
from qzoo.quant import nn as qnn
from qzoo.quant.optim import helper
from qzoo.quant.tensor_quant import fake_tensor_quant


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int32])
@pytest.mark.parametrize("keepdims", [True, False])
@pytest.mark.parametrize("axis", [None, 0, 2, -1, (0, 1), [1, -1], (0, 1, 2), ()])
def test_reduce_amax_equals_numpy(axis, keepdims, dtype):
    x = (torch.randn(3, 1, 5) * 10).to(dtype)
    found = utils.reduce_amax(x, axis, keepdims)
    expected = np.abs(x.numpy())
    if axis is None:
        expected = expected.max()
    elif axis != ():
        expected = expected.max(tuple(axis) if isinstance(axis, list) else axis, keepdims=keepdims)
    if isinstance(axis, tuple) and axis and np.size(expected) == 1:
        expected = expected.reshape(())
    assert found.dtype == dtype
    assert found.shape == np.shape(expected)
    np.testing.assert_array_equal(found.numpy(), expected)


def test_reduce_amax_refuses_too_many_axes():
    with pytest.raises(ValueError, match="axes"):
        utils.reduce_amax(torch.ones(2), (0, 1))
    with pytest.raises(ValueError, match="out of range"):
        utils.reduce_amax(torch.ones(2), 1)


def test_reduce_amax_has_no_gradient_and_one_channel_is_zero_dimensional():
    assert not utils.reduce_amax(torch.ones(2, requires_grad=True)).requires_grad
    assert utils.reduce_amax(torch.ones(1, 3, 3), (1, 2)).dim() == 0


def test_reset_logger_handler(monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [logging.NullHandler(), logging.NullHandler()])
    utils.quant_logging.reset_logger_handler()
    assert logging.root.handlers == []


def test_match_and_freeze():
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(3, 2)})
    assert list(helper.match_parameters(model, [r"^a\."])) == list(model["a"].parameters())
    assert len(list(helper.match_parameters(model, [r"^a\.", "weight"]))) == 4
    helper.freeze_parameters(model, [r"\.bias$"])
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, False]


def test_groups_are_ready_for_an_optimizer():
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(3, 2)})
    groups = helper.group_parameters(model, [[r"^a\."], [r"^b\."]], [0.1, 0.2], [0.9, 0.8], [0.0, 1e-4])
    optimizer = torch.optim.SGD(groups, lr=1.0)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.2]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 1e-4]
    assert helper.group_parameters(model, [["a"]])[0].keys() == {"params"}


@pytest.mark.parametrize("key", ["lrs", "momentums", "weight_decays"])
def test_group_refusals_come_before_the_model_is_looked_at(key):
    with pytest.raises(TypeError, match="must be list of list of patterns"):
        helper.group_parameters(None, ["a", "b"])
    with pytest.raises(TypeError, match="must match"):
        helper.group_parameters(None, [["a"], ["b"]], **{key: [1.0]})


def test_quant_weight_inplace():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.ConvTranspose1d(2, 3, 3))
    quantize_(model)
    expected = [m.weight_quantizer(m.weight).detach().clone() for m in (model[0], model[2])]
    helper.quant_weight_inplace(model)
    assert torch.equal(model[0].weight, expected[0])
    assert torch.equal(model[2].weight, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("unsigned", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 5, 7, 8, 11])
def test_the_extension_agrees_bit_for_bit(bits, unsigned, dtype):
    x = torch.randn(4, 6, 3)
    x = (x.abs() if unsigned else x).to(dtype)
    amax = torch.tensor(1.5)
    expected = fake_tensor_quant(x, amax, bits, unsigned)
    assert torch.equal(cuda_ext.fake_tensor_quant(x, amax, num_bits=bits, unsigned=unsigned), expected)
    y = x.clone()
    assert cuda_ext.fake_tensor_quant_(y, amax, bits, unsigned) is None
    assert torch.equal(y, expected)
    channels = torch.linspace(0.5, 2, 6)
    found = cuda_ext.fake_tensor_quant_with_axis(x, channels, 1, bits, unsigned)
    assert torch.equal(found, fake_tensor_quant(x, channels[:, None], bits, unsigned))


def test_the_extension_rounds_to_e4m3():
    x = torch.randn(50) * 100
    np.testing.assert_array_equal(cuda_ext.fake_e4m3fy(x).numpy(), oracle.nearest_e4m3(x.numpy()))


def test_names_of_the_package():
    import qzoo.quant as P

    for name in ("initialize", "deactivate", "enable_onnx_export", "__version__", "nn", "calib", "utils"):
        assert hasattr(P, name)
    assert P.nn.modules.tensor_quantizer.TensorQuantizer is qnn.TensorQuantizer
    assert P.nn._functions.quant_rnn.LSTMCell
    assert P.calib.max.MaxCalibrator is P.calib.MaxCalibrator
    assert P.calib.calibrator._Calibrator
    assert P.quant_modules.initialize is P.initialize
    assert P.tensor_quant.QuantDescriptor is P.QuantDescriptor
