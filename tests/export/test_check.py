"""The comparison of a file with its simulation: equal where it must be, and finding what was broken where it is."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exact import make_exact_
from onnx import numpy_helper
from torch import nn

import qzoo.export
from qzoo.__main__ import main
from qzoo.errors import DataError, ExportError
from qzoo.export import Check, check, export_onnx


@pytest.fixture(scope="module")
def exact(build, tmp_path_factory):
    model, images = build("resnet8", 16)
    make_exact_(model, "onnxruntime", images)
    path = export_onnx(model, tmp_path_factory.mktemp("check") / "exact.onnx", example=images)
    return model, images, path


def test_exact(exact) -> None:
    model, images, path = exact
    found = check(path, model, images)
    assert found.exact
    assert (found.agreement, found.sqnr_db, found.max_difference) == (100, math.inf, 0)
    assert (found.target, found.runtime, found.images) == ("onnxruntime", "onnxruntime", 8)
    assert found.layers == ()
    assert "equal to the bit" in str(found)
    assert check(path, model).exact, "noise of the right size without images"


def broken(path: Path, place: Path, name: str, change) -> Path:
    proto = onnx.load(path)
    (tensor,) = [i for i in proto.graph.initializer if i.name == name]
    array = numpy_helper.to_array(tensor).copy()
    change(array)
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(proto, place)
    return place


def test_finds_the_layer_that_was_changed(exact, tmp_path: Path) -> None:
    model, images, path = exact

    def change(q: np.ndarray) -> None:
        q[0, 0, 0, 0] += 3

    found = check(broken(path, tmp_path / "m.onnx", "layer2.0.conv2.weight_quantized", change), model, images)
    assert not found.exact
    rows = {row.name: row for row in found.layers}
    names = list(rows)
    first = next(name for name in names if rows[name].differing > 0)
    assert first == "layer2.0.branch_quantizer", "the first quantizer behind the changed weight"
    before = names[: names.index(first)]
    assert "layer1.0.conv1._input_quantizer" in before
    assert all((rows[n].steps, rows[n].sqnr_db) == (0, math.inf) for n in before)
    assert rows[first].steps >= 1
    assert f"{rows[first].name}" in str(found)
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [values["layers"][0][key] for key in ("name", "sqnr_db")] == [names[0], None]


def test_a_trained_sort_of_network_differs_by_flips_only(build, tmp_path: Path) -> None:
    model, images = build("resnet8", 16)
    path = export_onnx(model, tmp_path / "m.onnx", example=images)
    found = check(path, model, images)
    assert found.sqnr_db > 17
    assert found.layers == () or max(row.steps for row in found.layers[:4]) <= 1


@pytest.mark.parametrize("target", ["openvino", "tensorrt"])
def test_other_targets(build, tmp_path: Path, target: str) -> None:
    if target == "openvino":
        pytest.importorskip("openvino")
    model, images = build("resnet8", 16)
    make_exact_(model, target, images)
    path = export_onnx(model, tmp_path / "m.onnx", example=images, target=target)
    found = check(path, model, images)
    assert (found.target, found.exact) == (target, True)
    assert found.runtime == ("openvino" if target == "openvino" else "onnxruntime")


def test_another_model_is_refused_or_far(exact, build) -> None:
    _, images, path = exact
    other, _ = build("resnet8", 16)
    torch.manual_seed(1)
    other.fc.weight.data.normal_()
    assert check(path, other, images).sqnr_db < 10
    other.fc = torch.nn.Linear(64, 3)
    with pytest.raises(ExportError, match="shape"):
        check(path, other, images)


def test_a_float_model_has_no_layers_to_show(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU()).eval()
    found = check(export_onnx(model, tmp_path / "m.onnx", example=torch.zeros(1, 3, 8, 8)), model)
    assert found.sqnr_db > 100
    assert found.layers == ()
    assert len(str(found).splitlines()) == 1


def test_images_that_say_nothing_are_refused(exact) -> None:
    model, images, path = exact
    with pytest.raises(DataError, match=r"\[0, 3, 16, 16\]: nothing to check with"):
        check(path, model, images[:0])
    with pytest.raises(TypeError, match="must be a tensor"):
        check(path, model, images.numpy())
    with pytest.raises(DataError, match="the model takes"):
        check(path, model, images[:, :, :8])


def test_a_model_that_returns_two_tensors_is_refused(exact) -> None:
    model, images, path = exact
    pair = copy.deepcopy(model)
    pair.register_forward_hook(lambda module, args, output: (output, output))
    with pytest.raises(ExportError, match="returns a tuple, not one tensor"):
        check(path, pair, images)


def test_double_precision(build, tmp_path: Path) -> None:
    model, images = build("resnet8", 16)
    make_exact_(model, "onnxruntime", images)
    model.double()
    path = export_onnx(model, tmp_path / "m.onnx", example=images)
    assert check(path, model, images).exact
    with torch.no_grad():
        model.fc.weight[0, 0] += 1
    assert check(path, model, images).layers, "and layer by layer"


def test_what_is_not_finite_is_no_agreement(exact, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    with torch.no_grad():
        model[0].bias[0] = math.nan
    found = check(export_onnx(model, tmp_path / "m.onnx", example=torch.zeros(1, 3, 8, 8)), model)
    assert found.sqnr_db == -math.inf
    assert not found.exact
    assert "NaN or infinity among the logits" in str(found)
    quantized, images, path = exact
    assert check(path, quantized, images * math.nan).layers, "and layer by layer"


@pytest.mark.parametrize(("db", "status"), [(-math.inf, 1), (19.9, 1), (20.0, 0), (math.inf, 0)])
def test_command_status(tmp_path: Path, monkeypatch, db: float, status: int) -> None:
    found = Check("onnxruntime", "onnxruntime", 1, 100, db, 0.5)
    monkeypatch.setattr(qzoo.export, "check", lambda *args, **kwargs: found)
    assert main(["export", "resnet20.fmnist-w8a8", str(tmp_path / "m.onnx"), "--check"]) == status


@pytest.mark.parametrize(
    ("db", "as_written", "misread"),
    [
        (24.7, 144.0, True),
        (24.7, 30.0, False),
        (50.0, 144.0, False),
        (-math.inf, 30.0, True),
        (24.7, None, False),
    ],
)
def test_openvino_far_below_the_file_as_written(
    tmp_path: Path, monkeypatch, db: float, as_written: float | None, misread: bool
) -> None:
    found = Check("openvino", "openvino", 1, 100, db, 0.5, as_written_db=as_written)
    assert found.misread is misread
    assert ("docs/openvino.md" in str(found)) is misread
    monkeypatch.setattr(qzoo.export, "check", lambda *args, **kwargs: found)
    assert main(["export", "resnet20.fmnist-w8a8", str(tmp_path / "m.onnx"), "--check"]) == int(misread)


def test_finds_what_openvino_misreads(tmp_path: Path) -> None:
    """int8 that a MaxPool takes into a convolution, in the place of uint8: the same levels."""
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    images = torch.randn(4, 3, 8, 8)
    from test_openvino import CONVOLUTIONAL, Network, quantized

    model = quantized(Network(CONVOLUTIONAL["a Fire"][0]), images)
    path = export_onnx(model, tmp_path / "a.onnx", target="openvino", example=images)
    right = check(path, model, images)
    assert (right.misread, right.as_written_db > 50) == (False, True)
    proto = onnx.load(path)
    (zero,) = [tensor for tensor in proto.graph.initializer if tensor.name == "zero_point_128"]
    zero.CopyFrom(numpy_helper.from_array(np.array(0, np.int8), zero.name))
    del proto.graph.value_info[:]
    onnx.save(proto, path)
    wrong = check(path, model, images)
    assert (wrong.misread, wrong.as_written_db > 50) == (True, True)


def test_command(tmp_path: Path, capsys) -> None:
    arguments = ["export", "resnet20.fmnist-w8a8", str(tmp_path / "m.onnx"), "--check", "--images", "16"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "16 images: top-1 agreement 100.00 %" in text
    assert (tmp_path / "m.onnx").is_file()
