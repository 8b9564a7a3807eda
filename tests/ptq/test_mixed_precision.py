"""Mixed precision: the order by measured sensitivity, and the least number of layers that meets the target."""

from __future__ import annotations

import copy

import pytest
import torch
from fidelity import sqnr
from torch import Tensor

from qzoo.errors import CalibrationError
from qzoo.models.resnet_cifar import CifarResNet
from qzoo.ptq import adaround, raise_bits
from qzoo.ptq.layers import layers_of
from qzoo.quant.nn import TensorQuantizer

Pair = tuple[CifarResNet, CifarResNet]
Batch = tuple[Tensor, Tensor]


def test_sensitive_layers_first_and_no_more_than_needed(w3a8: Pair, batches: list[Batch]) -> None:
    exact, model = w3a8
    images = batches[0][0]
    start = copy.deepcopy(model)
    target = sqnr(exact, model, images) + 4
    found = raise_bits(model, [images], agreement=0.0, sqnr_db=target, progress=False)
    assert found.met
    assert sqnr(exact, model, images) == pytest.approx(found.sqnr_db, abs=1e-3)
    assert found.sqnr_db >= target
    names = [layer.name for layer in layers_of(model, images[:1])]
    assert 0 < len(found.order) < len(names)
    assert {n: 8 if n in found.order else 3 for n in names} == found.bits
    # One layer less is not enough.
    fewer = copy.deepcopy(start)
    for name in found.order[:-1]:
        fewer.get_submodule(name)._weight_quantizer._num_bits = 8
    assert sqnr(exact, fewer, images) < target
    # The first layer of the order costs most for its size, measured here by itself.
    cost = {}
    for name in names:
        alone = copy.deepcopy(start)
        for other, quantizer in alone.named_modules():
            if isinstance(quantizer, TensorQuantizer) and other != f"{name}._weight_quantizer":
                quantizer.disable()
        size = alone.get_submodule(name).weight.numel()
        cost[name] = 10 ** (-sqnr(exact, alone, images) / 10) / size
    assert list(found.order) == sorted(names, key=cost.__getitem__, reverse=True)[: len(found.order)]
    sizes = {name: start.get_submodule(name).weight.numel() for name in names}
    average = sum(found.bits[name] * size for name, size in sizes.items()) / sum(sizes.values())
    assert found.average_bits == pytest.approx(average)


def test_nothing_is_raised_where_all_is_well(w8a8: Pair, batches: list[Batch]) -> None:
    found = raise_bits(w8a8[1], batches, agreement=0.0, progress=False)
    assert (found.order, found.average_bits, found.met) == ((), 8.0, True)


def test_a_target_out_of_reach_is_said(w3a8: Pair, batches: list[Batch]) -> None:
    found = raise_bits(w3a8[1], batches[:1], sqnr_db=200.0, progress=False)
    assert not found.met
    assert set(found.bits.values()) == {8}


def test_rounding_uses_each_layers_bits(w3a8: Pair, batches: list[Batch]) -> None:
    exact, model = w3a8
    found = raise_bits(model, batches[:1], agreement=0.0, sqnr_db=sqnr(exact, model, batches[0][0]) + 3)
    adaround(model, batches, progress=False)
    for name, bits in found.bits.items():
        quantizer = model.get_submodule(name)._weight_quantizer
        levels = model.get_submodule(name).weight / (quantizer.amax / (2 ** (bits - 1) - 1))
        assert levels.abs().max() < 2 ** (bits - 1) - 0.5
        assert torch.allclose(levels, levels.round(), atol=1e-3)


def test_refusals(w3a8: Pair) -> None:
    with pytest.raises(ValueError, match="bits must be 2 to 8"):
        raise_bits(w3a8[1], [], bits=16)
    with pytest.raises(CalibrationError, match="no images"):
        raise_bits(w3a8[1], [], progress=False)
