"""What a rule is: where it looks, whom it hits, why, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from qzoo.export.lint.graph import Graph

ORT, OV, TRT = "onnxruntime", "openvino", "tensorrt"
EVERY = (ORT, OV, TRT)

Hits = Iterator[tuple[ir.Node, ...]]


@dataclass(frozen=True)
class Rule:
    """One way in which a Q/DQ graph loses int8 speed, or is refused.

    Attributes:
        id: short name, such as ``"bn-not-folded"``.
        targets: the runtimes that it hits.
        why, fix: one sentence each.
        find: yields the nodes of each place.
        floats: the runtimes that run the layers at such a place in float.
        refuses: those that do not load a file that has such a place.
    """

    id: str
    targets: tuple[str, ...]
    why: str
    fix: str
    find: Callable[[Graph], Hits]
    floats: tuple[str, ...] = ()
    refuses: tuple[str, ...] = ()
