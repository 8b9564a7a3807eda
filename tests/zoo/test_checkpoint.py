"""The folder format: what is written, that it comes back to the bit, and that nothing else is accepted."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import qzoo
from qzoo import files
from qzoo.config import WEIGHTS, Config, config_of, is_plain_path, read_config
from qzoo.errors import CheckpointError
from qzoo.quantizers import quantizers, weight_quantizers
from qzoo.scheme import TARGETS
from qzoo.zoo import checkpoint, hub, packing


def images(count: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(seed))


def calibrated(scheme: str = "w8a8", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = qzoo.create_model(f"resnet20.fmnist-{scheme}")
    model.train()
    with torch.no_grad():  # BatchNorm statistics that are not the initial ones
        for q in quantizers(model).values():
            q.disable_quant()
            q.dynamic = True
        model(images(32, seed))
        for q in quantizers(model).values():
            q.enable_quant()
            q.dynamic = False
    qzoo.calibrate(model, [(images(16, seed), torch.zeros(16))], method="max", progress=False)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return calibrated()


@pytest.fixture
def folder(model: nn.Module, tmp_path: Path) -> Path:
    return qzoo.save_pretrained(model, tmp_path / "checkpoint")


def read(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, its columns taken apart."""
    config = read_config(folder)
    columns = packing.columns(checkpoint.empty_model(config, config.scheme))
    tensors = load_file(folder / WEIGHTS)
    for column in columns.keys() & tensors.keys():
        tensors.update(packing.expand(column, tensors.pop(column), columns[column]))
    return tensors


def rewrite(folder: Path, change) -> None:
    """Change the tensors of a checkpoint, which then has no columns, and its hash with them."""
    tensors = read(folder)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    rehash(folder)


def rehash(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    values["files"][WEIGHTS] = hub.sha256_of(folder / WEIGHTS)
    values["sizes"][WEIGHTS] = (folder / WEIGHTS).stat().st_size
    (folder / "config.json").write_text(json.dumps(values))


# ---- to the bit ----


@pytest.mark.parametrize("form", ["packed", "master"])
@pytest.mark.parametrize(
    "scheme", ["w8a8", "w6a8", "w4a8", "w2a4", "w8e4m3a8", "w8e5m2a8", "w4g8a8", "w8e4m3g16a8"]
)
def test_outputs_come_back_to_the_bit_for_every_target(scheme: str, form: str, tmp_path: Path) -> None:
    model = calibrated(scheme)
    folder = qzoo.save_pretrained(model, tmp_path / "c", form=form)
    for target in TARGETS:
        loaded = qzoo.load_pretrained(folder, target=target)
        qzoo.set_target(model, target)
        with torch.inference_mode():
            assert torch.equal(loaded(images()), model(images()))
    assert set(loaded.state_dict()) == set(model.state_dict())
    assert not loaded.training


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w8e4m3a8", "w8e5m2a8", "w4g8a8"])
def test_packed_to_model_to_packed_is_the_identity(scheme: str, tmp_path: Path) -> None:
    first = qzoo.save_pretrained(calibrated(scheme), tmp_path / "a")
    second = qzoo.save_pretrained(qzoo.load_pretrained(first), tmp_path / "b")
    assert (first / WEIGHTS).read_bytes() == (second / WEIGHTS).read_bytes()
    assert (first / "config.json").read_text() == (second / "config.json").read_text()


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_integers_are_those_of_the_number_scheme(bits: int, tmp_path: Path) -> None:
    model = calibrated(f"w{bits}a8")
    tensors = read(qzoo.save_pretrained(model, tmp_path / "c"))
    bound = np.float32(2 ** (bits - 1) - 1)
    for key, (weight, quantizer) in weight_quantizers(model).items():
        w, amax = weight.detach().numpy(), quantizer.amax.numpy()
        expected = np.clip(np.round(w * (bound / amax)), -bound, bound).astype(np.int8)
        stored = tensors[key].numpy()
        if bits == 4:  # first value in the low half of a byte
            pairs = expected.reshape(-1, 2).astype(np.uint8) & 15
            expected = pairs[:, 0] | (pairs[:, 1] << 4)
        np.testing.assert_array_equal(stored, expected)
        np.testing.assert_array_equal(tensors[f"{quantizer.name}._amax"].numpy(), amax)


def test_packed_is_a_quarter_or_an_eighth_of_the_weights(tmp_path: Path) -> None:
    for bits, share in ((8, 1 / 4), (4, 1 / 8)):
        model = calibrated(f"w{bits}a8")
        with safe_open(qzoo.save_pretrained(model, tmp_path / str(bits)) / WEIGHTS, "pt") as file:
            stored = sum(file.get_tensor(k).nbytes for k in weight_quantizers(model))
        assert stored == share * sum(w.nbytes for w, _ in weight_quantizers(model).values())


def test_master_keeps_the_weights(model: nn.Module, tmp_path: Path) -> None:
    loaded = qzoo.load_pretrained(qzoo.save_pretrained(model, tmp_path / "m", form="master"))
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert all(p.requires_grad for p in loaded.parameters())
    loaded.train()(images()).sum().backward()  # mapped memory can be written to, and trained on
    torch.optim.SGD(loaded.parameters(), 0.1).step()
    again = qzoo.load_pretrained(tmp_path / "m")
    assert torch.equal(again.conv1.weight, model.conv1.weight)


def test_float_model_goes_in_and_out(tmp_path: Path) -> None:
    model = qzoo.create_model("resnet20.fmnist").eval()
    folder = qzoo.save_pretrained(model, tmp_path / "f")
    assert read_config(folder).form == "master"
    assert torch.equal(qzoo.load_pretrained(folder)(images()), model(images()))
    with pytest.raises(CheckpointError, match="packed"):
        qzoo.save_pretrained(model, tmp_path / "g", form="packed")


def test_config_comes_back_and_survives_a_deepcopy(model: nn.Module, folder: Path) -> None:
    loaded = qzoo.load_pretrained(folder)
    expected = dataclasses.replace(
        config_of(model),
        form="packed",
        qzoo_version=qzoo.__version__,
        files={WEIGHTS: hub.sha256_of(folder / WEIGHTS)},
        sizes={WEIGHTS: (folder / WEIGHTS).stat().st_size},
    )
    assert config_of(loaded) == expected
    assert config_of(copy.deepcopy(loaded)) == expected
    assert Config.from_json(expected.to_json()) == expected
    assert "qzoo_config" not in " ".join(loaded.state_dict())


# ---- refused when saving ----


def test_saving_without_ranges_names_the_quantizers(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"conv1\._input_quantizer.*calibrate"):
        qzoo.save_pretrained(qzoo.create_model("resnet20.fmnist-w8a8"), tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_saving_what_the_config_cannot_record_is_refused(tmp_path: Path) -> None:
    model = calibrated()
    model.layer1[0].conv1.input_quantizer.disable()
    with pytest.raises(CheckpointError, match=r"layer1\.0\.conv1\._input_quantizer is switched"):
        qzoo.save_pretrained(model, tmp_path / "c")
    model.layer1[0].conv1.input_quantizer.enable()
    model.fc.weight_quantizer.num_bits = 4
    with pytest.raises(CheckpointError, match=r"fc\._weight_quantizer has 4 bits"):
        qzoo.save_pretrained(model, tmp_path / "c")
    with pytest.raises(CheckpointError, match="float32"):
        qzoo.save_pretrained(calibrated().half(), tmp_path / "c")
    with pytest.raises(CheckpointError, match="qzoo_config"):
        qzoo.save_pretrained(nn.Linear(2, 2), tmp_path / "c")


# ---- refused when loading ----


def test_keys_that_are_missing_unexpected_and_misshaped_are_all_listed(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["bn1.weight"]
        tensors["bn9.weight"] = torch.zeros(3)
        tensors["bn1.bias"] = torch.zeros(3)

    rewrite(folder, change)
    with pytest.raises(CheckpointError) as error:
        qzoo.load_pretrained(folder)
    for part in ("missing: bn1.weight", "unexpected: bn9.weight", r"misshaped: bn1.bias [3]", "[16]"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pool_quantizer._amax", None, "no range.*pool_quantizer"),
        ("pool_quantizer._amax", torch.tensor(float("nan")), "pool_quantizer.*NaN"),
        ("pool_quantizer._amax", torch.tensor(-1.0), "pool_quantizer.*negative"),
        ("pool_quantizer._amax", torch.ones(2), "misshaped: pool_quantizer"),
        (
            "pool_quantizer._amax",
            torch.tensor(1.0, dtype=torch.float64),
            "of another type: .*float64 ",
        ),
        ("fc._weight_quantizer._amax", None, "fc.weight is packed, but its scale"),
        ("fc._weight_quantizer._amax", torch.ones(3, 1), "fc._weight_quantizer._amax does not fit"),
        ("fc.weight", torch.zeros(10, 64), "fc.weight holds torch.float32"),
        ("fc.weight", torch.full((10, 64), -128, dtype=torch.int8), "beyond -127 to 127"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder: Path, key: str, value, message: str) -> None:
    rewrite(folder, lambda t: t.pop(key) if value is None else t.update({key: value}))
    with pytest.raises(CheckpointError, match=message):
        qzoo.load_pretrained(folder)


def test_altered_and_truncated_files_are_refused(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match="SHA-256"):
        qzoo.load_pretrained(folder)
    for rest in (content[:-100], content[:5], b"", b"PK\3\4" + bytes(60)):
        (folder / WEIGHTS).write_bytes(rest)
        rehash(folder)
        with pytest.raises(CheckpointError, match="no whole safetensors"):
            qzoo.load_pretrained(folder)


def test_recipe_without_weights_says_how_to_build(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"qzoo build resnet20.fmnist-w8a8"):
        qzoo.load_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version is 2"),
        ({"architecture": "os"}, "no architecture 'os'"),
        ({"architecture": "resnet32"}, "name is 'resnet20.fmnist-w8a8'"),
        ({"name": "../../etc"}, "not a model name"),
        ({"form": "pickle"}, "form must be one of 'master', 'packed', not 'pickle'"),
        (
            {"scheme": {"weight_bits": 8.0, "activation_bits": 8}},
            r"scheme\.weight_bits must be a whole number",
        ),
        ({"scheme": {"weight_bits": 64, "activation_bits": 8}}, "scheme.*2 to 8"),
        ({"arguments": {"num_classes": True, "in_channels": 1}}, r"arguments\.num_classes must be a whole"),
        ({"arguments": {"num_classes": 10}}, r"field arguments\.in_channels is missing"),
        ({"arguments": {"num_classes": -1, "in_channels": 1}}, r"arguments\.num_classes must be 0"),
        ({"arguments": {"num_classes": 10, "in_channels": 3}}, r"preprocessing\.input_size"),
        ({"labels": None}, "labels must be a text, not null"),
        ({"extra": 1}, "unknown field extra"),
        ({"metrics": [{"runtime": 1}]}, r"metrics\[0\]"),
        ({"files": {"../model.safetensors": "0" * 64}}, "no path inside the folder"),
        ({"files": {WEIGHTS: "0"}}, "must be a SHA-256"),
    ],
)
def test_config_errors_name_the_field(folder: Path, change: dict, message: str) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(CheckpointError, match=message):
        qzoo.load_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no JSON"),
        ("[]", "must be an object, not a list"),
        ('{"a": 1, "a": 2}', "duplicate key 'a'"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ("[" * 100_000, "no JSON"),
        ('{"a": ' + "9" * 10_000 + "}", "config.json"),
        (" " * (1 << 20) + "{}", "more than"),
    ],
)
def test_config_that_is_no_sound_json(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_config(folder)


def test_plain_paths() -> None:
    for good in (WEIGHTS, "onnx/model_int8.onnx"):
        assert is_plain_path(good)
    for bad in (
        "",
        "/etc/passwd",
        "../x",
        "a/../b",
        "a//b",
        "./a",
        "C:/x",
        "a\\b",
        ".git/config",
        "a\0b",
        "a/",
    ):
        assert not is_plain_path(bad), bad


# ---- crashes and races ----


def test_crash_while_writing_a_new_folder_leaves_nothing(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args, **kwargs) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(CheckpointError, match=r"can't be written .*No space"):
        qzoo.save_pretrained(model, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("survives", [0, 1, 2])
def test_killed_while_overwriting_one_of_the_two_loads(folder: Path, model: nn.Module, survives: int) -> None:
    """Before any file is replaced, before the weights are, and before config.json is."""
    other, real, calls = calibrated(seed=1), os.replace, []

    def replace(source: str, target: str) -> None:
        if len(calls) == survives:
            os._exit(9)
        calls.append(target)
        real(source, target)

    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # the others did not come along
            os.replace = replace
            qzoo.save_pretrained(other, folder)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    expected = other if survives == 2 else model
    for _ in range(2):
        assert torch.equal(qzoo.load_pretrained(folder)(images()), expected(images()))
    again = qzoo.save_pretrained(qzoo.load_pretrained(folder), folder)  # as if it had not been
    assert torch.equal(qzoo.load_pretrained(again)(images()), expected(images()))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", WEIGHTS]


def test_a_config_left_by_a_killed_process_is_no_danger(folder: Path, model: nn.Module) -> None:
    for content in (b"", b"{", (folder / "config.json").read_bytes().replace(b"packed", b"master")):
        (folder / ".config.json.coming").write_bytes(content)
        if content.startswith(b"{") and len(content) > 1:
            content = content.replace(read_config(folder).files[WEIGHTS].encode(), b"0" * 64)
            (folder / ".config.json.coming").write_bytes(content)
        assert torch.equal(qzoo.load_pretrained(folder)(images()), model(images()))


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of this kind")
def test_scratch_folders_of_killed_processes_are_swept(model: nn.Module, tmp_path: Path) -> None:
    code = """
import os, pathlib, sys
from qzoo.files import scratch_beside
with scratch_beside(pathlib.Path(sys.argv[1])) as scratch:
    (scratch / "half").write_bytes(bytes(100))
    os._exit(9)
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "c"], check=False)
    (left,) = tmp_path.glob(".c.*.tmp")
    with files.scratch_beside(tmp_path / "c") as living:
        for path in (left, living):
            os.utime(path, (0, 0))
        qzoo.save_pretrained(model, tmp_path / "c")
        assert not left.exists()
        assert living.exists()
    assert [path.name for path in tmp_path.iterdir() if path.name != "qzoo-home"] == ["c"]


def test_sizes_that_no_such_model_has_cost_no_time_and_no_memory(folder: Path) -> None:
    """A sparse file of a TiB, which nobody can hash, and a header of 100,000 names, its hash right."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sizes": {}}))
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match=f"has {1 << 40} bytes; .* fills at most "):
        qzoo.load_pretrained(folder)
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    names = json.dumps({f"k{i}": empty for i in range(100_000)}).encode()
    for header in (names, b"{}"):
        claimed = len(header) if header is names else 1 << 62
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", claimed) + header)
        changed = {**config, "files": {WEIGHTS: files.sha256_of(folder / WEIGHTS)}, "sizes": {}}
        (folder / "config.json").write_text(json.dumps(changed))
        start = time.process_time()
        with pytest.raises(CheckpointError, match=r"its header claims|fills at most"):
            qzoo.load_pretrained(folder)
        assert time.process_time() - start < 2


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of this kind")
def test_temporary_folders_of_killed_commands_are_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else is: not a living one's, not a folder or a link of the user's own."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = (
        "import os; from qzoo.files import temporary_folder as make; m = make(); m.__enter__(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}, check=False)
    (left,) = tmp_path.glob("qzoo-*.tmp")
    own = [tmp_path / "qzoo-20261129", tmp_path / "qzoo-results.tmp.d", tmp_path / "other-12345678.tmp"]
    for path in own:
        path.mkdir()
    (tmp_path / "qzoo-elsewher.tmp").symlink_to(own[0])
    with files.temporary_folder() as living:
        for path in (left, living, *own):
            os.utime(path, (0, 0))
        with files.temporary_folder() as other:
            assert not left.exists()
            assert other.parent == tmp_path
            assert all(path.is_dir() for path in (living, *own))
            assert (tmp_path / "qzoo-elsewher.tmp").is_symlink()


def test_commands_make_temporary_folders_that_are_swept() -> None:
    """``tempfile``'s own stay for ever where a process is killed."""
    for path in Path(qzoo.__file__).parent.rglob("*.py"):
        if path.name != "files.py":
            assert "TemporaryDirectory(" not in path.read_text(), path


def test_files_are_not_placed_through_a_link_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "onnx").symlink_to(tmp_path / "elsewhere")
    with files.scratch_beside(tmp_path / "out") as scratch:
        (scratch / "onnx").mkdir()
        (scratch / "onnx" / "model.onnx").write_bytes(b"x")
        (scratch / "config.json").write_bytes(b"x")
        with pytest.raises(CheckpointError, match="is a link out of the folder"):
            files.place(scratch, tmp_path / "out", ["onnx/model.onnx", "config.json"])
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of this kind")
def test_a_file_system_that_takes_no_more_is_said_and_nothing_stays(model: nn.Module, tmp_path: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (20_000, before[1])
    )  # a write beyond it fails, as on a full disk
    try:
        with pytest.raises(
            CheckpointError, match=r"c can't be written \(.*File too large.*\); free some space"
        ):
            qzoo.save_pretrained(model, tmp_path / "c", form="master")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_concurrent_writers_leave_one_whole_checkpoint(tmp_path: Path) -> None:
    models = [calibrated(seed=seed) for seed in range(3)]
    threads = [
        threading.Thread(target=lambda m=m: [qzoo.save_pretrained(m, tmp_path / "c") for _ in range(4)])
        for m in models
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    logits = qzoo.load_pretrained(tmp_path / "c")(images())
    assert any(torch.equal(logits, m(images())) for m in models)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_loading_builds_no_random_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    real = torch.nn.init._no_grad_normal_

    def draw(tensor, *args, **kwargs):
        drawn.append(tensor.device.type)
        return real(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.nn.init, "_no_grad_normal_", draw)
    state = torch.get_rng_state()
    qzoo.load_pretrained(folder)
    assert set(drawn) <= {"meta"}
    assert torch.equal(torch.get_rng_state(), state)


def test_unpack_refuses_another_size() -> None:
    with pytest.raises(CheckpointError, match=r"need torch.uint8"):
        packing.unpack_weight(torch.zeros(4, dtype=torch.uint8), torch.Size([3, 3]), torch.ones(()), 4)


# ---- numbers that are none ----

BAD = [
    ("bn1.running_var", -1.0),
    *((key, value) for key in ("fc.bias", "bn1.weight", "bn1.running_mean", "conv1.weight")
      for value in (float("nan"), float("inf"), float("-inf"))),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), BAD)
def test_numbers_that_are_not_finite_are_not_saved(
    model: nn.Module, key: str, value: float, tmp_path: Path
) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.state_dict()[key].view(-1)[3] = value
    for form in ("master", "packed"):
        with pytest.raises(CheckpointError, match=f"{key}.*NaN"):
            qzoo.save_pretrained(broken, tmp_path / "c", form=form)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("form", ["master", "packed"])
@pytest.mark.parametrize(("key", "value"), BAD)
def test_numbers_that_are_not_finite_are_not_loaded(
    model: nn.Module, form: str, key: str, value: float, tmp_path: Path
) -> None:
    if form == "packed" and key == "conv1.weight":
        return  # integers
    folder = qzoo.save_pretrained(model, tmp_path / "c", form=form)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key].view(-1)[3] = value

    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=rf"{key}.*NaN"):
        qzoo.load_pretrained(folder)


def test_half_precision_infinity_in_a_column_is_not_loaded(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["*.bias"] = tensors["*.bias"].half()
    tensors["*.bias"][5] = float("inf")
    save_file(tensors, folder / WEIGHTS)
    rehash(folder)
    with pytest.raises(CheckpointError, match=r"\.bias holds NaN, infinity"):
        qzoo.load_pretrained(folder)


@pytest.mark.parametrize("form", ["master", "packed"])
def test_a_loaded_model_does_not_change_with_its_file(model: nn.Module, form: str, tmp_path: Path) -> None:
    folder = qzoo.save_pretrained(model, tmp_path / "c", form=form)
    loaded = qzoo.load_pretrained(folder)
    before = loaded(images())
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(4096)
        file.write(b"\x55" * 8192)
    assert torch.equal(loaded(images()), before)
    os.truncate(folder / WEIGHTS, 0)
    assert torch.equal(loaded(images()), before)


def test_files_of_another_size_are_refused_before_they_are_hashed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "sha256_of", lambda path: pytest.fail("it was hashed"))
    os.truncate(folder / WEIGHTS, 1 << 40)  # a hole: takes no space
    with pytest.raises(CheckpointError, match=r"its size is 1099511627776 bytes, config.json says"):
        qzoo.load_pretrained(folder)
