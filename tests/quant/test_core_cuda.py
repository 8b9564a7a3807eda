"""The Python core on a GPU gives what it gives on the CPU."""

import copy

import pytest
import torch
from torch import nn

from qzoo.quant import TensorQuantizer, calib, quantize_, tensor_quant
from qzoo.quant.tensor_quant import QuantDescriptor

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("shape", [(), (4, 1, 1)])
def test_fake_quantization_is_equal(dtype, narrow, shape):
    x = torch.randn(4, 5, 6).to(dtype)
    amax = torch.rand(shape) + 0.5
    expected = tensor_quant.fake_tensor_quant(x, amax, 8, False, narrow)
    assert torch.equal(
        tensor_quant.fake_tensor_quant(x.cuda(), amax.cuda(), 8, False, narrow).cpu(), expected
    )


def test_ranges_follow_the_data():
    quantizer = TensorQuantizer(QuantDescriptor(amax=1.0))
    x = torch.randn(8)
    expected = quantizer(x)
    assert torch.equal(quantizer(x.cuda()).cpu(), expected)
    assert quantizer.amax.is_cuda
    fresh = TensorQuantizer().cuda()
    fresh.load_state_dict(quantizer.state_dict())
    assert torch.equal(fresh(x.cuda()).cpu(), expected)


@pytest.mark.parametrize("method", ["max", "percentile", "mse", "entropy"])
def test_calibrators_are_equal(method):
    x = torch.randn(10_000)
    found = []
    for device in ("cpu", "cuda"):
        calibrator = calib.HistogramCalibrator(8, None, False)
        calibrator.collect(x.to(device))
        calibrator.collect(2 * x.to(device))
        amax = calibrator.compute_amax(method)
        assert amax.device.type == device
        found.append(amax.item())
    assert found[0] == found[1]


def test_a_model_trains():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    quantize_(model)
    other = copy.deepcopy(model).cuda()
    calib.calibrate_weights(model, "max")
    calib.calibrate_weights(other, "max")
    x = torch.randn(2, 3, 8, 8)
    model(x).sum().backward()
    other(x.cuda()).sum().backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(b.grad.cpu(), a.grad, rtol=1e-3, atol=1e-3)
