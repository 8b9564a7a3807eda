"""Bias correction: means that must match, and fidelity on other images."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from fidelity import sqnr
from torch import Tensor, nn

import qzoo
from qzoo.errors import CalibrationError
from qzoo.models.layers import SqueezeExcitation, conv_norm_activation
from qzoo.models.resnet_cifar import CifarResNet
from qzoo.ptq import adaround, correct_bias
from qzoo.ptq.ranges import calibrate
from qzoo.quant.nn import QuantLinear
from qzoo.quantizers import quantizers_off
from qzoo.scheme import Scheme

Pair = tuple[CifarResNet, CifarResNet]
Batch = tuple[Tensor, Tensor]


def test_one_layer_ends_with_the_mean_of_the_float_layer() -> None:
    """For a single layer both ways are exact, quantized input included."""
    for method in ("analytic", "empirical"):
        torch.manual_seed(0)
        model = QuantLinear(20, 6)
        exact = nn.Linear(20, 6)
        exact.load_state_dict(model.state_dict())
        batches = [torch.rand(50, 20) + 0.5, torch.rand(30, 20)]
        x = torch.cat(batches)
        model._input_quantizer.num_bits = model._weight_quantizer.num_bits = 3
        calibrate(model, batches, progress=False)
        with torch.no_grad():
            expected, before = exact(x).mean(0), model(x).mean(0)
            shifts = correct_bias(model, batches, method=method, progress=False)
            after = model(x).mean(0)
        assert (before - expected).abs().max() > 1e-2
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(shifts[""].float(), before - expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["analytic", "empirical"])
@pytest.mark.parametrize("tokens", [6, 5])
def test_tokens_are_no_channels(method: str, tokens: int) -> None:
    """Linear layers of transformers, [N, tokens, out], also where there are as many tokens as channels."""
    torch.manual_seed(0)
    model, batches = (
        nn.Sequential(QuantLinear(8, 6), nn.GELU(), QuantLinear(6, 6)),
        [torch.rand(40, tokens, 8)],
    )
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module._input_quantizer.num_bits = module._weight_quantizer.num_bits = 3
    exact = copy.deepcopy(model)
    for name, module in exact.named_children():
        if isinstance(module, QuantLinear):
            exact._modules[name] = nn.Linear(module.in_features, 6)
    exact.load_state_dict(model.state_dict())
    calibrate(model, batches, progress=False)
    with torch.no_grad():
        expected, before = exact(batches[0]).mean((0, 1)), model(batches[0]).mean((0, 1))
        shifts = correct_bias(model, batches, method=method, progress=False)
        after = model(batches[0]).mean((0, 1))
    assert {name: shift.shape for name, shift in shifts.items()} == {"0": (6,), "2": (6,)}
    assert (after - expected).abs().max() < 0.3 * (before - expected).abs().max()


def test_empirical_matches_the_mean_of_every_layer(w3a8: Pair, batches: list[Batch]) -> None:
    exact, model = w3a8
    correct_bias(model, batches, method="empirical", progress=False)
    x = torch.cat([images for images, _ in batches])
    means: dict[str, list[Tensor]] = {}
    for net in (exact, model):
        for name, module in net.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(
                    lambda _, args, out, name=name: means.setdefault(name, []).append(out.mean((0, 2, 3)))
                )
    with torch.no_grad():
        logits = [net(x) for net in (exact, model)]
    assert len(means) == 9
    for name, (float_mean, mean) in means.items():
        torch.testing.assert_close(mean, float_mean, rtol=0, atol=1e-4, msg=name)
    # What the quantizer of the logits does comes after the last layer.
    step = model.output_quantizer.amax.item() / 127
    assert (logits[0].mean(0) - logits[1].mean(0)).abs().max() < step


def test_empirical_matches_the_mean_of_every_layer_with_gates() -> None:
    """Squeeze-and-excitation: what the gates' layers get wrong multiplies all that comes after them."""
    torch.manual_seed(0)
    scheme = Scheme(3, 8, edge_bits=3, affine=True)
    model = nn.Sequential(
        conv_norm_activation(3, 16, 3, function=nn.Hardswish(), quantize=scheme),
        SqueezeExcitation(16, 8, nn.ReLU(), nn.Hardsigmoid(), scheme),
        conv_norm_activation(16, 8, 1, function=None, quantize=scheme),
    ).eval()
    x = torch.rand(24, 3, 8, 8) + 0.2
    calibrate(model, [x], method="mse", progress=False)
    exact = copy.deepcopy(model)
    found: dict[str, dict[str, Tensor]] = {"exact": {}, "before": {}, "after": {}}

    def watch(net: nn.Module, which: str) -> None:
        for name in ("0.1", "1.fc1", "1.fc2", "2.1"):
            net.get_submodule(name).register_forward_hook(
                lambda _, args, out, name=name: found[which].__setitem__(name, out.mean((0, 2, 3)))
            )

    watch(exact, "exact")
    before = copy.deepcopy(model)
    watch(before, "before")
    with torch.no_grad():
        before(x)
        with quantizers_off(exact):
            exact(x)
        correct_bias(model, [x], method="empirical", progress=False)
        watch(model, "after")
        model(x)
    for name, wanted in found["exact"].items():
        assert (found["before"][name] - wanted).abs().max() > 1e-3, name
        torch.testing.assert_close(found["after"][name], wanted, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("method", ["analytic", "empirical"])
def test_fidelity_on_other_images_rises(
    w3a8: Pair, batches: list[Batch], others: Tensor, method: str
) -> None:
    exact, model = w3a8
    before = sqnr(exact, model, others)
    correct_bias(model, batches, method=method, progress=False)
    assert sqnr(exact, model, others) > before + 1


def test_the_reference_counts_once_weights_are_rounded(
    w3a8: Pair, batches: list[Batch], others: Tensor
) -> None:
    exact, model = w3a8
    adaround(model, batches, progress=False)
    correct_bias(model, batches, method="empirical", reference=exact, progress=False)
    x = torch.cat([images for images, _ in batches])
    with torch.no_grad():
        difference = (exact(x) - model(x)).mean(0)
    assert difference.abs().max() < model.output_quantizer.amax.item() / 127


def test_ranges_and_weights_stay(w8a8: Pair, batches: list[Batch]) -> None:
    _, model = w8a8
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    correct_bias(model, batches, progress=False)
    assert model.training
    changed = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    assert changed == {name for name in before if name.endswith("running_mean") or name == "fc.bias"}


def test_refusals(w8a8: Pair, batches: list[Batch]) -> None:
    _, model = w8a8
    with pytest.raises(ValueError, match="'empirical' or 'analytic', not 'magic'"):
        correct_bias(model, batches, method="magic", progress=False)
    with pytest.raises(CalibrationError, match="no images"):
        correct_bias(model, [], progress=False)
    with pytest.raises(CalibrationError, match="no layer 'conv1'"):
        correct_bias(model, batches, method="empirical", reference=nn.Identity(), progress=False)


def test_a_reference_that_lacks_a_layer_keeps_no_hooks(w8a8: Pair, batches: list[Batch]) -> None:
    exact, model = w8a8
    del exact.fc
    with pytest.raises(CalibrationError, match="no layer 'fc'"):
        correct_bias(model, batches, method="empirical", reference=exact, progress=False)
    assert not any(module._forward_hooks for module in exact.modules())


class Rows(nn.Module):
    """A BatchNorm behind a linear layer's rows, as in LeViT; then one without a bias and without a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16)
        self.second, self.head = nn.Linear(16, 16, bias=False), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).mT
        y = self.first(x)
        y = self.norm(y.flatten(0, 1)).reshape_as(y).relu()
        return self.head(self.second(y).relu().mean(1))


@pytest.mark.parametrize("method", ["analytic", "empirical"])
def test_a_batchnorm_behind_rows_and_a_layer_without_bias(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = Rows().eval(), torch.randn(16, 8, 4, 4)
    quantized = qzoo.quantize(model, images, "w4a8", factory="nets.py:make")
    qzoo.calibrate(quantized, [images], progress=False)
    with torch.no_grad():
        before = (quantized(images) - model(images)).mean(0).abs().max()
        shifts = correct_bias(quantized, [images], method=method, progress=False)
        after = (quantized(images) - model(images)).mean(0).abs().max()
    assert shifts.keys() == {"first", "second", "head"}
    assert after < before / 3
    assert quantized.first.bias is None
    assert quantized.norm.running_mean.any()
    loaded = qzoo.load_pretrained(qzoo.save_pretrained(quantized, tmp_path / "out"), model=model)
    assert loaded.qzoo_config.biases == ("second",)
    with torch.no_grad():
        assert torch.equal(loaded(images), quantized(images))
