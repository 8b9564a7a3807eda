"""Writing an ONNX model so that a reader finds the old file or the new one, never half of one."""

from __future__ import annotations

import glob
import hashlib
import os
from pathlib import Path
from typing import Any

from qzoo.errors import ExportError
from qzoo.files import temporary_folder

PROTOBUF_LIMIT = 2**31 - 2**24
"""One protobuf message holds less than 2 GiB; weights beyond go into a file of their own."""


def write(graph: Any, path: Path, limit: int = PROTOBUF_LIMIT) -> Path:
    """Check an ``onnx_ir`` model, write it beside its place, then move it there.

    Weights of more than ``limit`` bytes go into ``<name>.<hash>.data``, which is in place before the model that
    refers to it. The hash is of the content, so that the data of a model that is there already stay as they are until
    the new model has taken its place; then they are removed. A symbolic link stays, and its target is written.

    Raises:
        ExportError: the model is not valid ONNX, or the system refuses the file; nothing is written.
    """
    try:
        _write(graph, path, Path(os.path.realpath(path)), limit)
    except OSError as error:  # names a temporary file
        raise ExportError(f"can't write {str(path)!r}: {error.strerror or error}") from error
    return path


def _write(graph: Any, given: Path, path: Path, limit: int) -> None:
    import onnx
    import onnx_ir as ir

    path.parent.mkdir(parents=True, exist_ok=True)
    values = list(graph.graph.initializers.values())
    large = sum(value.const_value.nbytes for value in values) > limit
    data = f"{path.name}.{_digest(values)}.data" if large else None
    if large and Path(os.path.realpath(given.parent)) != path.parent:
        # Runtimes look for the weights beside the path that they open.
        raise ExportError(
            f"{str(given)!r} links to another folder, where the file of its weights would not be found: write "
            f"{str(path)!r} itself"
        )
    with temporary_folder(f".{path.name}.", path.parent) as folder:
        draft = folder / path.name
        ir.save(graph, draft, format="protobuf", external_data=data)
        try:
            onnx.checker.check_model(str(draft), full_check=True)
        except Exception as error:  # onnx has several types for it
            raise ExportError(f"the exported graph is not valid ONNX: {error}") from error
        if data is not None:
            os.replace(folder / data, path.parent / data)
        os.replace(draft, path)
    for old in path.parent.glob(f"{glob.escape(path.name)}.{'[0-9a-f]' * 12}.data"):
        if old.name != data:
            old.unlink()


def _digest(values: list[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(value.name.encode())
        digest.update(value.const_value.numpy().tobytes())
    return digest.hexdigest()[:12]
