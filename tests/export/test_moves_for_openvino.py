"""Rewrites of moves for OpenVINO: the results of the file without them, in OpenVINO, and the operators that it runs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from qzoo.export import export_onnx, moves_for_openvino, rewrites
from qzoo.export.check import sqnr
from qzoo.models.swin import SwinTransformer
from qzoo.models.vit import VisionTransformer
from qzoo.runtimes.ov import OpenVinoRunner
from qzoo.scheme import Scheme

pytest.importorskip("openvino")

MOVES = tuple(
    rewrite for rewrite in rewrites.FOR["openvino"] if rewrite.__module__ == moves_for_openvino.__name__
)
OF_WINDOWS = (
    moves_for_openvino.turn_rows,
    moves_for_openvino.gather_windows,
    moves_for_openvino.add_mask_at_once,
)


def swin(quantize: bool, calibrated) -> tuple[nn.Module, Tensor]:
    """Windows of 4 x 4 on 8 x 8 patches, shifted in the second block; heads of 16 columns."""
    torch.manual_seed(0)
    scheme = Scheme.parse("w8a8", "openvino") if quantize else None
    model = SwinTransformer(32, (2,), 0.0, head=16, window=4, num_classes=6, quantize=scheme)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    images = torch.randn(3, 3, 32, 32)
    if quantize:
        calibrated(model, images)
    return model.eval(), images


def without(monkeypatch: pytest.MonkeyPatch, left_out: tuple[rewrites.Rewrite, ...]) -> None:
    kept = tuple(rewrite for rewrite in rewrites.FOR["openvino"] if rewrite not in left_out)
    monkeypatch.setitem(rewrites.FOR, "openvino", kept)


def executed(run: OpenVinoRunner) -> Counter[str]:
    """Types of the operators of attentions."""
    infos = [op.get_rt_info() for op in run.compiled.get_runtime_model().get_ordered_ops()]
    return Counter(
        i["layerType"].astype(str) for i in infos if ".attn" in i["originalLayersNames"].astype(str)
    )


@pytest.mark.parametrize(
    ("quantize", "batch"),
    [
        (True, "dynamic"),
        pytest.param(True, 3, marks=pytest.mark.slow),
        pytest.param(False, "dynamic", marks=pytest.mark.slow),
    ],
)
def test_shifted_windows(monkeypatch, calibrated, tmp_path: Path, quantize: bool, batch: int | str) -> None:
    model, images = swin(quantize, calibrated)
    paths = {}
    for name, left_out in {"new": (), "heads as before": OF_WINDOWS, "plain": MOVES}.items():
        with monkeypatch.context() as patch:
            without(patch, left_out)
            paths[name] = export_onnx(
                model, tmp_path / f"{name}.onnx", target="openvino", example=images, batch=batch
            )
    runs = {name: OpenVinoRunner(path) for name, path in paths.items()}
    found = {name: run(images) for name, run in runs.items()}
    with torch.no_grad():
        assert sqnr(model(images), found["new"]) > (30 if quantize else 100)
    assert sqnr(found["heads as before"], found["new"]) > 100
    new, plain = executed(runs["new"]), executed(runs["plain"])
    assert new["Softmax"] == new["MatMul"] == 0 < plain["Softmax"], "products, sum and softmax are one kernel"
    assert new["Concatenation"] < plain["Concatenation"]
    if quantize:
        assert new["Transpose"] + new["Split"] + new["VariadicSplit"] == 0
        assert new["FakeQuantize"] < plain["FakeQuantize"] or batch != "dynamic"


class Turned(nn.Module):
    """A convolution, whose channels are put last for a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 16, 2, stride=2), nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x).permute(0, 2, 3, 1)).mean((1, 2)))


@pytest.mark.parametrize("batch", ["dynamic", 2])
def test_an_image_is_turned_as_rows(monkeypatch, tmp_path: Path, batch: int | str) -> None:
    torch.manual_seed(0)
    model, images = Turned().eval(), torch.randn(2, 3, 8, 12)
    path = export_onnx(model, tmp_path / "m.onnx", target="openvino", example=images, batch=batch)
    without(monkeypatch, MOVES)
    plain = export_onnx(model, tmp_path / "plain.onnx", target="openvino", example=images, batch=batch)
    assert torch.equal(OpenVinoRunner(path)(images), OpenVinoRunner(plain)(images))
    turned = {
        tuple(a.ints) for node in onnx.load(path).graph.node for a in node.attribute if a.name == "perm"
    }
    assert ((0, 2, 3, 1) in turned) == (batch != "dynamic")
    layouts = [
        info["outputLayouts"].astype(str)
        for info in (op.get_rt_info() for op in OpenVinoRunner(path).compiled.get_runtime_model().get_ops())
        if info["layerType"].astype(str) == "Transpose"
    ]
    assert "acdb" not in layouts


@pytest.mark.parametrize(
    ("patch", "within", "quantize"), [(16, True, False), (16, True, True), (8, False, True)]
)
def test_wide_patches_are_a_product(
    monkeypatch, calibrated, tmp_path: Path, patch: int, within: bool, quantize: bool
) -> None:
    torch.manual_seed(0)
    scheme = Scheme.parse("w8a8", "openvino") if quantize else None
    model = VisionTransformer(64, 1, depth=1, image=32, patch=patch, num_classes=5, quantize=scheme)
    images = torch.randn(2, 3, 32, 32)
    if quantize:
        calibrated(model, images)
    path = export_onnx(model, tmp_path / "m.onnx", target="openvino", example=images)
    without(monkeypatch, MOVES)
    plain = export_onnx(model, tmp_path / "plain.onnx", target="openvino", example=images)
    runs = [OpenVinoRunner(file) for file in (path, plain)]
    assert sqnr(runs[1](images), runs[0](images)) > (30 if quantize else 100)
    types = [
        Counter(
            op.get_rt_info()["layerType"].astype(str) for op in run.compiled.get_runtime_model().get_ops()
        )
        for run in runs
    ]
    assert [found["Convolution"] for found in types] == [0 if within else 1, 1]
    assert not within or types[0]["Gather"] > types[1]["Gather"]
