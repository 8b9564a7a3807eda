"""What strangers, slips and races put into folders, names and addresses: said in words, never followed."""

from __future__ import annotations

import copy
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import qzoo
from qzoo.config import WEIGHTS, Config, is_plain_path, read_config
from qzoo.errors import CheckpointError, HubError, QzooError
from qzoo.files import write_text
from qzoo.zoo import hub


def calibrated(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = qzoo.create_model("resnet20.fmnist-w8a8")
    qzoo.calibrate(model, [torch.randn(2, 1, 28, 28)], progress=False)
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return qzoo.save_pretrained(calibrated(0), tmp_path / "checkpoint")


def with_training(folder: Path, text: str) -> None:
    """Put JSON into the one field that takes any."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | {"training": {"note": "HERE"}}
    path.write_text(json.dumps(values).replace('"HERE"', text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 500 + "]" * 500, r"training\['note'\].*nested more than"),
        ('{"a":' * 400 + "1" + "}" * 400, "nested more than"),
        ("[" * 99_999 + "]" * 99_999, "is no JSON"),
        ("1e999", r"training\['note'\] is no finite number"),
        ("[-1e400]", r"training\['note'\]\[0\] is no finite number"),
        ('"\\ud800"', "surrogate"),
        ('{"\\udc00": 1}', "surrogate"),
        ("9" * 5000, "4300 digits|digits"),
    ],
    ids=range(8),
)
def test_json_that_could_not_be_written_again_is_refused(folder: Path, text: str, message: str) -> None:
    with_training(folder, text)
    with pytest.raises(CheckpointError, match=message):
        qzoo.load_pretrained(folder)


def test_json_of_any_kind_comes_back(folder: Path, tmp_path: Path) -> None:
    with_training(folder, '{"a": [1, 2.5, null, true, "\\u00e9"], "b": {"c": ' + "9" * 400 + "}}")
    model = copy.deepcopy(qzoo.load_pretrained(folder))
    again = read_config(qzoo.save_pretrained(model, tmp_path / "again"))
    assert again.training == {
        "note": {"a": [1, 2.5, None, True, "é"], "b": {"c": int("9" * 400)}},
    }


@pytest.mark.parametrize("rows", ["metrics", "latency"])
def test_figures_of_a_target_that_does_not_exist_are_refused(rows: str) -> None:
    path = hub.EMBEDDED / "resnet20.fmnist-w8a8" / "config.json"
    values = json.loads(path.read_text())
    values[rows][-1]["target"] = "ensorrt"
    with pytest.raises(CheckpointError, match=rf"{rows}\[3\]\.target must be"):
        Config.from_json(json.dumps(values))


def test_bits_of_a_layer_that_is_not_there_are_refused(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    values["scheme"]["layers"] = [["laqer2.0.conv1", 8]]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"config.json: .*'laqer2\.0\.conv1'.* no quantized layer"):
        qzoo.load_pretrained(folder)


def test_a_text_that_no_file_can_hold_is_refused(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text()) | {"labels": "\ud800"}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="labels holds half of a surrogate pair"):
        qzoo.load_pretrained(folder)


def test_a_tuned_checkpoint_without_its_target_is_refused() -> None:
    """One flipped bit of the key would have it loaded for the default one."""
    text = (hub.EMBEDDED / "resnet20.fmnist-w4a4_qat" / "config.json").read_text()
    at = text.index('"target"', text.index('"training"'))
    with pytest.raises(CheckpointError, match=r"training\.target is missing"):
        Config.from_json(text[:at] + '"taret"' + text[at + len('"target"') :])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes and devices here")
@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop"])
def test_what_is_no_file_is_not_read(folder: Path, name: str, kind: str) -> None:
    """A pipe would be waited for, and a device never ends."""
    (folder / name).unlink()
    make = {
        "pipe": os.mkfifo,
        "device": lambda path: path.symlink_to("/dev/zero"),
        "folder": Path.mkdir,
        "loop": lambda path: path.symlink_to(path.name),
    }
    make[kind](folder / name)
    errors: list[BaseException] = []

    def load() -> None:
        try:
            qzoo.load_pretrained(folder)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(30)
    assert [type(error) for error in errors] == [CheckpointError]


def test_a_link_to_another_file_says_nothing_of_its_content(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text('{"password": "hunter2"}')
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError) as error:
        qzoo.load_pretrained(folder)
    assert "hunter2" not in str(error.value)


def test_weights_replaced_between_check_and_reading_are_not_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = qzoo.save_pretrained(calibrated(1), tmp_path / "other")
    original = hub.sha256_of

    def sha256_of(path: Path) -> str:
        digest = original(path)
        if path == folder / WEIGHTS:
            os.replace(other / WEIGHTS, path)
        return digest

    monkeypatch.setattr(hub, "sha256_of", sha256_of)
    with pytest.raises(CheckpointError, match="replaced while it was read; load it again"):
        qzoo.load_pretrained(folder)


@pytest.mark.parametrize(
    "path", ["..%2fx", "a/..%2fx", "a/ ../x", "a /x", "a./x", "a/b ", "x\n", "x\u202e", "a\\..\\x", "a/\0"]
)
def test_paths_that_some_system_reads_as_others_are_refused(path: str) -> None:
    assert not is_plain_path(path)


@pytest.mark.parametrize(
    "where",
    [
        "x" * 5000,
        "org/" + "x" * 5000,
        "org/na\0me",
        "org/..",
        "org/..%2f..",
        "\uff4frg/name",
        "a\\b",
        "",
        "a\0b",
        "x" * 256,
        "./" + "x" * 256,
        "resnet20." + "a" * 256,
        "resnet20.fmnist-w08a08",
        "resnet20.fmnist-w8a08",
        "resnet20.fmnist-\uff57\uff18\uff41\uff18",
        "resnet20.fmnist-w\u0668a8",
    ],
    ids=range(16),
)
def test_names_that_are_none_ask_nobody(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "download", lambda *args, **kwargs: pytest.fail("the Hub was asked"))
    with pytest.raises(QzooError) as error:
        qzoo.load_pretrained(where)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("revision", ["../../x", "a\0b", "..", "", " main", "/etc", "main?x=1", "a%2fb"])
def test_revisions_that_are_none_ask_nobody(revision: str, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="is no revision"):
        qzoo.load_pretrained("org/name", revision=revision, cache_dir=tmp_path, local_files_only=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
@pytest.mark.parametrize(("mask", "folders", "files"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600)])
def test_files_have_the_permissions_that_the_user_wants(
    mask: int, folders: int, files: int, tmp_path: Path
) -> None:
    model, old = calibrated(0), os.umask(mask)
    try:
        saved = qzoo.save_pretrained(model, tmp_path / "new")
        write_text(saved / "README.md", "card")
    finally:
        os.umask(old)
    assert saved.stat().st_mode & 0o777 == folders
    assert {path.name: path.stat().st_mode & 0o777 for path in saved.iterdir()} == dict.fromkeys(
        ("README.md", "config.json", WEIGHTS), files
    )


def test_a_wrong_file_behind_the_users_own_link_stays(tmp_path: Path) -> None:
    (tmp_path / "shared.pth").write_text("other weights")
    (tmp_path / "weights.pth").symlink_to(tmp_path / "shared.pth")
    with pytest.raises(HubError, match="removed"):
        hub.verify_file(tmp_path / "weights.pth", "0" * 64)
    assert not (tmp_path / "weights.pth").is_symlink()
    assert (tmp_path / "shared.pth").read_text() == "other weights"


def test_passwords_in_addresses_are_not_repeated() -> None:
    assert hub.redact("GET https://me:hunter2@mirror.org/x") == "GET https://[token]@mirror.org/x"
