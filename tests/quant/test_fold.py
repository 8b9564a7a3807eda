"""BatchNorm folding: the integers of the weights stay, the function stays, what can't be folded is left alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qzoo.errors import QuantizationError
from qzoo.quant import ops
from qzoo.quant.fold import Pair, fold_batchnorm_
from qzoo.quant.nn import QuantConv2d, QuantConvTranspose2d, QuantLinear, TensorQuantizer
from qzoo.quant.tensor_quant import QuantDescriptor

WEIGHT = QuantDescriptor(8, axis=0, narrow_range=True)


def randomize(norm: nn.Module) -> None:
    """Statistics and parameters of both signs, far from the identity."""
    with torch.no_grad():
        norm.running_mean.normal_(0, 0.5)
        norm.running_var.uniform_(0.01, 4)
        norm.weight.normal_()
        norm.bias.normal_()


def calibrate(layer: nn.Module, x: Tensor) -> None:
    axes = [d for d in range(layer.weight.dim()) if d != layer.weight_quantizer.axis]
    layer.weight_quantizer.amax = layer.weight.detach().abs().amax(axes, keepdim=True).numpy()
    layer.input_quantizer.amax = x.abs().max().item()


def integers(layer: nn.Module) -> np.ndarray:
    """The weight's levels by NumPy, in the core's order of operations."""
    weight, amax = layer.weight.detach().numpy(), layer.weight_quantizer.amax.numpy()
    scale = np.where(amax <= 2**-24, np.float32(1), np.float32(127) / np.maximum(amax, np.float32(1e-30)))
    return np.clip(np.rint(weight * scale), -127, 127) * (amax > 2**-24)


def conv(groups: int = 1, bias: bool = False) -> nn.Module:
    return QuantConv2d(8, 16, 3, padding=1, groups=groups, bias=bias, quant_desc_weight=WEIGHT)


@pytest.mark.parametrize(
    ("layer", "norm", "x"),
    [
        (conv(), nn.BatchNorm2d(16), torch.randn(4, 8, 6, 6)),
        (conv(bias=True), nn.BatchNorm2d(16), torch.randn(4, 8, 6, 6)),
        (conv(groups=4), nn.BatchNorm2d(16), torch.randn(4, 8, 6, 6)),
        (conv(groups=8), nn.BatchNorm2d(16), torch.randn(4, 8, 6, 6)),
        (QuantLinear(8, 16, quant_desc_weight=WEIGHT), nn.BatchNorm1d(16), torch.randn(4, 8)),
        (QuantConvTranspose2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), torch.randn(4, 8, 6, 6)),
    ],
    ids=["conv", "conv with bias", "grouped", "depthwise", "linear", "transposed"],
)
def test_integers_and_function_stay(layer: nn.Module, norm: nn.Module, x: Tensor) -> None:
    randomize(norm)
    calibrate(layer, x)
    model = nn.Sequential(layer, norm).eval()
    before, levels = model(x).detach(), integers(layer)
    gamma_sign = norm.weight.detach().sign().numpy()

    assert fold_batchnorm_(model, x[:1]) == [Pair("0", "1")]

    shape = [1] * layer.weight.dim()
    shape[1 if isinstance(layer, QuantConvTranspose2d) else 0] = -1
    np.testing.assert_array_equal(integers(layer), levels * gamma_sign.reshape(shape))
    assert isinstance(model[1], nn.Identity)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "rows", [lambda y: y.flatten(0, 1), lambda y: y.reshape(-1, 16), lambda y: y.view(-1, 16)]
)
def test_rows_of_a_linear_layer(rows) -> None:
    """As LeViT has it: the norm of the features over all tokens of the batch."""

    class Tokens(nn.Module):
        def __init__(self, read_twice: bool) -> None:
            super().__init__()
            self.linear, self.norm = (
                QuantLinear(8, 16, bias=False, quant_desc_weight=WEIGHT),
                nn.BatchNorm1d(16),
            )
            self.read_twice = read_twice

        def forward(self, x: Tensor) -> Tensor:
            y = rows(self.linear(x))
            z = self.norm(y) + y if self.read_twice else self.norm(y)
            return z.reshape(len(x), -1, 16)

    x = torch.randn(4, 5, 8)
    for twice, pairs in ((True, []), (False, [Pair("linear", "norm")])):
        model = Tokens(twice).eval()
        randomize(model.norm)
        calibrate(model.linear, x)
        before, levels = model(x).detach(), integers(model.linear)
        sign = model.norm.weight.detach().sign().numpy()
        assert fold_batchnorm_(model, x[:1]) == pairs
        np.testing.assert_array_equal(integers(model.linear), levels * (1 if twice else sign[:, None]))
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


def test_ties_do_not_tip_over() -> None:
    """Weights exactly between two levels, of which there are none by chance, keep their level under any factor."""
    layer, norm = QuantConv2d(1, 500, 1, bias=False, quant_desc_weight=WEIGHT), nn.BatchNorm2d(500)
    randomize(norm)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(500).remainder(127).add(0.5).reshape(500, 1, 1, 1) / 127)
    layer.weight_quantizer.amax = np.ones((500, 1, 1, 1), np.float32)
    layer.input_quantizer.amax = 1.0
    levels = integers(layer)
    fold_batchnorm_(nn.Sequential(layer, norm).eval(), torch.ones(1, 1, 2, 2))
    np.testing.assert_array_equal(np.abs(integers(layer)), levels)


def test_one_range_becomes_one_per_channel() -> None:
    layer, norm = (
        QuantConv2d(8, 16, 3, quant_desc_weight=QuantDescriptor(8, narrow_range=True)),
        nn.BatchNorm2d(16),
    )
    randomize(norm)
    x = torch.randn(2, 8, 6, 6)
    layer.weight_quantizer.amax, layer.input_quantizer.amax = layer.weight.abs().max().item(), 3.0
    model = nn.Sequential(layer, norm).eval()
    before = model(x).detach()
    fold_batchnorm_(model, x)
    assert layer.weight_quantizer.amax.shape == (16, 1, 1, 1)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


def test_float_model_against_torch() -> None:
    """torch's own fold is the oracle."""
    layer, norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
    randomize(norm)
    model = nn.Sequential(layer, norm).eval()
    expected = torch.nn.utils.fusion.fuse_conv_bn_eval(layer, norm)
    fold_batchnorm_(model, torch.randn(1, 3, 8, 8))
    torch.testing.assert_close(model[0].weight, expected.weight)
    torch.testing.assert_close(model[0].bias, expected.bias)


def test_parameters_keep_their_identity_and_modes_return() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
    weight, statistics = model[0].weight, model[1].running_mean
    before = statistics.clone()
    fold_batchnorm_(model, torch.randn(2, 3, 8, 8))
    assert model[0].weight is weight
    assert model[0].training
    assert torch.equal(statistics, before), "the example must not update the statistics"


class _ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y


class _Returned(_ReadTwice):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = self.conv(x)
        return self.bn(y), y


class _Between(_ReadTwice):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x) * 2)


class _CalledTwice(_ReadTwice):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.conv(x)))


@pytest.mark.parametrize("kind", [_ReadTwice, _Returned, _Between, _CalledTwice])
def test_what_is_no_pair_stays(kind: type[_ReadTwice]) -> None:
    model = kind().eval()
    randomize(model.bn)
    x = torch.randn(2, 3, 4, 4)
    before = model(x)
    assert fold_batchnorm_(model, x) == []
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_other_axes_and_groups_stay() -> None:
    # Normalizes the 5 tokens, not the 6 features.
    tokens = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(5)).eval()
    assert fold_batchnorm_(tokens, torch.randn(2, 5, 4)) == []
    grouped = nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)).eval()
    assert fold_batchnorm_(grouped, torch.randn(2, 4, 5, 5)) == []


def test_dead_channel() -> None:
    """gamma = 0 leaves only beta, and a channel of zero weights only its constant."""
    layer, norm = conv(), nn.BatchNorm2d(16)
    randomize(norm)
    with torch.no_grad():
        norm.weight[0] = 0.0
        layer.weight[1] = 0.0
    x = torch.randn(2, 8, 6, 6)
    calibrate(layer, x)
    model = nn.Sequential(layer, norm).eval()
    before = model(x).detach()
    fold_batchnorm_(model, x)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(ops.fake_quantize(layer.weight, layer.weight_quantizer.amax)).all()


def test_full_range_with_negative_factor_is_refused() -> None:
    """-128 has no opposite in int8."""
    layer, norm = (
        QuantConv2d(1, 1, 1, bias=False, quant_desc_weight=QuantDescriptor(8, axis=0)),
        nn.BatchNorm2d(1),
    )
    with torch.no_grad():
        layer.weight.fill_(-128.0)
        norm.weight.fill_(-1.0)
    layer.weight_quantizer.amax, layer.input_quantizer.amax = np.full((1, 1, 1, 1), 127.0), 1.0
    with pytest.raises(QuantizationError, match="narrow_range"):
        fold_batchnorm_(nn.Sequential(layer, norm).eval(), torch.ones(1, 1, 2, 2))


def test_timms_batchnorm_leaves_its_activation() -> None:
    from timm.layers import BatchNormAct2d

    layer, norm = nn.Conv2d(3, 5, 3), BatchNormAct2d(5, act_layer=nn.Hardswish)
    randomize(norm)
    model, x = nn.Sequential(layer, norm).eval(), torch.randn(2, 3, 8, 8)
    before = model(x).detach()
    assert len(fold_batchnorm_(model, x)) == 1
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


def test_quantizers_of_the_activation_do_not_disturb_the_check() -> None:
    """A difference in the last place may cross the border between two levels."""
    from timm.layers import BatchNormAct2d

    layer, norm = nn.Conv2d(3, 256, 1), BatchNormAct2d(256, act_layer=nn.Identity)
    randomize(norm)
    quantizer = TensorQuantizer(QuantDescriptor(2))
    model, x = nn.Sequential(layer, norm).eval(), torch.randn(1, 3, 1, 1)
    with torch.no_grad():
        norm.bias += 0.5 - model(x).flatten()  # every value is on the border of two levels, up to rounding
    quantizer.amax = 1.0
    norm.act = nn.Sequential(quantizer)
    assert len(fold_batchnorm_(model, x)) == 1
    assert quantizer.is_on
