"""What export leaves on the disk and in the caller's model."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import qzoo
from qzoo.errors import ExportError
from qzoo.export import export_onnx, write
from qzoo.runtimes import load


@pytest.fixture
def small() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 5)), torch.randn(3, 64)


def test_data_file_beyond_the_limit(small, tmp_path: Path, monkeypatch) -> None:
    model, images = small
    whole = export_onnx(model, tmp_path / "whole.onnx", example=images)
    monkeypatch.setattr(write.write, "__defaults__", (50_000,))
    path = export_onnx(model, tmp_path / "m.onnx", example=images)
    (data,) = tmp_path.glob("m.onnx.*.data")
    assert path.stat().st_size < 50_000 < data.stat().st_size
    assert torch.equal(load(path)(images), load(whole)(images))
    # Written again with other weights, the old data go; written small again, all data go.
    with torch.no_grad():
        model[2].weight.mul_(0.5)
    export_onnx(model, path, example=images)
    (other,) = tmp_path.glob("m.onnx.*.data")
    assert other.name != data.name
    monkeypatch.setattr(write.write, "__defaults__", (write.PROTOBUF_LIMIT,))
    export_onnx(model, path, example=images)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["m.onnx", "whole.onnx"]


@pytest.mark.parametrize("step", ["check", "data", "model"])
def test_a_failed_write_leaves_the_old_file(small, tmp_path: Path, monkeypatch, step: str) -> None:
    model, images = small
    monkeypatch.setattr(write.write, "__defaults__", (50_000,))
    path = export_onnx(model, tmp_path / "m.onnx", example=images)
    expected, before = load(path)(images), path.read_bytes()
    real = write.os.replace

    def fails(source, place):
        if str(place).endswith(".data") == (step == "data"):
            raise OSError("disk full")
        real(source, place)

    def invalid(*args, **kwargs):
        raise onnx.checker.ValidationError("no")

    if step == "check":
        monkeypatch.setattr(onnx.checker, "check_model", invalid)
    else:
        monkeypatch.setattr(write.os, "replace", fails)
    with torch.no_grad():
        model[2].weight.mul_(0.5)
    with pytest.raises(ExportError, match="no$" if step == "check" else rf"can't write '{path}': disk full"):
        export_onnx(model, path, example=images)
    assert path.read_bytes() == before
    assert torch.equal(load(path)(images), expected), "the data it refers to are there still"
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")], "no temporary files"


def test_a_link_is_written_through(small, tmp_path: Path, monkeypatch) -> None:
    model, images = small
    folder, link = tmp_path / "real", tmp_path / "link.onnx"
    folder.mkdir()
    link.symlink_to(folder / "m.onnx")
    assert export_onnx(model, link, example=images) == link
    assert link.is_symlink()
    assert load(link)(images).shape == (3, 5)
    before = (folder / "m.onnx").read_bytes()
    monkeypatch.setattr(write.write, "__defaults__", (50_000,))
    with pytest.raises(ExportError, match=r"links to another folder.*would not be found"):
        export_onnx(model, link, example=images)
    assert [f.name for f in folder.iterdir()] == ["m.onnx"]
    assert (folder / "m.onnx").read_bytes() == before


def test_data_of_other_models_stay(small, tmp_path: Path) -> None:
    other = tmp_path / "m1.onnx.0123456789ab.data"
    other.touch()
    export_onnx(small[0], tmp_path / "m[0-9].onnx", example=small[1])
    assert other.exists()


def test_places_are_looked_at_before_the_export(small, tmp_path: Path, monkeypatch) -> None:
    model, images = small
    (tmp_path / "file").touch()
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: pytest.fail("was exported"))
    for place in ("file/m.onnx", "file/new/m.onnx"):
        with pytest.raises(ExportError, match=rf"can't write '{tmp_path}/{place}'.*file' is no folder"):
            export_onnx(model, tmp_path / place, example=images)
    with pytest.raises(ExportError, match="'/dev/null' is no regular file"):
        export_onnx(model, "/dev/null", example=images)
    for nothing in (None, 3):
        with pytest.raises(TypeError, match="path must be a text or a Path"):
            export_onnx(model, nothing, example=images)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ExportError, match=rf"can't write '{tmp_path}/new/m\.onnx': no permission"):
        export_onnx(model, tmp_path / "new" / "m.onnx", example=images)
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_hooks_devices_and_modes_stay(build, tmp_path: Path) -> None:
    model, images = build("resnet8", 16)
    model.train()
    model.layer1[0].bn1.eval()
    calls = []
    handle = model.fc.register_forward_pre_hook(lambda module, args: calls.append(len(args)))
    model.conv1.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    export_onnx(model, tmp_path / "m.onnx", example=images)
    assert [m.training for m in model.modules()] == modes
    assert list(model.fc._forward_pre_hooks) == [handle.id]
    assert not any(m._forward_hooks for m in model.modules())
    assert not model.conv1.weight.requires_grad
    assert model.fc.weight.requires_grad
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(before[k].device == after[k].device for k in before)
    calls.clear()
    model.eval()(images)
    assert calls == [1]


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    model = qzoo.create_model("resnet20.fmnist-w8a8", pretrained=True)
    path = qzoo.export_onnx(model, tmp_path / "m.onnx", target="openvino")
    proto = onnx.load(path)
    facts = {p.key: p.value for p in proto.metadata_props}
    assert (proto.producer_name, proto.producer_version) == ("qzoo", qzoo.__version__)
    assert facts["qzoo_version"] == qzoo.__version__
    assert facts["qzoo.name"] == "resnet20.fmnist-w8a8"
    assert facts["qzoo.target"] == "openvino"
    assert facts["qzoo.labels"] == "fashion-mnist"
    assert json.loads(facts["qzoo.preprocessing"]) == json.loads(
        json.dumps(model.qzoo_config.preprocessing.to_dict())
    )


def test_int8_file_is_small(tmp_path: Path) -> None:
    sizes = [
        qzoo.export_onnx(qzoo.create_model(name, pretrained=True), tmp_path / f"{name}.onnx").stat().st_size
        for name in ("resnet20.fmnist", "resnet20.fmnist-w8a8")
    ]
    assert sizes[1] <= 0.28 * sizes[0]


def test_example_of_another_rank(tmp_path: Path) -> None:
    path = export_onnx(nn.Sequential(nn.Linear(4, 3)), tmp_path / "m.onnx", example=torch.randn(1, 4))
    assert load(path)(torch.randn(5, 4)).shape == (5, 3)
