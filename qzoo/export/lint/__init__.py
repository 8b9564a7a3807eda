"""Reads any Q/DQ ONNX file and says what will run slowly, in float, or not at all in a runtime, and why."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnx_ir as ir

from qzoo.errors import ArgumentError
from qzoo.export.lint.coverage import Coverage, coverage, covered
from qzoo.export.lint.graph import Graph, label
from qzoo.export.lint.rule import EVERY, Rule
from qzoo.export.lint.rules import RULES, hits_of

__all__ = ["RULES", "Coverage", "Finding", "Report", "Rule", "coverage", "examine", "lint"]


@dataclass(frozen=True)
class Finding:
    """Place in a Q/DQ graph that costs int8 speed, with the reason and the remedy.

    Attributes:
        rule: the rule's id, such as ``"bn-not-folded"``.
        nodes: names of the nodes, in the order of the data.
        targets: the runtimes that it hits.
        why, fix: what goes wrong, and what to do.

    Example:
        >>> findings = qzoo.lint("model.onnx", target="tensorrt")  # a file for ONNX Runtime
        >>> sorted({finding.rule for finding in findings})
        ['q-on-branch', 'unsigned-type', 'zero-point']
    """

    rule: str
    nodes: tuple[str, ...]
    targets: tuple[str, ...]
    why: str
    fix: str

    def __str__(self) -> str:
        return f"{self.rule} [{', '.join(self.targets)}] {' > '.join(self.nodes)}: {self.why} {self.fix}"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return asdict(self)


def lint(path: str | os.PathLike[str], target: str | None = None) -> list[Finding]:
    """Lint an ONNX file with Q/DQ nodes, whoever wrote it: find what costs int8 speed.

    Nothing is run and no runtime is needed. The rules of ONNX Runtime and OpenVINO are those seen in the graphs that
    these make of a file (tests hold that up); TensorRT's are its documented rules of explicit quantization.

    Args:
        path: an ONNX file; large weights are not read.
        target: ``"onnxruntime"``, ``"openvino"`` or ``"tensorrt"``; by default what qzoo exported the file for. For
            other tools' files the findings of all are looked for, each of which says what it hits. No file is free of
            findings for all three (see :mod:`qzoo.scheme`).

    Returns:
        Findings, rule by rule in the order of :data:`RULES`; the nodes of a rule in the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
        GraphError: not an ONNX file, one that no runtime would load, or one that is too large or too deep to judge
            (:mod:`qzoo.export.lint.load` has the limits).
        ArgumentError: an unknown target.

    Example:
        >>> for finding in qzoo.lint("model.onnx", target="onnxruntime"):
        ...     print(finding)
    """
    return _findings(hits_of(*_open(path, target)))


@dataclass(frozen=True)
class Report:
    """Findings and int8 coverage of one file.

    Attributes:
        target: the runtime that the file is judged for; None for all of them.
        findings: as :func:`lint` returns them.
        coverage: what part runs in int8, for the target or for each runtime.
        kept: layers that are in float because the scheme or ``exclude`` says so.
    """

    target: str | None
    findings: list[Finding]
    coverage: list[Coverage]
    kept: tuple[str, ...] = ()

    def summary(self) -> str:
        """Summarize in one line: layers, and the share of the multiply-adds that runs in int8, by runtime."""
        layers = self.coverage[0].layers
        text = f"{layers} layer{'' if layers == 1 else 's'}, of them in int8: {', '.join(map(str, self.coverage))}"
        return f"{text}; in float, as asked for: {', '.join(self.kept)}" if self.kept else text


def examine(path: str | os.PathLike[str], target: str | None = None) -> Report:
    """Find what costs int8 speed in a file, and count the layers and multiply-adds that run in int8.

    Args and errors are those of :func:`lint`.
    """
    graph, target = _open(path, target)
    targets: Sequence[str] = EVERY if target is None else (target,)
    hits = hits_of(graph, target)
    kept = tuple(dict.fromkeys(graph.kept_in_float.values()))
    return Report(target, _findings(hits), covered(graph, targets, hits), kept)


def _open(path: str | os.PathLike[str], target: str | None) -> tuple[Graph, str | None]:
    if target is not None and target not in EVERY:
        raise ArgumentError(f"no target {target!r}; expected one of {', '.join(EVERY)}")
    graph = Graph(path)
    return graph, target or _target_of(graph)


def _findings(hits: dict[Rule, list[tuple[ir.Node, ...]]]) -> list[Finding]:
    return [
        Finding(rule.id, tuple(label(node) for node in nodes), rule.targets, rule.why, rule.fix)
        for rule, places in hits.items()
        for nodes in places
    ]


def written_for(path: str | os.PathLike[str]) -> str | None:
    """Read the target that qzoo exported a file for; None for other files."""
    return _target_of(Graph(path))


def _target_of(graph: Graph) -> str | None:
    target = graph.model.metadata_props.get("qzoo.target")
    return target if target in EVERY else None
