"""Weights of 7 bits: what processors without VNNI need, shown where oneDNN is kept from using it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import qzoo
from qzoo.export import export_onnx, lint
from qzoo.export.check import sqnr
from qzoo.models.vit import VisionTransformer
from qzoo.quantizers import quantizers
from qzoo.runtimes.ort import OnnxRuntimeRunner
from qzoo.runtimes.processor import processor_facts, saturates
from qzoo.scheme import Scheme

WITHOUT_VNNI = {"ONEDNN_MAX_CPU_ISA": "AVX2"}


@pytest.fixture
def loud(build) -> tuple[nn.Module, Tensor]:
    """A model with the sums that are cut off: weights and activations near their largest values."""
    model, images = build("resnet8", 28)
    with torch.no_grad():
        model.conv1.weight.abs_()
        for quantizer in quantizers(model).values():
            if quantizer.role == "weight":
                continue
            quantizer.amax = (quantizer.amax * 0.5).numpy()  # type: ignore[operator]
    return model, images.abs() * 2


def weights_of(path: Path) -> list[np.ndarray]:
    tensors = [numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]
    return [t for t in tensors if t.dtype == np.int8 and t.ndim > 1]


def test_weights_have_7_bits_and_are_those_of_a_7_bit_scheme(build, tmp_path: Path) -> None:
    model, images = build("resnet8", 28)
    path = export_onnx(model, tmp_path / "m.onnx", example=images, reduce_range=True)
    assert max(int(np.abs(w.astype(int)).max()) for w in weights_of(path)) == 63
    full = export_onnx(model, tmp_path / "full.onnx", example=images)
    assert max(int(np.abs(w.astype(int)).max()) for w in weights_of(full)) == 127
    assert all(q.num_bits == 8 for q in quantizers(model).values()), "the model stays as it is"
    for quantizer in quantizers(model).values():
        quantizer.num_bits = 7 if quantizer.role == "weight" else 8
    other = export_onnx(model, tmp_path / "w7.onnx", example=images)
    assert torch.equal(OnnxRuntimeRunner(path)(images), OnnxRuntimeRunner(other)(images))


def test_processor_is_known_by_its_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    flags = processor_facts().get("flags", "").split()
    assert saturates() == (bool(flags) and not {"avx512_vnni", "avx_vnni", "amx_int8"} & set(flags))
    for isa, expected in (("AVX2", True), ("avx512_core", True), ("AVX512_CORE_VNNI", False)):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
        assert saturates() == (
            expected or (bool(flags) and "avx512_vnni" not in flags and "avx_vnni" not in flags)
        )


def test_lint_names_weights_of_8_bits_there_alone(
    build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = build("resnet8", 28)
    full = export_onnx(model, tmp_path / "full.onnx", example=images)
    reduced = export_onnx(model, tmp_path / "reduced.onnx", example=images, reduce_range=True)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert {finding.rule for finding in lint(full, "onnxruntime")} == {"saturating-weights"}
    assert lint(reduced, "onnxruntime") == []
    assert not [f for f in lint(full, "tensorrt") if f.rule == "saturating-weights"]
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")
    if not saturates():
        assert lint(full, "onnxruntime") == []


def test_products_of_activations_stay_uint8_there(
    calibrated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, images = (
        VisionTransformer(64, 2, depth=1, num_classes=20, quantize=Scheme()),
        torch.randn(2, 3, 224, 224),
    )
    calibrated(model, images)
    full = export_onnx(model, tmp_path / "full.onnx", example=images)
    reduced = export_onnx(model, tmp_path / "reduced.onnx", example=images, reduce_range=True)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    found = [finding for finding in lint(full, "onnxruntime") if finding.rule == "saturating-product"]
    assert len(found) == 2
    assert "blocks.0.attn" in str(found[0])
    assert lint(reduced, "onnxruntime") == []


def test_deploy_reduces_there_and_says_so(
    build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    model, images = build("resnet8", 28)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    reduced = export_onnx(model, tmp_path / "reduced.onnx", example=images, reduce_range=True)
    assert torch.equal(qzoo.deploy(model, example=images)(images), OnnxRuntimeRunner(reduced)(images))
    assert "weights of 8 bits are rounded to 7" in caplog.text


RUN = """
import sys, torch
from qzoo.runtimes.ov import OpenVinoRunner
path, images, out = sys.argv[1:]
torch.save(OpenVinoRunner(path)(torch.load(images)), out)
"""


def test_sums_that_openvino_cuts_off_without_vnni_are_whole_with_7_bits(loud, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    model, images = loud
    torch.save(images, tmp_path / "images.pt")
    found = {}
    for reduce_range in (False, True):
        path = export_onnx(
            model, tmp_path / "m.onnx", target="openvino", example=images, reduce_range=reduce_range
        )
        arguments = [str(path), str(tmp_path / "images.pt"), str(tmp_path / "logits.pt")]
        environment = {**os.environ, **WITHOUT_VNNI}
        subprocess.run([sys.executable, "-c", RUN, *arguments], check=True, env=environment)
        found[reduce_range] = sqnr(OnnxRuntimeRunner(path)(images), torch.load(tmp_path / "logits.pt"))
    assert found[False] < 20
    assert found[True] > 25
