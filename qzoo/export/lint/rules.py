"""All rules, and the places of a graph that they find."""

from __future__ import annotations

import onnx_ir as ir

from qzoo.export.lint.activations import RULES as ACTIVATIONS
from qzoo.export.lint.graph import Graph
from qzoo.export.lint.islands import RULES as ISLANDS
from qzoo.export.lint.layers import RULES as LAYERS
from qzoo.export.lint.moves import RULES as MOVES
from qzoo.export.lint.openvino import RULES as OPENVINO
from qzoo.export.lint.rule import Rule
from qzoo.export.lint.types import RULES as TYPES

RULES: tuple[Rule, ...] = (*LAYERS, *ACTIVATIONS, *MOVES, *ISLANDS, *TYPES, *OPENVINO)


def hits_of(graph: Graph, target: str | None) -> dict[Rule, list[tuple[ir.Node, ...]]]:
    """Find the hits of every rule for a target; of all rules for None.

    That a layer runs in float is no hit where the file says that it is to.
    """
    kept = graph.kept_in_float
    return {
        rule: [nodes for nodes in rule.find(graph) if not (rule.floats and kept.keys() & set(nodes))]
        for rule in RULES
        if target is None or target in rule.targets
    }


def float_hits_of(graph: Graph, target: str) -> dict[Rule, list[tuple[ir.Node, ...]]]:
    """Find the hits of the rules whose layers a target runs in float, or whose files it does not load."""
    return {rule: list(rule.find(graph)) for rule in RULES if target in (*rule.floats, *rule.refuses)}
