"""Lint on files that nobody should write: one line and status 2, or findings; never a traceback, never for long."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper
from qdq_graphs import INT8, Draft

from qzoo.__main__ import main
from qzoo.errors import GraphError
from qzoo.export.lint import examine, lint
from qzoo.export.lint.load import MAX_FILE, MAX_NODES

SECONDS = 5.0
F32 = np.float32


def node(op_type: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes) -> NodeProto:
    return helper.make_node(op_type, inputs, outputs, domain=domain, **attributes)


def model(nodes: list[NodeProto], *stored: TensorProto, functions=()) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 8, 8])
    graph = helper.make_graph(nodes, "g", [x], [onnx.ValueInfoProto(name="y")], list(stored))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("f", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=functions)


def stored(value, name: str) -> TensorProto:
    return numpy_helper.from_array(np.asarray(value), name)


def function(name: str, body: list[NodeProto]) -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("f", 1)]
    return helper.make_function("f", name, ["a"], ["b"], body, opsets)


def chain(op_type: str, count: int) -> list[NodeProto]:
    names = ["x", *(f"t{i}" for i in range(count - 1)), "y"]
    return [node(op_type, [a], [b]) for a, b in pairwise(names)]


def quantize(x: str = "x", y: str = "y", scale: str = "s") -> list[NodeProto]:
    return [node("QuantizeLinear", [x, scale], [f"{y}q"]), node("DequantizeLinear", [f"{y}q", scale], [y])]


def bomb(depth: int, width: int) -> onnx.ModelProto:
    functions = [function("g0", [node("Relu", ["a"], ["b"])])]
    for level in range(1, depth):
        names = ["a", *(f"t{i}" for i in range(width - 1)), "b"]
        body = [node(f"g{level - 1}", [a], [b], "f") for a, b in pairwise(names)]
        functions.append(function(f"g{level}", body))
    return model([node(f"g{depth - 1}", ["x"], ["y"], "f")], functions=functions)


def external(**facts: str) -> onnx.ModelProto:
    scale = TensorProto(name="s", data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in facts.items():
        scale.external_data.add(key=key, value=value)
    return model(quantize(), scale)


def large_external() -> onnx.ModelProto:
    made = external(location="big.data")
    made.graph.initializer[0].dims.append(2**38)
    return made


def odd_type() -> onnx.ModelProto:
    made = model(quantize(), stored(F32(1), "s"))
    made.graph.initializer[0].data_type = 99
    return made


def short_tensor() -> onnx.ModelProto:
    made = model(quantize(), stored(np.ones(4, F32), "s"))
    made.graph.initializer[0].dims[0] = 2**40
    return made


def strings() -> onnx.ModelProto:
    return model(quantize(), helper.make_tensor("s", TensorProto.STRING, [1], [b"one"]))


def nested(depth: int) -> onnx.ModelProto:
    value = onnx.ValueInfoProto(name="b0")
    body = helper.make_graph([node("Relu", ["x"], ["b0"])], "b", [], [value])
    for level in range(1, depth):
        name = f"b{level}"
        inner = node(
            "If", ["c"], [name], then_branch=body, else_branch=body if level < 4 else onnx.GraphProto()
        )
        body = helper.make_graph([inner], "b", [], [onnx.ValueInfoProto(name=name)])
    return model([node("If", ["c"], ["y"], then_branch=body, else_branch=body)], stored(True, "c"))


REFUSED: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "cycle": (lambda: model([node("Identity", ["a"], ["y"]), node("Identity", ["y"], ["a"])]), "cycle"),
    "own-input": (lambda: model([node("Relu", ["y"], ["y"])]), "cycle"),
    "made-twice": (lambda: model([node("Relu", ["x"], ["y"]), node("Neg", ["x"], ["y"])]), "two nodes"),
    "made-by-none": (lambda: model([node("Relu", ["nowhere"], ["y"])]), "nothing makes"),
    "no-inputs": (lambda: model([node("QuantizeLinear", [], ["y"])]), "0 inputs"),
    "one-input": (lambda: model([node("Conv", ["x"], ["y"])]), "1 inputs"),
    "empty-input": (lambda: model([node("DequantizeLinear", ["", "x"], ["y"])]), "lacks an input"),
    "many-inputs": (lambda: model([node("Relu", ["x"] * 9, ["y"])]), "9 inputs"),
    "no-outputs": (lambda: model([node("Relu", ["x"], [])]), "0 outputs"),
    "no-nodes": (lambda: model([]), "no nodes"),
    "function-bomb": (lambda: bomb(7, 10), "nodes; lint reads"),
    "function-tower": (lambda: bomb(2000, 1), "levels; too many"),
    "recursion": (
        lambda: model(
            [node("r", ["x"], ["y"], "f")], functions=[function("r", [node("r", ["a"], ["b"], "f")])]
        ),
        "calls itself",
    ),
    "nodes": (lambda: model(chain("Relu", MAX_NODES + 1)), "nodes; lint reads"),
    "unknown-type": (odd_type, "type 99"),
    "short-tensor": (short_tensor, "can't be read"),
    "negative-size": (lambda: model(quantize(), TensorProto(name="s", data_type=1, dims=[-1])), "shape"),
    "string-scale": (strings, "no number"),
    "empty-scale": (lambda: model(quantize(), stored(np.ones(0, F32), "s")), "no number"),
    "no-data-file": (lambda: external(location="gone.data"), "not there"),
    "data-elsewhere": (lambda: external(location="../x.data"), "outside"),
    "data-by-root": (lambda: external(location="/etc/hostname"), "outside"),
    "data-unnamed": (lambda: external(), "outside"),
    "data-too-short": (lambda: external(location="big.data", offset=str(2**50)), "beyond the end"),
    "data-no-number": (lambda: external(location="big.data", offset="-4"), "by its place"),
    "data-of-a-terabyte": (large_external, "bytes, too many"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(tmp_path: Path, capsys, name: str) -> None:
    make, words = REFUSED[name]
    file = tmp_path / "x.onnx"
    file.write_bytes(make().SerializeToString())
    with (tmp_path / "big.data").open("wb") as stream:
        stream.truncate(2**40)  # sparse
    began = time.process_time()
    assert main(["lint", str(file)]) == 2
    assert time.process_time() - began < SECONDS
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    with pytest.raises(GraphError):
        lint(file)


ODD: dict[str, Callable[[], onnx.ModelProto]] = {
    "expand-tower": lambda: model(
        [node("Expand", [a, a], [b]) for a, b in pairwise("xabcdefghijklmnopqrsty")]
    ),
    "diamonds": lambda: model(
        [
            made
            for i in range(300)
            for made in (
                node("Relu", [f"t{i}" if i else "x"], [f"l{i}"]),
                node("Add", [f"l{i}", f"l{i}"], [f"t{i + 1}" if i < 299 else "y"]),
            )
        ]
    ),
    "concat-tower": lambda: model(
        [
            node("Shape", ["x"], ["t0"]),
            *(node("Concat", [f"t{i}"] * 2, [f"t{i + 1}"], axis=0) for i in range(60)),
            node("ConstantOfShape", ["t60"], ["y"]),
        ]
    ),
    "identities": lambda: model(chain("Identity", 2000)),
    "relus": lambda: model([*chain("Relu", 6000), *quantize("y", "z")], stored(F32(1), "s")),
    "hardswishes": lambda: model([*chain("HardSwish", 6000), *quantize("y", "z")], stored(F32(1), "s")),
    "pairs": lambda: model(
        [n for i in range(2500) for n in quantize(f"t{i}" if i else "x", f"t{i + 1}")], stored(F32(1), "s")
    ),
    "fan": lambda: model(
        [*quantize("x", "d"), *(node("Add", ["d", "d"], [f"t{i}"]) for i in range(5000)), node("Relu", ["x"], ["y"])],
        stored(F32(1), "s"),
    ),
    "wide-concat": lambda: model(
        [
            *(node("HardSwish", ["x"], [f"t{i}"]) for i in range(5000)),
            node("Concat", [f"t{i}" for i in range(5000)], ["y"], axis=0),
        ]
    ),
    "large-scale-again": lambda: model(
        [n for i in range(2000) for n in quantize("x", f"t{i}")], stored(np.ones(200_000, F32), "s")
    ),
    "zero-scale-clip": lambda: model(
        [node("Clip", ["x", "l", "h"], ["c"]), *quantize("c")],
        *(stored(F32(v), k) for k, v in (("l", 0), ("h", 6), ("s", 0))),
    ),
    "nested": lambda: nested(20),
    "own-convolution": lambda: model([node("Conv", ["x"], ["y"], "own")]),
    "no-opset": lambda: onnx.ModelProto(ir_version=8, graph=model(chain("Relu", 2)).graph),
    "strides-of-0": lambda: model(
        [node("Conv", ["x", "w"], ["y"], strides=[0, 0], group=0)], stored(np.ones((8, 8, 3, 3), F32), "w")
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_judged_in_time(tmp_path: Path, capsys, name: str) -> None:
    file = tmp_path / "x.onnx"
    file.write_bytes(ODD[name]().SerializeToString())
    began = time.process_time()
    status = main(["lint", str(file)])
    assert time.process_time() - began < SECONDS
    assert status in (0, 1) or capsys.readouterr().err.count("\n") == 1


def test_a_sparse_file_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "x.onnx"
    with file.open("wb") as stream:
        stream.truncate(MAX_FILE * 300)
    with pytest.raises(GraphError, match="2 GiB"):
        lint(file)


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.onnx")
    with pytest.raises(FileNotFoundError):
        lint(tmp_path / "x.onnx")


def test_weights_in_another_file_are_not_needed(tmp_path: Path) -> None:
    weight = TensorProto(name="w", data_type=1, dims=[8, 8, 3, 3], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="gone.data")
    file = tmp_path / "x.onnx"
    onnx.save(
        model([*quantize("x", "d"), node("Conv", ["d", "w"], ["y"])], stored(F32(1), "s"), weight), file
    )
    assert "float-weight" in {finding.rule for finding in lint(file, "openvino")}


def test_names_that_would_move_the_cursor(tmp_path: Path, capsys) -> None:
    file = tmp_path / "x.onnx"
    made = model([*quantize("x", "d"), node("Conv", ["x", "w"], ["y"])], stored(F32(1), "s"))
    made.graph.initializer.append(stored(np.ones((8, 8, 3, 3), F32), "w"))
    made.graph.node[2].name = "a\x1b[2J\nb"
    file.write_bytes(made.SerializeToString())
    assert main(["lint", str(file)]) == 1
    assert "at   a\\x1b[2J\\nb" in capsys.readouterr().out


def network(tmp_path: Path) -> onnx.ModelProto:
    d = Draft()
    y = d.pair(d.op("Relu", d.conv(d.pair("image", INT8))))
    y = d.pair(d.op("Concat", y, d.pair("image", INT8), axis=1))
    y = d.pair(d.op("Clip", d.op("Add", y, y), d.const(F32(0)), d.const(F32(6))))
    flat = d.op("Reshape", d.op("Transpose", y, perm=[0, 2, 3, 1]), d.const(np.array([2, 1024])))
    return onnx.load(d.save(tmp_path / "network.onnx", d.op("Gemm", flat, d.weight(1024, 4, axis=1))))


def altered(whole: onnx.ModelProto, rng: random.Random) -> Iterator[bytes]:
    """Bits flipped; and names, types, attributes and tensors exchanged."""
    while True:
        raw = bytearray(whole.SerializeToString())
        for _ in range(rng.randint(1, 8)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        yield bytes(raw)
        other = onnx.ModelProto.FromString(whole.SerializeToString())
        for _ in range(rng.randint(1, 4)):
            _alter(other.graph, rng)
        yield other.SerializeToString()


def _alter(graph: onnx.GraphProto, rng: random.Random) -> None:
    some, tensor = rng.choice(graph.node), rng.choice(graph.initializer)
    names = [name for n in graph.node for name in (*n.input, *n.output)]
    match rng.randrange(7):
        case 0:
            some.op_type = rng.choice(
                [n.op_type for n in graph.node] + ["MatMul", "Resize", "Where", "ReduceMean"]
            )
        case 1 if some.input:
            some.input[rng.randrange(len(some.input))] = rng.choice([*names, ""])
        case 2 if some.input:
            del some.input[rng.randrange(len(some.input)) :]
        case 3 if some.output:
            some.output[0] = rng.choice(names)
        case 4:
            tensor.data_type = rng.randrange(30)
        case 5:
            del tensor.dims[:]
            tensor.dims.extend(rng.choice([0, 1, -1, 3, 2**40]) for _ in range(rng.randrange(4)))
        case _:
            some.attribute.add(name=rng.choice(["axis", "block_size", "min", "mode"]), i=rng.randrange(-9, 9))


def test_altered_files(tmp_path: Path) -> None:
    """A finding or a GraphError, whatever is altered."""
    file, judged = tmp_path / "x.onnx", 0
    source = altered(network(tmp_path), random.Random(0))
    for _ in range(400):
        file.write_bytes(next(source))
        began = time.process_time()
        with suppress(GraphError):
            examine(file)
            judged += 1
        assert time.process_time() - began < SECONDS
    assert 80 < judged < 320
