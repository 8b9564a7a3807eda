"""The ONNX files of a checkpoint folder: ``onnx/model_int8.onnx`` for ONNX Runtime, one more for each other target."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from qzoo.config import Config
from qzoo.export.onnx import export_onnx
from qzoo.scheme import target_named
from qzoo.zoo import hub


def onnx_name(config: Config, target: str) -> str:
    """Name the ONNX file of a target: its path inside the folder.

    Raises:
        ValueError: an unknown target.
    """
    target_named(target)
    if config.scheme is None:
        return "onnx/model.onnx"
    return "onnx/model_int8.onnx" if target == "onnxruntime" else f"onnx/model_int8_{target}.onnx"


def export_files(model: nn.Module, config: Config, folder: Path, targets: Iterable[str]) -> list[str]:
    """Write the files into a folder; returns their paths inside of it. Raises as :func:`qzoo.export_onnx`."""
    names = []
    for target in targets:
        name = onnx_name(config, target)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        export_onnx(model, folder / name, target=target)
        names.append(name)
    return names


def with_files(config: Config, folder: Path, names: Iterable[str]) -> Config:
    """Record hashes and sizes of these files, and of no others, in a config."""
    names = list(names)
    return dataclasses.replace(
        config,
        files={name: hub.sha256_of(folder / name) for name in names},
        sizes={name: (folder / name).stat().st_size for name in names},
    )
