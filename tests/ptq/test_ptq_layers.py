"""Which layers are found, and the patches that their weights meet."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qzoo.errors import CalibrationError
from qzoo.models.resnet_cifar import CifarResNet
from qzoo.ptq.layers import Layer, layers_of
from qzoo.ptq.ranges import calibrate
from qzoo.quant.nn import QuantConv2d, QuantConv2dSame, QuantLinear
from qzoo.scheme import Scheme


def test_layers_in_order_with_their_norms(w8a8: tuple[CifarResNet, CifarResNet], others: Tensor) -> None:
    _, model = w8a8
    layers = layers_of(model, others[:1])
    names = [layer.name for layer in layers]
    assert names[:4] == ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1"]
    assert names[-1] == "fc"
    assert len(names) == sum(isinstance(m, QuantConv2d | QuantLinear) for m in model.modules())
    norms = {layer.name: layer.norm for layer in layers}
    assert norms["layer1.0.conv2"] is model.layer1[0].bn2
    assert norms["layer2.0.downsample.0"] is model.layer2[0].downsample[1]
    assert norms["fc"] is None


def test_what_is_not_ready_is_refused(others: Tensor) -> None:
    with pytest.raises(CalibrationError, match=r"'conv1' has no range yet; call calibrate"):
        layers_of(CifarResNet(1, in_channels=1, quantize=Scheme()), others[:1])
    with pytest.raises(CalibrationError, match="no quantizers"):
        layers_of(CifarResNet(1, in_channels=1), others[:1])
    with pytest.raises(CalibrationError, match="no images"):
        layers_of(CifarResNet(1, in_channels=1, quantize=Scheme()), None)


@pytest.mark.parametrize(
    "layer",
    [
        QuantConv2d(6, 8, 3, padding=1),
        QuantConv2d(6, 8, 3, stride=2, padding=1, groups=2, bias=False),
        QuantConv2d(6, 6, 5, stride=2, padding=2, groups=6),
        QuantConv2d(6, 4, 3, dilation=2, padding=2),
        QuantConv2d(6, 4, (3, 1), padding=(1, 0), padding_mode="reflect"),
        QuantConv2dSame(6, 8, 3, stride=2),
        QuantConv2dSame(6, 8, 3, stride=2, dilation=2, padding=1),
        QuantLinear(6, 5),
    ],
    ids=lambda layer: f"{type(layer).__name__}-{layer.extra_repr()}".replace(" ", ""),
)
def test_weights_times_patches_are_the_layers_output(layer: QuantConv2d | QuantLinear) -> None:
    x = torch.randn(3, 6, 10, 9) if isinstance(layer, QuantConv2d) else torch.randn(7, 6)
    for quantizer in (layer._input_quantizer, layer._weight_quantizer):
        quantizer.disable()
    info = Layer("layer", layer, None)
    patches = info.patches(x, 10_000, torch.Generator().manual_seed(0))
    weight = layer.weight.detach().flatten(1).reshape(patches.shape[0], -1, patches.shape[2])
    product = torch.einsum("gsn,grn->sgr", patches, weight).flatten(1)
    if layer.bias is not None:
        product += layer.bias.detach()
    with torch.no_grad():
        output = layer(x)
    expected = output.movedim(1, -1).reshape(-1, output.shape[1])
    # The order of the positions is drawn: compare them sorted by the first channel.
    torch.testing.assert_close(
        product[product[:, 0].argsort()], expected[expected[:, 0].argsort()], rtol=1e-4, atol=1e-5
    )


def test_the_number_of_positions() -> None:
    layer = Layer("layer", QuantConv2d(2, 2, 1), None)
    patches = layer.patches(torch.randn(5, 2, 8, 8), 10, torch.Generator())
    assert patches.shape == (1, 50, 2)


@pytest.mark.parametrize("kind", ["norm", "bias", "neither"])
def test_shift_subtracts_from_the_output(kind: str) -> None:
    conv = QuantConv2d(2, 3, 1, bias=kind == "bias")
    norm = nn.BatchNorm2d(3).eval() if kind == "norm" else None
    for quantizer in (conv._input_quantizer, conv._weight_quantizer):
        quantizer.disable()
    after = norm if norm is not None else nn.Identity()
    x, delta = torch.randn(2, 2, 4, 4), torch.tensor([1.0, -2.0, 0.5])
    with torch.no_grad():
        before = after(conv(x))
        Layer("conv", conv, norm).shift(delta)
        changed = after(conv(x))
    torch.testing.assert_close(
        before - changed, delta.view(1, 3, 1, 1).expand_as(before), rtol=1e-3, atol=1e-4
    )


def test_a_layer_that_runs_twice_is_left_out() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.once = QuantLinear(4, 4), QuantLinear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.once(self.shared(self.shared(x)))

    model = Twice()
    calibrate(model, [torch.randn(3, 4)], progress=False)
    assert [layer.name for layer in layers_of(model, torch.randn(1, 4))] == ["once"]
