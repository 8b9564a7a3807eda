"""Checkpoint folders from strangers: whatever is in them, the loader loads or says CheckpointError.

Some hundreds, and the corpus of cases that were once interesting; ``python -m tests.fuzz`` runs any number.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import json
import struct
import time
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from fuzz.bytes import DTYPES, places, replaced
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

import qzoo
from qzoo import registry
from qzoo.cards.card import card
from qzoo.config import (
    WEIGHTS,
    CalibrationRecord,
    Config,
    FloatSource,
    Latency,
    Measurement,
    Trial,
    read_config,
)
from qzoo.errors import CheckpointError
from qzoo.models.layers import conv2d
from qzoo.quantizers import quantizers
from qzoo.registry import ModelEntry
from qzoo.scheme import Scheme
from qzoo.zoo import hub

FEW = settings(
    max_examples=300,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

numbers = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64 - 1, 1e308])
)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=8) | st.sampled_from(["\ud800", [[[[[[]]]]]] * 2]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def tiny(*, num_classes: int = 2, in_channels: int = 3, quantize=None) -> nn.Module:
    """A model that loads in a millisecond: with two quantized layers, so with all kinds of tensors."""
    return nn.Sequential(
        conv2d(in_channels, 4, 1, quantize=quantize),
        nn.BatchNorm2d(4),
        conv2d(4, num_classes, 1, bias=True, quantize=quantize),
    )


ROW = Measurement("torch", "float", None, "some", "0:9", 9, 90.0, (80.0, 95.0), 99.0, (95.0, 99.9), 0.3)
TIMED = Latency("onnxruntime", "w8a8", None, 1, 1, 2.0, 3.0, 4.0, "CPU", "1", "2030-01-01", (3.0, 5.0))
FULL = {
    "labels": "imagenet-1k",
    "float_source": FloatSource("hf:a/b/c", "1", "2" * 64, "mit"),
    "calibration": CalibrationRecord("mse", "some", "0:9", 9, 99.9, (Trial("mse", 1.0, 2.0),), recipe="best"),
    "training": {"epochs": 1, "lr": 0.1, "method": "lsq", "target": "onnxruntime"},
    "metrics": (
        ROW,
        dataclasses.replace(ROW, precision="w8a8", target="tensorrt", agreement=1.0, sqnr_db=2.0),
    ),
    "latency": (TIMED,),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    registry.list_architectures()
    monkeypatch.setitem(registry._entries, "tiny", ModelEntry("tiny", tiny, {}))
    torch.manual_seed(0)
    model = qzoo.create_model("tiny-w8a8")
    qzoo.calibrate(model, [torch.randn(2, 3, 4, 4)], progress=False)
    config = dataclasses.replace(model.qzoo_config, **FULL)
    return qzoo.save_pretrained(model, tmp_path / "tiny", config=config)


def config_case(folder: Path, data) -> None:
    values = json.loads((folder / "config.json").read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        if not isinstance(values, (dict, list)):
            break
        place = data.draw(st.sampled_from(list(places(values))))
        values = replaced(values, place, data.draw(st.just(...) | json_values))
    text = json.dumps(values).replace("Infinity", data.draw(st.sampled_from(["Infinity", "1e999"])))
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(text)))
        text = text[:at] + data.draw(st.text(max_size=3)) + text[at + data.draw(st.integers(0, 3)) :]
    try:
        config = Config.from_json(text)
    except CheckpointError:
        return
    assert Config.from_json(config.to_json()) == copy.deepcopy(config)
    assert (config.to_json() + card(config)).encode()  # what was read can be written
    assert card(config).startswith("---\n")  # whoever publishes it, its card can be compared


def split(content: bytes) -> tuple[dict, bytes]:
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(header: object, body: bytes, text: str | None = None, size: int | None = None) -> bytes:
    text_bytes = (json.dumps(header) if text is None else text).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text_bytes) if size is None else size) + text_bytes + body


def write_weights(folder: Path, content: bytes) -> None:
    """These weights, with a config.json that vouches for them."""
    (folder / WEIGHTS).write_bytes(content)
    values = json.loads((folder / "config.json").read_text())
    values["files"][WEIGHTS] = hub.sha256_of(folder / WEIGHTS)
    values["sizes"][WEIGHTS] = (folder / WEIGHTS).stat().st_size
    (folder / "config.json").write_text(json.dumps(values))


def load(folder: Path, content: bytes) -> None:
    write_weights(folder, content)
    try:
        model = qzoo.load_pretrained(folder)
    except CheckpointError:
        return
    for tensor in model.state_dict().values():
        assert not tensor.is_meta
    for quantizer in quantizers(model).values():
        assert torch.isfinite(quantizer.amax).all()
    assert model(torch.ones(1, 3, 4, 4)).shape == (1, 2, 4, 4)


def weights_case(folder: Path, original: bytes, data) -> None:
    header, body = split(original)
    kind = data.draw(st.sampled_from(["value", "key", "bytes", "size", "text", "numbers"]))
    if kind == "value":
        place = data.draw(st.sampled_from(list(places(header))))
        header = replaced(header, place, data.draw(st.just(...) | json_values | st.sampled_from(DTYPES)))
        content = joined(header, body)
    elif kind == "key":
        old, new = (data.draw(st.sampled_from(sorted(header))) for _ in range(2))
        header[new] = header.pop(old)
        content = joined(header, body)
    elif kind == "size":
        content = joined(header, body, size=data.draw(st.integers(0, 2**64 - 1) | st.integers(0, 5000)))
    elif kind == "text":
        text = json.dumps(header)
        at = data.draw(st.integers(0, len(text)))
        content = joined(header, body, text[:at] + data.draw(st.text(max_size=4)) + text[at:])
    elif kind == "numbers":  # NaN, infinity, negative and denormal values among the tensors
        at = data.draw(st.integers(0, len(body) // 4 - 1)) * 4
        content = joined(
            header, body[:at] + struct.pack("<f", data.draw(st.floats(width=32))) + body[at + 4 :]
        )
    else:
        at = data.draw(st.integers(0, len(original)))
        content = (
            original[:at] + data.draw(st.binary(max_size=9)) + original[at + data.draw(st.integers(0, 9)) :]
        )
    load(folder, content)


# Headers that a loader may stumble over; each once made one stumble, here or elsewhere.
CORPUS = (
    b"",
    b"\0" * 8,
    b"\xff" * 8,
    struct.pack("<Q", 2) + b"{}",
    struct.pack("<Q", 2**40) + b"{}",
    struct.pack("<Q", 100_000_001) + b"{" + b" " * 100,
    joined({"0.weight": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)),
    joined({"0.weight": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}, b""),
    joined({"0.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, b""),
    joined({"0.weight": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, bytes(4)),
    joined({"0.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**63]}}, bytes(4)),
    joined({"../../x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    joined({"__metadata__": {"a": 1}}, b""),
    joined(None, b"", text='{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],'
           '"data_offsets":[0,1]}}'),
    joined(None, b"", text='{"\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
    joined(None, b"", text="[" * 50_000),
    b"PK\x03\x04" + bytes(100),
    b"\x80\x02}q\x00." + bytes(20),
)  # fmt: skip


@pytest.mark.parametrize("content", CORPUS, ids=range(len(CORPUS)))
def test_corpus(folder: Path, content: bytes) -> None:
    write_weights(folder, content)
    with pytest.raises(CheckpointError):
        qzoo.load_pretrained(folder)


@FEW
@given(data=st.data())
def test_config(folder: Path, data) -> None:
    config_case(folder, data)


@FEW
@given(data=st.data())
def test_weights(folder: Path, data) -> None:
    original = folder / "original"
    if not original.exists():
        original.write_bytes((folder / WEIGHTS).read_bytes())
    weights_case(folder, original.read_bytes(), data)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(text=st.text(max_size=200))
@example("\ud800")
@example('{"format_version": 1e999}')
@example('{"format_version": ' + "9" * 5000 + "}")
def test_any_text_is_no_config(text: str) -> None:
    with pytest.raises(CheckpointError):
        Config.from_json(text)


# ---- fields that have few values ----

# Texts that may say anything; what they name is looked up, or only shown.
FREE = {
    "Config.name",
    "Config.architecture",
    "Config.labels",
    "Config.qzoo_version",
    "FloatSource.revision",
    "FloatSource.license",
    "Trial.method",
    "CalibrationRecord.data",
    "Measurement.data",
    "Latency.machine",
    "Latency.versions",
    "Latency.date",
}
CHECKED = {"Scheme.target", "Scheme.weight_format", "Preprocessing.interpolation"}  # by their own classes


def dataclasses_of(kind: type, seen: set[type]) -> set[type]:
    """A dataclass and all those in its annotations."""
    if dataclasses.is_dataclass(kind) and kind not in seen:
        seen.add(kind)
        for hint in get_type_hints(kind).values():
            for part in (hint, *get_args(hint), *(p for a in get_args(hint) for p in get_args(a))):
                dataclasses_of(part, seen)
    return seen


def test_every_text_field_is_checked_or_known_to_be_free() -> None:
    found, closed = set(), set()
    for kind in dataclasses_of(Config, set()):
        for f in dataclasses.fields(kind):
            if get_type_hints(kind)[f.name] in (str, str | None):
                found.add(f"{kind.__name__}.{f.name}")
                if "allowed" in f.metadata:
                    closed.add(f"{kind.__name__}.{f.name}")
    assert closed.isdisjoint(FREE)
    assert found == closed | FREE | CHECKED


CLOSED = [
    ("form",),
    ("preprocessing", "interpolation"),
    ("scheme", "weight_format"),
    ("float_source", "sha256"),
    *(
        ("calibration", key)
        for key in ("method", "subset", "rounding", "bias_correction", "recipe", "target")
    ),
    *(("metrics", 1, key) for key in ("runtime", "precision", "target", "subset")),
    *(("latency", 0, key) for key in ("runtime", "precision", "target", "speedup_clock")),
    ("training", "target"),
    ("training", "method"),
]


@pytest.mark.parametrize("place", CLOSED, ids=lambda place: ".".join(map(str, place)))
def test_a_flipped_bit_of_a_field_with_few_values_is_refused(folder: Path, place: tuple) -> None:
    record = dataclasses.replace(
        FULL["calibration"], rounding="learned", bias_correction="empirical", target="openvino"
    )
    config = dataclasses.replace(
        read_config(folder),
        scheme=Scheme(8, 8, weight_format="e4m3"),
        name="tiny-w8e4m3a8",
        calibration=record,
        training={"method": "lsq", "target": "onnxruntime"},
        latency=(dataclasses.replace(TIMED, target="onnxruntime", speedup_clock="cpu"),),
    )
    values = json.loads(config.to_json())
    Config.from_json(json.dumps(values))
    inner = values
    for key in place[:-1]:
        inner = inner[key]
    text, refused = inner[place[-1]], 0
    for i, bit in itertools.product(range(len(text)), range(7)):
        inner[place[-1]] = text[:i] + chr(ord(text[i]) ^ 1 << bit) + text[i + 1 :]
        try:
            Config.from_json(json.dumps(values))
        except CheckpointError as error:
            assert str(place[-1]) in str(error)  # noqa: PT017 - one clause for all flips
            refused += 1
    free = sum(text.count(digit) for digit in "0123456789abcdef") if place[-1] in DIGITS else 0
    assert refused >= len(text) * 7 - free * 7
    assert refused > 0


DIGITS = ("sha256", "subset", "precision")  # another digit is another legal value


# ---- time ----

LARGEST = 1 << 20


def largest(fill) -> str:
    """The config of a checkpoint with so many items that it just has the size allowed."""
    values = json.loads((hub.EMBEDDED / "resnet20.fmnist-w8a8" / "config.json").read_text())
    low, high = 1, LARGEST
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(fill(values, middle)) <= LARGEST else (low, middle - 1)
    return fill(values, low)


def with_duplicate(values: dict, count: int) -> str:
    keys = ",".join(f'"{i:x}":0' for i in range(count))
    return json.dumps(values)[:-1] + f',"training2":{{{keys},"0":0}}}}'


def with_long_key(values: dict, count: int) -> str:
    return json.dumps(values | {"training": {"x" * count: [0] * (count // 2)}}, separators=(",", ":"))


def with_nested_keys(values: dict, count: int) -> str:
    inner = [0] * (count * 4)
    for _ in range(14):
        inner = {"y" * count: inner}
    return json.dumps(values | {"training": inner}, separators=(",", ":"))


def with_files(values: dict, count: int) -> str:
    return json.dumps(values | {"files": {f"{i}": "0" * 64 for i in range(count)}})


def with_rows(values: dict, count: int) -> str:
    return json.dumps(values | {"metrics": values["metrics"][:1] * count})


def with_layers(values: dict, count: int) -> str:
    layers = [[str(i), 8] for i in range(count)]
    return json.dumps(values | {"scheme": values["scheme"] | {"layers": layers}})


def with_unknown_fields(values: dict, count: int) -> str:
    return json.dumps(values | {str(i): 0 for i in range(count)})


def with_long_name(values: dict, count: int) -> str:
    return json.dumps(values | {"name": "resnet20." + "a" * count})


def with_long_architecture(values: dict, count: int) -> str:
    return json.dumps(values | {"architecture": "resnet" * (count // 6)})


@pytest.mark.slow
@pytest.mark.parametrize(
    "fill",
    [
        with_duplicate,
        with_long_key,
        with_nested_keys,
        with_files,
        with_rows,
        with_layers,
        with_unknown_fields,
        with_long_name,
        with_long_architecture,
    ],
)
def test_the_largest_config_takes_no_time_and_errors_stay_short(fill, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(largest(fill))
    start = time.process_time()
    with contextlib.suppress(CheckpointError):
        read_config(tmp_path)
    assert time.process_time() - start < 5  # a quarter of a second here
    with pytest.raises(CheckpointError) as error:
        qzoo.load_pretrained(tmp_path)
    assert len(str(error.value)) < 1000
