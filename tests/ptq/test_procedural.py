"""Ranges from procedural images: what bounds them, their margin, and what they do to a trained model."""

from __future__ import annotations

import copy

import pytest
import torch
from fidelity import sqnr
from torch import Tensor, nn

from qzoo.accuracy import Fidelity
from qzoo.errors import ArgumentError, CalibrationError
from qzoo.models.resnet_cifar import CifarResNet
from qzoo.preprocessing import Preprocessing
from qzoo.ptq import Recipe, apply_recipe
from qzoo.ptq.collect import collect
from qzoo.ptq.procedural import (
    LEAST,
    MARGIN,
    Comparison,
    MatchedNorms,
    calibrate_procedural,
    procedural_batches,
)
from qzoo.quant.nn import QuantConv2d, TensorQuantizer
from qzoo.quantizers import quantizers
from qzoo.scheme import Scheme

Pair = tuple[CifarResNet, CifarResNet]
PREPROCESSING = Preprocessing((1, 28, 28), 1.0, "bilinear", (0.2860,), (0.3530,))


class Bounds(nn.Module):
    """A ReLU6 that saturates, a softmax, and sums that nothing bounds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = QuantConv2d(1, 4, 3)
        self.relu6, self.clipped, self.share, self.free = (
            nn.ReLU6(),
            TensorQuantizer(),
            TensorQuantizer(),
            TensorQuantizer(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = 8 * self.conv(x)
        clipped = self.clipped(self.relu6(x))
        share = self.share(torch.softmax(0.05 * x.flatten(2), -1))
        return self.free(x + 0 * clipped).mean((2, 3)) + 0 * share.sum(2)


def test_ranges_end_at_what_is_known_to_bound_them() -> None:
    torch.manual_seed(0)
    model, batches = Bounds().eval(), procedural_batches(PREPROCESSING, 16)
    record = calibrate_procedural(model, batches, progress=False)
    assert (record.method, record.images) == ("procedural", 0)
    assert model.clipped.amax == 6
    assert model.share.amax == 1  # although no value comes near it
    white = (1 - 0.2860) / 0.3530
    assert model.conv._input_quantizer.amax.item() == pytest.approx(white, rel=1e-6)
    statistics = collect(model, batches, histograms=True, progress=False)
    best, largest = (statistics.ranges(method, 100.0)["free"].amax for method in ("mse", "max"))
    assert torch.equal(model.free.amax, torch.maximum(MARGIN * best, LEAST * largest))
    weight = model.conv.weight.detach()
    assert torch.equal(model.conv._weight_quantizer.amax.flatten(), weight.abs().amax((1, 2, 3)))


def random_norms() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)
    )
    for norm in (model[1], model[4]):
        for values in (norm.weight, norm.running_var):
            nn.init.uniform_(values, 0.5, 2)
        for values in (norm.bias, norm.running_mean):
            nn.init.normal_(values)
    return model.eval()


@torch.no_grad()
def test_matched_norms_give_every_channel_the_moments_that_training_had() -> None:
    """Behind a BatchNorm these are its bias and its weight, whatever the images are."""
    model, batches = random_norms(), procedural_batches(PREPROCESSING, 16)
    trained, images = copy.deepcopy(model.state_dict()), torch.cat(batches)
    norms = MatchedNorms(model)
    with norms.measure():
        outputs = [model(images)]
    with norms.round_on(model, batches):
        outputs.append(model(images))
    for output in outputs:
        assert torch.allclose(output.mean((0, 2, 3)), model[4].bias, atol=1e-3)
        assert torch.allclose(output.std((0, 2, 3)), model[4].weight, rtol=1e-2)
    for name, values in model.state_dict().items():
        assert torch.allclose(values, trained[name], atol=1e-4), name


@torch.no_grad()
def test_norms_make_up_for_what_rounding_does_to_mean_and_deviation() -> None:
    model, batches = random_norms(), procedural_batches(PREPROCESSING, 16)
    trained, images = copy.deepcopy(model.state_dict()), torch.cat(batches)
    expected = model(images)
    norms = MatchedNorms(model)
    with norms.measure():
        model(images)
    with norms.round_on(model, batches):
        model[0].bias += 0.3
        model[3].weight *= 1.1
        model[4].running_mean += 5  # a bias correction, which the measurement replaces
    assert torch.allclose(model[1].running_mean, trained["1.running_mean"] + 0.3, atol=1e-4)
    assert torch.allclose(model[1].running_var, trained["1.running_var"], rtol=1e-3)
    assert torch.allclose(model[4].running_var, 1.21 * trained["4.running_var"], rtol=1e-3)
    # the same up to an offset: the mean moves by what it moves on these images, not on the data
    change = model(images) - expected
    assert torch.allclose(change, change.mean((0, 2, 3), keepdim=True).expand_as(change), atol=1e-3)


def test_ranges_cover_the_images_with_and_without_the_moments_of_the_data(w8a8: Pair) -> None:
    model, batches = fresh(w8a8[0]), procedural_batches(PREPROCESSING, 32)
    passes = [collect(model, batches, histograms=True, progress=False).ranges("mse", 100.0)]
    norms = MatchedNorms(model)
    with norms.measure():
        together = [torch.cat(batches)]
        passes.append(collect(model, together, histograms=True, progress=False).ranges("mse", 100.0))
    calibrate_procedural(model, batches, norms=norms, progress=False)
    found, wider = quantizers(model), set()
    for name in passes[0]:
        plain, matched = (ranges[name].amax for ranges in passes)
        if found[name].role == "input" and name != "conv1._input_quantizer":
            assert found[name].amax == torch.maximum(plain, matched)
            wider.add(bool(matched > plain))
    assert wider == {True, False}


def fresh(exact: CifarResNet, scheme: str = "w8a8") -> CifarResNet:
    model = CifarResNet(1, in_channels=1, quantize=Scheme.parse(scheme, "onnxruntime"))
    model.load_state_dict(exact.state_dict())
    return model.eval()


def test_near_the_model_calibrated_on_images(w8a8: Pair, others: Tensor) -> None:
    exact, calibrated = w8a8
    model = fresh(exact)
    recipe = Recipe(method="procedural", bias_correction="analytic")
    comparison = Comparison(model, PREPROCESSING)
    apply_recipe(model, (), recipe, preprocessing=PREPROCESSING, progress=False)
    assert sqnr(exact, model, others) > sqnr(exact, calibrated, others) - 6
    fidelity = comparison.fidelity(model)
    assert fidelity.agreement >= 95
    images = torch.cat(procedural_batches(PREPROCESSING, 64, seed=1))
    with torch.no_grad():
        again = Fidelity.of(model(images), exact(images))
    assert fidelity.agreement == again.agreement
    assert fidelity.sqnr_db == pytest.approx(again.sqnr_db, abs=0.01)


def test_learned_rounding_needs_no_data_for_four_bit_weights(w8a8: Pair, others: Tensor) -> None:
    exact, _ = w8a8
    plain, learned = fresh(exact, "w4a8"), fresh(exact, "w4a8")
    for model, rounding in ((plain, "nearest"), (learned, "learned")):
        recipe = Recipe(method="procedural", rounding=rounding)
        apply_recipe(model, (), recipe, preprocessing=PREPROCESSING, progress=False)
    assert sqnr(exact, learned, others) > sqnr(exact, plain, others) + 1


def test_the_same_call_gives_the_same_ranges(w8a8: Pair) -> None:
    first, second = fresh(w8a8[0]), fresh(w8a8[0])
    for model in (first, second):
        apply_recipe(model, (), Recipe(method="procedural"), preprocessing=PREPROCESSING, progress=False)
    ranges = copy.deepcopy(quantizers(second))
    assert all(torch.equal(q.amax, ranges[name].amax) for name, q in quantizers(first).items())


def test_refusals(w8a8: Pair) -> None:
    with pytest.raises(ArgumentError, match="range of the images from their preprocessing; pass it"):
        apply_recipe(w8a8[1], (), Recipe(method="procedural"))
    with pytest.raises(CalibrationError, match="has no quantizers"):
        calibrate_procedural(nn.Conv2d(1, 1, 1), [])
