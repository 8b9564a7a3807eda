"""Affine activations of a model: which have two ends, how they are found, switched and stored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qzoo
from qzoo.accuracy import Fidelity
from qzoo.errors import CheckpointError
from qzoo.ptq.data_free import calibrate_data_free
from qzoo.ptq.ranges import calibrate
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
