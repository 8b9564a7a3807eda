"""Recipes: the order of the methods, and the choice on images that no candidate has seen."""

from __future__ import annotations

import copy
from importlib import import_module

import pytest
import torch
from fidelity import sqnr
from torch import Tensor, nn

from qzoo.errors import CalibrationError
from qzoo.models.resnet_cifar import CifarResNet
from qzoo.models.vit import VisionTransformer
from qzoo.preprocessing import Preprocessing
from qzoo.ptq import (
    RECIPES,
    Recipe,
    adaround,
    apply_recipe,
    best_alpha,
    best_recipe,
    correct_bias,
    equalize,
    smooth,
)
from qzoo.ptq.ranges import calibrate
from qzoo.quant.nn import QuantConv2d, TensorQuantizer
from qzoo.scheme import Scheme

Pair = tuple[CifarResNet, CifarResNet]
Batch = tuple[Tensor, Tensor]
FEW = (Recipe(method="max"), Recipe(method="max", rounding="learned"))


@pytest.fixture
def fresh(w3a8: Pair) -> Pair:
    """The float model, and its quantized form without ranges."""
    model = CifarResNet(1, in_channels=1, quantize=Scheme.parse("w3a8", "onnxruntime"))
    model.load_state_dict(w3a8[0].state_dict())
    return w3a8[0], model.eval()


def equal(a: CifarResNet, b: CifarResNet) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_apply_is_the_methods_in_order(fresh: Pair, batches: list[Batch]) -> None:
    by_hand = copy.deepcopy(fresh[1])
    equalize(by_hand, batches, progress=False)
    calibrate(by_hand, batches, method="mse", progress=False)
    adaround(by_hand, batches, progress=False)
    found = apply_recipe(fresh[1], batches, Recipe(True, "mse", "learned"), progress=False)
    assert equal(fresh[1], by_hand)
    assert (found.method, found.images) == ("mse", 96)


@pytest.mark.parametrize("method", ["analytic", "empirical"])
def test_apply_corrects_biases(fresh: Pair, batches: list[Batch], others: Tensor, method: str) -> None:
    exact, model = fresh
    by_hand = copy.deepcopy(model)
    calibrate(by_hand, batches, method="max", progress=False)
    before = sqnr(exact, by_hand, others)
    correct_bias(by_hand, batches, method=method, reference=exact, progress=False)
    apply_recipe(model, batches, Recipe(method="max", bias_correction=method), progress=False)
    assert sqnr(exact, model, others) == pytest.approx(sqnr(exact, by_hand, others), abs=0.01)
    assert sqnr(exact, model, others) > before


def test_best_judges_by_the_last_images_only(fresh: Pair, batches: list[Batch]) -> None:
    exact, model = fresh
    before = copy.deepcopy(model)
    choice = best_recipe(model, batches, recipes=FEW, held_back=1 / 3, progress=False)
    assert equal(model, before)  # only copies were changed
    assert (choice.images, choice.held_back) == (64, 32)
    found = {candidate.method: candidate for candidate in choice.candidates}
    for recipe in FEW:
        by_hand = copy.deepcopy(model)
        apply_recipe(by_hand, batches[:2], recipe, progress=False)
        assert found[str(recipe)].sqnr_db == pytest.approx(sqnr(exact, by_hand, batches[2][0]), abs=0.01)
    assert choice.candidates[0].sqnr_db == max(c.sqnr_db for c in choice.candidates)
    assert str(choice.recipe) == choice.candidates[0].method == "max + learned"


def test_without_data_no_image_is_looked_at(fresh: Pair) -> None:
    def refuse():  # type: ignore[no-untyped-def]
        raise AssertionError("an image was asked for")
        yield

    recipe = Recipe(method="batchnorm")
    preprocessing = Preprocessing((1, 28, 28), 1.0, "bilinear", (0.2860,), (0.3530,))
    found = apply_recipe(fresh[1], refuse(), recipe, preprocessing=preprocessing)
    assert (found.method, found.images) == ("batchnorm", 0)
    assert all(m.amax is not None for m in fresh[1].modules() if isinstance(m, TensorQuantizer))
    with pytest.raises(ValueError, match="preprocessing; pass it"):
        apply_recipe(fresh[1], [], recipe)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "best"}, "method must be one of max"),
        ({"rounding": "up"}, "rounding must be one of nearest"),
        ({"bias_correction": "yes"}, "bias_correction must be one of none"),
        ({"rounding": "learned", "bias_correction": "analytic"}, "corrects biases itself"),
        ({"method": "batchnorm", "smooth": True}, "uses no images; smooth \\+ batchnorm"),
        ({"method": "mse", "percentile": 99.9}, "is for method percentile or auto, not 'mse'"),
        ({"percentile": 101.0}, "at most 100, not 101"),
        ({"alpha": 0.7}, "alpha is SmoothQuant's"),
        ({"smooth": True, "alpha": 2.0}, "between 0 and 1, or 'auto', not 2"),
        ({"smooth": True, "alpha": "half"}, "between 0 and 1, or 'auto', not 'half'"),
        ({"smooth": True, "alpha": "auto"}, "'auto' needs one of the methods max.*, not 'auto'"),
        ({"smooth": True, "alpha": "auto", "method": "batchnorm"}, "not 'batchnorm'"),
    ],
)
def test_recipes_that_make_no_sense(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**values)


def test_percentile_and_alpha_go_with_their_methods() -> None:
    recipe = Recipe(method="percentile", percentile=99.9, smooth=True, alpha=0.7)
    assert str(recipe) == "smooth 0.7 + percentile 99.9"
    assert recipe.changed({"method": "mse"}) == Recipe(method="mse", smooth=True, alpha=0.7)
    assert recipe.changed({"smooth": False}) == Recipe(method="percentile", percentile=99.9)
    assert recipe.changed({"method": "auto", "alpha": 0.2}) == Recipe(percentile=99.9, smooth=True, alpha=0.2)
    with pytest.raises(ValueError, match="not 'max'"):
        recipe.changed({"method": "max", "percentile": 99.0})


def test_percentile_is_of_the_ranges(fresh: Pair, batches: list[Batch]) -> None:
    by_hand = copy.deepcopy(fresh[1])
    calibrate(by_hand, batches, method="percentile", percentile=95.0, progress=False)
    found = apply_recipe(fresh[1], batches, Recipe(method="percentile", percentile=95.0), progress=False)
    assert equal(fresh[1], by_hand)
    assert found.percentile == 95.0


def test_the_best_is_tried_behind_equalization_too(
    fresh: Pair, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("qzoo.ptq.apply"), "RECIPES", FEW)
    choice = best_recipe(fresh[1], batches, progress=False)
    assert {c.method for c in choice.candidates} == {"max", "max + learned", "equalize + max + learned"}
    assert str(choice.recipe) == choice.candidates[0].method
    assert choice.candidates[0].sqnr_db == max(c.sqnr_db for c in choice.candidates)


def test_too_few_images_to_choose(fresh: Pair, batches: list[Batch]) -> None:
    with pytest.raises(CalibrationError, match="at least two images"):
        best_recipe(fresh[1], [batches[0][0][:1]], progress=False)
    with pytest.raises(ValueError, match="between 0 and 1"):
        best_recipe(fresh[1], batches, held_back=1.0)


@pytest.mark.parametrize("alpha", [None, 0.8])
def test_smooth_comes_before_the_ranges(alpha: float | None) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(48, 3, depth=1, num_classes=10, quantize=Scheme()).eval()
    by_hand, images = copy.deepcopy(model), torch.rand(2, 3, 224, 224)
    smooth(by_hand, [images], alpha=0.5 if alpha is None else alpha, progress=False)
    calibrate(by_hand, [images], method="max", progress=False)
    apply_recipe(model, [images], Recipe(method="max", smooth=True, alpha=alpha), progress=False)
    assert equal(model, by_hand)  # type: ignore[arg-type]
    assert str(Recipe(method="max", smooth=True)) == "smooth + max"


def transformer() -> VisionTransformer:
    torch.manual_seed(0)
    scheme = Scheme(target="onnxruntime")
    return VisionTransformer(48, 3, depth=1, num_classes=10, quantize=scheme).eval()


def test_transformers_are_tried_with_smoothing_too(caplog: pytest.LogCaptureFixture) -> None:
    choice = best_recipe(transformer(), [torch.rand(4, 3, 224, 224)], progress=False)
    tried = [candidate.method for candidate in choice.candidates]
    plain = [name for name in tried if "smooth" not in name]
    assert sorted(plain) == sorted(map(str, RECIPES))
    assert {name for name in tried if "smooth" in name} == {
        f"smooth {a} + {plain[0]}" for a in (0.15, 0.5, 0.85)
    }
    assert not caplog.records


@pytest.mark.parametrize("outliers", [1, 60])
def test_alpha_is_searched_on_images_held_back(outliers: int, caplog: pytest.LogCaptureFixture) -> None:
    model, images = transformer(), torch.rand(5, 3, 224, 224)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
    with torch.no_grad():
        model.blocks[0].norm1.weight[[3, 17, 30]] *= outliers
        model.blocks[0].norm2.weight[[3, 17, 30]] *= outliers
    exact = VisionTransformer(48, 3, depth=1, num_classes=10)
    exact.load_state_dict(model.state_dict())
    recipe = Recipe(method="max", smooth=True, alpha="auto")
    choice = best_alpha(model, [images], recipe, progress=False)
    assert (choice.images, choice.held_back) == (4, 1)
    found = {}
    for alpha in (None, 0.15, 0.5, 0.85):
        by_hand = copy.deepcopy(model)
        if alpha is not None:
            smooth(by_hand, [images[:4]], alpha=alpha, progress=False)
        calibrate(by_hand, [images[:4]], progress=False)
        name = "max" if alpha is None else f"smooth {alpha} + max"
        found[name] = sqnr(exact.eval(), by_hand, images[4:])
    assert {c.method: c.sqnr_db for c in choice.candidates} == pytest.approx(found, abs=0.01)
    assert str(choice.recipe) == max(found, key=found.__getitem__)
    assert choice.recipe.smooth or outliers == 1, "three channels that stick out are worth smoothing"
    taken, by_hand = copy.deepcopy(model), copy.deepcopy(model)
    apply_recipe(taken, [images], recipe, progress=False)
    apply_recipe(by_hand, [images], choice.recipe, progress=False)
    assert equal(taken, by_hand)  # type: ignore[arg-type]
    assert not caplog.records


@pytest.mark.parametrize("recipe", [Recipe(smooth=True), Recipe(True), Recipe(True, "batchnorm")], ids=str)
def test_what_finds_nothing_to_do_is_refused(recipe: Recipe) -> None:
    """Neither a LayerNorm, nor a ReLU between two layers."""
    preprocessing = Preprocessing((3, 24, 24), 1.0, "bilinear")
    layers = (
        QuantConv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Hardtanh(0, 1),
        QuantConv2d(4, 4, 3),
        nn.BatchNorm2d(4),
    )
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(CalibrationError, match=r"nothing to (smooth|equalize).*leave .* out"):
        apply_recipe(model, [torch.rand(2, 3, 24, 24)], recipe, preprocessing=preprocessing, progress=False)


@pytest.mark.parametrize("rounding", ["learned", "sequential"])
def test_groups_of_inputs_are_not_rounded_by_learning(
    rounding: str, batches: list[Batch], caplog: pytest.LogCaptureFixture
) -> None:
    model = CifarResNet(1, in_channels=1, quantize=Scheme.parse("w4g16a8", "onnxruntime")).eval()
    recipe = Recipe(method="max", rounding=rounding)
    with pytest.raises(CalibrationError, match="a range for every group of inputs"):
        apply_recipe(copy.deepcopy(model), batches, recipe, progress=False)
    choice = best_recipe(model, batches, recipes=(recipe, Recipe(method="max")), progress=False)
    assert choice.recipe == Recipe(method="max")
    assert f"left out, max + {rounding}" in caplog.text


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(method="auto"),
        Recipe(True, "mse", "learned"),
        Recipe(method="max", rounding="sequential"),
        Recipe(method="entropy", bias_correction="analytic"),
        Recipe(method="percentile", bias_correction="empirical"),
        Recipe(True, "batchnorm", bias_correction="analytic"),
    ],
    ids=str,
)
def test_everything_is_computed_where_the_model_is(fresh: Pair, batches: list[Batch], recipe: Recipe) -> None:
    """On a GPU, say. Another default device stands in for it: what is not made at the model's would not fit it."""
    preprocessing = Preprocessing((1, 28, 28), 1.0, "bilinear", (0.2860,), (0.3530,))
    model, other = fresh[1], copy.deepcopy(fresh[1])
    apply_recipe(model, batches, recipe, preprocessing=preprocessing, progress=False)
    with torch.device("meta"):
        apply_recipe(other, batches, recipe, preprocessing=preprocessing, progress=False)
    assert equal(model, other)
