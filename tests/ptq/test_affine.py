"""Affine activations of a model: which have two ends, how they are found, switched and stored."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fidelity import sqnr
from torch import Tensor, nn

import qzoo
from qzoo.accuracy import Fidelity
from qzoo.errors import CheckpointError
from qzoo.models.vit import VisionTransformer
from qzoo.preprocessing import Preprocessing
from qzoo.ptq import Recipe, apply_recipe, correct_bias, equalize, round_biases
from qzoo.ptq.data_free import calibrate_data_free
from qzoo.ptq.ranges import calibrate
from qzoo.quant.fold import fold_batchnorm_
from qzoo.quant.nn import TensorQuantizer
from qzoo.quantizers import quantizers, quantizers_off, set_target, switch_target
from qzoo.scheme import Scheme

Batch = tuple[Tensor, Tensor]
METHODS = ("max", "percentile", "mse", "entropy")


def model_of(affine: bool, target: str = "onnxruntime") -> nn.Module:
    scheme = Scheme(target=target, affine=affine)
    return qzoo.create_model("resnet20.fmnist", pretrained="float", quantize=scheme)


def two_ended(model: nn.Module) -> list[str]:
    return [name for name, quantizer in quantizers(model).items() if quantizer.two_ended]


@pytest.fixture(scope="module")
def calibrated(batches: list[Batch]) -> nn.Module:
    model = model_of(True)
    calibrate(model, batches, method="mse", progress=False)
    return model


def test_activations_that_may_be_negative_have_two_ends() -> None:
    model = model_of(True)
    names = two_ended(model)
    assert names == [
        name for name, q in quantizers(model).items() if q.role != "weight" and not q.nonnegative
    ]
    assert {quantizers(model)[name].role for name in names} == {"input", "residual", "branch", "output"}
    assert not two_ended(model_of(False))
    for target, on in (("tensorrt", False), ("openvino", True), ("onnxruntime", True)):
        set_target(model, target)
        assert {quantizers(model)[name].affine for name in names} == {on}
        built = quantizers(model_of(True, target))
        assert {built[name].affine for name in names} == {on}


@pytest.mark.parametrize("method", METHODS)
def test_one_pass_finds_both_ranges_and_the_symmetric_one_is_as_before(
    method: str, batches: list[Batch]
) -> None:
    model, plain = model_of(True), model_of(False)
    for each in (model, plain):
        calibrate(each, batches, method=method, progress=False)
    symmetric = quantizers(plain)
    seen: dict[str, list[float]] = {}
    with quantizers_off(model):
        handles = [
            q.register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(name, []).extend(
                    v.item() for v in args[0].aminmax()
                )
            )
            for name, q in quantizers(model).items()
            if q.two_ended
        ]
        for images, _ in batches:
            model(images)
    for handle in handles:
        handle.remove()
    for name, quantizer in quantizers(model).items():
        assert torch.equal(quantizer.amax, symmetric[name].amax)  # type: ignore[arg-type]
        if not quantizer.two_ended:
            assert quantizer.limits is None
            continue
        assert quantizer.limits is not None
        low, high = quantizer.limits.tolist()
        lowest, highest = min(*seen[name], 0.0), max(*seen[name], 0.0)
        if method == "max":
            assert (low, high) == (lowest, highest)
        assert lowest <= low <= 0 <= high <= highest


def test_switching_the_target_back_and_forth_changes_nothing(calibrated: nn.Module, others: Tensor) -> None:
    found = {
        target: set_target(calibrated, target)(others) for target in ("onnxruntime", "tensorrt", "openvino")
    }
    for target in ("openvino", "tensorrt", "onnxruntime"):
        assert torch.equal(set_target(calibrated, target)(others), found[target])
    plain = model_of(False)
    plain.load_state_dict({k: v for k, v in calibrated.state_dict().items() if not k.endswith("_limits")})
    assert torch.equal(set_target(plain, "tensorrt")(others), found["tensorrt"])


def test_nearer_to_the_float_model_where_ranges_lean(others: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.SiLU(), nn.Conv2d(16, 16, 3), nn.SiLU(), nn.Flatten(), nn.Linear(9216, 10)
    ).eval()
    exact = model(others)
    errors = {}
    for affine in (False, True):
        found = qzoo.models.layers  # the layers of the zoo, with the weights of the network
        scheme = Scheme(affine=affine)
        quantized = nn.Sequential(
            found.conv2d(1, 16, 3, bias=True, quantize=scheme),
            nn.SiLU(),
            found.conv2d(16, 16, 3, bias=True, quantize=scheme),
            nn.SiLU(),
            nn.Flatten(),
            found.linear(9216, 10, quantize=scheme),
        ).eval()
        quantized.load_state_dict(model.state_dict())
        calibrate(quantized, [others], method="mse", progress=False)
        errors[affine] = Fidelity.of(quantized(others), exact).sqnr_db
    assert errors[True] > errors[False] + 1.5


@pytest.mark.parametrize(("function", "affine"), [(nn.GELU(), True), (nn.Softmax(-1), False)])
def test_ranges_of_least_error_behind_gelu_and_softmax(function: nn.Module, affine: bool) -> None:
    """As good as the best of many ranges, each tried in NumPy; better than all that occurs, and than 0 to 1."""
    torch.manual_seed(0)
    scheme, linear = Scheme(affine=True), qzoo.models.layers.linear
    first, second = (
        linear(16, 64, quantize=scheme),
        linear(64, 4, quantize=scheme, nonnegative=not affine),
    )
    nn.init.normal_(first.weight, std=0.6)
    images = torch.randn(400, 16)
    calibrate(nn.Sequential(first, function, second), [images], method="mse", progress=False)
    quantizer = second.input_quantizer
    assert quantizer.affine is affine
    with torch.no_grad():
        x = function(nn.functional.linear(images, first.weight, first.bias)).numpy().astype(np.float64)

    def error(low: float, high: float) -> float:
        scale = (high - low) / 255
        zero = np.round(-low / scale)
        return float(np.square((np.clip(np.round(x / scale) + zero, 0, 255) - zero) * scale - x).mean())

    low, high = min(x.min(), 0.0), x.max()
    tried = [
        error(low * down, high * up) for down in np.linspace(0.2, 1, 41) for up in np.linspace(0.2, 1, 81)
    ]
    assert quantizer.limits is not None or not affine
    found = error(*(quantizer.limits.tolist() if affine else (0.0, quantizer.amax.item())))
    assert found < 1.03 * min(tried)
    assert found < 0.95 * error(low, 1.0 if not affine else high)


def test_data_free_ends_are_those_of_the_widest_channels() -> None:
    model = model_of(True)
    calibrate_data_free(model, model.qzoo_config.preprocessing, correct=False)  # type: ignore[union-attr]
    image = quantizers(model)["conv1._input_quantizer"]
    mean, std = 0.2860, 0.3530
    np.testing.assert_allclose(image.limits, [-mean / std, (1 - mean) / std], rtol=1e-5)  # type: ignore[arg-type]
    norm = model.layer1[0].bn2  # type: ignore[index, union-attr]
    reach = 6 * norm.weight.abs()
    wanted = [min((norm.bias - reach).min().item(), 0.0), max((norm.bias + reach).max().item(), 0.0)]
    branch = quantizers(model)["layer1.0.branch_quantizer"]
    np.testing.assert_allclose(branch.limits, wanted, rtol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["packed", "master"])
def test_checkpoints_hold_both_ends(calibrated: nn.Module, others: Tensor, tmp_path: Path, form: str) -> None:
    switch_target(calibrated, "onnxruntime")
    qzoo.save_pretrained(calibrated, tmp_path / "saved", form=form)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["scheme"]["affine"] is True
    for target in ("onnxruntime", "tensorrt", "openvino"):
        loaded = qzoo.load_pretrained(tmp_path / "saved", target=target)
        expected = set_target(calibrated, target)(others)
        if form == "master":
            assert torch.equal(loaded(others), expected)
        else:  # the weights are on their levels
            assert Fidelity.of(loaded(others), expected).sqnr_db > 100
        assert {
            name: q.limits.tolist() for name, q in quantizers(loaded).items() if q.limits is not None
        } == {name: q.limits.tolist() for name, q in quantizers(calibrated).items() if q.limits is not None}


def test_a_symmetric_checkpoint_is_what_it_was(batches: list[Batch], tmp_path: Path) -> None:
    model = model_of(False)
    calibrate(model, batches[:1], progress=False)
    qzoo.save_pretrained(model, tmp_path / "saved")
    assert "affine" not in (tmp_path / "saved" / "config.json").read_text()
    from safetensors import safe_open

    with safe_open(tmp_path / "saved" / "model.safetensors", framework="pt") as file:
        assert not [key for key in file.keys() if "limits" in key]  # noqa: SIM118


def test_missing_or_broken_ends_are_refused_by_name(calibrated: nn.Module, tmp_path: Path) -> None:
    quantizer = quantizers(calibrated)["conv1._input_quantizer"]
    known = quantizer.range
    assert known is not None
    try:
        quantizer.set_range(known.amax)
        with pytest.raises(CheckpointError, match=r"limits.*conv1\._input_quantizer"):
            qzoo.save_pretrained(calibrated, tmp_path / "none")
        for ends in ([1.0, -1.0], [float("nan"), 1.0], [-1.0, float("inf")]):
            quantizer.set_range(known.amax, torch.tensor(ends))
            with pytest.raises(CheckpointError, match=r"conv1\._input_quantizer|NaN"):
                qzoo.save_pretrained(calibrated, tmp_path / "broken")
    finally:
        quantizer.set_range(*known)
    plain = model_of(False)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*_limits"):
        plain.load_state_dict(calibrated.state_dict())


class Leaning(nn.Module):
    """Convolutions with BatchNorm, SiLU and ReLU: ranges that lean to one side."""

    def __init__(self, scheme: Scheme | None) -> None:
        super().__init__()
        conv2d = qzoo.models.layers.conv2d
        self.conv1, self.bn1 = conv2d(1, 8, 3, stride=2, padding=1, quantize=scheme), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = conv2d(8, 8, 3, padding=1, quantize=scheme), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = (
            conv2d(8, 16, 3, stride=2, padding=1, nonnegative=True, quantize=scheme),
            nn.BatchNorm2d(16),
        )
        self.fc, self.act, self.relu = (
            qzoo.models.layers.linear(784, 10, quantize=scheme),
            nn.SiLU(),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.fc(self.act(self.bn3(self.conv3(x))).flatten(1))


@pytest.fixture(scope="module")
def leaning(batches: list[Batch]) -> tuple[nn.Module, nn.Module]:
    """Float, and quantized to W3A8 with zero points, not yet calibrated; channels of several sizes."""
    torch.manual_seed(0)
    exact = Leaning(None)
    for norm in exact.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.3, 2.0)
            nn.init.normal_(norm.bias, std=0.5)
            norm.momentum = None  # a plain average over the batches
    with torch.no_grad():
        for images, _ in batches:
            exact.train()(images)
    model = Leaning(Scheme(weight_bits=3, edge_bits=8, affine=True))
    model.load_state_dict(exact.eval().state_dict())
    assert sorted(two_ended(model)) == [f"{n}._input_quantizer" for n in ("conv1", "conv2", "fc")]
    return exact, model.eval()


RECIPES = (
    Recipe(method="mse", rounding="learned"),
    Recipe(method="mse", rounding="sequential"),
)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_methods_gain_as_on_symmetric_ranges(
    leaning: tuple[nn.Module, nn.Module], batches: list[Batch], others: Tensor, recipe: Recipe
) -> None:
    exact, fresh = leaning
    plain, model = copy.deepcopy(fresh), copy.deepcopy(fresh)
    apply_recipe(plain, batches, Recipe(method="mse"), progress=False)
    apply_recipe(model, batches, recipe, progress=False)
    assert all(quantizers(model)[name].limits is not None for name in two_ended(model))
    assert sqnr(exact, model, others) > sqnr(exact, plain, others)


def test_empirical_correction_leaves_no_shift(
    leaning: tuple[nn.Module, nn.Module], batches: list[Batch]
) -> None:
    exact, model = leaning[0], copy.deepcopy(leaning[1])
    images = torch.cat([batch for batch, _ in batches])
    apply_recipe(model, batches, Recipe(method="mse"), progress=False)
    with torch.no_grad():
        before = (model(images) - exact(images)).mean(0).abs().max()
        correct_bias(model, batches, method="empirical", progress=False)
        assert (model(images) - exact(images)).mean(0).abs().max() < 0.01 * before


def test_equalization_is_that_of_symmetric_ranges(
    leaning: tuple[nn.Module, nn.Module], batches: list[Batch], others: Tensor
) -> None:
    exact, model = leaning[0], copy.deepcopy(leaning[1])
    plain = Leaning(Scheme(weight_bits=3, edge_bits=8)).eval()
    plain.load_state_dict(exact.state_dict())
    for each in (model, plain):
        found = equalize(each, batches, progress=False)
        assert [(pair.layer, pair.reader) for pair in found] == [("conv2", "conv3")]
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.state_dict().items())
    with quantizers_off(model), torch.no_grad():
        assert Fidelity.of(model(others), exact(others)).sqnr_db > 80


def codes(quantizer: TensorQuantizer, x: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """By NumPy, from the definition: the values that a range of two ends leaves, and its step."""
    assert quantizer.limits is not None
    low, high = quantizer.limits.numpy()
    step = np.float32((high - low) / 255)
    zero = np.rint(-low / step)
    return (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step, step


def test_correction_and_bias_grid_know_the_zero_point(
    leaning: tuple[nn.Module, nn.Module], batches: list[Batch]
) -> None:
    model = copy.deepcopy(leaning[1])
    calibrate(model, batches, method="max", progress=False)
    seen: list[Tensor] = []
    with quantizers_off(model), torch.no_grad():
        handle = model.fc.register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # type: ignore[union-attr, operator]
        for images, _ in batches:
            model(images)
    handle.remove()
    x, weight = torch.cat(seen).numpy(), model.fc.weight.detach().numpy()  # type: ignore[union-attr, operator]
    found, step = codes(quantizers(model)["fc._input_quantizer"], x)
    amax = np.abs(weight).max(1, keepdims=True)
    rounded = np.rint(weight / amax * 3) / 3 * amax
    expected = (found @ rounded.T - x @ weight.T).mean(0)
    shift = correct_bias(model, batches, progress=False)["fc"]
    np.testing.assert_allclose(shift, expected, rtol=0.02, atol=2e-5)
    round_biases(model, batches[0][0][:1])
    levels = model.fc.bias.detach().numpy() / (step * amax.ravel() / 3)  # type: ignore[union-attr, operator]
    np.testing.assert_allclose(levels, np.rint(levels), atol=2e-2)


def test_folding_batchnorm_keeps_the_integers(
    leaning: tuple[nn.Module, nn.Module], batches: list[Batch], others: Tensor
) -> None:
    model = copy.deepcopy(leaning[1])
    calibrate(model, batches, progress=False)
    with torch.no_grad():
        expected = model(others)
        assert [pair.layer for pair in fold_batchnorm_(model, others[:1])] == ["conv1", "conv2", "conv3"]
        assert Fidelity.of(model(others), expected).sqnr_db > 45  # roundings that flip, at most


def test_smoothing_behind_layernorm_with_zero_points() -> None:
    torch.manual_seed(0)
    images = torch.rand(4, 3, 224, 224)
    exact = VisionTransformer(48, 3, depth=1, num_classes=10).eval()
    for module in exact.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
    with torch.no_grad():
        for norm in (exact.blocks[0].norm1, exact.blocks[0].norm2):
            norm.weight[[3, 17, 30]] *= 60
    found = []
    for recipe in (Recipe(method="max"), Recipe(method="max", smooth=True)):
        model = VisionTransformer(48, 3, depth=1, num_classes=10, quantize=Scheme(affine=True)).eval()
        model.load_state_dict(exact.state_dict())
        apply_recipe(model, [images], recipe, progress=False)
        found.append(sqnr(exact, model, images))
    assert found[1] > found[0] + 3


def test_procedural_images_give_both_ends(leaning: tuple[nn.Module, nn.Module], others: Tensor) -> None:
    exact, model = leaning[0], copy.deepcopy(leaning[1])
    preprocessing = Preprocessing((1, 28, 28), 1.0, "bilinear", (0.2860,), (0.3530,))
    apply_recipe(model, [], Recipe(method="procedural"), preprocessing=preprocessing, progress=False)
    for name in two_ended(model):
        limits = quantizers(model)[name].limits
        assert limits is not None
        assert limits[0] < 0 < limits[1]
    assert sqnr(exact, model, others) > 5
