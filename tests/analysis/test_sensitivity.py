"""One layer at a time against full passes of the model, and the work that is saved."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import qzoo
from qzoo.errors import CalibrationError, DataError
from qzoo.models.resnet_cifar import CifarResNet
from qzoo.ptq.ranges import calibrate
from qzoo.quant.nn import QuantConv2d, TensorQuantizer
from qzoo.quantizers import set_target
from qzoo.scheme import Scheme

ON = "_if_quant"


@pytest.fixture(scope="module")
def setting() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = CifarResNet(1, in_channels=1, quantize=Scheme(4, 4)).eval()
    images = torch.randn(12, 1, 12, 12)
    calibrate(model, [images], progress=False)
    return set_target(model, "onnxruntime"), images


def by_full_passes(model: nn.Module, images: Tensor, keep: str, invert: bool) -> tuple[float, float]:
    """SQNR and agreement with only the quantizers under ``keep`` on, or all but these."""
    variant, reference = copy.deepcopy(model), copy.deepcopy(model)
    for name, module in variant.named_modules():
        if isinstance(module, TensorQuantizer):
            inside = name == keep or name.startswith(f"{keep}.")
            module._if_quant = inside != invert
    for module in reference.modules():
        if isinstance(module, TensorQuantizer):
            module._if_quant = False
    with torch.no_grad():
        got, expected = variant(images).double(), reference(images).double()
    noise = (got - expected).square().sum().item()
    sqnr = 10 * math.log10(expected.square().sum().item() / noise) if noise else math.inf
    return sqnr, 100 * (got.argmax(1) == expected.argmax(1)).double().mean().item()


def test_every_layer_as_by_full_passes(setting) -> None:
    model, images = setting
    found = qzoo.sensitivity(model, [images], progress=False)
    assert found.images == 12
    names = {name for name, m in model.named_modules() if isinstance(m, QuantConv2d)}
    assert names < {layer.name for layer in found.layers}
    assert {"fc", "pool_quantizer", "output_quantizer"} < {layer.name for layer in found.layers}
    for layer in found.layers:
        assert (layer.sqnr_db, layer.agreement) == pytest.approx(
            by_full_passes(model, images, layer.name, False)
        )
        without = by_full_passes(model, images, layer.name, True)
        assert (layer.sqnr_without_db, layer.agreement_without) == pytest.approx(without)
    assert (found.sqnr_db, found.agreement) == pytest.approx(by_full_passes(model, images, "nothing", True))
    ranked = [layer.sqnr_db for layer in found.layers]
    assert ranked == sorted(ranked)


def test_batches_add_up(setting) -> None:
    model, images = setting
    whole = qzoo.sensitivity(model, [images], progress=False)
    parts = qzoo.sensitivity(model, [(images[:5], None), (images[5:], None)], progress=False)
    for a in parts.layers:
        b = next(layer for layer in whole.layers if layer.name == a.name)
        assert (a.sqnr_db, a.sqnr_without_db) == pytest.approx((b.sqnr_db, b.sqnr_without_db), rel=1e-4)
    assert qzoo.sensitivity(model, [images], images=7, progress=False).images == 7


def test_prefix_is_not_computed_again(setting, monkeypatch) -> None:
    model, images = setting
    calls: list[int] = []
    forward = QuantConv2d._conv_forward
    monkeypatch.setattr(QuantConv2d, "_conv_forward", lambda *a: calls.append(1) or forward(*a))
    found = qzoo.sensitivity(model, [images], progress=False)
    convs = sum(isinstance(m, QuantConv2d) for m in model.modules())
    full_passes = 2 * len(found.layers) * convs
    assert len(calls) < 0.7 * full_passes


def test_model_is_left_as_it_was(setting) -> None:
    model, images = setting
    model = copy.deepcopy(model).train()
    switches = [(m._disabled, m._if_quant) for m in model.modules() if isinstance(m, TensorQuantizer)]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    qzoo.sensitivity(model, [images], progress=False)
    assert model.training
    assert switches == [(m._disabled, m._if_quant) for m in model.modules() if isinstance(m, TensorQuantizer)]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_text_and_values(setting) -> None:
    model, images = setting
    found = qzoo.sensitivity(model, [images], progress=False)
    lines = str(found).splitlines()
    assert len(lines) == 3 + len(found.layers)
    assert lines[3].startswith(found.layers[0].name)
    assert len({len(line) for line in lines[2:]}) == 1, "a table with straight columns"
    assert found.to_dict()["layers"][0]["name"] == found.layers[0].name


def test_refusals(setting) -> None:
    model, images = setting
    with pytest.raises(DataError, match="no images"):
        qzoo.sensitivity(model, [], progress=False)
    with pytest.raises(CalibrationError, match="no quantizers"):
        qzoo.sensitivity(CifarResNet(1), [images], progress=False)
    silent = copy.deepcopy(model)
    for module in silent.modules():
        if isinstance(module, TensorQuantizer):
            module.disable()
    with pytest.raises(CalibrationError, match="is off"):
        qzoo.sensitivity(silent, [images], progress=False)
    with pytest.raises(ValueError, match="images"):
        qzoo.sensitivity(model, [images], images=0)
