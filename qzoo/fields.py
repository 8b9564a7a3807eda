"""JSON to dataclasses and back: a field that does not fit its annotation is an error that names it.

Known annotations: dataclasses, ``str``, ``int``, ``float``, ``bool``, ``X | None``, ``int | str``,
``tuple[...]``, ``dict[str, X]``, ``Any``. A field whose metadata says "optional" is written only where it differs
from its default, and may be missing; :func:`one_of` and :func:`like` say which values it can have.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from qzoo.errors import CheckpointError, shown
from qzoo.scheme import Scheme


def one_of(*values: str | None) -> dict[str, Any]:
    """Make the metadata of a field that has one of these values and no other."""
    return {"allowed": (set(values), f"must be one of {', '.join(repr(v) for v in values if v is not None)}")}


def like(pattern: str, what: str) -> dict[str, Any]:
    """Make the metadata of a text field that matches the pattern from end to end; ``what`` describes it."""
    return {"allowed": (re.compile(pattern, re.ASCII), f"must be {what}")}


def parse(text: str) -> dict[str, Any]:
    """Parse a JSON object without duplicate keys, NaN or infinity. Raises CheckpointError for anything else."""

    def refuse(constant: str) -> float:
        raise CheckpointError(f"config.json: {constant} is no JSON number")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values:
                raise CheckpointError(f"config.json: duplicate key {shown(key)}")
            values[key] = value
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


def finite(value: Any) -> Any:
    """Replace infinity and NaN by None, at any depth of lists and dictionaries: JSON has no such numbers."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    return type(value)(map(finite, value)) if type(value) in (list, tuple) else value


def encode(value: Any) -> Any:
    """Encode dataclasses, tuples and mappings as JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: encode(getattr(value, f.name))
            for f in _fields(type(value))
            if not (f.metadata.get("optional") and getattr(value, f.name) == f.default)
        }
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    return value


_DEEPEST = 16
_KINDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a whole number"}


def _kind(value: Any) -> str:
    return "null" if value is None else _KINDS.get(type(value), "a number")


def decode(kind: Any, value: Any, path: str) -> Any:
    """Decode a JSON value to an instance of an annotated type; an error names ``path``."""
    if kind is Any:
        return _plain(value, path, 0)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, Union):
        if value is None:
            return None
        kinds = [a for a in arguments if a is not types.NoneType]
        return decode(next((a for a in kinds if a is type(value)), kinds[0]), value, path)
    if dataclasses.is_dataclass(kind):
        return _decode_fields(kind, _expect(value, dict, path), path)
    if origin is tuple:
        return _decode_items(arguments, _expect(value, list, path), path)
    if origin is dict:
        values = _expect(value, dict, path)
        return {key: decode(arguments[1], item, f"{path}[{shown(key)}]") for key, item in values.items()}
    if kind is str:
        return _text(_expect(value, str, path), path)
    if kind is float:
        number = _expect(value, int if isinstance(value, int) else float, path)
        if not abs(number) < 1e300:  # 1e999 is infinity to JSON, and a long integer has no float
            raise CheckpointError(f"config.json: {path} is no finite number of sensible size")
        return float(number)
    if kind is int and not abs(_expect(value, int, path)) < 1 << 63:  # cards and summaries divide by it
        raise CheckpointError(f"config.json: {path} must be less than 2**63")
    return _expect(value, kind, path)


def _plain(value: Any, path: str, depth: int) -> Any:
    """JSON without an annotation, where it can be written and copied again."""
    if depth > _DEEPEST:
        raise CheckpointError(f"config.json: {path} is nested more than {_DEEPEST} levels deep")
    if isinstance(value, dict):
        return {
            _text(key, path): _plain(item, f"{path}[{shown(key)}]", depth + 1) for key, item in value.items()
        }
    if isinstance(value, list):
        return [_plain(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
    return value if value is None or isinstance(value, int) else decode(type(value), value, path)


def _text(value: str, path: str) -> str:
    if any("\ud800" <= letter <= "\udfff" for letter in value):  # JSON has them, UTF-8 does not
        raise CheckpointError(f"config.json: {path} holds half of a surrogate pair, which is no text")
    return value


def _decode_fields(kind: Any, values: dict[str, Any], path: str) -> Any:
    hints = get_type_hints(kind)
    known = _fields(kind)
    prefix = f"{path}." if path else ""
    unknown = values.keys() - {f.name for f in known}
    if unknown:
        raise CheckpointError(f"config.json: unknown field {prefix}{shown(min(unknown))[1:-1]}")
    for f in known:
        if f.name not in values and not f.metadata.get("optional"):
            raise CheckpointError(f"config.json: field {prefix}{f.name} is missing")
    names = [f.name for f in known if f.name in values]
    decoded = {name: decode(hints[name], values[name], prefix + name) for name in names}
    for f in known:
        if f.name in names and "allowed" in f.metadata:
            _check_allowed(decoded[f.name], f.metadata["allowed"], prefix + f.name)
    try:
        return kind(**decoded)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"config.json: {path}: {error}") from error


def _check_allowed(value: Any, allowed: tuple[set[str | None] | re.Pattern[str], str], path: str) -> None:
    values, what = allowed
    if not (values.fullmatch(value) if isinstance(values, re.Pattern) else value in values):
        raise CheckpointError(f"config.json: {path} {what}, not {'null' if value is None else shown(value)}")


def _fields(kind: Any) -> list[dataclasses.Field[Any]]:
    """A Scheme's target is no part of a file: one checkpoint serves all."""
    return [f for f in dataclasses.fields(kind) if not (kind is Scheme and f.name == "target")]


def _decode_items(arguments: tuple[Any, ...], items: list[Any], path: str) -> tuple[Any, ...]:
    if arguments[-1] is Ellipsis:
        arguments = (arguments[0],) * len(items)
    if len(items) != len(arguments):
        raise CheckpointError(f"config.json: {path} must have {len(arguments)} entries, not {len(items)}")
    pairs = zip(arguments, items, strict=True)
    return tuple(decode(kind, item, f"{path}[{i}]") for i, (kind, item) in enumerate(pairs))


def _expect(value: Any, kind: type, path: str) -> Any:
    if type(value) is not kind:
        expected = _KINDS.get(kind, "a number")
        raise CheckpointError(f"config.json: {path} must be {expected}, not {_kind(value)}")
    return value
