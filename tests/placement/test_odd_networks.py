"""What people write into a ``forward``, and networks are not written so in torchvision and timm."""

from __future__ import annotations

import copy
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import share_in_onnxruntime, with_statistics
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm

import qzoo
from qzoo.quantizers import quantizers
from qzoo.runtimes import load

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


class Between(nn.Module):
    """Two convolutions, with what a function of the module and the first one's output computes between them."""

    def __init__(self, function, **modules: nn.Module) -> None:
        super().__init__()
        self.stem, self.tail, self.function = conv(3, 8), conv(8, 8), function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.function(self, self.stem(x)))


def made(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    quantized = qzoo.quantize(with_statistics(model, IMAGES), IMAGES)
    qzoo.calibrate(quantized, [IMAGES], progress=False)
    return quantized


def share(model: nn.Module, folder: Path) -> float:
    """Of its multiply-adds that ONNX Runtime has in int8, where it gives what the simulation does but for rounding."""
    path = qzoo.export_onnx(model, folder / "model.onnx", target="onnxruntime", example=IMAGES[:1])
    with torch.no_grad():
        expected = model(IMAGES)
    noise = torch.as_tensor(load(path, "onnxruntime")(IMAGES)) - expected
    assert noise.square().mean() < 1e-3 * expected.square().mean()
    return share_in_onnxruntime(path, IMAGES[:1])


class Named(nn.Module):
    """Its own names are none that quantizers need."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.sites, self.path = conv(8, 8), [1], "here"

    def _call(self, x: Tensor) -> Tensor:
        assert (self.sites, self.path) == ([1], "here")
        return self.conv(x)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self._call(x)) + x


def test_names_of_a_module_s_own() -> None:
    model = nn.Sequential()
    for name, module in (("float_class", conv(3, 8)), ("path", Named()), ("orders", Named())):
        model.add_module(name, module)
    quantized = made(model)
    assert {"path.residual_quantizer", "orders.sigmoid_quantizer"} <= quantizers(quantized).keys()
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(quantized)(IMAGES), quantized(IMAGES))


def _with_a_skip(self: nn.Module, x: Tensor) -> Tensor:
    return self[1](self[0](x)) + self[0](x)


def test_a_forward_of_the_instance() -> None:
    model = nn.Sequential(conv(3, 8), conv(8, 8))
    model.forward = types.MethodType(_with_a_skip, model)
    quantized = made(model)
    assert "residual_quantizer" in quantizers(quantized)
    copied = copy.deepcopy(quantized)
    with torch.no_grad():
        quantized[0].weight.zero_()
        quantized[0].bias.zero_()
        assert not torch.equal(copied(IMAGES), quantized(IMAGES))  # the copy runs its own layers


def test_weights_that_are_computed_are_folded() -> None:
    model = nn.Sequential(
        parametrizations.weight_norm(conv(3, 8)),
        parametrizations.spectral_norm(conv(8, 8)),
        weight_norm(conv(8, 8)),
        prune.l1_unstructured(conv(8, 8), "weight", 0.5),
    ).eval()
    with torch.no_grad():
        expected = model(IMAGES)
        quantized = qzoo.quantize(model, IMAGES)
        assert quantized.qzoo_placement.reasons == []
        assert [name for name, _ in quantized.named_parameters() if "weight" in name] == [
            f"{i}.weight" for i in range(4)
        ]
        for quantizer in quantizers(quantized).values():
            quantizer.disable()
        assert torch.equal(quantized(IMAGES), expected)
        assert torch.equal(model(IMAGES), expected)  # the float model's class is as it was


def changed(_: nn.Module, x: Tensor) -> Tensor:
    y = x.relu()
    y[:, :2] = -1.0
    return y


def part_changed(_: nn.Module, x: Tensor) -> Tensor:
    y = x.relu()
    y[:, :2].neg_()
    return y


@pytest.mark.parametrize("function", [changed, part_changed])
def test_what_is_changed_in_place_may_be_negative(function) -> None:
    quantized = made(Between(function))
    assert not quantized.tail._input_quantizer.unsigned
    with torch.no_grad():
        off = copy.deepcopy(quantized)
        for quantizer in quantizers(off).values():
            quantizer.disable()
        exact = off(IMAGES)
        assert (quantized(IMAGES) - exact).square().mean() < 1e-3 * exact.square().mean()


class Attention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT
        return super().forward(tokens, tokens, tokens)[0].mT.reshape(x.shape)


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 8, 3, 3) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, padding=1)


def recurrent(self: nn.Module, x: Tensor) -> Tensor:
    return self.other(x.flatten(2).mT)[0].mT.reshape(x.shape)


@pytest.mark.parametrize(
    ("function", "other", "name", "words"),
    [
        (
            lambda m, x: (x.movedim(1, -1) @ m.other.weight).movedim(-1, 1),
            nn.Linear(8, 8),
            "matmul",
            "of no layer",
        ),
        (
            lambda m, x: torch.einsum("nchw,cd->ndhw", x, m.other.weight),
            nn.Linear(8, 8),
            "einsum",
            "of no layer",
        ),
        (
            recurrent,
            nn.GRU(8, 4, bidirectional=True, batch_first=True),
            "other",
            "no runtime computes in int8",
        ),
        (lambda m, x: m.other(x), Attention(8, 2, batch_first=True), "other.multi_head", "as one function"),
        (lambda m, x: m.other(x), Held(), "other.kernel", "another name than weight"),
        (changed, None, "setitem", "a change in place"),
        (lambda m, x: F.relu(x) * torch.special.erfcx(x), None, "special_erfcx", "does not know"),
    ],
)
def test_what_stays_in_float_is_named_once(function, other: nn.Module | None, name: str, words: str) -> None:
    quantized = made(Between(function, **({} if other is None else {"other": other})))
    ((left, reason),) = quantized.qzoo_placement.left
    assert left.startswith(name)
    assert words in reason
    assert quantized.qzoo_placement.unreached == ()


def limits(self: nn.Module, x: Tensor) -> Tensor:
    """ReLU in all but name; limits that no quantizer has; two operands, and three; comparisons."""
    x = self.other[0](x.clamp(min=0))
    x = self.other[1](F.hardtanh(x, -0.3, 1.0))
    y = self.other[2](x.clamp(max=0.5))
    y = torch.maximum(F.softsign(y), self.other[3](y))
    z = self.other[4](y)
    return torch.where(z > 0, z, 0.1 * z)


def test_what_stands_between_layers_runs_behind_integers(tmp_path: Path) -> None:
    quantized = made(Between(limits, other=nn.ModuleList(conv(8, 8) for _ in range(5))))
    assert quantized.qzoo_placement.left == ()
    assert share(quantized, tmp_path) == 1.0
    assert [f.rule for f in qzoo.lint(tmp_path / "model.onnx") if "float-island" not in f.rule] == []


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        layers = {"dim_feedforward": 32, "dropout": 0.0, "batch_first": True, "norm_first": True}
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, **layers), 2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.patches(x).flatten(2).mT)[:, 0])


def test_packed_projections_run_in_int8(tmp_path: Path) -> None:
    """Query, key and value of ``nn.MultiheadAttention`` have one weight; both layers' biases are the same zeros."""
    assert share(made(Encoder()), tmp_path) == 1.0


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_packed_projections_are_saved_as_integers(scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Encoder().eval()
    quantized = qzoo.quantize(model, IMAGES, scheme, factory="nets.py:make")
    qzoo.calibrate(quantized, [IMAGES], progress=False)
    attention = quantized.layers.layers[0].self_attn
    assert torch.equal(
        attention._weight_quantizer.amax.flatten(),
        model.layers.layers[0].self_attn.in_proj_weight.abs().amax(1),
    )
    folder = qzoo.save_pretrained(quantized, tmp_path / scheme)
    kept = load_file(folder / "model.safetensors")["layers.layers.0.self_attn.in_proj_weight"]
    assert kept.dtype == (torch.int8 if scheme == "w8a8" else torch.uint8)
    loaded = qzoo.load_pretrained(folder, model=Encoder().eval())
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), quantized(IMAGES))


def twice(self: nn.Module, x: Tensor) -> Tensor:
    for _ in range(2):
        x = x + F.relu(self.norm(self.conv(x)))
    return x


def test_a_convolution_and_its_batchnorm_that_run_twice(tmp_path: Path) -> None:
    """They are not folded into one, so that the BatchNorm needs integers behind the convolution's."""
    quantized = made(Between(twice, conv=conv(8, 8), norm=nn.BatchNorm2d(8)))
    assert share(quantized, tmp_path) == 1.0
