"""QuantAdd, QuantMatMul, QuantConcat, QuantMultiheadAttention."""

import pytest
import torch
from torch import nn

from qzoo.quant import TensorQuantizer, quantize_
from qzoo.quant import nn as qnn
from qzoo.quant.tensor_quant import QuantDescriptor, fake_tensor_quant


def quantized(x, amax=None):
    return fake_tensor_quant(x, x.abs().max() if amax is None else amax, 8, False, False)


def off(module):
    for m in module.modules():
        if isinstance(m, TensorQuantizer):
            m.disable()
    return module


def test_add():
    a, b = torch.randn(2, 3), torch.randn(2, 3) * 5
    add = qnn.QuantAdd()
    assert torch.equal(add(a, b), quantized(a) + quantized(b))
    assert (add._residual_quantizer.role, add._branch_quantizer.role) == ("residual", "branch")
    add._branch_quantizer.disable()
    assert torch.equal(add(a, b), a + quantized(b))


def test_matmul():
    a, b = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    assert torch.equal(qnn.QuantMatMul()(a, b), quantized(a) @ quantized(b))


@pytest.mark.parametrize("fixed", [False, True])
def test_concatenation_has_one_range(fixed):
    a, b = torch.randn(2, 3), torch.randn(2, 1) * 5
    concat = qnn.QuantConcat(quant_desc_input=QuantDescriptor(amax=2.0) if fixed else QuantDescriptor())
    assert torch.equal(concat([a, b]), quantized(torch.cat([a, b], 1), torch.tensor(2.0) if fixed else None))
    concat._input_quantizer.enable_calib()
    concat([a, b])
    concat._input_quantizer.load_calib_amax()
    assert concat._input_quantizer.amax == torch.cat([a, b], 1).abs().max()


ATTENTION = [
    {"batch_first": True},
    {"batch_first": False},
    {"bias": False, "batch_first": True},
]


@pytest.mark.parametrize("options", ATTENTION, ids=str)
def test_attention_equals_torch_when_disabled(options):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(8, 2, **options)
    torch.manual_seed(0)
    ours = off(qnn.QuantMultiheadAttention(8, 2, **options))
    assert list(ours.state_dict()) == list(plain.state_dict())
    ours.load_state_dict(plain.state_dict())
    q, k = torch.randn(3, 3, 8), torch.randn(3, 3, 8)
    float_mask = torch.randn(3, 3)
    causal = torch.ones(3, 3, dtype=torch.bool).triu(1)
    padding = torch.tensor([[False, False, True]] * 3)
    for kwargs in (
        {},
        {"attn_mask": float_mask},
        {"attn_mask": causal, "is_causal": True},
        {"attn_mask": causal.expand(6, 3, 3)},
        {"key_padding_mask": padding, "average_attn_weights": False},
    ):
        for found, expected in zip(ours(q, k, k, **kwargs), plain(q, k, k, **kwargs), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert ours(q, k, k, need_weights=False)[1] is None
    single = q[0]
    torch.testing.assert_close(ours(single, single, single), plain(single, single, single))


def test_attention_drops_what_torch_drops():
    torch.manual_seed(0)
    plain, ours = (
        nn.MultiheadAttention(8, 2, dropout=0.5),
        off(qnn.QuantMultiheadAttention(8, 2, dropout=0.5)),
    )
    ours.load_state_dict(plain.state_dict())
    x, results = torch.randn(5, 3, 8), []
    for attention in (plain, ours):
        torch.manual_seed(1)
        results.append(attention(x, x, x))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_attention_in_place_and_quantized():
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 8)
    expected = model(x)
    names = quantize_(model)
    assert names == ["self_attn", "linear1", "linear2"]
    assert type(model.self_attn.out_proj) is qnn.QuantLinear
    difference = (model(x) - expected).abs().max()
    assert 0 < difference < 0.2
    off(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_attention_refusals():
    with pytest.raises(ValueError, match="add_bias_kv"):
        qnn.QuantMultiheadAttention(8, 2, add_bias_kv=True)
    with pytest.raises(ValueError, match="divisible"):
        qnn.QuantMultiheadAttention(8, 3)
    x = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match="attn_mask"):
        qnn.QuantMultiheadAttention(8, 2)(x, x, x, is_causal=True)
