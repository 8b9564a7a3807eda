"""Rounding: the solver against exhaustive search, and what it does to a model."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from fidelity import sqnr
from torch import Tensor

from qzoo.errors import CalibrationError
from qzoo.models.resnet_cifar import CifarResNet
from qzoo.ptq import adaround
from qzoo.ptq.adaround import regularized, solve
from qzoo.ptq.layers import layers_of
from qzoo.ptq.moments import input_moments
from qzoo.ptq.ranges import calibrate
from qzoo.quant.nn import QuantConv2d, QuantLinear, TensorQuantizer
from qzoo.scheme import Scheme

Pair = tuple[CifarResNet, CifarResNet]
Batch = tuple[Tensor, Tensor]


def correlated(groups: int, n: int, seed: int) -> tuple[np.ndarray, Tensor]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(groups, 4 * n, n)) @ (np.eye(n) + 0.8 * rng.normal(size=(groups, n, n)))
    h = np.einsum("gsn,gsm->gnm", x, x) / (4 * n)
    return h, torch.from_numpy(h).float()


@pytest.mark.parametrize("groups", [1, 3])
def test_near_the_exhaustive_optimum(groups: int) -> None:
    n, rows = 9, 24
    exact, h = correlated(groups, n, 0)
    target = torch.randn(groups, rows, n, generator=torch.Generator().manual_seed(0)) * 3
    found = solve(target, 127, h, 10).double().numpy()
    w = target.double().numpy()
    ratios, nearest_ratios = [], []
    for g, r in itertools.product(range(groups), range(rows)):
        ups = np.array(list(itertools.product((0, 1), repeat=n)))
        d = np.floor(w[g, r]) + ups - w[g, r]
        best = np.einsum("kn,nm,km->k", d, exact[g], d).min()
        e, nearest = found[g, r] - w[g, r], np.round(w[g, r]) - w[g, r]
        cost, nearest_cost = e @ exact[g] @ e, nearest @ exact[g] @ nearest
        assert cost <= nearest_cost * (1 + 1e-5)
        ratios.append(cost / best)
        nearest_ratios.append(nearest_cost / best)
    assert np.mean(ratios) - 1 < 0.6 * (np.mean(nearest_ratios) - 1)


def test_up_or_down_only_and_within_the_bound() -> None:
    _, h = correlated(1, 16, 1)
    target = torch.randn(1, 40, 16, generator=torch.Generator().manual_seed(1)) * 5
    found = solve(target, 7, h, 10)
    assert torch.equal(found, found.round())
    assert ((found - target.clamp(-7, 7)).abs() < 1).all()
    assert found.abs().max() == 7


def test_uncorrelated_inputs_mean_nearest() -> None:
    target = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(2)) * 5
    h = torch.diag_embed(torch.rand(2, 8) + 0.1)
    assert torch.equal(solve(target, 127, h, 10), target.round())


def test_groups_do_not_touch_each_other() -> None:
    _, h = correlated(4, 9, 3)
    target = torch.randn(4, 2, 9, generator=torch.Generator().manual_seed(3)) * 4
    other = target.clone()
    other[2] *= 1.7
    before, after = solve(target, 127, h, 10), solve(other, 127, h, 10)
    assert torch.equal(before[[0, 1, 3]], after[[0, 1, 3]])
    assert not torch.equal(before[2], after[2])


def test_moments_equal_numpys(w8a8: Pair, batches: list[Batch]) -> None:
    exact, model = w8a8
    layers = [layer for layer in layers_of(model, batches[0][0]) if layer.name == "layer2.0.conv1"]
    moments = input_moments(model, layers, batches, positions=10_000, progress=False)["layer2.0.conv1"]
    with torch.no_grad():
        inputs = [exact.layer1(exact.relu(exact.bn1(exact.conv1(images)))) for images, _ in batches]
    x = torch.nn.functional.unfold(torch.cat(inputs), 3, padding=1, stride=2)
    x = x.transpose(1, 2).reshape(-1, 16 * 9).double().numpy()
    assert moments.count == len(x)
    np.testing.assert_allclose(moments.mean()[0].numpy(), x.mean(0), rtol=1e-5, atol=1e-6)
    expected = np.cov(x, rowvar=False, bias=True)
    np.testing.assert_allclose(moments.covariance()[0].numpy(), expected, rtol=1e-3, atol=1e-4)


def test_few_samples_shrink_the_covariance() -> None:
    model = QuantLinear(40, 3)
    x = torch.randn(10, 40)
    calibrate(model, [x], progress=False)
    moments = input_moments(model, layers_of(model, x), [x], progress=False)[""]
    h = regularized(moments, 0.01)[0].double()
    covariance = moments.covariance()[0]
    assert torch.linalg.eigvalsh(h).min() >= (1 - 10 / 50) * covariance.diagonal().min() > 0
    off = covariance - torch.diag(covariance.diagonal())
    torch.testing.assert_close(h - torch.diag(h.diagonal()), off * (10 / 50), rtol=1e-4, atol=1e-5)


def test_every_layer_gains_and_the_logits_do(w3a8: Pair, batches: list[Batch], others: Tensor) -> None:
    exact, model = w3a8
    before = sqnr(exact, model, others)
    gains = adaround(model, batches, progress=False)
    assert [gain.layer for gain in gains] == [layer.name for layer in layers_of(model, others[:1])]
    assert all(gain.learned < gain.nearest for gain in gains)
    assert sqnr(exact, model, others) > before + 3


def test_gain_at_8_bits_on_other_images(w8a8: Pair, batches: list[Batch], others: Tensor) -> None:
    exact, model = w8a8
    for quantizer in model.modules():
        if isinstance(quantizer, TensorQuantizer) and quantizer.role != "weight":
            quantizer.disable()
    before = sqnr(exact, model, others)
    adaround(model, batches, progress=False)
    assert sqnr(exact, model, others) > before + 2


@pytest.mark.parametrize("scheme", ["w8a8", "w3a8"])
def test_weights_are_fixed_points_and_integers(
    scheme: str, batches: list[Batch], request: pytest.FixtureRequest
) -> None:
    _, model = request.getfixturevalue(scheme)
    names = {name: m.amax.shape for name, m in model.named_modules() if isinstance(m, TensorQuantizer)}
    adaround(model, batches, progress=False)
    for module in model.modules():
        if isinstance(module, QuantConv2d | QuantLinear):
            quantizer = module._weight_quantizer
            assert torch.equal(quantizer(module.weight), module.weight)
            integers = module.weight.double() / (quantizer.amax.double() / quantizer.maxbound)
            assert (integers - integers.round()).abs().max() < 1e-4
            assert integers.abs().max() <= quantizer.maxbound + 1e-4
    assert names == {
        name: m.amax.shape for name, m in model.named_modules() if isinstance(m, TensorQuantizer)
    }


def test_the_same_each_time(w8a8: Pair, batches: list[Batch]) -> None:
    models = [copy.deepcopy(w8a8[1]) for _ in range(2)]
    torch.manual_seed(1)
    adaround(models[0], batches, progress=False)
    torch.manual_seed(2)
    adaround(models[1], iter(batches), progress=False)
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_zero_channels_and_dead_inputs_stay_sound(batches: list[Batch]) -> None:
    torch.manual_seed(0)
    model = CifarResNet(1, in_channels=1, quantize=Scheme()).eval()
    with torch.no_grad():
        model.layer1[0].conv1.weight[2] = 0
        model.bn1.weight[5] = model.bn1.bias[5] = 0  # an input channel that is always zero
    calibrate(model, batches, progress=False)
    gains = adaround(model, batches, progress=False)
    assert (model.layer1[0].conv1.weight[2] == 0).all()
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert all(math.isfinite(gain.learned) for gain in gains)


def test_refusals(batches: list[Batch]) -> None:
    model = CifarResNet(1, in_channels=1, quantize=Scheme())
    with pytest.raises(CalibrationError, match="no range yet"):
        adaround(model, batches, progress=False)
    with pytest.raises(CalibrationError, match="no images"):
        adaround(model, [], progress=False)
