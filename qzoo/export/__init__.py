"""ONNX files with Q/DQ pairs that runtimes run in int8, and the checks around them."""

from __future__ import annotations

from qzoo.export.check import Check, check
from qzoo.export.lint import Finding, lint
from qzoo.export.onnx import export_onnx

__all__ = ["Check", "Finding", "check", "export_onnx", "lint"]
