"""Names a reader of the file can follow: nodes and tensors by module path, and what the file says about itself."""

from __future__ import annotations

import ast
import json
from collections import Counter
from typing import Any

import onnx_ir as ir
from torch import nn

from qzoo.export.graph import constant
from qzoo.fields import encode
from qzoo.quantizers import float_layers
from qzoo.version import __version__

_STORED = "_quantized"  # what store_integer_weights appends to the name of a weight
_SCOPES = "pkg.torch.onnx.name_scopes"


def name_by_module(model: ir.Model) -> None:
    """Name each node ``module.path/OpType`` and its output alike, in place; a DQ's output has its quantizer's name.

    Scales and zero points are named after their quantizer. The exporter's notes (stack traces with the paths of the
    machine that exported) are removed.
    """
    counts: Counter[str] = Counter()
    names = Counter(str(value.name) for value in (*model.graph.inputs, *model.graph.initializers.values()))
    fixed = {id(value) for value in model.graph.outputs}
    for node in model.graph:
        scope = _module_path(node)
        node.name = _unique(f"{scope}/{node.op_type}" if scope else node.op_type, counts)
        for i, value in enumerate(node.outputs):
            if id(value) not in fixed:
                value.name = _unique(_tensor_name(node, i), names)
            value.metadata_props.clear()
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and scope:
            _name_constants(node, scope, names)
        node.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()


def describe(model: ir.Model, source: nn.Module, target: str) -> None:
    """Write qzoo's version, and what the model's config says about name, input and labels, into the file.

    The target is written only where something is quantized: a float file is the same for all.
    """
    model.producer_name, model.producer_version = "qzoo", __version__
    model.metadata_props.clear()
    facts: dict[str, Any] = {"qzoo_version": __version__}
    if any(node.op_type == "DequantizeLinear" for node in model.graph):
        facts["target"] = target
    excluded = getattr(getattr(source, "qzoo_placement", None), "excluded", ())
    if kept := list(dict.fromkeys([*float_layers(source), *excluded])):
        facts["float_layers"] = kept
    config = getattr(source, "qzoo_config", None)
    if config is not None:
        facts |= {
            "name": config.name,
            "labels": config.labels,
            "preprocessing": config.preprocessing.to_dict(),
            **({"classes": config.classes} if config.classes else {}),
            **({"seen": encode(config.seen)} if config.seen else {}),
        }
    for key, value in facts.items():
        model.metadata_props[f"qzoo.{key}" if not key.startswith("qzoo") else key] = (
            value if isinstance(value, str) else json.dumps(value)
        )


def _module_path(node: ir.Node) -> str:
    """The innermost module that the node came from: ``layer1.0.conv1``; "" at the top."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    except (SyntaxError, ValueError):
        return ""
    return scopes[-2] if len(scopes) >= 2 else ""


def _tensor_name(node: ir.Node, output: int) -> str:
    """The node's own name, but shorter for a DQ: the name of its quantizer, or of the weight that it stands for."""
    if node.op_type != "DequantizeLinear":
        return str(node.name) if output == 0 else f"{node.name}.{output}"
    source = node.inputs[0]
    stored = source is not None and constant(source) is not None
    if stored and source:
        return str(source.name).removesuffix(_STORED)
    return str(node.name).rpartition("/")[0] or str(node.name)


def _unique(name: str, counts: Counter[str]) -> str:
    counts[name] += 1
    return name if counts[name] == 1 else _unique(f"{name}_{counts[name]}", counts)


def _name_constants(node: ir.Node, scope: str, counts: Counter[str]) -> None:
    for value, role in zip(node.inputs[1:3], ("scale", "zero_point"), strict=False):
        # The exporter numbers them val_7; a name given already (of a merged pair, say) stays.
        if value is not None and constant(value) is not None and str(value.name).startswith("val_"):
            value.name = _unique(f"{scope}.{role}", counts)
