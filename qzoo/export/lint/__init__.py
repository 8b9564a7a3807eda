"""Reads any Q/DQ ONNX file and says what will run slowly, in float, or not at all in a runtime, and why."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from qzoo.errors import ArgumentError
from qzoo.export.lint import activations, islands, layers, moves, types
from qzoo.export.lint.graph import Graph, label
from qzoo.export.lint.rule import EVERY, Rule

__all__ = ["RULES", "Finding", "Rule", "lint"]

RULES: tuple[Rule, ...] = (
    *layers.RULES,
    *activations.RULES,
    *moves.RULES,
    *islands.RULES,
    *types.RULES,
)


@dataclass(frozen=True)
class Finding:
    """One place where a rule is broken.

    Attributes:
        rule: the rule's id, such as ``"bn-not-folded"``.
        nodes: names of the nodes, in the order of the data.
        targets: the runtimes that it hits.
        why, fix: what goes wrong, and what to do.
    """

    rule: str
    nodes: tuple[str, ...]
    targets: tuple[str, ...]
    why: str
    fix: str

    def __str__(self) -> str:
        return f"{self.rule} [{', '.join(self.targets)}] {' > '.join(self.nodes)}: {self.why} {self.fix}"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)


def lint(path: str | os.PathLike[str], target: str | None = None) -> list[Finding]:
    """Look for everything that costs int8 speed in a Q/DQ file, whoever wrote it.

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
        ValueError: not an ONNX file, or an unknown target.
    """
    if target is not None and target not in EVERY:
        raise ArgumentError(f"no target {target!r}; expected one of {', '.join(EVERY)}")
    graph = Graph(path)
    target = target or _target_of(graph)
    return [
        Finding(rule.id, tuple(label(node) for node in nodes), rule.targets, rule.why, rule.fix)
        for rule in RULES
        if target is None or target in rule.targets
        for nodes in rule.find(graph)
    ]


def written_for(path: str | os.PathLike[str]) -> str | None:
    """The target that a file of qzoo was exported for; None for other files."""
    return _target_of(Graph(path))


def _target_of(graph: Graph) -> str | None:
    facts = {entry.key: entry.value for entry in graph.model.metadata_props}
    target = facts.get("qzoo.target")
    return target if target in EVERY else None
