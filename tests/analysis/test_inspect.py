"""Saturation and dead levels against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import qzoo
from qzoo.bench.layers import histograms
from qzoo.errors import ArgumentError, CalibrationError, DataError
from qzoo.models.resnet_cifar import CifarResNet
from qzoo.ptq.ranges import calibrate
from qzoo.quantizers import set_target
from qzoo.scheme import Scheme


@pytest.fixture(scope="module")
def setting() -> tuple[CifarResNet, torch.Tensor]:
    torch.manual_seed(0)
    model = CifarResNet(1, in_channels=1, quantize=Scheme(4, 8)).eval()
    images = torch.randn(6, 1, 12, 12)
    calibrate(model, [images], method="percentile", percentile=99.0, progress=False)
    return set_target(model, "onnxruntime"), images


def test_activations_against_numpy(setting) -> None:
    model, images = setting
    found = {q.name: q for q in qzoo.inspect(model, [images]).quantizers}
    info = found["conv1._input_quantizer"]
    x, amax = images.numpy().astype(np.float64), model.conv1._input_quantizer.amax.item()
    levels = np.unique(np.clip(np.round(x * 127 / amax), -128, 127))
    assert info.largest == pytest.approx(np.abs(x).max())
    assert info.saturated == pytest.approx(100 * (np.abs(x) > amax).mean())
    assert info.saturated > 0.5
    assert info.dead == pytest.approx(100 * (1 - len(levels) / 256))
    assert (info.format, info.ranges, info.amax_high) == ("int8", 1, pytest.approx(amax))
    assert found["fc._input_quantizer"].format == "uint8"


def test_weights_against_numpy(setting) -> None:
    model, _ = setting
    report = qzoo.inspect(model)
    info = next(q for q in report.quantizers if q.name == "layer2.0.conv1._weight_quantizer")
    w = model.layer2[0].conv1.weight.detach().numpy().astype(np.float64)
    amax = np.abs(w).max(axis=(1, 2, 3), keepdims=True)
    levels = np.unique(np.clip(np.round(w * 7 / amax), -7, 7))
    assert (info.format, info.role, info.ranges, info.saturated) == ("int4", "weight", 32, 0.0)
    assert info.dead == pytest.approx(100 * (1 - len(levels) / 15))
    assert (info.amax_low, info.amax_high) == pytest.approx((amax.min(), amax.max()))
    assert report.images == 0
    with pytest.raises(ArgumentError, match="images must be at least 1, not -1"):
        qzoo.inspect(setting[0], [setting[1]], images=-1)
    assert next(q for q in report.quantizers if q.role == "output").dead is None


def test_tree(setting) -> None:
    model, images = setting
    text = str(qzoo.inspect(set_target(model, "tensorrt"), [images]))
    set_target(model, "onnxruntime")
    assert "activations counted on 6 images" in text
    (line,) = [line for line in text.splitlines() if "output_quantizer" in line]
    assert line.endswith("off")
    for part in ("├─ conv1", "│  ├─ _input_quantizer", "layer1.0", "└─ "):
        assert part in text
    assert max(map(len, text.splitlines())) <= 110


def test_uncalibrated_and_refusals(setting) -> None:
    fresh = qzoo.inspect(CifarResNet(1, quantize=Scheme()))
    assert all(q.amax_low is None and q.saturated is None for q in fresh.quantizers)
    assert "none" in str(fresh)
    with pytest.raises(CalibrationError, match="no quantizers"):
        qzoo.inspect(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(DataError, match="no images"):
        qzoo.inspect(setting[0], [])


def test_both_ends_against_numpy() -> None:
    torch.manual_seed(0)
    model = CifarResNet(1, in_channels=1, quantize=Scheme(affine=True)).eval()
    images = torch.randn(6, 1, 12, 12) + 0.5
    calibrate(model, [images], method="percentile", percentile=99.0, progress=False)
    report = qzoo.inspect(model, [images])
    info = next(q for q in report.quantizers if q.name == "conv1._input_quantizer")
    x, (low, high) = images.numpy().astype(np.float64), model.conv1._input_quantizer.limits.tolist()
    scale = (high - low) / 255
    codes = np.unique(np.clip(np.round(x / scale) + np.round(-low / scale), 0, 255))
    assert (info.format, info.limits) == ("uint8", (low, high))
    assert info.saturated == pytest.approx(100 * ((x < low) | (x > high)).mean())
    assert info.saturated > 0.5
    assert info.dead == pytest.approx(100 * (1 - len(codes) / 256))
    assert f"{low:.4g} to {high:.4g}" in str(report)
    (drawn,) = [h for h in histograms(model, images) if h["name"] == info.name]
    assert drawn["limits"] == pytest.approx([low, high], rel=1e-3)
    assert (
        next(q for q in qzoo.inspect(set_target(model, "tensorrt")).quantizers if q.name == info.name).limits
        is None
    )


def test_a_network_of_others_shows_its_placement() -> None:
    """Roles, the range that the parts of a concatenation share, and what stays in float, with the reason."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head, self.aux = (nn.Conv2d(3, 3, 1) for _ in range(4))

        def forward(self, x):
            return self.head(torch.cat([self.a(x).relu(), self.b(x).relu()], 1)[:, :3])

    images = torch.randn(2, 3, 8, 8)
    model = qzoo.quantize(Parts(), images, exclude="b")
    qzoo.calibrate(model, [images], progress=False)
    report = qzoo.inspect(model, [images])
    assert dict(report.left) == {"b": "as asked for", "aux": "which inference does not reach"}
    text = str(report)
    assert "in float: aux, which inference does not reach" in text
    shared = {q.name: q.group for q in report.quantizers if q.group}
    assert shared == {"concat_quantizer": "head._input_quantizer"}
    (line,) = [line for line in text.splitlines() if line.endswith("the range of head._input_quantizer")]
    assert "concat_quantizer" in line
