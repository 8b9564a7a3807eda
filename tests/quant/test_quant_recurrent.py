"""Quantized recurrent layers against torch's."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

from qzoo.quant import nn as qnn
from qzoo.quant.tensor_quant import QuantDescriptor, fake_tensor_quant

LAYERS = ["LSTM", "GRU", "RNN"]
OPTIONS = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"bias": False, "batch_first": True},
    {"num_layers": 2, "batch_first": True, "bidirectional": True},
]


def pair(name, *args, **kwargs):
    torch.manual_seed(5)
    quantized = getattr(qnn, f"Quant{name}")(*args, **kwargs)
    torch.manual_seed(5)
    return quantized, getattr(nn, name)(*args, **kwargs)


def off(module):
    for m in module.modules():
        if isinstance(m, qnn.TensorQuantizer):
            m.disable()
    return module


def flat(result):
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [t for part in result for t in flat(part)]


def assert_close(a, b):
    for x, y in zip(flat(a), flat(b), strict=True):
        assert x.shape == y.shape
        assert (x - y).norm() <= 1e-6 * max(y.norm(), 1)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_disabled_equals_torch(name, options):
    quantized, plain = pair(name, 3, 4, **options)
    off(quantized)
    assert list(quantized.state_dict()) == list(plain.state_dict())
    for a, b in zip(quantized.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    x = torch.randn(5, 2, 3) if not options.get("batch_first") else torch.randn(2, 5, 3)
    assert_close(quantized(x), plain(x))
    count = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    h = torch.randn(count, 2, 4)
    hx = (h, h * 2) if name == "LSTM" else h
    assert_close(quantized(x, hx), plain(x, hx))


@pytest.mark.parametrize("name", LAYERS)
def test_unbatched_input_equals_torch(name):
    quantized, plain = pair(name, 3, 4, num_layers=2)
    x = torch.randn(5, 3)
    assert_close(off(quantized)(x), plain(x))


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_packed_sequences_equal_torch(name, enforce_sorted):
    quantized, plain = pair(name, 3, 4, num_layers=2, bidirectional=True)
    lengths = [5, 3, 3, 1] if enforce_sorted else [3, 1, 5, 3]
    packed = pack_padded_sequence(torch.randn(5, 4, 3), lengths, enforce_sorted=enforce_sorted)
    h = torch.randn(4, 4, 4)
    hx = (h, h * 2) if name == "LSTM" else h
    found, expected = off(quantized)(packed, hx), plain(packed, hx)
    assert isinstance(found[0], PackedSequence)
    assert torch.equal(found[0].batch_sizes, expected[0].batch_sizes)
    assert_close(found, expected)


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("shape", [(2, 3), (3,)])
def test_cells_equal_torch(name, shape):
    quantized, plain = pair(name, 3, 4)
    off(quantized)
    x = torch.randn(shape)
    first = plain(x)
    assert_close(quantized(x), first)
    assert_close(quantized(x, first), plain(x, first))


def test_relu_nonlinearity():
    quantized, plain = pair("RNN", 3, 4, 1, "relu")
    x = torch.randn(5, 2, 3)
    assert_close(off(quantized)(x), plain(x))
    quantized, plain = pair("RNNCell", 3, 4, nonlinearity="relu")
    assert_close(off(quantized)(x[0]), plain(x[0]))


def test_quantization_is_on_the_concatenations():
    """A cell by hand: [x, h] with one range, [W_ih, W_hh] with a range per row."""
    cell = qnn.QuantLSTMCell(3, 4)
    x, h, c = torch.randn(2, 3), torch.randn(2, 4), torch.randn(2, 4)
    joined = torch.cat([x, h], 1)
    weight = torch.cat([cell.weight_ih, cell.weight_hh], 1).detach()
    joined = fake_tensor_quant(joined, joined.abs().max(), 8, False, False)
    weight = fake_tensor_quant(weight, weight.abs().amax(1, keepdim=True), 8, False, False)
    i, f, g, o = (joined @ weight.T + cell.bias_ih + cell.bias_hh).chunk(4, 1)
    expected = f.sigmoid() * c + i.sigmoid() * g.tanh()
    found = cell(x, (h, c))
    torch.testing.assert_close(found[1], expected)
    torch.testing.assert_close(found[0], o.sigmoid() * expected.tanh())


@pytest.mark.parametrize("name", LAYERS)
def test_layer_equals_its_cell_step_by_step(name):
    layer = getattr(qnn, f"Quant{name}")(3, 4)
    cell = getattr(qnn, f"Quant{name}Cell")(3, 4)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x = torch.randn(5, 2, 3)
    state = None
    for step in x:
        state = cell(step, state)
    final = layer(x)[1]
    final = [s.squeeze(0) for s in final] if name == "LSTM" else [final.squeeze(0)]
    assert_close(final, state if name == "LSTM" else [state])


def test_one_pair_of_quantizers_per_layer_and_direction():
    layer = qnn.QuantLSTM(3, 4, 2, bidirectional=True, quant_desc_input=QuantDescriptor(6))
    assert len(layer._input_quantizers) == len(layer._weight_quantizers) == 4
    assert layer._input_quantizers[3].num_bits == 6
    assert layer._weight_quantizers[0].axis == 0
    assert layer.input_quantizer is layer._input_quantizers


def test_gradients_reach_everything():
    for name in LAYERS:
        layer = getattr(qnn, f"Quant{name}")(3, 4, 2, bidirectional=True)
        x = torch.randn(5, 2, 3, requires_grad=True)
        layer(x)[0].sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in [x, *layer.parameters()])


def test_refusals():
    with pytest.raises(ValueError, match="proj_size"):
        qnn.QuantLSTM(3, 4, proj_size=2)
    for dropout in (-0.1, 1.1):
        with pytest.raises(ValueError, match="dropout"):
            qnn.QuantLSTM(3, 4, 2, dropout=dropout)
    layer = qnn.QuantLSTM(3, 4)
    with pytest.raises(RuntimeError, match="input_size"):
        layer(torch.randn(5, 2, 4))
    with pytest.raises(RuntimeError, match="hidden size"):
        layer(torch.randn(5, 2, 3), (torch.zeros(1, 3, 4), torch.zeros(1, 2, 4)))
    with pytest.raises(RuntimeError, match="input_size"):
        qnn.QuantLSTMCell(3, 4)(torch.randn(2, 4))
    with pytest.raises(RuntimeError, match="hidden"):
        qnn.QuantLSTMCell(3, 4)(torch.randn(2, 3), (torch.zeros(2, 3), torch.zeros(2, 3)))


def test_dropout_only_while_training():
    layer = off(qnn.QuantLSTM(3, 4, 2, dropout=0.5))
    x = torch.randn(5, 2, 3)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


def test_all_weights_and_texts():
    quantized, plain = pair("LSTM", 3, 4, 2, batch_first=True, bias=False)
    assert [[w.shape for w in ws] for ws in quantized.all_weights] == [
        [w.shape for w in ws] for ws in plain.all_weights
    ]
    assert quantized.extra_repr() == plain.extra_repr()
    quantized.flatten_parameters()
    assert qnn.LSTM is qnn.QuantLSTM
    assert qnn.LSTMCell is qnn.QuantLSTMCell


def test_pack_sequence_of_lists():
    quantized, plain = pair("LSTM", 3, 4)
    packed = pack_sequence([torch.randn(2, 3), torch.randn(4, 3)], enforce_sorted=False)
    assert_close(off(quantized)(packed), plain(packed))
