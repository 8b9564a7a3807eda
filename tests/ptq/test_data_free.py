"""Ranges from BatchNorm statistics: moments against integrals and samples, and what they do to a model."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from fidelity import sqnr
from torch import Tensor, nn

from qzoo.errors import CalibrationError
from qzoo.models.resnet_cifar import CifarResNet
from qzoo.preprocessing import Preprocessing
from qzoo.ptq import calibrate_data_free
from qzoo.ptq.data_free import of_images
from qzoo.ptq.statistics import batchnorm_statistics, clipped_normal
from qzoo.quant.nn import QuantConv2d, QuantLinear, TensorQuantizer
from qzoo.scheme import Scheme

Pair = tuple[CifarResNet, CifarResNet]
PREPROCESSING = Preprocessing((1, 28, 28), 1.0, "bilinear", (0.2860,), (0.3530,))


@pytest.mark.parametrize("high", [6.0, math.inf])
def test_clipped_normal_is_the_integral(high: float) -> None:
    mean = torch.tensor([-3.0, -0.5, 0.0, 2.0, 5.9, 8.0], dtype=torch.float64)
    deviation = torch.tensor([1.0, 0.3, 2.0, 1.5, 0.01, 4.0], dtype=torch.float64)
    found, variance = clipped_normal(mean, deviation, 0.0, high)
    for i, (m, s) in enumerate(zip(mean.tolist(), deviation.tolist(), strict=True)):
        x = np.linspace(m - 12 * s, m + 12 * s, 400_001)
        density = np.exp(-0.5 * ((x - m) / s) ** 2) / (s * math.sqrt(2 * math.pi))
        y = np.clip(x, 0.0, high)
        first = np.trapezoid(y * density, x)
        second = np.trapezoid((y - first) ** 2 * density, x)
        assert found[i].item() == pytest.approx(first, abs=1e-6)
        assert variance[i].item() == pytest.approx(second, abs=1e-5)


class Small(nn.Module):
    """A skip, a ReLU6, a pooling and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = QuantConv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = QuantConv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4)
        self.relu6, self.sum_quantizer = nn.ReLU6(inplace=True), TensorQuantizer()
        self.fc = QuantLinear(4, 5)
        self.output_quantizer = TensorQuantizer()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu6(self.bn1(self.conv1(x)))
        x = self.sum_quantizer(x + self.bn2(self.conv2(x)))
        return self.output_quantizer(self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1)))


@pytest.fixture
def small() -> Small:
    torch.manual_seed(0)
    model = Small().eval()
    for norm in (model.bn1, model.bn2):
        nn.init.uniform_(norm.weight, 0.5, 3.0)
        nn.init.normal_(norm.bias, std=1.5)
    return model


def test_moments_go_through_the_network(small: Small) -> None:
    preprocessing = Preprocessing((3, 8, 8))
    known = batchnorm_statistics(small, of_images(preprocessing), torch.zeros(1, 3, 8, 8), 6.0)
    beta1, gamma1, beta2, gamma2 = (
        t.detach().double() for t in (small.bn1.bias, small.bn1.weight, small.bn2.bias, small.bn2.weight)
    )
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2, 400_000, 4, generator=generator, dtype=torch.float64)
    first = (beta1 + gamma1 * draws[0]).clamp(0, 6)
    both = first + beta2 + gamma2 * draws[1]
    close = {"rtol": 0.02, "atol": 0.01}
    torch.testing.assert_close(known["conv2"].mean, first.mean(0), **close)
    torch.testing.assert_close(known["conv2"].variance, first.var(0), **close)
    torch.testing.assert_close(known["sum_quantizer"].mean, both.mean(0), **close)
    torch.testing.assert_close(known["sum_quantizer"].variance, both.var(0), **close)
    weight, bias = small.fc.weight.detach().double(), small.fc.bias.detach().double()
    torch.testing.assert_close(known["output_quantizer"].mean, both.mean(0) @ weight.T + bias, **close)
    torch.testing.assert_close(known["output_quantizer"].variance, both.var(0) @ weight.T.square(), **close)
    torch.testing.assert_close(known["conv2"].high, (beta1 + 6 * gamma1).clamp(0, 6))
    assert known["conv2._input_quantizer"] is known["conv2"]


def test_images_reach_from_black_to_white() -> None:
    known = of_images(Preprocessing())
    to_images = Preprocessing().transform().transforms[-1]
    assert torch.allclose(known.low.float(), to_images(torch.zeros(3, 1, 1)).flatten())
    assert torch.allclose(known.high.float(), to_images(torch.ones(3, 1, 1)).flatten())


def test_near_the_model_calibrated_on_images(w8a8: Pair, others: Tensor) -> None:
    exact, calibrated = w8a8
    with_images = sqnr(exact, calibrated, others)
    model = CifarResNet(1, in_channels=1, quantize=Scheme.parse("w8a8", "onnxruntime"))
    model.load_state_dict(exact.state_dict())
    record = calibrate_data_free(model.eval(), PREPROCESSING)
    assert (record.method, record.images, record.candidates) == ("batchnorm", 0, ())
    ranges = {n: m.amax for n, m in model.named_modules() if isinstance(m, TensorQuantizer)}
    assert all(amax is not None and amax.isfinite().all() for amax in ranges.values())
    assert (
        sqnr(exact, model, others) > with_images - 15
    )  # 27.8 of 39.6 dB: the classes' logits are not 6 sigma apart
    block = model.layer1[0]
    assert torch.equal(block.residual_quantizer.amax, block.conv1._input_quantizer.amax)


def test_correction_takes_the_mean_error_out(small: Small) -> None:
    for module in (small.conv1, small.conv2, small.fc):
        module._weight_quantizer._num_bits = 3
    corrected, plain = copy.deepcopy(small), copy.deepcopy(small)
    calibrate_data_free(corrected, Preprocessing((3, 8, 8)))
    calibrate_data_free(plain, Preprocessing((3, 8, 8)), correct=False)
    assert torch.equal(plain.bn1.running_mean, small.bn1.running_mean)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4000, 4, generator=generator).mul(small.bn1.weight.detach()).add(small.bn1.bias.detach())
    x = (
        x.clamp(0, 6).reshape(4000, 4, 1, 1).expand(-1, -1, 5, 5)
    )  # what conv2 reads, if the BatchNorm is right
    with torch.no_grad():
        for model in (corrected, plain, small):
            for quantizer in model.modules():
                if isinstance(quantizer, TensorQuantizer):
                    quantizer.disable()
            if model is not small:
                model.conv2._weight_quantizer.enable()
        means = [m.bn2(m.conv2(x))[:, :, 2, 2].mean(0) for m in (corrected, plain, small)]
    assert (means[0] - means[2]).abs().max() < 0.1 * (means[1] - means[2]).abs().max()


def test_refusals(w8a8: Pair) -> None:
    with pytest.raises(ValueError, match="sigmas must be above 0"):
        calibrate_data_free(w8a8[1], PREPROCESSING, sigmas=0)
    model = nn.Sequential(QuantConv2d(1, 2, 3), nn.Sigmoid(), QuantConv2d(2, 2, 3))
    with pytest.raises(CalibrationError, match=r"'2' comes from sigmoid.*calibrate this model on images"):
        calibrate_data_free(model, PREPROCESSING)


def test_equalization_without_data() -> None:
    """conv1, BatchNorm, ReLU, conv2: factors by the rule of equalize(), from what the BatchNorm says."""
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(QuantConv2d(3, 4, 3, bias=False), norm, nn.ReLU(), QuantConv2d(4, 5, 3)).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([3.0, 0.1, 1.0, 0.5]))
        norm.bias.copy_(torch.tensor([0.5, 0.2, -0.3, 0.0]))
    exact, x = copy.deepcopy(model), torch.randn(8, 3, 16, 16)
    plain = copy.deepcopy(model)
    preprocessing = Preprocessing((3, 16, 16))
    calibrate_data_free(plain, preprocessing)
    calibrate_data_free(model, preprocessing, equalized=True)
    factors = norm.weight / torch.tensor([3.0, 0.1, 1.0, 0.5])
    assert factors[1] == factors.max()  # the channel with the smallest range grows most
    assert factors[1] > 1.5
    torch.testing.assert_close(norm.bias, factors * torch.tensor([0.5, 0.2, -0.3, 0.0]))
    torch.testing.assert_close(model[3].weight * factors.view(1, -1, 1, 1), exact[3].weight)
    assert torch.equal(
        model[3]._input_quantizer.amax, plain[3]._input_quantizer.amax
    )  # the largest channel rules
    for module in (exact, model):
        for quantizer in module.modules():
            if isinstance(quantizer, TensorQuantizer):
                quantizer.disable()
    with torch.no_grad():
        model[1].running_mean.zero_()
        model[3].bias.copy_(exact[3].bias)
        torch.testing.assert_close(model(x), exact(x), rtol=1e-4, atol=1e-5)
