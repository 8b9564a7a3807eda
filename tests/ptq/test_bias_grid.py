"""Biases on the int32 grid: what the export writes is whole, and ONNX Runtime comes closer to the simulation."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qzoo
from qzoo.errors import CalibrationError
from qzoo.export.prepare import copy_for, fold_and_store_
from qzoo.models.resnet_cifar import CifarResNet
from qzoo.ptq import round_biases
from qzoo.ptq.ranges import calibrate
from qzoo.quant.nn import QuantLinear
from qzoo.quant.tensor_quant import QuantDescriptor

Pair = tuple[CifarResNet, CifarResNet]
Batch = tuple[Tensor, Tensor]


def units(model: nn.Module) -> dict[str, Tensor]:
    """Bias of every folded layer in units of input scale x weight scale."""
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "_weight_quantizer", None)
        if weight is not None and module.bias is not None:
            source = module._input_quantizer
            scale = weight.amax.double().flatten() / weight.maxbound * source.amax.double() / source.maxbound
            found[name] = module.bias.double() / scale
    return found


def test_folded_biases_are_whole_and_moved_by_half_a_unit_at_most(w8a8: Pair, batches: list[Batch]) -> None:
    _, model = w8a8
    x = batches[0][0]
    before = units(fold_and_store_(copy_for(model, "onnxruntime"), x))
    moved = round_biases(model, x)
    after = units(fold_and_store_(copy_for(model, "onnxruntime"), x))
    assert before.keys() == after.keys() == moved.keys()
    assert len(before) == 10
    assert max((b - b.round()).abs().max() for b in before.values()) > 0.3
    for name, bias in after.items():
        # Left over: float32 rounding of a beta that is some thousand units long.
        assert (bias - bias.round()).abs().max() < 0.02, name
        assert (bias - before[name]).abs().max() <= 0.52, name


def test_zero_weights_and_layers_without_bias_stay() -> None:
    layer = QuantLinear(4, 3)
    plain = QuantLinear(3, 2, bias=False)
    model = nn.Sequential(layer, plain)
    with torch.no_grad():
        layer.weight[1] = 0
    calibrate(model, [torch.rand(8, 4)], progress=False)
    bias = layer.bias.clone()
    moved = round_biases(model, torch.rand(2, 4))
    assert set(moved) == {"0"}
    assert layer.bias[1] == bias[1]
    assert not torch.equal(layer.bias, bias)


def test_ranges_per_group_of_inputs_have_no_unit_and_stay() -> None:
    weight = QuantDescriptor(4, axis=0, block=(1, 2))
    model = nn.Sequential(QuantLinear(4, 3, quant_desc_weight=weight), QuantLinear(3, 2))
    calibrate(model, [torch.rand(8, 4)], progress=False)
    bias = model[0].bias.clone()  # type: ignore[union-attr]
    assert set(round_biases(model, torch.rand(2, 4))) == {"1"}
    assert torch.equal(model[0].bias, bias)  # type: ignore[arg-type]


def test_without_ranges_an_error_names_the_layer() -> None:
    with pytest.raises(CalibrationError, match="'0'"):
        round_biases(nn.Sequential(QuantLinear(4, 3)), torch.rand(2, 4))


def test_onnx_runtime_comes_closer_to_the_simulation(
    w8a8: Pair, batches: list[Batch], others: Tensor, tmp_path: Path
) -> None:
    """Logits on their 8-bit grid: fewer of them differ."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from qzoo.runtimes import load

    _, model = w8a8
    rounded = copy.deepcopy(model)
    round_biases(rounded, batches[0][0])
    differing = []
    for name, net in (("plain", model), ("rounded", rounded)):
        path = qzoo.export_onnx(net, tmp_path / f"{name}.onnx", target="onnxruntime", example=others[:2])
        with torch.no_grad():
            expected = net(others)
        got = load(path, "onnxruntime")(others)
        differing.append((got - expected).abs().gt(1e-4).double().mean().item())
    assert differing[1] < differing[0]
