"""Quantized layers: torch's own operation on quantized operands."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qzoo.quant import nn as qnn
from qzoo.quant.nn.modules import _utils, quant_conv
from qzoo.quant.tensor_quant import QuantDescriptor, fake_tensor_quant

CONVS = [("Conv", n) for n in (1, 2, 3)] + [("ConvTranspose", n) for n in (1, 2, 3)]
OPTIONS = [
    {},
    {"stride": 2, "padding": 1, "bias": False},
    {"groups": 2, "dilation": 2},
    {"padding": "same"},
    {"padding": "valid"},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": 1, "padding_mode": "replicate"},
    {"padding": 1, "padding_mode": "circular"},
]

# Torch's transposed convolutions pad with zeros and by number only: the first three.
CASES = [(kind, n, o) for kind, n in CONVS for o in (OPTIONS if kind == "Conv" else OPTIONS[:3])]


def pair(name, *args, **kwargs):
    """A quantized and a float layer made under the same seed."""
    torch.manual_seed(7)
    quantized = getattr(qnn, f"Quant{name}")(*args, **kwargs)
    torch.manual_seed(7)
    return quantized, getattr(nn, name)(*args, **kwargs)


def by_hand(x, axis=None):
    dims = [d for d in range(x.dim()) if d != axis]
    amax = x.detach().abs().amax(dims, keepdim=axis is not None)
    return fake_tensor_quant(x, amax, 8, False, False)


@pytest.mark.parametrize(("kind", "n", "options"), CASES, ids=str)
def test_convolutions(kind, n, options):
    transposed = kind == "ConvTranspose"
    quantized, plain = pair(f"{kind}{n}d", 4, 6, 3, **options)
    x = torch.randn(2, 4, *(7,) * n)
    assert torch.equal(quantized.weight, plain.weight)
    with torch.no_grad():
        expected = plain(x)
        quantized._input_quantizer.disable()
        quantized._weight_quantizer.disable()
        assert torch.equal(quantized(x), expected)
        quantized._input_quantizer.enable()
        quantized._weight_quantizer.enable()
        plain.weight.copy_(by_hand(plain.weight, 1 if transposed else 0))
        assert torch.equal(quantized(x), plain(by_hand(x)))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_transposed_output_size_with_dilation(n):
    quantized, plain = pair(f"ConvTranspose{n}d", 2, 3, 3, stride=3, dilation=2)
    quantized._input_quantizer.disable()
    quantized._weight_quantizer.disable()
    x = torch.randn(1, 2, *(4,) * n)
    size = [s + 1 for s in plain(x).shape[2:]]
    assert torch.equal(quantized(x, size), plain(x, size))


def test_class_relations_and_aliases():
    assert not issubclass(qnn.QuantConv2d, nn.Conv2d)
    assert issubclass(qnn.QuantConv2d, nn.modules.conv._ConvNd)
    assert issubclass(qnn.QuantLinear, nn.Linear)
    assert quant_conv._ConvNd is quant_conv._QuantConvNd
    for name in ("Conv1d", "Conv3d", "ConvTranspose2d", "Linear", "MaxPool2d", "AdaptiveAvgPool3d"):
        assert getattr(qnn, name) is getattr(qnn, f"Quant{name}")


@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5)])
def test_linear_of_any_rank(shape):
    quantized, plain = pair("Linear", 5, 4)
    x = torch.randn(shape)
    expected = F.linear(by_hand(x), by_hand(plain.weight, 0), plain.bias)
    assert torch.equal(quantized(x), expected)


def test_states_are_interchangeable():
    for name, args in (("Conv2d", (3, 4, 3)), ("Linear", (3, 4)), ("LSTM", (3, 4, 2))):
        quantized, plain = pair(name, *args)
        assert list(quantized.state_dict()) == list(plain.state_dict())
        quantized.load_state_dict(plain.state_dict())
        plain.load_state_dict(quantized.state_dict())


POOLS = [
    ("MaxPool{}d", {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1, "ceil_mode": True}),
    ("AvgPool{}d", {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False}),
    ("AdaptiveAvgPool{}d", {"output_size": 2}),
    ("InstanceNorm{}d", {"num_features": 3}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(("name", "options"), POOLS)
def test_pooling_and_instance_norm(name, options, n, dtype):
    quantized, plain = pair(name.format(n), **options)
    x = torch.randn(2, 3, *(6,) * n, dtype=dtype)
    assert isinstance(quantized, type(plain))
    assert torch.equal(quantized(x), plain(by_hand(x)))


def test_descriptor_with_several_axes():
    pool = qnn.QuantMaxPool2d(2, quant_desc_input=QuantDescriptor(axis=(0, 1)))
    x = torch.randn(2, 3, 4, 4)
    amax = x.abs().amax((2, 3), keepdim=True)
    assert torch.equal(pool(x), F.max_pool2d(fake_tensor_quant(x, amax, 8, False, False), 2))


def test_max_pool_returns_indices():
    x = torch.randn(1, 2, 4, 4)
    y, indices = qnn.QuantMaxPool2d(2, return_indices=True)(x)
    assert y.shape == indices.shape == (1, 2, 2, 2)


# Mixins


def test_defaults_belong_to_one_class():
    class Mine(qnn.QuantConv2d):
        pass

    before = qnn.QuantConv2d.default_quant_desc_input
    Mine.set_default_quant_desc_input(QuantDescriptor(4))
    Mine.set_default_quant_desc_weight(QuantDescriptor(3, axis=0))
    assert qnn.QuantConv2d.default_quant_desc_input is before
    layer = Mine(2, 3, 1)
    assert (layer.input_quantizer.num_bits, layer.weight_quantizer.num_bits) == (4, 3)
    with pytest.raises(ValueError, match="QuantDescriptor"):
        Mine.set_default_quant_desc_input(8)


def test_refusals():
    with pytest.raises(TypeError, match="Unused keys"):
        qnn.QuantConv2d(3, 4, 3, colour="red")
    with pytest.raises(ValueError, match="Only fake quantization is supported"):
        qnn.QuantLinear(3, 4, quant_desc_input=QuantDescriptor(fake_quant=False))
    with pytest.raises(TypeError, match="__init__"):
        qnn.QuantLinear(3, 4).init_quantizer(QuantDescriptor(), QuantDescriptor())


def test_pop_quant_desc():
    desc = QuantDescriptor(5)
    found = _utils.pop_quant_desc_in_kwargs(qnn.QuantLinear, quant_desc_weight=desc)
    assert found == (qnn.QuantLinear.default_quant_desc_input, desc)
    assert _utils.pop_quant_desc_in_kwargs(qnn.QuantMaxPool2d, input_only=True, quant_desc_input=desc) is desc


# Clip


def test_clip_forward_and_gradients():
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], requires_grad=True)
    low = torch.tensor(-1.0, requires_grad=True)
    high = torch.tensor(1.0, requires_grad=True)
    y = qnn.functional.clip(x, low, high)
    assert y.tolist() == [-1, -1, 0, 1, 1]
    y.backward(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]))
    assert x.grad.tolist() == [0, 0, 4, 0, 0]
    assert (low.grad.item(), high.grad.item()) == (3, 24)


def test_clip_with_learnable_bounds_of_several_elements():
    x = torch.randn(2, 3)
    bound = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="can only be scalar"):
        qnn.functional.clip(x, -bound, bound).sum().backward()


def test_clip_module():
    clip = qnn.Clip(-1.0, 0.5, learn_max=True)
    assert dict(clip.named_parameters()).keys() == {"clip_value_max"}
    assert clip(torch.tensor([-2.0, 2.0])).tolist() == [-1.0, 0.5]
    for start in (torch.tensor(1.0), [1.0], "1"):
        with pytest.raises(ValueError, match="must be scalar"):
            qnn.Clip(start, 1.0, learn_min=True)
