"""OpenVINO computes what the file says: small networks, each of a form that it once computed otherwise.

The oracle is the simulation: OpenVINO's results differ from it by float32's rounding, as ONNX Runtime's do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import qzoo
from qzoo.export import export_onnx
from qzoo.export.check import sqnr
from qzoo.models.vit import VisionTransformer
from qzoo.quant import quantize_
from qzoo.quant.nn import TensorQuantizer
from qzoo.runtimes.ort import OnnxRuntimeRunner
from qzoo.runtimes.ov import OpenVinoRunner
from qzoo.runtimes.sessions import onnxruntime_session
from qzoo.scheme import Scheme

pytest.importorskip("openvino")

ROUNDING = 100.0  # dB; a flipped level costs about half of it, a lost zero point or scale leaves under 30

Net = Callable[[], nn.Module]


def conv(inputs: int, outputs: int, kernel: int = 3, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias)


class Network(nn.Module):
    """Convolutions (without bias, or a fold of BatchNorm) and a classifier; ``how`` joins them."""

    def __init__(self, how: Callable[[Network, Tensor], Tensor], bias: bool = True) -> None:
        super().__init__()
        self.how = how
        self.a, self.b = conv(3, 8, bias=bias), conv(3, 8)
        self.wide, self.narrow, self.point = conv(16, 8), conv(8, 8), conv(8, 8, 1)
        self.pool = nn.AvgPool2d(3, 1, 1)
        self.fc, self.fc_wide = nn.Linear(8, 10), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.how(self, x)
        if y.dim() == 4:
            y = y.mean((2, 3))
        return self.fc(y) if y.shape[1] == 8 else self.fc_wide(y)


def joined(m: Network, x: Tensor) -> Tensor:
    return torch.cat([m.a(x), m.b(x)], 1)


CONVOLUTIONAL: dict[str, tuple[Callable[[Network, Tensor], Tensor], bool]] = {
    "concat": (lambda m, x: m.wide(joined(m, x)), True),
    "concat of ReLUs": (lambda m, x: m.wide(joined(m, x).relu()), True),
    "concat, scaled": (lambda m, x: m.wide(joined(m, x) * 0.7 + 0.1), True),
    "concat with the layer's own input": (
        lambda m, x: m.wide(torch.cat([m.a(x), m.narrow(m.a(x))], 1)),
        False,
    ),
    "skip around a convolution": (lambda m, x: (y := m.a(x)) + m.narrow(y), False),
    "squeeze and excite": (
        lambda m, x: (y := m.a(x)) * m.point(y.mean((2, 3), keepdim=True)).sigmoid(),
        False,
    ),
    "ReLU and the sum itself": (lambda m, x: (y := m.a(x)) + m.narrow(y.relu()), False),
    "averaged with padding": (lambda m, x: m.point(m.pool(y := m.a(x))) + m.narrow(y), True),
    "concat, averaged with padding": (
        lambda m, x: m.narrow(m.pool(m.wide(y := joined(m, x)))) + m.wide(y),
        True,
    ),
    "pooled, and joined behind": (
        lambda m, x: m.wide(torch.cat([m.narrow(y := nn.functional.max_pool2d(m.a(x), 3)), m.point(y)], 1)),
        True,
    ),
    "a Fire": (
        lambda m, x: torch.cat(
            [
                m.narrow(y := m.point(nn.functional.max_pool2d(m.a(x).relu(), 3)).relu()).relu(),
                m.narrow(y).relu(),
            ],
            1,
        ),
        True,
    ),
    "maximum over the image": (lambda m, x: m.a(x).amax((2, 3)), True),
    "maximum and average": (
        lambda m, x: torch.cat([(y := m.a(x)).amax((2, 3)), y.mean((2, 3))], 1),
        False,
    ),
}


class Tokens(nn.Module):
    """A linear layer on all tokens of the batch at once, N of them an image, and a classifier."""

    def __init__(self, width: int, norm: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        if isinstance(self.norm, nn.Identity):
            y = self.linear(x.reshape(-1, x.shape[2]))
        else:  # as LeViT has it
            y = self.norm(self.linear(x).flatten(0, 1))
        return self.head((x + y.reshape_as(x)).mean(1))


def quantized(model: nn.Module, images: Tensor, affine: bool = False) -> nn.Module:
    """The model quantized by :func:`quantize_`, with the ranges of the images; ``affine``: with zero points."""
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_mean.normal_(0, 0.2)
            norm.running_var.uniform_(0.5, 1.5)
    quantize_(model.eval())
    layers = [m for m in model.modules() if isinstance(m, TensorQuantizer)]
    for q in layers:
        if affine and q.axis is None:
            q.two_ended = q.affine = True
        q.disable_quant()
        q.enable_calib()
    with torch.no_grad():
        model(images)
    for q in layers:
        q.disable_calib()
        q.load_calib_amax(strict=False)
        q.enable_quant()
        if q.amax is None or not q.amax.isfinite().all():  # a layer that this network does without
            q.disable()
    return model


def assert_right(model: nn.Module, images: Tensor, path: Path, limit: float = ROUNDING) -> None:
    """Export a quantized model, and compare OpenVINO with the simulation; ONNX Runtime shows that the file is right."""
    export_onnx(model, path, target="openvino", example=images[:2])
    with torch.no_grad():
        expected = model(images)
    assert sqnr(expected, OnnxRuntimeRunner(path)(images)) > min(limit, 40)
    assert sqnr(expected, OpenVinoRunner(path)(images)) > limit


@pytest.mark.parametrize("affine", [False, True], ids=["symmetric", "affine"])
@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_convolutions(tmp_path: Path, name: str, affine: bool) -> None:
    torch.manual_seed(0)
    how, bias = CONVOLUTIONAL[name]
    images = torch.randn(8, 3, 8, 8)
    assert_right(quantized(Network(how, bias), images, affine), images, tmp_path / "m.onnx")


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("width", [32, 36])
@pytest.mark.parametrize("affine", [False, True], ids=["symmetric", "affine"])
def test_as_many_tokens_as_channels(tmp_path: Path, width: int, norm: bool, affine: bool) -> None:
    torch.manual_seed(0)
    images = torch.randn(8, width, 6, 6)
    assert_right(quantized(Tokens(width, norm), images, affine), images, tmp_path / "m.onnx", limit=50)


def test_a_fixed_batch_is_right_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 8, 8)
    model = quantized(Network(CONVOLUTIONAL["concat, scaled"][0]), images)
    path = export_onnx(model, tmp_path / "m.onnx", target="openvino", example=images, batch=4)
    with torch.no_grad():
        assert sqnr(model(images), OpenVinoRunner(path)(images)) > ROUNDING


def test_the_depthwise_convolution_in_the_place_of_a_pooling_runs_in_int8(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 8, 8)
    model = quantized(Network(CONVOLUTIONAL["averaged with padding"][0]), images)
    path = export_onnx(model, tmp_path / "m.onnx", target="openvino", example=images)
    assert precisions(path) == {("Convolution", "u8"): 4, ("FullyConnected", "i8"): 1}


def precisions(path: Path, shape: list[int] | None = None) -> Counter[tuple[str, str]]:
    """How often OpenVINO runs which kind of layer in which precision; ``shape``: reshaped to it before."""
    import openvino

    core = openvino.Core()
    model = core.read_model(str(path))
    if shape is not None:
        model.reshape(shape)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    infos = [op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops()]
    found = Counter((i["layerType"].astype(str), i["runtimePrecision"].astype(str)) for i in infos)
    return Counter({key: n for key, n in found.items() if key[0] in ("Convolution", "FullyConnected")})


def test_every_layer_of_a_transformer_runs_in_int8(calibrated, tmp_path: Path) -> None:
    """A weight's zero point that a convolution and linear layers share makes both float in a reshaped file."""
    torch.manual_seed(0)
    model = VisionTransformer(64, 2, depth=1, num_classes=64, quantize=Scheme.parse("w8a8"))
    images = torch.randn(2, 3, 224, 224)
    calibrated(model, images)
    dynamic, fixed = (
        export_onnx(model, tmp_path / f"{batch}.onnx", target="openvino", example=images, batch=batch)
        for batch in ("dynamic", 1)
    )
    for found in (precisions(dynamic), precisions(dynamic, [1, 3, 224, 224])):
        assert found == {("FullyConnected", "i8"): 6}
    assert precisions(fixed) == {("Convolution", "u8"): 1, ("FullyConnected", "i8"): 5}


class Rows(nn.Module):
    """A convolution, and LayerNorms of images whose channels lie last: one before a linear layer, one before an add."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.skip = nn.Conv2d(3, 16, 2, stride=2), nn.LayerNorm(16)
        self.norm, self.fc = nn.LayerNorm(16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.skip(self.conv(x).permute(0, 2, 3, 1))
        return self.head((x + self.fc(self.norm(x))).mean((1, 2)))


@pytest.mark.parametrize("batch", ["dynamic", 2])
def test_a_layernorm_of_images_is_one_kernel(tmp_path: Path, batch: int | str) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 8, 8)
    model = quantized(Rows(), images)
    path = export_onnx(model, tmp_path / "m.onnx", target="openvino", example=images, batch=batch)
    run = OpenVinoRunner(path)
    with torch.no_grad():
        assert sqnr(model(images), run(images)) > ROUNDING
    found = executed(run)
    assert [kind for kind, _ in found].count("MVN") == 2
    assert {"RMS", "FakeQuantize"} & {kind for kind, origin in found if "norm" in origin} == set()
    assert any(kind == "MVN" and "fc._input_quantizer" in origin for kind, origin in found)


def executed(run: OpenVinoRunner) -> list[tuple[str, str]]:
    """Type of each operator that OpenVINO executes, and what of the file it computes."""
    infos = [op.get_rt_info() for op in run.compiled.get_runtime_model().get_ordered_ops()]
    return [(i["layerType"].astype(str), i["originalLayersNames"].astype(str)) for i in infos]


@pytest.mark.parametrize(("heads", "batch"), [(2, "dynamic"), (2, 2), (4, "dynamic"), (4, 2)])
def test_heads_are_quantized_within_the_linear_layer(
    calibrated, tmp_path: Path, heads: int, batch: int | str
) -> None:
    torch.manual_seed(0)
    scheme = Scheme.parse("w8a8", "openvino")
    model = VisionTransformer(128, heads, depth=1, image=32, num_classes=5, quantize=scheme)
    images = torch.randn(2, 3, 32, 32)
    calibrated(model, images)
    path = export_onnx(model, tmp_path / "m.onnx", target="openvino", example=images, batch=batch)
    run = OpenVinoRunner(path)
    with torch.no_grad():
        assert sqnr(model(images), run(images)) > 30
    ops = run.compiled.get_runtime_model().get_ordered_ops()
    infos = [op.get_rt_info() for op in ops if "attn.qkv/MatMul" in op.get_friendly_name()]
    assert [i["outputPrecisions"].astype(str) for i in infos] == ["i8"]
    moves = {
        (info["layerType"].astype(str), info["outputPrecisions"].astype(str))
        for op in ops
        if "attn" in op.get_friendly_name()  # patches are put in order, too
        for info in [op.get_rt_info()]
    }
    narrow = 128 // heads < 64
    assert (("Gather", "i8") in moves, ("Transpose", "i8") in moves) == (narrow, not narrow)
    for name, expected in simulated(model.blocks[0].attn, images, model).items():
        got = tensor(path, f"blocks.0.attn.{name}", images)
        assert got.shape == expected.shape
        assert torch.isclose(got, expected, rtol=1e-4).float().mean() > 0.98, name  # but for flips


def simulated(attention: nn.Module, images: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """What the quantizers of query, key and value give."""
    found: dict[str, Tensor] = {}
    names = [f"{part}_quantizer" for part in ("query", "key", "value")]
    for name in names:
        attention.get_submodule(name).register_forward_hook(
            lambda _m, _x, y, name=name: found.update({name: y})
        )
    with torch.no_grad():
        model(images)
    return found


def tensor(path: Path, name: str, images: Tensor) -> Tensor:
    """A tensor within the file, as the file says."""
    graph = onnx.load(path)
    graph.graph.output.append(onnx.ValueInfoProto(name=name))
    onnx.save(graph, path.with_suffix(".inner.onnx"))
    session = onnxruntime_session(path.with_suffix(".inner.onnx"), level="none")
    return torch.as_tensor(session.run([name], {session.get_inputs()[0].name: images.numpy()})[0])


class WithToken(nn.Module):
    """A class token before what convolutions make of the image, and an average of a permuted tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 2, stride=2))
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 1, 8))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = self.stem(x)
        rows = features.flatten(2).transpose(1, 2) + self.position.expand(x.shape[0], -1, -1)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), rows], dim=1)
        mean = nn.functional.adaptive_avg_pool2d(features.permute(0, 2, 3, 1).permute(0, 3, 1, 2), 1)
        return self.fc(torch.cat([tokens.sum(1), mean.flatten(1)], dim=1))


def test_no_file_asks_for_the_number_of_images(tmp_path: Path) -> None:
    """OpenVINO would take it from the first convolution, whose bias it then loses."""
    torch.manual_seed(0)
    images = torch.randn(4, 3, 8, 8)
    model = qzoo.quantize(WithToken().eval(), images, target="openvino")
    qzoo.calibrate(model, [images], progress=False)
    path = export_onnx(model, tmp_path / "m.onnx", target="openvino", example=images)
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert operators.isdisjoint({"Shape", "Gather", "Range"})
    for count in (1, 4):
        got = OpenVinoRunner(path)(images[:count])
        assert sqnr(OnnxRuntimeRunner(path, level="none")(images[:count]), got) > 60
