"""Equalization: the float function stays, small channels grow, ReLU6 is not clipped more."""

from __future__ import annotations

import re

import pytest
import torch
from fidelity import sqnr
from torch import Tensor, nn

from qzoo.errors import CalibrationError, QuantizationError
from qzoo.ptq import equalize, without_relu6
from qzoo.ptq.ranges import calibrate
from qzoo.ptq.relu6 import LEAST_DB, without_relu6_unseen
from qzoo.quant.nn import QuantConv2d
from qzoo.quantizers import quantizers_off


class Chain(nn.Module):
    """1x1, depthwise 3x3, 1x1 with BatchNorm and an activation after each but the last."""

    def __init__(self, activation: type[nn.Module], leak: bool = False) -> None:
        super().__init__()
        self.expand, self.norm1 = QuantConv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.norm2 = QuantConv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.project = QuantConv2d(8, 5, 1)
        self.act = activation()
        self.leak = leak

    def forward(self, x: Tensor) -> Tensor:
        middle = self.act(self.norm1(self.expand(x)))
        out = self.project(self.act(self.norm2(self.depthwise(middle)))).mean((2, 3))
        return out + middle.mean() if self.leak else out


def chain(activation: type[nn.Module], leak: bool = False) -> Chain:
    torch.manual_seed(0)
    model = Chain(activation, leak).eval()
    for norm in (model.norm1, model.norm2):
        nn.init.constant_(norm.weight, 1.0)
        norm.weight.data[:4] *= torch.tensor([0.01, 0.05, 0.2, 5.0])
        nn.init.uniform_(norm.bias, 0, 0.1)
        norm.bias.data[:3] *= 0.05
    return model


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, 8, 8, generator=generator) * 2 for _ in range(3)]


def test_the_float_function_stays(batches: list[Tensor]) -> None:
    model = chain(nn.ReLU)
    with torch.no_grad(), quantizers_off(model):
        before = [model(x) for x in batches]
        pairs = equalize(model, batches, progress=False)
        after = [model(x) for x in batches]
    assert [(pair.layer, pair.reader) for pair in pairs] == [
        ("expand", "depthwise"),
        ("depthwise", "project"),
    ]
    assert all((pair.factors >= 1).all() and pair.factors.max() > 5 for pair in pairs)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_fidelity_rises(batches: list[Tensor]) -> None:
    plain, equalized, exact = chain(nn.ReLU), chain(nn.ReLU), chain(nn.ReLU)
    for module in exact.modules():
        if isinstance(module, QuantConv2d):
            module._input_quantizer.disable()
            module._weight_quantizer.disable()
    equalize(equalized, batches, progress=False)
    for model in (plain, equalized):
        for module in model.modules():
            if isinstance(module, QuantConv2d):
                module._input_quantizer.num_bits = 5
        calibrate(model, batches, progress=False)
    others = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2
    assert sqnr(exact, equalized, others) > sqnr(exact, plain, others)


def test_an_activation_read_elsewhere_is_refused_and_restored(batches: list[Tensor]) -> None:
    model = chain(nn.ReLU, leak=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(QuantizationError, match="read elsewhere"):
        equalize(model, batches, progress=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_dead_channel_stays(batches: list[Tensor]) -> None:
    model = chain(nn.ReLU)
    with torch.no_grad():
        model.norm1.weight[5] = model.norm1.bias[5] = 0
    (first, _) = equalize(model, batches, progress=False)
    assert first.factors[5] == 1
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_pairs_with_relu6_stay(batches: list[Tensor]) -> None:
    model = chain(nn.ReLU6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert equalize(model, batches, progress=False) == []
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_relu_takes_the_place_of_relu6_that_hardly_clips(batches: list[Tensor]) -> None:
    model = chain(nn.ReLU6)
    for norm in (model.norm1, model.norm2):
        norm.weight.data.clamp_(max=0.8)  # the largest channel goes over 6 now and then no more
    with torch.no_grad(), quantizers_off(model):
        before = torch.cat([model(x) for x in batches])
        assert without_relu6(model, batches) == 1
        assert type(model.act) is nn.ReLU
        assert len(equalize(model, batches, progress=False)) == 2
        after = torch.cat([model(x) for x in batches])
    assert 10 * torch.log10(before.square().sum() / (after - before).square().sum()) >= LEAST_DB
    assert without_relu6(model, batches) == 0


def test_relu6_that_clips_much_is_refused(batches: list[Tensor]) -> None:
    model = chain(nn.ReLU6)
    model.norm1.weight.data *= 20
    with pytest.raises(CalibrationError, match=r"would keep .* dB of its logits, 20 are needed"):
        without_relu6(model, batches)
    assert type(model.act) is nn.ReLU6


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_relu6_is_judged_by_batchnorms_without_data(scale: float) -> None:
    """Against a sample of the normal distribution that the BatchNorm tells of."""
    model, image = chain(nn.ReLU6), torch.zeros(1, 3, 8, 8)
    nn.init.constant_(model.norm1.weight, 0.5)
    norm = model.norm2
    norm.weight.data *= scale
    x = norm.bias + norm.weight * torch.randn(400_000, 8, generator=torch.Generator().manual_seed(0))
    signal, noise = x.clamp(0, 6).double().square().sum(), (x.double() - 6).clamp(min=0).square().sum()
    kept = 10 * torch.log10(signal / noise).item()
    assert (kept < LEAST_DB) == (scale > 0.5)
    if scale == 0.5:
        assert without_relu6_unseen(model, image) == 1
        assert type(model.act) is nn.ReLU
        return
    with pytest.raises(CalibrationError, match=r"the ReLU6 behind 'norm2' would keep") as caught:
        without_relu6_unseen(model, image)
    said = re.search(r"keep (\S+) dB", str(caught.value))
    assert said is not None
    assert float(said[1]) == pytest.approx(kept, abs=0.15)
    assert type(model.act) is nn.ReLU6


def test_relu6_behind_no_batchnorm_is_refused_without_data() -> None:
    model = nn.Sequential(QuantConv2d(3, 4, 1), nn.ReLU6(), QuantConv2d(4, 2, 1)).eval()
    with pytest.raises(CalibrationError, match=r"'1' follows no BatchNorm"):
        without_relu6_unseen(model, torch.zeros(1, 3, 8, 8))
