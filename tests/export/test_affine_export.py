"""Models with zero points: the file computes what the simulation computes, in int8, in every runtime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exact import make_exact_
from onnx import numpy_helper
from test_openvino import Network, precisions, quantized
from torch import Tensor, nn

from qzoo.errors import ExportError
from qzoo.export import export_onnx, lint
from qzoo.export.check import sqnr
from qzoo.models.vit import VisionTransformer
from qzoo.quant.nn import QuantConv2d, QuantConvTranspose2d
from qzoo.quantizers import adopt, quantizers
from qzoo.runtimes.ort import OnnxRuntimeRunner
from qzoo.scheme import Scheme

LEVELS = ("none", "basic", "extended", "all")


def zero_points(path: Path) -> list[np.ndarray]:
    """The zero points of all activations."""
    graph = onnx.load(path).graph
    known = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    return [known[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"]


@pytest.mark.parametrize("scheme", ["w8a8", "w4a4"])
def test_onnx_runtime_is_exact_at_every_level(build, tmp_path: Path, scheme: str) -> None:
    model, images = build("resnet8", 28, scheme=scheme, affine=True)
    make_exact_(model, "onnxruntime", images)
    with torch.no_grad():
        expected = model(images)
    assert len(expected.unique()) > 5
    path = export_onnx(model, tmp_path / "model.onnx", example=images)
    assert [str(finding) for finding in lint(path, "onnxruntime")] == []
    wanted = {q.zero_point for q in quantizers(model).values() if q.affine}
    assert len(wanted) > 4
    assert {int(z) for z in zero_points(path)} - {0} == wanted - {0}
    for level in LEVELS:
        got = OnnxRuntimeRunner(path, level=level, optimized=tmp_path / "optimized.onnx")(images)
        assert torch.equal(got, expected), level
    ops = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert ops["QLinearConv"] >= 9
    assert ops["Conv"] == ops["Add"] == 0


def test_openvino_is_exact_and_all_int8(build, tmp_path: Path) -> None:
    """On images that lie on the input's levels, as without zero points (``test_parity.py``)."""
    ov = pytest.importorskip("qzoo.runtimes.ov")
    model, images = build("resnet8", 16, affine=True)
    make_exact_(model, "openvino", images)
    step = next(q for q in quantizers(model).values() if q.role == "input").step_size.item()
    images = (images / step).round() * step
    with torch.no_grad():
        expected = model(images)
    path = export_onnx(model, tmp_path / "model.onnx", example=images, target="openvino")
    assert [str(finding) for finding in lint(path, "openvino")] == []
    assert len({int(z) for z in zero_points(path)}) > 2
    for given in (path, export_onnx(model, tmp_path / "8.onnx", example=images, target="openvino", batch=8)):
        assert torch.equal(ov.OpenVinoRunner(given)(images), expected)
    assert precisions(path) == {("Convolution", "u8"): 9, ("FullyConnected", "u8"): 1}


def test_every_layer_of_a_transformer_runs_in_int8_in_openvino(calibrated, tmp_path: Path) -> None:
    """Operands of products of activations keep zero point 0, with which OpenVINO multiplies them in int8."""
    torch.manual_seed(0)
    model = VisionTransformer(64, 2, depth=1, num_classes=64, quantize=Scheme(affine=True))
    images = torch.randn(2, 3, 224, 224)
    calibrated(model, images)
    path = export_onnx(model, tmp_path / "m.onnx", target="openvino", example=images)
    assert [str(finding) for finding in lint(path, "openvino")] == []
    for shape in (None, [1, 3, 224, 224]):
        assert precisions(path, shape) == {("FullyConnected", "u8"): 6}, "the patches are one of them"


def test_the_input_of_a_transposed_convolution_keeps_zero_point_0() -> None:
    """With another OpenVINO runs it in float."""
    layer = QuantConvTranspose2d(8, 8, 2, 2)
    assert not adopt(Scheme(affine=True), layer.input_quantizer, "input").two_ended
    assert adopt(Scheme(affine=True), QuantConv2d(8, 8, 2).input_quantizer, "input").two_ended


def test_tensorrt_gets_the_symmetric_range(build, tmp_path: Path) -> None:
    files = []
    for affine in (True, False):
        model, images = build("resnet8", 28, affine=affine)
        files.append(export_onnx(model, tmp_path / f"{affine}.onnx", example=images, target="tensorrt"))
    first, second = (onnx.load(path).graph for path in files)
    assert not any(z.any() or z.dtype != np.int8 for z in zero_points(files[0]))
    assert [n.op_type for n in first.node] == [n.op_type for n in second.node]
    assert {t.name: t.raw_data for t in first.initializer} == {t.name: t.raw_data for t in second.initializer}


SILU = nn.functional.silu
FORMS: dict[str, tuple[Callable[[Network, Tensor], Tensor], bool]] = {
    "SiLU": (lambda m, x: SILU(m.narrow(SILU(m.a(x)))), True),
    "hard-swish": (lambda m, x: nn.functional.hardswish(m.narrow(nn.functional.hardswish(m.a(x)))), True),
    "GELU": (lambda m, x: nn.functional.gelu(m.narrow(nn.functional.gelu(m.a(x)))), True),
    "concat of SiLU": (lambda m, x: m.wide(torch.cat([SILU(m.a(x)), SILU(m.b(x))], 1)), True),
    "concat of SiLU and its own input": (
        lambda m, x: m.wide(torch.cat([y := SILU(m.a(x)), m.narrow(y)], 1)),
        False,
    ),
    "SiLU averaged with padding": (lambda m, x: m.point(m.pool(y := SILU(m.a(x)))) + m.narrow(y), True),
    "SiLU, maximum": (lambda m, x: m.narrow(nn.functional.max_pool2d(SILU(m.a(x)), 2)), True),
    "squeeze and excite of SiLU": (
        lambda m, x: m.narrow((y := SILU(m.a(x))) * m.point(y.mean((2, 3), keepdim=True)).sigmoid()),
        False,
    ),
    "skip around SiLU": (lambda m, x: (y := m.a(x)) + m.narrow(SILU(y)), False),
}


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", FORMS)
def test_networks_whose_ranges_lean(tmp_path: Path, name: str, target: str) -> None:
    """A wrong zero point leaves less than 30 dB; only roundings that flip are left here."""
    torch.manual_seed(0)
    how, bias = FORMS[name]
    images = torch.randn(8, 3, 8, 8) + 0.5
    model = quantized(Network(how, bias), images, affine=True)
    path = export_onnx(model, tmp_path / "m.onnx", target=target, example=images[:2])
    with torch.no_grad():
        expected = model(images)
    for given in (path, export_onnx(model, tmp_path / "8.onnx", target=target, example=images, batch=8)):
        assert sqnr(expected, OnnxRuntimeRunner(given)(images)) > 45
        if target == "openvino":
            ov = pytest.importorskip("qzoo.runtimes.ov")
            assert sqnr(expected, ov.OpenVinoRunner(given)(images)) > 45


def test_ends_that_are_missing_are_named(build, tmp_path: Path) -> None:
    model, images = build("resnet8", 28, affine=True)
    quantizers(model)["conv1._input_quantizer"].set_range(torch.tensor(1.0))
    with pytest.raises(ExportError, match=r"both ends of the range \(limits\).*conv1\._input_quantizer"):
        export_onnx(model, tmp_path / "m.onnx", example=images)
    assert export_onnx(model, tmp_path / "m.onnx", example=images, target="tensorrt").exists()
