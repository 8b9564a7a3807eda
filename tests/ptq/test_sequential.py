"""Sequential rounding: the regression against NumPy's least squares, and what it does to a model."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from fidelity import sqnr
from torch import Tensor

from qzoo.errors import CalibrationError
from qzoo.models.resnet_cifar import CifarResNet
from qzoo.ptq import adaround, adaround_sequential
from qzoo.ptq.blocks import tails_of
from qzoo.ptq.layers import layers_of
from qzoo.ptq.regression import CrossMoments, wanted_weights
from qzoo.quant.nn import QuantConv2d, QuantLinear
from qzoo.scheme import Scheme

Pair = tuple[CifarResNet, CifarResNet]
Batch = tuple[Tensor, Tensor]


def samples(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated inputs [2, count, 6], outputs of other weights [2, count, 3], and weights to start from."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, count, 6, generator=generator) @ torch.randn(2, 6, 6, generator=generator) + 0.5
    true = torch.randn(2, 3, 6, generator=generator)
    y = x @ true.transpose(1, 2) + 0.1 * torch.randn(2, count, 3, generator=generator) + 2.0
    return x, y, torch.randn(2, 3, 6, generator=generator)


def test_moments_are_numpys() -> None:
    x, y, weight = samples(400)
    moments = CrossMoments.of(x[:, :150], y[:, :150]) + CrossMoments.of(x[:, 150:], y[:, 150:])
    assert (moments.count, moments.groups, moments.n) == (400, 2, 6)
    for g in range(2):
        both = np.cov(y[g].double().numpy(), x[g].double().numpy(), rowvar=False, bias=True)
        np.testing.assert_allclose(moments.covariance()[g].numpy(), both[3:, 3:], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(moments.cross_covariance()[g].numpy(), both[:3, 3:], rtol=1e-4, atol=1e-5)
        error = (x[g].double() @ weight[g].double().T - y[g].double()).numpy()
        np.testing.assert_allclose(moments.error(weight)[g].numpy(), error.var(0), rtol=1e-4)
        np.testing.assert_allclose(moments.error_of_mean(weight)[g].numpy(), error.mean(0), rtol=1e-4)
    rest = moments - CrossMoments.of(x[:, :150], y[:, :150])
    torch.testing.assert_close(rest.covariance(), CrossMoments.of(x[:, 150:], y[:, 150:]).covariance())


def test_wanted_weights_come_near_least_squares() -> None:
    x, y, weight = samples(4000)
    parts = [CrossMoments.of(a, b) for a, b in zip(x.split(1000, 1), y.split(1000, 1), strict=True)]
    found = wanted_weights(weight, parts)
    total = sum(parts[1:], start=parts[0])
    for g in range(2):
        inputs = np.concatenate([x[g].double().numpy(), np.ones((4000, 1))], 1)
        least = np.linalg.lstsq(inputs, y[g].double().numpy(), rcond=None)[0][:6].T
        start = np.abs(weight[g].numpy() - least).max()
        assert np.abs(found[g].numpy() - least).max() < 0.15 * start
    assert (total.error(found) < 0.05 * total.error(weight)).all()


def test_noise_is_not_learned() -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(1, 40, 30, generator=generator), torch.randn(1, 64, 30, generator=generator)
    y = x @ weight.transpose(1, 2) + torch.randn(1, 40, 64, generator=generator)
    parts = [CrossMoments.of(a, b) for a, b in zip(x.split(10, 1), y.split(10, 1), strict=True)]
    stayed = (wanted_weights(weight, parts) == weight).all(2)
    assert stayed.float().mean() > 0.5  # 40 samples of pure noise say nothing
    assert torch.equal(wanted_weights(weight, parts[:1]), weight)  # nothing to check against


def test_blocks_with_their_own_input_as_skip(w8a8: Pair, others: Tensor) -> None:
    _, model = w8a8
    blocks = tails_of(model, layers_of(model, others[:1]), others[:1])
    assert list(blocks) == ["layer1.0.conv2"]  # the others' skips are convolutions
    block = blocks["layer1.0.conv2"]
    assert block.module is model.layer1[0]
    x = torch.randn(2, 16, 5, 5)
    norm = model.layer1[0].bn2
    with torch.no_grad():
        norm.weight[3] = 1e-6
        through = norm(block.scaled_skip(x, False)) - norm(torch.zeros_like(x))
    assert (through[:, 3] == 0).all()
    x[:, 3] = 0
    torch.testing.assert_close(through, x, rtol=1e-4, atol=1e-5)


def test_beats_rounding_layer_by_layer(w3a8: Pair, batches: list[Batch], others: Tensor) -> None:
    exact, model = w3a8
    alone = copy.deepcopy(model)
    adaround(alone, batches, progress=False)
    gains = adaround_sequential(model, batches, progress=False)
    assert [gain.layer for gain in gains] == [layer.name for layer in layers_of(model, others[:1])]
    assert all(gain.learned < gain.nearest for gain in gains)
    assert sqnr(exact, model, others) > sqnr(exact, alone, others) + 1


def test_outputs_have_the_float_models_mean(w3a8: Pair, batches: list[Batch]) -> None:
    exact, model = w3a8
    adaround_sequential(model, batches, positions=10_000, progress=False)
    images = torch.cat([images for images, _ in batches])
    with torch.no_grad():
        difference = (model(images) - exact(images)).mean(0)
    # The classifier's input quantizer and its mean are in its bias; its output's quantizer is what is left.
    step = model.output_quantizer.amax / 127 if hasattr(model, "output_quantizer") else 0.0
    assert difference.abs().max() < step


def test_weights_are_integers_and_runs_equal(w8a8: Pair, batches: list[Batch]) -> None:
    models = [copy.deepcopy(w8a8[1]) for _ in range(2)]
    for model in models:
        adaround_sequential(model, iter(batches), progress=False)
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[key], second[key]) for key in first)
    for module in models[0].modules():
        if isinstance(module, QuantConv2d | QuantLinear):
            assert torch.equal(module._weight_quantizer(module.weight), module.weight)


def test_refusals(w8a8: Pair, batches: list[Batch]) -> None:
    with pytest.raises(ValueError, match="folds must be at least 2"):
        adaround_sequential(w8a8[1], batches, folds=1)
    with pytest.raises(CalibrationError, match="no images"):
        adaround_sequential(w8a8[1], [], progress=False)
    with pytest.raises(CalibrationError, match="no range yet"):
        adaround_sequential(CifarResNet(1, in_channels=1, quantize=Scheme()), batches, progress=False)
