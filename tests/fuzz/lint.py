"""ONNX files for the fuzz: damaged in bytes and in fields, built to make a reader loop, and equivalent ones."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import Message
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from qzoo.__main__ import main
from tests.export.qdq_graphs import Draft
from tests.fuzz.bytes import damaged
from tests.fuzz.cases import Case, Wrong

_INTEGERS = (0, 1, -1, 2, 7, 127, 128, 255, 1000, 2**31 - 1, -(2**31), 2**40, 2**63 - 1, -(2**63))
_FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 3e38, float("inf"), float("nan"))
_TEXTS = (
    "",
    "x",
    "image",
    "Conv",
    "DequantizeLinear",
    "If",
    "Identity",
    "ai.onnx.ml",
    "../x",
    "/dev/zero",
    "\n\x1b[2J",
    "é" * 300,
)


def prepare(folder: Path) -> Case:
    """The case of lint."""
    models = [_convolutions(folder), _products(folder), _bodies(folder)]

    def case(rng: random.Random) -> str:
        shutil.rmtree(folder)
        folder.mkdir()
        kind = rng.choice((_bytes, _fields, _fields, _fields, _hostile, _same))
        return kind(rng, folder, rng.choice(models))

    return case


def _convolutions(folder: Path) -> ModelProto:
    d = Draft()
    first = d.pair(d.op("Relu", d.conv(d.pair("image"))))
    second = d.op("Relu", d.conv(first))  # not quantized behind: a finding
    mixed = d.op("Concat", d.pair(d.op("Add", d.pair(second), first)), d.pair("image"), axis=1)
    pooled = d.op("Flatten", d.pair(d.op("GlobalAveragePool", d.pair(mixed))))
    d.op("Gemm", pooled, d.weight(10, 16), d.const(np.zeros(10, np.float32)), transB=1)
    return onnx.load(d.save(folder / "x.onnx", "gemm0"))


def _products(folder: Path) -> ModelProto:
    d = Draft()
    a, b = d.pair("image"), d.op("Transpose", d.pair("image"), perm=[0, 1, 3, 2])
    scores = d.op("Softmax", d.op("MatMul", a, b))
    mixed = d.op("MatMul", d.pair(scores), d.op("LayerNormalization", a, d.const(np.ones(8, np.float32))))
    d.op("MatMul", d.pair(d.op("Gelu", mixed)), d.weight(8, 8, axis=1))
    return onnx.load(d.save(folder / "x.onnx", "matmul2"))


def _bodies(folder: Path) -> ModelProto:
    d = Draft()
    x = d.pair("image")
    inner = [
        helper.make_node("Conv", [x, d.weight(8, 8, 3, 3)], ["inside"], name="inside", pads=[1, 1, 1, 1])
    ]
    body = helper.make_graph(
        inner, "body", [], [helper.make_tensor_value_info("inside", TensorProto.FLOAT, None)]
    )
    d.op("If", d.const(np.array(True)), then_branch=body, else_branch=body, name="chosen")
    d.op("Block", d.pair("chosen"), name="called", domain="own")
    model = onnx.load(d.save(folder / "x.onnx", "called", checked=False))
    model.opset_import.append(helper.make_opsetid("own", 1))
    block = helper.make_node("Relu", ["a"], ["b"], name="r")
    model.functions.append(
        helper.make_function("own", "Block", ["a"], ["b"], [block], model.opset_import[:1])
    )
    return model


def _findings(path: Path) -> set[tuple[str, tuple[str, ...]]] | None:
    """What the command says of a file; None if it refuses it in one line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["lint", "--json", "--target", "onnxruntime", str(path)])
        main(["lint", str(path)])
    if status == 2:
        lines = err.getvalue().splitlines()
        if len(lines) != 2 or not all(line.startswith("qzoo: ") for line in lines):
            raise Wrong(f"not one line a refusal: {err.getvalue()[:1000]}")
        return None
    (rows,) = json.loads(out.getvalue()[: out.getvalue().rindex("\n}") + 2]).values()
    if status != bool(rows):
        raise Wrong(f"status {status} with {len(rows)} findings")
    return {(row["rule"], tuple(row["nodes"])) for row in rows}


def _said(path: Path) -> str:
    return "refused" if _findings(path) is None else "accepted"


def _bytes(rng: random.Random, folder: Path, model: ModelProto) -> str:
    content = model.SerializeToString()
    (folder / "x.onnx").write_bytes(damaged(content, rng, rng.choice((None, 100))))
    return _said(folder / "x.onnx")


def _fields(rng: random.Random, folder: Path, model: ModelProto) -> str:
    """One to four fields of the file have other values, are missing, or are there twice."""
    changed = ModelProto()
    changed.CopyFrom(model)
    for _ in range(rng.randint(1, 4)):
        _change(changed, rng, [name for node in model.graph.node for name in (*node.input, *node.output)])
    (folder / "x.onnx").write_bytes(changed.SerializeToString())
    return _said(folder / "x.onnx")


def _change(message: Message, rng: random.Random, names: list[str]) -> None:
    """Change a field somewhere in a message; nodes and tensors more often than what is beside them."""
    known = [field for field, _ in message.ListFields()]
    if not known or rng.random() < 0.1:
        field = rng.choice(message.DESCRIPTOR.fields)
    else:
        field = rng.choices(
            known, [5 if f.name in ("graph", "node", "initializer", "functions") else 1 for f in known]
        )[0]
    value = getattr(message, field.name)
    several, nested = hasattr(value, "append"), field.type == field.TYPE_MESSAGE
    if several and len(value) and rng.random() < 0.2:
        at = rng.randrange(len(value))
        if rng.random() < 0.5:
            del value[at]
        else:
            value.append(value[at])
    elif nested and several:
        _change(rng.choice(value) if len(value) else value.add(), rng, names)
    elif nested:
        _change(value, rng, names) if rng.random() < 0.95 else message.ClearField(field.name)
    elif several:
        new = _scalar(field, rng, names)
        if len(value):
            value[rng.randrange(len(value))] = new
        else:
            value.append(new)
    else:
        setattr(message, field.name, _scalar(field, rng, names))


def _scalar(field: Any, rng: random.Random, names: list[str]) -> Any:
    if field.type == field.TYPE_STRING:
        return rng.choice((rng.choice(_TEXTS), rng.choice(names)))
    if field.type == field.TYPE_BYTES:
        return rng.choice((b"", b"\xff", rng.randbytes(8), rng.choice(_TEXTS).encode()))
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return rng.choice(_FLOATS)
    if field.type == field.TYPE_ENUM:
        return rng.choice(field.enum_type.values).number
    wide = field.type in (field.TYPE_INT64, field.TYPE_UINT64)
    low = 0 if field.type in (field.TYPE_UINT64, field.TYPE_UINT32) else -(2**63 if wide else 2**31)
    return rng.choice([n for n in _INTEGERS if low <= n < (2**63 if wide else 2**31)])


def _hostile(rng: random.Random, folder: Path, model: ModelProto) -> str:
    """Small files that a careless reader does not end with."""
    changed = ModelProto()
    changed.CopyFrom(model)
    rng.choice(_HOSTILE)(changed, rng, folder)
    (folder / "x.onnx").write_bytes(changed.SerializeToString())
    return _said(folder / "x.onnx")


def _cycle(model: ModelProto, rng: random.Random, folder: Path) -> None:
    count = rng.choice((1, 2, 50))
    nodes = [helper.make_node("Identity", [f"c{(i + 1) % count}"], [f"c{i}"]) for i in range(count)]
    model.graph.node.extend(nodes)
    if rng.random() < 0.5:
        model.graph.node[0].input[0] = "c0"


def _chain(model: ModelProto, rng: random.Random, folder: Path) -> None:
    kind = rng.choice(("Identity", "Relu", "Transpose", "DequantizeLinear", "Clip"))
    count, start = rng.choice((100, 2000, 5000)), rng.choice([*model.graph.node]).output[0]
    for i in range(count):
        model.graph.node.add(
            op_type=kind, input=[f"n{i - 1}" if i else start], output=[f"n{i}"], name=f"n{i}"
        )
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == start and not node.name.startswith("n"):
                node.input[i] = f"n{count - 1}"


def _doubling(model: ModelProto, rng: random.Random, folder: Path) -> None:
    kind, start = (
        rng.choice(("Expand", "Concat", "Add", "Mul", "Where")),
        rng.choice(("image", model.graph.initializer[0].name)),
    )
    for i in range(rng.choice((20, 60, 400))):
        before = f"d{i - 1}" if i else start
        model.graph.node.append(
            helper.make_node(kind, [before] * (3 if kind == "Where" else 2), [f"d{i}"], name=f"d{i}")
        )
    model.graph.output.add(name=model.graph.node[-1].output[0])


def _calls(model: ModelProto, rng: random.Random, folder: Path) -> None:
    depth, calls = rng.choice(((6, 10), (30, 2), (200, 1), (1, 3000)))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("deep", 1)]
    for level in range(depth):
        kind = f"F{level + 1}" if level + 1 < depth or rng.random() < 0.1 else "Relu"
        names = ["a", *(f"t{i}" for i in range(calls - 1)), "b"]
        nodes = [
            helper.make_node(kind, [x], [y], domain="" if kind == "Relu" else "deep")
            for x, y in pairwise(names)
        ]
        model.functions.append(helper.make_function("deep", f"F{level}", ["a"], ["b"], nodes, opsets))
    if rng.random() < 0.2:
        model.functions[-1].node[0].op_type, model.functions[-1].node[0].domain = "F0", "deep"
    model.opset_import.append(opsets[1])
    model.graph.node.append(helper.make_node("F0", ["image"], ["called"], domain="deep"))


def _nested(model: ModelProto, rng: random.Random, folder: Path) -> None:
    node: NodeProto = helper.make_node("Relu", ["image"], ["y"])
    for level in range(rng.choice((2, 12, 25))):  # protobuf reads 100 messages deep
        body = helper.make_graph([node], "body", [], [onnx.ValueInfoProto(name="y")])
        branches = {"then_branch": body} | ({"else_branch": body} if level < 10 else {})
        node = helper.make_node("If", [model.graph.initializer[0].name], ["y"], **branches)
    model.graph.node.append(node)


def _external(model: ModelProto, rng: random.Random, folder: Path) -> None:
    tensor = rng.choice(model.graph.initializer)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    sparse, pipe = folder / "sparse", folder / "pipe"
    sparse.touch()
    os.truncate(sparse, 2**40)
    os.mkfifo(pipe)
    (folder / "loop").symlink_to("loop")
    places = (
        "none",
        "sparse",
        "pipe",
        "loop",
        "",
        ".",
        "../../../../etc/passwd",
        "/dev/zero",
        "/etc/passwd",
        "x.onnx",
        "a\0b",
    )
    tensor.external_data.add(key="location", value=rng.choice(places))
    for key in ("offset", "length"):
        if rng.random() < 0.5:
            tensor.external_data.add(
                key=key, value=rng.choice(("0", "4096", "-1", str(2**40), "9" * 5000, "x", "1e9"))
            )
    if rng.random() < 0.5:
        tensor.dims[:] = rng.choice(([2**38], [2**20, 2**20], [-1], [2**62, 4], [0], []))


def _tensor(model: ModelProto, rng: random.Random, folder: Path) -> None:
    tensor = rng.choice(model.graph.initializer)
    tensor.dims[:] = rng.choice(([2**38], [2**20, 2**20], [-1], [2**62, 4], [0], [], [1] * 1000, [3, 3]))
    if rng.random() < 0.5:
        tensor.data_type = rng.choice((*TensorProto.DataType.values(), 77, -1))
    if rng.random() < 0.3:
        tensor.raw_data = b""


def _names(model: ModelProto, rng: random.Random, folder: Path) -> None:
    node = rng.choice(model.graph.node)
    choice = rng.randrange(5)
    if choice == 0:
        del node.input[rng.randrange(len(node.input) + 1) :]
    elif choice == 1:
        del node.output[:]
    elif choice == 2:
        node.output[0] = rng.choice(model.graph.node).output[0]
    elif choice == 3:
        node.input.extend(["image"] * rng.choice((1, 100, 10_000)))
    else:
        node.name = node.domain = rng.choice(_TEXTS)


def _sparse(model: ModelProto, rng: random.Random, folder: Path) -> None:
    values = helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0])
    places = helper.make_tensor("p", TensorProto.INT64, [1], [0])
    tensor = helper.make_sparse_tensor(values, places, rng.choice(([3], [2**40], [2**20, 2**20], [-1])))
    node = helper.make_node("Constant", [], ["sparse"])
    node.attribute.add(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR).sparse_tensor.CopyFrom(
        tensor
    )
    model.graph.node.insert(0, node)
    reader = rng.choice([n for n in model.graph.node if n.input])
    reader.input[rng.randrange(len(reader.input))] = "sparse"


def _versions(model: ModelProto, rng: random.Random, folder: Path) -> None:
    del model.opset_import[:]
    for _ in range(rng.randrange(3)):
        model.opset_import.add(
            domain=rng.choice(("", "ai.onnx", "own")), version=rng.choice((0, 1, 12, 99, -5, 2**40))
        )
    model.ir_version = rng.choice((0, 3, 10, 99, -1))


_Build = Callable[[ModelProto, random.Random, Path], None]
_HOSTILE: tuple[_Build, ...] = (
    *(_cycle, _chain, _doubling, _calls, _nested, _external, _tensor, _names, _names, _sparse, _versions),
)


def _same(rng: random.Random, folder: Path, model: ModelProto) -> str:
    """Other names of tensors, another order, weights in another file or in nodes: the same findings."""
    onnx.save(model, folder / "x.onnx")
    before = _findings(folder / "x.onnx")
    changed = ModelProto()
    changed.CopyFrom(model)
    forms = rng.sample((_renamed, _reordered, _as_nodes, _described), rng.randint(1, 4))
    for form in forms:
        form(changed, rng)
    outside = rng.random() < 0.5
    if outside:
        onnx.external_data_helper.convert_model_to_external_data(
            changed, location="weights", size_threshold=0
        )
    onnx.save(changed, folder / "y.onnx")
    after = _findings(folder / "y.onnx")
    if before is None or before != after:
        names = [form.__name__ for form in forms] + ["weights in another file"] * outside
        difference = (before or set()) ^ (after or set())
        raise Wrong(f"{names}: {'refused' if after is None else sorted(difference)}")
    return "accepted"


def _renamed(model: ModelProto, rng: random.Random) -> None:
    new: dict[str, str] = {"": ""}

    def rename(name: str) -> str:
        return new.setdefault(name, f"t{rng.getrandbits(64):x}")

    def within(nodes: Any) -> None:
        for node in nodes:
            node.input[:], node.output[:] = [*map(rename, node.input)], [*map(rename, node.output)]
            for attribute in node.attribute:
                within(attribute.g.node)
                for value in attribute.g.output:
                    value.name = rename(value.name)

    within(model.graph.node)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer):
        value.name = rename(value.name)


def _reordered(model: ModelProto, rng: random.Random) -> None:
    """A random topological order."""
    waiting = list(model.graph.node)
    made = {"", *(value.name for value in (*model.graph.input, *model.graph.initializer))}
    order: list[NodeProto] = []
    while waiting:
        ready = [node for node in waiting if made.issuperset((*node.input, *_captured(node)))]
        node = rng.choice(ready)
        waiting.remove(node)
        order.append(node)
        made.update(node.output)
    kept = [NodeProto.FromString(node.SerializeToString()) for node in order]
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _captured(node: NodeProto) -> list[str]:
    inner = [n for attribute in node.attribute for n in attribute.g.node]
    return [name for n in inner for name in n.input]


def _as_nodes(model: ModelProto, rng: random.Random) -> None:
    """Some constants are nodes, not initializers."""
    chosen = [tensor for tensor in model.graph.initializer if rng.random() < 0.5]
    for tensor in chosen:
        value = numpy_helper.from_array(numpy_helper.to_array(tensor))
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=value))
        model.graph.initializer.remove(tensor)


def _described(model: ModelProto, rng: random.Random) -> None:
    model.doc_string, model.producer_name = "words", "someone"
    for node in model.graph.node:
        node.doc_string = "words"
    model.metadata_props.add(key="a", value="b")
