"""float16 values in a calibrated model: the integers stay, the outputs hardly move, the file shrinks."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import qzoo
from qzoo.cards.figures import float_bytes
from qzoo.config import WEIGHTS, config_of
from qzoo.ptq.half import compact
from qzoo.quantizers import quantizers, weight_quantizers
from qzoo.zoo.packing import columns, pack_weight

HALF = {"*.weight", "*.running_mean", "*.running_var", "*._weight_quantizer._amax"}


def calibrated(name: str, side: int, channels: int = 3) -> nn.Module:
    """Random weights with lively BatchNorms; some channels nearly dead, as trained models have them."""
    torch.manual_seed(0)
    model = qzoo.create_model(name).train()
    for q in quantizers(model).values():
        q.disable()
    with torch.no_grad():
        model(torch.randn(16, channels, side, side))  # statistics of its own
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
        first, _ = next(iter(weight_quantizers(model).values()))
        first[0] *= 1e-5
        first[1] = 0
        first[2] *= 1e-9
    qzoo.set_target(model, "tensorrt")
    qzoo.calibrate(model.eval(), [torch.randn(2, channels, side, side)], method="max", progress=False)
    return model


def packed_weights(model: nn.Module) -> dict[str, list[int]]:
    return {k: pack_weight(w, q).view(torch.uint8).tolist() for k, (w, q) in weight_quantizers(model).items()}


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_integers_stay_and_outputs_hardly_move(scheme: str, tmp_path: Path) -> None:
    model = calibrated(f"resnet20.fmnist-{scheme}", 28, channels=1)
    before, x = copy.deepcopy(model), torch.randn(8, 1, 28, 28)
    assert compact(model, x) == len(weight_quantizers(model))
    assert packed_weights(model) == packed_weights(before)
    for q in [*quantizers(model).values(), *quantizers(before).values()]:
        if q.role != "weight":
            q.disable_quant()  # a flipped rounding of an activation would hide the size of the change
    error = (model(x) - before(x)).norm() / before(x).norm()
    assert 0 < error < 1e-3
    for q in quantizers(model).values():
        q.enable_quant()
    folder = qzoo.save_pretrained(model, tmp_path / "c")
    with safe_open(folder / WEIGHTS, "pt") as file:
        stored = {key: file.get_tensor(key).dtype for key in columns(model)}
    assert {key for key, dtype in stored.items() if dtype == torch.float16} == HALF
    assert torch.equal(qzoo.load_pretrained(folder, target="tensorrt")(x), model(x))


def test_a_second_time_changes_nothing() -> None:
    model = calibrated("resnet20.fmnist-w8a8", 28, channels=1)
    x = torch.randn(2, 1, 28, 28)
    compact(model, x)
    before = copy.deepcopy(model.state_dict())
    compact(model, x)
    for key, value in model.state_dict().items():
        assert torch.allclose(value, before[key], rtol=1e-6, atol=1e-7), key


def test_values_beyond_float16_are_left_alone() -> None:
    model = calibrated("resnet20.fmnist-w8a8", 28, channels=1)
    model.bn1.running_var[3] = 1e6
    x = torch.randn(2, 1, 28, 28)
    before = copy.deepcopy(model.bn1.state_dict())
    assert compact(model, x) == len(weight_quantizers(model)) - 1
    assert all(torch.equal(value, before[key]) for key, value in model.bn1.state_dict().items())


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("tf_efficientnet_lite0-w8a8", 0.26),
        ("tf_efficientnet_lite0-w4a8", 0.15),
        ("resnet50-w8a8", 0.26),
        ("resnet50-w4a8", 0.15),
    ],
)
def test_packed_files_are_at_most_this_share_of_the_float_model(
    name: str, share: float, tmp_path: Path
) -> None:
    model = calibrated(name, 32)
    compact(model, torch.randn(1, 3, 32, 32))
    folder = qzoo.save_pretrained(model, tmp_path / "c")
    assert (folder / WEIGHTS).stat().st_size <= share * float_bytes(config_of(model))
