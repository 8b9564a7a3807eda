"""``qzoo.quantize``: small networks of every kind, where their quantizers go, and that they stay ordinary modules."""

from __future__ import annotations

import copy
import logging
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from networks import with_statistics
from torch import Tensor, nn

import qzoo
from qzoo.accuracy import Fidelity
from qzoo.errors import ArgumentError, ExportError, QuantizationError
from qzoo.placement.scope import Scope
from qzoo.quant.nn import QuantConv2d
from qzoo.quantizers import quantizers, quantizers_off, set_target
from qzoo.runtimes import load
from qzoo.scheme import Scheme

SIZE = 16


def conv(inputs: int, outputs: int, kernel: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(width, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return F.relu(out)


class Squeeze(nn.Module):
    """Hard-swish, then a gate of squeezed features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.bn, self.act = conv(width, width, bias=False), nn.BatchNorm2d(width), nn.Hardswish()
        self.fc1, self.fc2 = conv(width, 4, 1), conv(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.conv(x)))
        gate = F.hardsigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))
        return x * gate


class Shuffle(nn.Module):
    """Half of the channels goes through a layer; then all are joined and shuffled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv(width // 2, width // 2)

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, 1)
        x = torch.cat([kept, F.relu(self.conv(changed))], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = F.linear(self.norm(tokens), self.qkv.weight, self.qkv.bias).chunk(3, -1)
        tokens = tokens + self.drop(self.proj(F.scaled_dot_product_attention(q, k, v)))
        return tokens.transpose(1, 2).reshape(n, c, h, w)


class Network(nn.Module):
    def __init__(self, block: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.stem = conv(3, width)
        self.block = block
        self.aux: nn.Module | None = nn.Linear(width, 5)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(F.relu(self.stem(x)))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.aux(x) if self.training else self.fc(x)


BLOCKS = {"residual": Residual, "squeeze": Squeeze, "shuffle": Shuffle, "attention": Attention}


def built(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    images = torch.randn(4, 3, SIZE, SIZE)
    return with_statistics(Network(BLOCKS[kind](8)), images), images


def quantized(kind: str) -> tuple[nn.Module, nn.Module, Tensor]:
    model, images = built(kind)
    made = qzoo.quantize(model, images)
    qzoo.calibrate(made, [images], progress=False)
    return model, made, images


ROLES = {
    "residual": {
        "stem._input_quantizer": "input",
        "block.conv1._input_quantizer": "input",
        "block.conv2._input_quantizer": "input",
        "block.branch_quantizer": "branch",
        "block.residual_quantizer": "residual",
    },
    "squeeze": {
        "stem._input_quantizer": "input",
        "block.conv._input_quantizer": "input",
        "block.act.activation_quantizer": "activation",
        "block.pool_quantizer": "pool",
        "block.fc1._input_quantizer": "input",
        "block.fc2._input_quantizer": "input",
        "block.activation_quantizer": "activation",
        "block.left_quantizer": "input",
        "block.right_quantizer": "input",
    },
    "shuffle": {
        "stem._input_quantizer": "input",
        "block.move_quantizer": "input",
        "block.conv._input_quantizer": "input",
        "block.concat_quantizer": "input",
    },
    "attention": {
        "stem._input_quantizer": "input",
        "block.qkv._input_quantizer": "input",
        "block.query_quantizer": "product",
        "block.key_quantizer": "product",
        "block.value_quantizer": "product",
        "block.softmax_quantizer": "product",
        "block.proj._input_quantizer": "input",
        "block.residual_quantizer": "residual",
        "block.branch_quantizer": "branch",
        "block.norm.activation_quantizer": "activation",
    },
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_places(kind: str) -> None:
    _, made, _ = quantized(kind)
    found = {n: q.role for n, q in quantizers(made).items() if q.role != "weight"}
    rest = {"pool_quantizer": "pool", "fc._input_quantizer": "input", "output_quantizer": "output"}
    assert found == {**ROLES[kind], **rest}
    assert made.qzoo_placement.unreached == ("aux",)
    assert made.qzoo_placement.left == ()


class Tokens(nn.Module):
    """A LayerNorm behind a layer and a dropout, positions by a layer, and attention on what a convolution gives."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.pos1, self.pos2, self.fc = nn.Linear(2, 4), nn.Linear(4, width), nn.Linear(width, width)
        self.drop, self.norm, self.qkv = nn.Dropout(0.1), nn.LayerNorm(width), conv(width, 3 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        tokens = x.flatten(2).transpose(1, 2) + self.pos2(self.pos1(torch.ones(h * w, 2)).relu())
        tokens = tokens + self.norm(self.drop(self.fc(tokens)))
        q, k, v = self.qkv(tokens.transpose(1, 2).reshape(x.shape)).flatten(2).chunk(3, 1)
        return (v @ (q.transpose(1, 2) @ k).softmax(1)).reshape(x.shape)


def test_roles_beside_layer_norms() -> None:
    torch.manual_seed(0)
    made = qzoo.quantize(Network(Tokens()).eval(), torch.randn(1, 3, SIZE, SIZE))
    assert {n: q.role for n, q in quantizers(made.block).items() if q.role != "weight"} == {
        "activation_quantizer": "activation",  # of the stem, which the position is added to
        "fc._input_quantizer": "input",
        "residual_quantizer": "stream",
        "branch_quantizer": "stream",
        "qkv._input_quantizer": "input",
        "move_quantizer": "input",
        "left_quantizer1": "input",
        "right_quantizer1": "input",
        "left_quantizer2": "input",
        "right_quantizer2": "input",
    }
    assert made.qzoo_placement.left == ()


class Counts(nn.Module):
    """Adds before the one that has quantizers: constants, integers, and in training BatchNorm's count."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv, self.bn, self.a = conv(width, width), nn.BatchNorm2d(width), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        constant = (self.a + self.a) * 0 + 1 + (torch.tensor(1) + 1)
        return x + self.bn(self.conv(x)) * (constant / 3)


@pytest.mark.parametrize("training", [False, True])
def test_other_calls_of_the_function_do_not_move_a_site(training: bool) -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, SIZE, SIZE)
    made = qzoo.quantize(with_statistics(Network(Counts()), images), images).train(training)
    seen = {}
    for name in ("residual_quantizer", "branch_quantizer"):
        made.block.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: args[0]})
        )
    parts = []
    made.block.register_forward_pre_hook(lambda module, args: parts.append(args[0]))
    made.block.bn.register_forward_hook(lambda module, args, output: parts.append(output))
    with quantizers_off(made):
        made(images)
    torch.testing.assert_close(seen["residual_quantizer"], parts[0], rtol=0, atol=0)
    torch.testing.assert_close(seen["branch_quantizer"], parts[1], rtol=0, atol=0)
    assert made.block.bn.num_batches_tracked == 1 + training


class Positions(nn.Module):
    """Joins a token; resizes its positions for other images than the example, and in export, as timm does."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.token, self.fc = nn.Parameter(torch.randn(1, 1, width)), nn.Linear(width, width)
        self.positions = nn.Parameter(torch.randn(1, SIZE * SIZE + 1, width))

    def forward(self, x: Tensor) -> Tensor:
        size, tokens, positions = x.shape[2:], x.flatten(2).transpose(1, 2), self.positions
        if torch.compiler.is_exporting() or size != (SIZE, SIZE):
            first, rest = positions.split([1, SIZE * SIZE], 1)
            rest = F.interpolate(rest.transpose(1, 2).unflatten(2, (SIZE, SIZE)) + 0, size)
            positions = torch.cat([first, rest.flatten(2).transpose(1, 2)], 1)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], 1) + positions
        tokens = tokens + self.fc(tokens).relu()
        return tokens[:, 1:].transpose(1, 2).reshape(x.shape)


def test_what_is_computed_from_constants_moves_no_site(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = Network(Positions()).eval(), torch.randn(2, 3, SIZE, SIZE)
    made = qzoo.quantize(model, images)
    qzoo.calibrate(made, [images], progress=False)
    larger = torch.randn(2, 3, SIZE, SIZE + 4)
    with torch.no_grad():
        with quantizers_off(made):
            torch.testing.assert_close(made(larger), model(larger), rtol=0, atol=1e-6)
        assert torch.equal(torch.compile(made, backend="aot_eager", fullgraph=True)(images), made(images))
        path = qzoo.export_onnx(made, tmp_path / "net.onnx", example=images)
        assert Fidelity.of(torch.as_tensor(load(path)(images)), made(images)).sqnr_db > 60


def test_a_classifier_that_is_a_convolution_is_the_last_layer() -> None:
    head = nn.Sequential(conv(8, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    made = qzoo.quantize(
        nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), head), torch.zeros(1, 3, 8, 8), "w4a4"
    )
    layers = [module for module in made.modules() if isinstance(module, QuantConv2d)]
    assert [(m.input_quantizer.num_bits, m.weight_quantizer.num_bits) for m in layers] == [
        (8, 8),
        (4, 4),
        (8, 8),
    ]


class Activated(nn.Module):
    """A layer is added behind its ReLU, as in the branches of an HRNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(8, 8), conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + x) + F.relu6(self.conv1(x))


def test_the_branch_of_an_add_may_be_a_relu() -> None:
    """OpenVINO computes it with the add, and leaves out a Q between (``branch-not-rounded`` of lint)."""
    torch.manual_seed(0)
    made = qzoo.quantize(Network(Activated()).eval(), torch.randn(2, 3, SIZE, SIZE))
    roles = {n: q.role for n, q in quantizers(made.block).items() if "conv" not in n}
    assert sorted(roles.values()) == ["branch", "branch", "residual", "residual"]
    relu6 = [q for q in quantizers(made.block).values() if q.role == "branch" and q.nonnegative]
    assert len(relu6) == 1


def test_a_shuffle_has_one_range() -> None:
    _, made, _ = quantized("shuffle")
    names = ("move_quantizer", "conv._input_quantizer", "concat_quantizer")
    tied = [made.block.get_submodule(name) for name in names] + [made.pool_quantizer]
    assert len({q.group for q in tied}) == 1
    assert tied[0].group
    assert len({q.amax.item() for q in tied}) == 1
    assert all(q.unsigned for q in tied)


@pytest.mark.parametrize("kind", BLOCKS)
def test_parameters_and_the_float_model_stay(kind: str) -> None:
    model, made, images = quantized(kind)
    assert dict(model.named_parameters()).keys() == dict(made.named_parameters()).keys()
    assert not any(isinstance(m, Scope) for m in model.modules())
    assert not quantizers(model)
    missing, unexpected = made.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert all(key.endswith(("._amax", "._limits")) for key in missing)
    with quantizers_off(made), torch.no_grad():
        torch.testing.assert_close(made(images), model(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", BLOCKS)
def test_copies_are_the_same(kind: str) -> None:
    _, made, images = quantized(kind)
    with torch.no_grad():
        expected = made(images)
        assert torch.equal(copy.deepcopy(made)(images), expected)
        assert torch.equal(pickle.loads(pickle.dumps(made))(images), expected)
        other = qzoo.quantize(built(kind)[0], images)
        other.load_state_dict(made.state_dict())
        assert torch.equal(other(images), expected)
        exported = torch.export.export(made, (images,)).module()
        torch.testing.assert_close(exported(images), expected)


def test_export_with_open_sizes() -> None:
    """Batch, height and width, for torch.export; files of ONNX leave the batch open."""
    _, made, images = quantized("squeeze")
    free = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        exported = torch.export.export(
            made, (images,), dynamic_shapes=({0: free, 2: free, 3: free},)
        ).module()
        other = torch.randn(3, 3, 2 * SIZE, SIZE + 4)
        torch.testing.assert_close(exported(other), made(other))


class OneByOne(nn.Module):
    """Takes the images apart, so that their number is fixed where the module is recorded."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([image.relu() for image in x])


def test_a_batch_size_that_can_not_be_left_open(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(3, 3, SIZE, SIZE)
    made = qzoo.quantize(Network(OneByOne()).eval(), images)
    qzoo.calibrate(made, [images], progress=False)
    with pytest.raises(
        ExportError, match=r"^the forward of Network makes .* takes only one: pass batch=1 or"
    ):
        qzoo.export_onnx(made, tmp_path / "open.onnx", example=images)
    path = qzoo.export_onnx(made, tmp_path / "three.onnx", example=images, batch=3)
    with torch.no_grad():
        torch.testing.assert_close(torch.as_tensor(load(path)(images)), made(images), rtol=0.02, atol=0.02)


def test_strict_export_is_refused() -> None:
    _, made, images = quantized("residual")
    with pytest.raises(Exception, match="strict=False"):
        torch.export.export(made, (images,), strict=True)


def test_torch_compile() -> None:
    _, made, images = quantized("shuffle")
    with torch.no_grad():
        compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), made(images))


def test_training_takes_the_other_path() -> None:
    """Dropout and the auxiliary head of a model in training do not move the sites."""
    _, made, images = quantized("attention")
    set_target(made, "openvino")
    seen: list[str] = []
    for name, quantizer in quantizers(made).items():
        quantizer.register_forward_hook(lambda *_, name=name: seen.append(name))
    made.train()(images).sum().backward()
    assert "block.softmax_quantizer" in seen
    assert "block.residual_quantizer" in seen
    assert made.block.qkv.weight.grad.abs().sum() > 0


class Changed(nn.Module):
    """Adds twice; in training, or for large images, in another order."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.change = change
        self.conv1, self.conv2 = conv(8, 8), conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        other = self.training or x.shape[-1] > SIZE
        out = self.conv1(x)
        if other and self.change == "more":
            out = out + 0.1 * x
        if not (other and self.change == "skip"):
            out = out + x
        if other and self.change == "end":
            return out
        out = self.conv2(out) + out
        return out + x if other and self.change == "again" else out


@pytest.mark.parametrize(
    ("change", "call"),
    [
        ("more", "add-like call 2 comes after block.conv1"),
        ("skip", "add-like call 1 comes after block.conv2"),
        ("again", "add-like call 3 comes after block.conv2"),
        ("none", ""),
        ("end", ""),
    ],
)
def test_a_forward_that_moves_its_sites_is_refused(change: str, call: str) -> None:
    torch.manual_seed(0)
    made = qzoo.quantize(Network(Changed(change)).eval(), images := torch.randn(2, 3, SIZE, SIZE))
    qzoo.calibrate(made, [images], progress=False)
    for training, given in ((True, images), (False, torch.randn(2, 3, 2 * SIZE, SIZE).transpose(2, 3))):
        mode = "in training" if training else "in inference"
        made.train(training)
        if call:
            with pytest.raises(QuantizationError, match=f"^block: {mode} {call}, unlike"):
                made(given)
        else:
            assert made(given).isfinite().all()
        assert made.eval()(images).isfinite().all()


def test_a_layer_that_was_replaced_moves_no_site() -> None:
    _, made, images = quantized("residual")
    made.block.conv2 = conv(8, 8)
    assert made(images).isfinite().all()


class Fewer(nn.Module):
    """No module stands between its calls, by which one could be told from the other."""

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.training else x + x.roll(1, 2)
        return x + x.relu()


class Both(Network):
    """Returns two results in training, as GoogLeNet does."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        result = super().forward(x)
        return (result, result) if self.training else result


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Both, "^Both returns a tuple, and one tensor on the example"),
        (Network, r"^block: in training 1 add-like call\(s\) are made, not 2"),
    ],
)
def test_training_that_can_not_be_told_from_inference(kind: type[Network], words: str) -> None:
    images = torch.randn(2, 3, SIZE, SIZE)
    made = qzoo.quantize(kind(Fewer() if kind is Network else nn.Identity()).eval(), images)
    qzoo.calibrate(made, [images], progress=False)
    with pytest.raises(QuantizationError, match=words):
        made.train()(images)


def test_exclude() -> None:
    model, images = built("squeeze")
    made = qzoo.quantize(model, images, exclude=["block", "fc"])
    around = {"block.conv._input_quantizer", "fc._input_quantizer"}  # which int8 kernels make
    assert {n for n in quantizers(made) if n.startswith(("block", "fc"))} == around
    assert made.qzoo_placement.excluded == ("block.conv", "block.fc1", "block.fc2", "fc")
    with pytest.raises(ArgumentError, match="'nothing' names no module"):
        qzoo.quantize(model, images, exclude="nothing")


def test_targets_switch() -> None:
    _, made, _ = quantized("squeeze")
    on = {}
    for target in ("onnxruntime", "openvino", "tensorrt"):
        set_target(made, target)
        on[target] = made.block.act.activation_quantizer.is_on, made.block.left_quantizer.is_on
    assert on == {"onnxruntime": (True, True), "openvino": (False, True), "tensorrt": (False, True)}


def gated(x: Tensor) -> Tensor:
    return x * F.sigmoid(x)


def squeezed(x: Tensor) -> Tensor:
    return x * x.mean((2, 3), keepdim=True).sigmoid()


class Between(nn.Module):
    """Two convolutions with a function between them."""

    def __init__(self, function) -> None:
        super().__init__()
        self.first, self.second, self.function = conv(3, 8), conv(8, 4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first(x)))


@pytest.mark.parametrize(
    ("function", "affine"),
    [
        (nn.SiLU(), True),
        (F.silu, True),
        (nn.Hardswish(), True),
        (gated, True),
        (squeezed, False),
        (F.gelu, False),
        (F.relu, False),
    ],
)
def test_activations_get_zero_points_behind_silu_and_hard_swish(function, affine: bool) -> None:
    images = torch.randn(1, 3, SIZE, SIZE)
    for scheme in ("w8a8", "w4a8", True):
        made = qzoo.quantize(Between(function), images, scheme)
        assert made.qzoo_scheme.affine is affine
        assert any(q.two_ended for q in quantizers(made).values()) is affine
        assert not any(q.affine for q in quantizers(set_target(made, "tensorrt")).values())
    for given in (True, False):  # a Scheme is taken as it is
        made = qzoo.quantize(Between(function), images, Scheme(affine=given))
        assert made.qzoo_scheme == Scheme(affine=given)
        assert any(q.two_ended for q in quantizers(made).values()) is given


class Stated(nn.Conv2d):
    """Named differently, computes the same."""


class Scaled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * 2, self.bias, padding=self.padding)


class Own(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=self.padding).relu()


def test_subclasses_of_layers(caplog) -> None:
    images = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(Stated(3, 4, 3), Own(4, 4, 3, padding=1), Scaled(4, 4, 3, padding=1))
    with caplog.at_level(logging.WARNING):
        made = qzoo.quantize(model, images)
    assert isinstance(made[0], QuantConv2d)
    assert isinstance(made[1], Own)
    assert made[1]._weight_quantizer.role == "weight"
    assert [name for name, _ in made.qzoo_placement.left] == ["2.conv2d"]
    assert "2.conv2d: a weight that is computed in forward" in caplog.text
    qzoo.calibrate(made, [images], progress=False)
    seen = made[1]._weight_quantizer.amax.flatten()
    torch.testing.assert_close(seen, model[1].weight.abs().amax((1, 2, 3)), rtol=0, atol=0)


class Gate(nn.Module):
    """Goes another way where the values say so."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if (x.mean() > 0) else x


class Shrink(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.erfcx(x)


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (Gate(), "1: asks for values of its tensors"),
        (Shrink(), "1.*erfcx: an operation that qzoo does not know"),
    ],
)
def test_what_is_reported(odd: nn.Module, words: str, caplog) -> None:
    images = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(conv(3, 4), odd, conv(4, 2)).eval()
    with caplog.at_level(logging.WARNING):
        made = qzoo.quantize(model, images)
    assert re.search(words, caplog.text)
    qzoo.calibrate(made, [images], progress=False)
    with torch.no_grad():
        assert made(images).isfinite().all()


def test_other_sizes_and_batches_run() -> None:
    """The example's size is no part of the quantized model."""
    _, made, _ = quantized("squeeze")
    with torch.no_grad():
        assert made(torch.randn(3, 3, 2 * SIZE, SIZE)).shape == (3, 5)


def test_no_network_of_torchvision_is_said_to_decide() -> None:
    made = qzoo.quantize(torchvision.models.shufflenet_v2_x0_5(), torch.zeros(1, 3, 32, 32))
    assert made.qzoo_placement.left == ()


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Dict(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": x}


class InPlace(nn.Module):
    """What is added in place is read under its old name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(3, 3), conv(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        out.add_(self.conv2(x))
        return self.conv2(out)


def test_refusals() -> None:
    images = torch.zeros(1, 3, 8, 8)
    for model, words in (
        (Two(), "can't run the example, .* as its only input"),
        (Dict(), "returns a dict"),
        (InPlace(), "in place"),
        (nn.Sequential(conv(3, 3), torch.jit.script(nn.ReLU())), "1 is TorchScript"),
        (torch.compile(nn.Sequential(conv(3, 3))), "torch.compile"),
        (conv(3, 3), "itself a Conv2d; put it into an nn.Sequential"),
    ):
        with pytest.raises(QuantizationError, match=words):
            qzoo.quantize(model, images + torch.randn(1, 3, 8, 8))
    split = nn.Sequential(conv(3, 3), conv(3, 3).to("meta"))
    with pytest.raises(QuantizationError, match=r"cpu, meta; move the model to one device"):
        qzoo.quantize(split, images)
    with pytest.raises(QuantizationError, match="quantizers already"):
        qzoo.quantize(qzoo.resnet20(quantize=True), images)
