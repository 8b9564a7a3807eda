"""From a folder to a repository and back, through the real Hub client."""

# ruff: noqa: F811 - fixtures of another file are arguments here

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hub_server import Hub
from test_hub import NAME, checkpoint, server  # noqa: F401 - fixtures

import qzoo
from qzoo import registry
from qzoo.config import WEIGHTS, Config, Measurement, read_config
from qzoo.errors import CheckpointError, HubError, UnknownModelError
from qzoo.release.publish import Publication, publish
from qzoo.release.verify import verify
from qzoo.zoo import hub

REPO = f"lab/{NAME}"
ROW = Measurement(
    "torch", "float", None, "Fashion-MNIST test", "0:64", 64, 90.0, (80.0, 95.0), 99.0, (95.0, 99.9), 0.3
)


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint with figures."""
    model = qzoo.load_pretrained(checkpoint)
    quantized = dataclasses.replace(ROW, precision="w8a8", target="tensorrt")
    config = dataclasses.replace(model.qzoo_config, metrics=(ROW, quantized))
    return qzoo.save_pretrained(model, tmp_path / "staged" / NAME, config=config)


@pytest.fixture
def quick_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exporting takes seconds; tests of the upload do without."""
    publish_module = import_module("qzoo.release.publish")
    monkeypatch.setattr(publish_module, "export_onnx", lambda m, path, target: path.write_text(target * 1000))


def put_into_registry(done: Publication, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``register_model(published=...)`` of the architecture would say."""
    entry = registry.architecture("resnet20")
    pins = {NAME: registry.Pin(done.repo, done.commit, done.sha256)}
    monkeypatch.setitem(registry._entries, "resnet20", dataclasses.replace(entry, published=pins))


def test_publish_uploads_once_and_tags_and_the_name_loads_once_the_registry_has_it(
    server: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    done = publish(folder, REPO)
    repo = server.repos[REPO]
    assert len(server.requests("POST .*/commit/")) == 1
    assert repo.refs["main"] == done.commit == repo.refs["v" + qzoo.__version__]
    files = repo.commits[done.commit]
    expected = {"README.md", "config.json", WEIGHTS, "onnx/model_int8.onnx", "onnx/model_int8_tensorrt.onnx"}
    expected.add(".eval_results/qzoo.yaml")
    assert set(files) - {".gitattributes"} == expected == set(done.files)
    config = Config.from_json(files["config.json"].decode())
    for name, digest in config.files.items():
        assert hashlib.sha256(files[name]).hexdigest() == digest
        assert len(files[name]) == config.sizes[name]
    assert b"model-index" in files["README.md"]
    assert f'qzoo.load_pretrained("{REPO}", target="onnxruntime")' in files["README.md"].decode()
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert done.sha256 == hashlib.sha256(files["config.json"]).hexdigest()
    put_into_registry(done, monkeypatch)
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(qzoo.create_model(NAME, pretrained=True)(x), qzoo.load_pretrained(folder)(x))
    assert [(f.name, f.problem) for f in verify(progress=False)] == [(NAME, "")]


@pytest.mark.usefixtures("quick_export")
def test_a_dry_run_talks_to_nobody(server: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QZOO_HUB_ORG", "somebody")
    planned = publish(folder, dry_run=True)
    assert (planned.repo, planned.commit) == (f"somebody/{NAME}", "")
    assert planned.files["onnx/model_int8.onnx"] == 11_000
    assert server.log == []


@pytest.mark.usefixtures("quick_export")
def test_what_is_sent_is_what_was_checked(
    server: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that is built again while it is published: new weights never go out with old figures."""
    other = qzoo.load_pretrained(folder)
    with torch.no_grad():
        other.fc.bias.add_(1)
    qzoo.save_pretrained(other, tmp_path / "other")
    module = import_module("qzoo.release.publish")
    original = module.load_pretrained

    def load_pretrained(where: Path):
        model = original(where)
        shutil.copyfile(tmp_path / "other" / WEIGHTS, folder / WEIGHTS)
        return model

    expected = (folder / WEIGHTS).read_bytes()
    monkeypatch.setattr(module, "load_pretrained", load_pretrained)
    published = publish(folder, REPO)
    assert server.repos[REPO].commits[published.commit][WEIGHTS] == expected
    with pytest.raises(CheckpointError, match="altered"):  # from now on they are another's
        publish(folder, REPO)


def test_checkpoints_without_figures_are_refused(server: Hub, checkpoint: Path) -> None:
    with pytest.raises(HubError, match="no measured figures"):
        publish(checkpoint, REPO)
    assert server.log == []


@pytest.mark.parametrize("place", ["PUT /upload/", "POST .*/commit/", "POST .*/preupload/", "POST .*/tag/"])
@pytest.mark.usefixtures("quick_export")
def test_a_broken_upload_goes_on_where_it_was(
    server: Hub,
    folder: Path,
    place: str,
) -> None:
    server.fault(place, "500", times=50)
    with pytest.raises(HubError, match="was not published") as error:
        publish(folder, REPO)
    assert "Secret" not in str(error.value)
    server.faults.clear()
    sent = len(server.requests("PUT"))
    done = publish(folder, REPO)
    assert server.repos[REPO].refs["main"] == done.commit
    if place != "PUT /upload/" and place != "POST .*/preupload/":
        assert len(server.requests("PUT")) == sent  # the large files were there already


@pytest.mark.usefixtures("quick_export")
def test_publishing_again_moves_the_tag(server: Hub, folder: Path) -> None:
    first = publish(folder, REPO, private=True)
    assert server.repos[REPO].private
    config = read_config(folder)
    model = qzoo.load_pretrained(folder)
    metrics = tuple(dataclasses.replace(row, top1=91.0) for row in config.metrics)
    qzoo.save_pretrained(model, folder, config=dataclasses.replace(config, metrics=metrics))
    second = publish(folder, REPO)
    assert second.commit != first.commit
    assert server.repos[REPO].refs[second.tag] == second.commit


@pytest.mark.usefixtures("quick_export")
def test_verify_finds_what_was_changed(server: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = publish(folder, REPO)
    put_into_registry(done, monkeypatch)
    repo = server.repos[REPO]
    files = repo.commits[done.commit]
    kept = dict(files)
    files[".eval_results/qzoo.yaml"] = b"- value: 99.9"
    for path in Path(hub_cache()).rglob("qzoo.yaml"):
        hub.discard(path)
    assert ".eval_results/qzoo.yaml differs" in verify([NAME], progress=False)[0].problem
    del files[".eval_results/qzoo.yaml"]
    for path in Path(hub_cache()).rglob("qzoo.yaml"):
        hub.discard(path)
    assert "no such file" in verify([NAME], progress=False)[0].problem
    files.update(kept)
    files["README.md"] = b"changed by hand"
    for path in Path(hub_cache()).rglob("README.md"):
        hub.discard(path)
    assert "README.md differs" in verify([NAME], progress=False)[0].problem
    files.update(kept)
    files["onnx/model_int8.onnx"] = b"other"
    for blob in Path(hub_cache()).rglob("*.onnx"):
        blob.unlink()
    assert "SHA-256" in verify([NAME], progress=False)[0].problem
    files.update(kept)
    with pytest.raises(UnknownModelError, match="no checkpoint"):
        verify(["resnet18.tv_in1k-w8a8"], progress=False)


def hub_cache() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


@pytest.mark.usefixtures("quick_export")
def test_verify_measures_again(server: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_into_registry(publish(folder, REPO), monkeypatch)
    x = torch.randn(20, 1, 28, 28)
    labels = qzoo.load_pretrained(folder)(x).argmax(1)
    labels[:2] = (labels[:2] + 1) % 10  # 90 %: inside 80 to 95

    def load(config: Config, row: Measurement) -> list[tuple[torch.Tensor, torch.Tensor]]:
        assert (row.precision, row.subset) == ("w8a8", "0:64")
        return [(x, labels)]

    assert verify([NAME], load, progress=False)[0].problem == ""
    labels[:10] = (labels[:10] + 1) % 10
    assert "outside the recorded 80.00 to 95.00" in verify([NAME], load, progress=False)[0].problem


def test_verify_runs_the_onnx_file_again(server: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    model = qzoo.load_pretrained(folder)
    rows = read_config(folder).metrics
    ran = dataclasses.replace(rows[1], runtime="onnxruntime", target="onnxruntime")
    config = dataclasses.replace(model.qzoo_config, metrics=(*rows, ran))
    put_into_registry(publish(qzoo.save_pretrained(model, folder, config=config), REPO), monkeypatch)
    x = torch.randn(20, 1, 28, 28)
    labels = model(x).argmax(1)
    labels[:2] = (labels[:2] + 1) % 10
    asked = []

    def load(config: Config, row: Measurement) -> list[tuple[torch.Tensor, torch.Tensor]]:
        asked.append(row.runtime)
        return [(x, labels if row.runtime == "torch" else (labels + 5) % 10)]

    (finding,) = verify([NAME], load, progress=False)
    assert asked == ["torch", "onnxruntime"]
    assert re.match(r"top-1 in onnxruntime for onnxruntime is \d", finding.problem)
