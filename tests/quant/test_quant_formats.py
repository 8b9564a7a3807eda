"""Every number format at every granularity, from the descriptor through calibration to a stored weight."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from qzoo.quant import TensorQuantizer, calib, ops, quantize_
from qzoo.quant import block as blocks
from qzoo.quant import nn as qnn
from qzoo.quant.tensor_quant import QuantDescriptor
from qzoo.zoo import packing

INTEGERS = [2, 3, 4, 5, 6, 7, 8, 16]
FLOATS = {"e4m3": (torch.float8_e4m3fn, 448.0), "e5m2": (torch.float8_e5m2, 57344.0)}
FORMATS = [*INTEGERS, *FLOATS]
# axis, block, shape of the range of a weight [6, 64]
GRANULARITIES = {
    "per tensor": (None, None, ()),
    "per channel": (0, None, (6, 1)),
    "several axes": ((0, 1), None, (6, 64)),
    "blocks": (0, (1, 16), (6, 4)),
    "blocks alone": (None, (-1, 32), (1, 2)),
}


def descriptor(fmt, axis=None, block=None, **more):
    if isinstance(fmt, str):
        return QuantDescriptor(float_format=fmt, axis=axis, block=block, **more)
    return QuantDescriptor(fmt, axis=axis, block=block, **more)


def wide(amax, shape):
    """The range of a weight `[6, 64]` repeated for each of its elements, in NumPy."""
    a = amax.numpy()
    if a.ndim == 2 and a.shape[1] not in (1, 64):
        a = a.repeat(64 // a.shape[1], axis=1)
    return np.broadcast_to(a, shape)


def expected(x, amax, fmt, unsigned=False, narrow=False):
    a = wide(amax, x.shape).astype(np.float32)
    if isinstance(fmt, str):
        kind, limit = FLOATS[fmt]
        scale = np.float32(limit) / a
        scaled = torch.from_numpy(np.clip(x.numpy() * scale, -limit, limit))
        return torch.from_numpy(scaled.to(kind).float().numpy() / scale)
    high = np.float32(2 ** (fmt - 1 + unsigned) - 1)
    low = np.float32(0) if unsigned else -high if narrow else -high - 1
    scale = high / a
    return torch.from_numpy(np.clip(np.rint(x.numpy() * scale), low, high) / scale)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_layer_calibrates_trains_and_is_saved(fmt, granularity):
    axis, block, shape = GRANULARITIES[granularity]
    torch.manual_seed(0)
    layer = qnn.QuantLinear(64, 6, quant_desc_weight=descriptor(fmt, axis, block, narrow_range=True))
    quantizer = layer.weight_quantizer
    fresh = copy.deepcopy(layer)
    layer.input_quantizer.disable()
    quantizer.enable_calib()
    layer(torch.zeros(1, 64))
    quantizer.disable_calib()
    quantizer.load_calib_amax()
    assert quantizer.amax.shape == shape
    with torch.no_grad():
        quantizer.amax.mul_(0.7)
    weight = layer.weight.detach()
    wanted = expected(weight, quantizer.amax, fmt, narrow=True)
    assert torch.equal(quantizer(weight), wanted)
    x = torch.randn(3, 64)
    y = layer(x)
    assert torch.equal(y, nn.functional.linear(x, wanted, layer.bias))
    y.sum().backward()
    inside = torch.from_numpy(np.abs(weight.numpy()) <= wide(quantizer.amax, weight.shape))
    assert torch.equal(layer.weight.grad, torch.where(inside, x.sum(0).expand(6, 64), 0.0))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file))
    fresh.input_quantizer.disable()
    assert torch.equal(fresh(x), y)


@pytest.mark.parametrize("bits", INTEGERS)
@pytest.mark.parametrize("unsigned", [False, True])
def test_integers_of_an_activation(bits, unsigned):
    x = torch.randn(5, 64).abs() if unsigned else torch.randn(5, 64)
    quantizer = TensorQuantizer(descriptor(bits, amax=1.5, unsigned=unsigned))
    assert torch.equal(quantizer(x), expected(x, torch.tensor(1.5), bits, unsigned))
    assert len(torch.unique(quantizer(torch.linspace(-3 * (not unsigned), 3, 10**5)))) <= 2**bits
    assert quantizer.maxbound == 2 ** (bits - 1 + unsigned) - 1


@pytest.mark.parametrize("method", ["max", "percentile", "mse"])
@pytest.mark.parametrize("fmt", [4, 16, "e4m3", "e5m2"], ids=str)
@pytest.mark.parametrize("granularity", ["per channel", "blocks"])
def test_calibrate_weights_in_every_format(fmt, granularity, method):
    axis, block, shape = GRANULARITIES[granularity]
    layer = qnn.QuantLinear(64, 6, quant_desc_weight=descriptor(fmt, axis, block))
    calib.calibrate_weights(layer, method)
    amax = layer.weight_quantizer.amax
    largest = np.abs(layer.weight.detach().numpy()).reshape(6, -1, 16 if block else 64).max(-1)
    assert amax.shape == shape
    assert (amax.numpy() <= largest.reshape(shape)).all()
    assert (amax > 0).all()
    if method == "max":
        assert np.array_equal(amax.numpy(), largest.reshape(shape))


def test_blocks_of_a_convolution_along_its_input_channels():
    layer = qnn.QuantConv2d(32, 4, 3, quant_desc_weight=QuantDescriptor(4, axis=0, block=(1, 8)))
    calib.calibrate_weights(layer, "max")
    assert layer.weight_quantizer.amax.shape == (4, 4, 1, 1)
    grouped = layer.weight.detach().numpy().reshape(4, 4, 8, 3, 3)
    scale = np.float32(7) / np.abs(grouped).max(axis=(2, 3, 4), keepdims=True)
    wanted = (np.clip(np.rint(grouped * scale), -8, 7) / scale).reshape(4, 32, 3, 3)
    assert np.array_equal(layer.weight_quantizer(layer.weight).detach().numpy(), wanted)


def test_int4_blocks_are_stored_in_half_a_byte_a_value():
    layer = qnn.QuantLinear(64, 6, quant_desc_weight=QuantDescriptor(4, axis=0, block=(1, 16)))
    calib.calibrate_weights(layer, "max")
    quantizer = layer.weight_quantizer
    grouped = blocks.split(layer.weight.detach(), quantizer.block)
    amax = blocks.spread(quantizer.amax, quantizer.block, 2)
    packed = ops.quantize_int4(grouped, amax, narrow_range=False)
    assert packed.numel() == 6 * 64 // 2
    restored = ops.dequantize_int4(packed, amax, grouped.shape).reshape(6, 64)
    assert torch.equal(restored, quantizer(layer.weight).detach() + 0.0)


@pytest.mark.parametrize("block", [None, (1, 16)])
def test_real_quantization_gives_the_integers(block):
    quantizer = TensorQuantizer(QuantDescriptor(4, axis=0, block=block, fake_quant=False))
    x = torch.randn(6, 64)
    q = quantizer(x)
    assert q.shape == x.shape
    groups = np.abs(x.numpy().reshape(6, -1, 16 if block else 64))
    scale = np.float32(7) / groups.max(-1, keepdims=True)
    assert np.array_equal(q.numpy().reshape(groups.shape), np.rint(x.numpy().reshape(groups.shape) * scale))
    assert quantizer.scale.numel() == scale.size


def test_real_quantization_to_floating_point_is_refused():
    with pytest.raises(ValueError, match="fake_quant"):
        TensorQuantizer(QuantDescriptor((4, 3), fake_quant=False))


@pytest.mark.parametrize("fmt", [5, 16, "e4m3", "e5m2"], ids=str)
def test_mse_takes_the_range_that_loses_least(fmt):
    x = torch.randn(2000)
    desc = descriptor(fmt)
    calibrator = calib.HistogramCalibrator(desc.num_bits, None, False, num_bins=64)
    calibrator.collect(x)
    found = calibrator.compute_amax("mse", start_bin=8)
    edges = calibrator._calib_bin_edges
    centers = (edges[1:] + edges[:-1]) / 2
    counts = calibrator._calib_hist.double()
    costs = [
        float(((expected(centers, amax, fmt, narrow=True) - centers).double().square() * counts).sum())
        for amax in centers[8:]
    ]
    assert found == centers[8 + int(np.argmin(costs))]


@pytest.mark.parametrize("bits", [2, 4, 8, 10, 16])
@pytest.mark.parametrize("block", [None, (1, 16)])
def test_stored_weights_come_back(bits, block):
    layer = qnn.QuantLinear(
        64, 6, quant_desc_weight=QuantDescriptor(bits, axis=0, block=block, narrow_range=True)
    )
    calib.calibrate_weights(layer, "max")
    quantizer = layer.weight_quantizer
    packed = packing.pack_weight(layer.weight, quantizer)
    assert packed.element_size() * packed.numel() == 6 * 64 * (0.5 if bits <= 4 else 1 if bits <= 8 else 2)
    back = packing.unpack_weight(packed, layer.weight.shape, quantizer.amax, bits, block)
    assert torch.equal(back, quantizer(layer.weight).detach() + 0.0)


def test_a_model_in_place_with_int4_blocks_and_16_bit_activations():
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    quantize_(
        model,
        quant_desc_input=QuantDescriptor(16),
        quant_desc_weight=QuantDescriptor(4, axis=0, block=(1, 32)),
    )
    calib.calibrate_weights(model, "mse")
    x = torch.randn(8, 64)
    before = model(x)
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), before)
    assert model[0].weight_quantizer.amax.shape == (32, 2)
