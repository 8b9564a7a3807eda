"""ONNX files with Q/DQ pairs that runtimes run in int8, and the checks around them."""

from __future__ import annotations

from qzoo.export.lint import Finding, lint
from qzoo.export.onnx import export_onnx

__all__ = ["Finding", "export_onnx", "lint"]
