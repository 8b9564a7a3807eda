"""Files for TensorRT, as its documentation wants them; ONNX Runtime runs them, TensorRT has not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

import qzoo
from qzoo.errors import ExportError
from qzoo.export import check, export_onnx, lint
from qzoo.export.check import sqnr
from qzoo.models.vit import VisionTransformer
from qzoo.quantizers import quantizers, quantizers_off, set_target
from qzoo.runtimes.ort import OnnxRuntimeRunner
from qzoo.scheme import Scheme

FLOATS = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16"}


@pytest.fixture(scope="module")
def transformer() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = VisionTransformer(32, 2, depth=1, num_classes=10, quantize=Scheme(target="tensorrt")).eval()
    images = torch.randn(4, 3, 224, 224)
    qzoo.calibrate(model, [images], progress=False)
    return model, images


def operands(graph: onnx.GraphProto, op_type: str) -> list[list[str]]:
    """What makes the operands of these nodes."""
    makers = {name: node.op_type for node in graph.node for name in node.output}
    return [[makers.get(x, "") for x in node.input] for node in graph.node if node.op_type == op_type]


def test_float16_between_pairs(transformer: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    model, images = transformer
    path = export_onnx(model, tmp_path / "model.onnx", target="tensorrt", example=images, dtype="float16")
    file = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
    onnx.checker.check_model(file, full_check=True)
    graph = file.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    assert (types["image"], types["logits"]) == (TensorProto.FLOAT, TensorProto.FLOAT)
    wide = {name for name, kind in types.items() if kind == TensorProto.FLOAT} - {"image", "logits"}
    assert not wide, "what is float32 in a strongly typed network runs in float32"
    first = next(node for node in graph.node if "image" in node.input and node.op_type != "Shape")
    assert first.op_type == "QuantizeLinear", "the image is rounded once"
    assert [name for name, array in stored.items() if array.dtype == np.float32] == [first.input[1]]
    for name, (weight, quantizer) in weights(model).items():
        pair = next(n for n in graph.node if n.op_type == "DequantizeLinear" and name in n.input[0])
        step = stored[pair.input[1]].astype(np.float64).reshape(-1, *[1] * (weight.dim() - 1))
        found = stored[pair.input[0]] * step
        assert (np.abs(found - weight.detach().numpy()) <= 0.5001 * step).all(), "no weight is clipped"
        assert (step.ravel() >= (quantizer.amax / 127).numpy().ravel() * (1 - 1e-6)).all()
    result = check(path, model, images, target="tensorrt")
    assert result.runtime == "onnxruntime"
    with torch.no_grad(), quantizers_off(model):
        exact = model(images)
    with torch.no_grad():
        simulated = set_target(model, "tensorrt")(images)
    assert sqnr(exact, OnnxRuntimeRunner(path)(images)) > sqnr(exact, simulated) - 1.0
    assert result.sqnr_db > 30
    assert not lint(path, "tensorrt")


def weights(model: nn.Module) -> dict:
    from qzoo.quantizers import weight_quantizers

    return {name: pair for name, pair in weight_quantizers(model).items() if "patch" not in name}


def test_attention_reads_dequantized_operands(transformer: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    """The scaled query and the transposed key are quantized right before the product; nothing else changes."""
    model, images = transformer
    path = export_onnx(model, tmp_path / "model.onnx", target="tensorrt", example=images)
    products = [kinds for kinds in operands(onnx.load(path).graph, "MatMul") if "Transpose" not in kinds]
    assert products == [["DequantizeLinear"] * 2] * 2
    scores = [n for n in onnx.load(path).graph.node if n.op_type == "Softmax"]
    assert operands(onnx.load(path).graph, "Softmax") == [["MatMul"]]
    assert len(scores) == 1
    with torch.no_grad():
        simulated = set_target(model, "tensorrt")(images)
    assert sqnr(simulated, OnnxRuntimeRunner(path)(images)) > 60


class Scores(nn.Module):
    """Attention that scales the scores, not the query, as LeViT has it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.head = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        scores = (q @ k.transpose(-2, -1)) * 0.3
        return self.head((scores.softmax(-1) @ v).mean(1))


def test_a_scale_behind_the_product_moves_before_the_pair(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(8, 10, 16)
    model = qzoo.quantize(Scores().eval(), images, target="tensorrt")
    qzoo.calibrate(model, [images], progress=False)
    path = export_onnx(model, tmp_path / "model.onnx", target="tensorrt", example=images)
    graph = onnx.load(path).graph
    assert operands(graph, "Softmax") == [["MatMul"]]
    assert "Mul" in {node.op_type for node in graph.node}
    with torch.no_grad():
        assert sqnr(model(images), OnnxRuntimeRunner(path)(images)) > 60


class NextBlock(nn.Module):
    """As in ConvNeXt: a depthwise convolution, LayerNorm over channels last, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        x = x + self.fc2(nn.functional.gelu(self.fc1(y))).permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


def test_a_convolution_before_layernorm_writes_int8(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(8, 3, 16, 16)
    model = qzoo.quantize(NextBlock().eval(), images, target="tensorrt")
    qzoo.calibrate(model, [images], progress=False)
    path = export_onnx(model, tmp_path / "model.onnx", target="tensorrt", example=images, dtype="float16")
    graph = onnx.load(path).graph
    makers = {name: node for node in graph.node for name in node.output}
    node, chain = next(n for n in graph.node if n.op_type == "LayerNormalization"), []
    while node.op_type != "Conv":
        node = makers[node.input[0]]
        chain.append(node.op_type)
    assert chain == ["DequantizeLinear", "QuantizeLinear", "Transpose", "Conv"]
    with torch.no_grad():
        assert sqnr(model(images), OnnxRuntimeRunner(path)(images)) > 30
    names = {name for name, quantizer in quantizers(model).items() if quantizer.role == "norm"}
    assert names == {"norm.norm_quantizer"}
    set_target(model, "openvino")
    assert not quantizers(model)["norm.norm_quantizer"].is_on


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_float16_of_convolutions_and_of_half_models(build, tmp_path: Path, dtype: torch.dtype) -> None:
    model, images = build("resnet8", 28)
    path = export_onnx(
        model.to(dtype), tmp_path / "model.onnx", target="tensorrt", example=images, dtype="float16"
    )
    graph = onnx.load(path).graph
    ends = [FLOATS[v.type.tensor_type.elem_type] for v in (*graph.input, *graph.output)]
    assert ends == [str(dtype).removeprefix("torch.")] * 2
    assert "Cast" not in {n.op_type for n in graph.node if "image" in n.input}
    got = OnnxRuntimeRunner(path)(images.to(dtype))
    with torch.no_grad():
        simulated = set_target(model.float(), "tensorrt")(images)
    assert sqnr(simulated, got.float()) > 20


def test_float16_of_a_float_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 3)).eval(),
        torch.randn(2, 3, 8, 8),
    )
    path = export_onnx(model, tmp_path / "model.onnx", target="tensorrt", example=images, dtype="float16")
    assert "Cast" in {n.op_type for n in onnx.load(path).graph.node if "image" in n.input}
    with torch.no_grad():
        assert 40 < sqnr(model(images), OnnxRuntimeRunner(path)(images)) < 100


def test_refusals(transformer: tuple[nn.Module, Tensor], tmp_path: Path) -> None:
    model, images = transformer
    for target in ("onnxruntime", "openvino"):
        with pytest.raises(ValueError, match=f"'float16' is for target 'tensorrt'.*{target}"):
            export_onnx(model, tmp_path / "x.onnx", target=target, example=images, dtype="float16")
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, not 'half'"):
        export_onnx(model, tmp_path / "x.onnx", target="tensorrt", example=images, dtype="half")
    with pytest.raises(ExportError, match="needs to be 19 or higher: float16 scales"):
        export_onnx(model, tmp_path / "x.onnx", target="tensorrt", example=images, dtype="float16", opset=18)
    assert not list(tmp_path.iterdir())
    assert quantizers(model)
