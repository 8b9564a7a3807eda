"""Forms that OpenVINO computes otherwise than the file says: lint names those, and the executed graphs say which.

Every case is run in OpenVINO and, as the file says, in ONNX Runtime without optimization.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from qdq_graphs import INT8, UINT8, Draft

from qzoo.export.lint import lint
from qzoo.export.lint.openvino import RULES
from qzoo.runtimes.sessions import onnxruntime_session

F32 = np.float32
U128 = np.uint8(128)


class Sketch(Draft):
    """A draft with scales of its own for each channel of a weight."""

    def weight(self, *shape: int, zero=INT8, axis: int = 0) -> str:
        q = self.random.integers(-100, 100, shape).astype(np.int8)
        scales = self.random.uniform(0.5, 1.5, shape[axis]) / (57 * math.sqrt(np.prod(shape) / shape[axis]))
        return self.dq(self.const(q), np.zeros(shape[axis], np.int8), scales.astype(F32), axis=axis)

    def layer(self, x: str, inputs: int = 8, kernel: int = 3, *, bias: bool = True) -> str:
        """A convolution with 8 outputs."""
        b = [self.const(self.random.normal(0, 0.3, 8).astype(F32))] if bias else []
        return self.op("Conv", x, self.weight(8, inputs, kernel, kernel), *b, pads=[kernel // 2] * 4)

    def ints(self, *values: int) -> str:
        return self.const(np.array(values, np.int64))

    def vector(self, size: int = 8) -> str:
        return self.const(self.random.uniform(0.5, 1.5, size).astype(F32))

    def write(
        self, path: Path, outputs: str | list[str], *, batch: int | None, size: tuple[int, ...]
    ) -> Path:
        outputs = [outputs] if isinstance(outputs, str) else outputs
        image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch or "batch", *size])
        graph = helper.make_graph(
            self.nodes,
            "sketch",
            [image],
            [onnx.ValueInfoProto(name=name) for name in outputs],
            self.initializers,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.save(onnx.shape_inference.infer_shapes(model, strict_mode=True), path)
        return path


def pool(d: Sketch, x: str, counted: int = 1) -> str:
    return d.op("AveragePool", x, kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=counted)


def pooled(d: Sketch, x: str) -> str:
    return d.op("MaxPool", x, kernel_shape=[3, 3], pads=[1] * 4)


def average(d: Sketch) -> str:
    """Of what has much wider steps than it needs."""
    return d.op("AveragePool", d.pair("image", UINT8, F32(0.3)), kernel_shape=[2, 2])


def narrow(d: Sketch, x: str) -> str:
    return d.pair(x, UINT8, F32(0.0317))


def image(d: Sketch) -> str:
    return d.pair("image", INT8, F32(0.0217))


def beside(d: Sketch) -> str:
    """What is added to a convolution, quantized."""
    return d.pair(d.op("MaxPool", "image", kernel_shape=[1, 1]), INT8, F32(0.0317))


def steps(d: Sketch, x: str, zero=UINT8) -> str:
    return d.pair(x, zero, F32(0.05))


def added(d: Sketch, a: str, b: str, relu: bool = False) -> str:
    total = d.op("Add", a, b)
    return d.layer(d.pair(d.op("Relu", total) if relu else total, UINT8, F32(0.0437)))


def joined(d: Sketch) -> str:
    """A Concat that nothing else has to do with."""
    return concat(d, d.op("Exp", "image"), "image")


def dim(d: Sketch) -> str:
    """The batch, as a vector of one number."""
    return d.op("Gather", d.op("Shape", "image"), d.ints(0), axis=0)


def sizes(d: Sketch, *parts: str, kind: str = "Reshape") -> list[str]:
    """A pooled int8 convolution, and another operator whose sizes a Concat joins."""
    other = d.op("Exp", "image") if kind == "Reshape" else d.const(np.ones((1, 1, 8), F32))
    return [
        d.layer(pooled(d, d.pair("image", INT8))),
        d.op(kind, other, d.op("Concat", *parts, axis=0)),
    ]


def expanded(d: Sketch) -> str:
    """What is the same for all images, as often as there are images."""
    return d.op(
        "Expand", d.const(np.ones((1, 1, 1), F32)), d.op("Concat", dim(d), d.ints(1), d.ints(1), axis=0)
    )


def quantized(d: Sketch, x: str) -> str:
    """A convolution whose output is quantized for another one."""
    return d.layer(d.pair(d.op("Relu", d.layer(x)), UINT8))


def concat(d: Sketch, *tensors: str) -> str:
    return d.op("Concat", *tensors, axis=1)


def two(d: Sketch, zero=None) -> tuple[str, str]:
    """Two convolutions of the image, quantized when there is a zero point."""
    x = d.pair("image", INT8)
    a, b = d.layer(x), d.layer(x)
    return (a, b) if zero is None else (d.pair(a, zero), d.pair(b, zero))


def channels(d: Sketch) -> str:
    """A factor for each of 16 channels."""
    return d.const(d.random.uniform(0.5, 1.5, (1, 16, 1, 1)).astype(F32))


def bare(d: Sketch, bias: bool = False) -> str:
    return d.layer(d.pair("image", INT8), bias=bias)


def rows(d: Sketch, between: Callable[[Sketch, str], str], images: int, *, flat: bool = True) -> str:
    """Rows of the last dimension, through a linear layer; so many of them gathered for an image."""
    if flat:
        x = d.op("Reshape", d.pair("image", INT8), d.ints(-1, 8))
        x = between(d, d.op("MatMul", x, d.weight(8, 8, axis=1)))
    else:
        x = d.op("MatMul", d.pair("image", INT8), d.weight(8, 8, axis=1))
        x = between(d, d.op("Reshape", x, d.ints(-1, 8)))
    return d.op("Reshape", x, d.ints(-1, images, 8))


def same(d: Sketch, x: str) -> str:
    return x


def norm(d: Sketch, x: str) -> str:
    return d.op("BatchNormalization", x, d.vector(), d.vector(), d.vector(), d.vector())


def maximum(d: Sketch, x: str, kind: str = "ReduceMax") -> str:
    return d.op(kind, x) if kind.startswith("Global") else d.op(kind, x, d.ints(2, 3))


def normed(d: Sketch, x: str, *, axis: int = -1, epsilon: float = 0.1, kind: str = "Layer") -> str:
    if kind == "Layer":
        factors = d.const(d.random.uniform(0.5, 1.5, [8] * (1 if axis == -1 else 3)).astype(F32))
        return d.op("LayerNormalization", x, factors, axis=axis, epsilon=epsilon)
    groups = {"num_groups": 2} if kind == "Group" else {}
    return d.op(f"{kind}Normalization", x, d.vector(), d.vector(), epsilon=epsilon, **groups)


@dataclass(frozen=True)
class Form:
    """A graph, whether OpenVINO computes it wrongly, and how its input looks."""

    write: Callable[[Sketch], str | list[str]]
    wrong: bool
    batch: int | None = None
    size: tuple[int, ...] = (8, 8, 8)


FORMS: dict[str, dict[str, Form]] = {
    "concat-int8": {
        "int8 joined": Form(lambda d: d.layer(concat(d, *two(d, INT8)), 16), True),
        "int8 behind": Form(lambda d: d.layer(d.pair(concat(d, *two(d)), INT8), 16), True),
        "int8 behind a ReLU": Form(
            lambda d: d.layer(d.pair(d.op("Relu", concat(d, *two(d))), INT8), 16), True
        ),
        "int8 behind scales of channels, fixed": Form(
            lambda d: d.layer(d.pair(d.op("Mul", concat(d, *two(d)), channels(d)), INT8), 16), True, 2
        ),
        "the image itself": Form(
            lambda d: d.layer(concat(d, x := d.pair("image", INT8), d.pair(d.layer(x), INT8)), 16), True
        ),
        "int8 and uint8": Form(lambda d: d.layer(concat(d, two(d, INT8)[0], two(d, UINT8)[0]), 16), True),
        "pooled before": Form(
            lambda d: d.layer(
                concat(d, *(d.op("MaxPool", x, kernel_shape=[1, 1]) for x in two(d, INT8))), 16
            ),
            True,
        ),
        "uint8 joined": Form(lambda d: d.layer(concat(d, *two(d, U128)), 16), False),
        "uint8 behind": Form(lambda d: d.layer(d.pair(concat(d, *two(d)), U128), 16), False),
        "no layer behind": Form(lambda d: concat(d, *two(d, INT8)), False),
        "one float": Form(lambda d: d.layer(concat(d, two(d, INT8)[0], two(d)[0]), 16), False),
        "int8 behind a scale": Form(
            lambda d: d.layer(d.pair(d.op("Mul", concat(d, *two(d)), d.const(F32(0.7))), INT8), 16), True
        ),
        "int8 behind scales of channels": Form(
            lambda d: d.layer(d.pair(d.op("Mul", concat(d, *two(d)), channels(d)), INT8), 16), False
        ),
    },
    "moved-int8": {
        "pooled": Form(lambda d: [d.layer(pooled(d, d.pair("image", INT8))), joined(d)], True),
        "pooled, joined behind": Form(
            lambda d: concat(d, d.layer(x := d.pair(d.layer(pooled(d, d.pair("image", INT8))), INT8)), x),
            True,
        ),
        "any zero point": Form(
            lambda d: [d.layer(pooled(d, d.pair("image", np.int8(-20)))), joined(d)], True
        ),
        "ReLU": Form(lambda d: [d.layer(d.op("Relu", d.pair("image", INT8))), joined(d)], True),
        "averaged": Form(lambda d: [d.layer(pool(d, d.pair("image", INT8), 0)), joined(d)], True),
        "transposed": Form(
            lambda d: [d.layer(d.op("Transpose", d.pair("image", INT8), perm=[0, 1, 3, 2])), joined(d)], True
        ),
        "a part of it": Form(
            lambda d: [
                d.layer(d.op("Slice", d.pair("image", INT8), d.ints(1), d.ints(5), d.ints(3))),
                joined(d),
            ],
            True,
        ),
        "the shape of a Flatten": Form(
            lambda d: [
                d.layer(pooled(d, d.pair("image", INT8))),
                d.op("Flatten", d.op("Exp", "image"), axis=2),
            ],
            True,
        ),
        "fixed": Form(lambda d: [d.layer(pooled(d, d.pair("image", INT8))), joined(d)], True, 2),
        "uint8": Form(lambda d: [d.layer(pooled(d, d.pair("image", U128))), joined(d)], False),
        "no Concat": Form(lambda d: d.layer(pooled(d, d.pair("image", INT8))), False),
        "the shape of a Flatten, fixed": Form(
            lambda d: [
                d.layer(pooled(d, d.pair("image", INT8))),
                d.op("Flatten", d.op("Exp", "image"), axis=2),
            ],
            False,
            2,
        ),
        "sizes of a Reshape": Form(lambda d: sizes(d, dim(d), d.ints(-1)), False),
        "computed sizes of a Reshape": Form(
            lambda d: sizes(d, d.op("Mul", dim(d), d.ints(2)), d.ints(4), d.ints(-1)), True
        ),
        "computed sizes, fixed": Form(
            lambda d: sizes(d, d.op("Mul", dim(d), d.ints(2)), d.ints(4), d.ints(-1)), False, 2
        ),
        "sizes of an Expand": Form(lambda d: sizes(d, dim(d), d.ints(1), d.ints(1), kind="Expand"), True),
        "Flatten of axis 1": Form(
            lambda d: d.op("Flatten", d.layer(pooled(d, d.pair("image", INT8))), axis=1), False
        ),
        "no operator between": Form(lambda d: [d.layer(d.pair("image", INT8)), joined(d)], False),
        "float weights": Form(
            lambda d: [
                d.op("Conv", pooled(d, d.pair("image", INT8)), d.const(np.ones((8, 8, 1, 1), F32))),
                joined(d),
            ],
            False,
        ),
        "depthwise": Form(
            lambda d: [
                d.op("Conv", pooled(d, d.pair("image", INT8)), d.weight(8, 1, 1, 1), group=8),
                joined(d),
            ],
            False,
        ),
    },
    "shared-without-bias": {
        "add": Form(lambda d: d.op("Add", x := bare(d), d.layer(d.pair(x, INT8))), True),
        "multiply": Form(
            lambda d: d.op(
                "Mul",
                x := bare(d),
                d.op("Sigmoid", d.layer(d.pair(d.op("GlobalAveragePool", x), INT8), 8, 1)),
            ),
            True,
        ),
        "output": Form(lambda d: [x := bare(d), d.layer(d.pair(x, INT8))], True),
        "ReLU and output": Form(lambda d: [x := bare(d), d.layer(d.pair(d.op("Relu", x), UINT8))], True),
        "two float": Form(lambda d: [d.op("Sigmoid", x := bare(d)), d.op("Add", x, "image")], True),
        "with bias": Form(lambda d: d.op("Add", x := bare(d, True), d.layer(d.pair(x, INT8))), False),
        "fixed batch": Form(lambda d: d.op("Add", x := bare(d), d.layer(d.pair(x, INT8))), False, 2),
        "quantized for both": Form(lambda d: d.op("Add", y := d.pair(bare(d), INT8), d.layer(y)), False),
        "sigmoid and output": Form(lambda d: [x := bare(d), d.op("Sigmoid", x)], False),
        "ReLU and Q": Form(lambda d: [d.op("Relu", x := bare(d)), d.layer(d.pair(x, INT8))], False),
    },
    "batch-read": {
        "Expand": Form(lambda d: [expanded(d), quantized(d, image(d))], True),
        "Range": Form(
            lambda d: [
                d.op("Range", d.const(np.int64(0)), d.op("Squeeze", dim(d)), d.const(np.int64(1))),
                quantized(d, image(d)),
            ],
            True,
        ),
        "second convolution": Form(
            lambda d: [expanded(d), quantized(d, d.pair(d.op("Relu", d.layer("image")), UINT8))], True
        ),
        "fixed": Form(lambda d: [expanded(d), quantized(d, image(d))], False, 2),
        "no size": Form(lambda d: quantized(d, image(d)), False),
        "the image's own sizes": Form(
            lambda d: [
                d.op("ConstantOfShape", d.op("Concat", dim(d), *(d.ints(8) for _ in range(3)), axis=0)),
                quantized(d, image(d)),
            ],
            False,
        ),
        "no Q": Form(lambda d: [expanded(d), d.op("Relu", d.layer(image(d)))], False),
        "MaxPool before Q": Form(
            lambda d: [expanded(d), d.layer(d.pair(pooled(d, d.op("Relu", d.layer(image(d)))), UINT8))], False
        ),
        "no bias": Form(
            lambda d: [expanded(d), d.layer(d.pair(d.op("Relu", d.layer(image(d), bias=False)), UINT8))],
            False,
        ),
    },
    "padded-average": {
        "a zero point": Form(lambda d: pool(d, d.pair("image", U128)), True),
        "int8 that a convolution reads": Form(
            lambda d: [pool(d, x := d.pair(two(d)[0], INT8)), d.layer(x)], True
        ),
        "int8": Form(lambda d: pool(d, d.pair(two(d)[0], INT8)), False),
        "uint8": Form(lambda d: pool(d, d.pair("image", UINT8)), False),
        "not counted": Form(lambda d: pool(d, d.pair("image", U128), 0), False),
    },
    "average-rounded": {
        "convolution behind": Form(lambda d: d.layer(pool(d, d.pair("image", UINT8, F32(0.3)), 0)), True),
        "Q between": Form(lambda d: d.layer(d.pair(pool(d, d.pair("image", UINT8, F32(0.3)), 0))), False),
        "BatchNormalization and Q": Form(
            lambda d: [d.layer(narrow(d, norm(d, x := average(d)))), d.layer(narrow(d, x))], True
        ),
        "BatchNormalization and Q, fixed": Form(
            lambda d: [d.layer(narrow(d, norm(d, x := average(d)))), d.layer(narrow(d, x))], False, 2
        ),
        "BatchNormalization and ReLU": Form(
            lambda d: d.layer(narrow(d, d.op("Relu", norm(d, average(d))))), False
        ),
        "BatchNormalization, no Q": Form(lambda d: norm(d, average(d)), True, 2),
        "two Q": Form(lambda d: [d.layer(narrow(d, x := average(d))), narrow(d, d.op("Relu", x))], False),
        "a scale": Form(lambda d: d.layer(narrow(d, d.op("Mul", average(d), d.const(F32(0.7))))), False),
        "add": Form(
            lambda d: d.layer(
                narrow(d, d.op("Add", average(d), d.op("MaxPool", "image", kernel_shape=[2, 2])))
            ),
            True,
        ),
        "multiply, fixed": Form(lambda d: d.op("Mul", x := average(d), d.op("Tanh", x)), True, 2),
        "sigmoid": Form(lambda d: d.op("Sigmoid", average(d)), False),
    },
    "branch-not-rounded": {
        "convolution": Form(lambda d: added(d, beside(d), steps(d, d.layer(image(d)), INT8)), True),
        "convolution, fixed": Form(lambda d: added(d, beside(d), steps(d, d.layer(image(d)), INT8)), True, 2),
        "ReLU": Form(lambda d: added(d, beside(d), steps(d, d.op("Relu", d.layer(image(d))))), True),
        "Clip": Form(
            lambda d: added(
                d, beside(d), steps(d, d.op("Clip", d.layer(image(d)), d.const(F32(0)), d.const(F32(6))))
            ),
            True,
        ),
        "a factor": Form(
            lambda d: added(d, beside(d), steps(d, d.op("Mul", d.layer(image(d)), d.const(F32(0.7))), INT8)),
            True,
        ),
        "beside float": Form(lambda d: added(d, "image", steps(d, d.op("Relu", d.layer(image(d))))), True),
        "ReLU behind": Form(
            lambda d: added(d, beside(d), steps(d, d.op("Relu", d.layer(image(d)))), relu=True), True
        ),
        "no Q": Form(lambda d: added(d, beside(d), d.op("Relu", d.layer(image(d)))), False),
        "another convolution without Q": Form(
            lambda d: added(d, d.op("Relu", d.layer(image(d))), steps(d, d.op("Relu", d.layer(image(d))))),
            False,
        ),
        "two": Form(
            lambda d: added(
                d, steps(d, d.op("Relu", d.layer(image(d)))), steps(d, d.op("Relu", d.layer(image(d))))
            ),
            True,
        ),
        "sigmoid": Form(lambda d: added(d, beside(d), steps(d, d.op("Sigmoid", d.layer(image(d))))), False),
        "another reader": Form(
            lambda d: [added(d, beside(d), x := steps(d, d.op("Relu", d.layer(image(d))))), d.layer(x)], False
        ),
        "no Q behind": Form(
            lambda d: d.op("Add", beside(d), steps(d, d.op("Relu", d.layer(image(d))))), False
        ),
    },
    "maximum-before-q": {
        "ReduceMax": Form(lambda d: d.layer(d.pair(maximum(d, bare(d, True)), INT8), 8, 1), True),
        "GlobalMaxPool": Form(
            lambda d: d.layer(d.pair(maximum(d, bare(d, True), "GlobalMaxPool"), INT8), 8, 1), True
        ),
        "ReduceMin": Form(
            lambda d: d.layer(d.pair(maximum(d, d.pair("image", INT8), "ReduceMin"), INT8), 8, 1), True
        ),
        "behind a sigmoid": Form(
            lambda d: d.layer(d.pair(d.op("Sigmoid", maximum(d, bare(d, True))), INT8), 8, 1), True
        ),
        "MaxPool": Form(
            lambda d: d.layer(d.pair(d.op("MaxPool", bare(d, True), kernel_shape=[8, 8]), INT8), 8, 1), False
        ),
        "of int8": Form(
            lambda d: d.layer(d.pair(maximum(d, d.pair(bare(d, True), INT8)), INT8), 8, 1), False
        ),
        "no Q": Form(lambda d: maximum(d, bare(d, True)), False),
    },
    "rows-gathered": {
        "linear layer": Form(lambda d: rows(d, same, 8), True, size=(8, 8)),
        "BatchNormalization": Form(lambda d: rows(d, norm, 16, flat=False), True, size=(16, 8)),
        "as many and some": Form(lambda d: rows(d, same, 12), True, size=(12, 8)),
        "a scale": Form(
            lambda d: rows(d, lambda d, x: d.op("Mul", x, d.vector()), 8, flat=False), True, size=(8, 8)
        ),
        "fewer rows": Form(lambda d: rows(d, norm, 4, flat=False), False, size=(4, 8)),
        "fixed": Form(lambda d: rows(d, same, 8), False, 2, size=(8, 8)),
        "bias behind": Form(
            lambda d: rows(d, lambda d, x: d.op("Add", x, d.vector()), 8), False, size=(8, 8)
        ),
        "not quantized to rows": Form(lambda d: rows(d, same, 8, flat=False), False, size=(8, 8)),
        "Unsqueeze": Form(
            lambda d: rows(d, lambda d, x: d.op("Unsqueeze", x, d.ints(0)), 8), False, size=(8, 8)
        ),
    },
    "range-not-clipped": {
        "uint16": Form(lambda d: d.layer(d.pair("image", np.uint16(0), F32(2e-4))), True),
        "int16, lopsided": Form(lambda d: d.layer(d.pair("image", np.int16(-32768), F32(2e-4))), True),
        "uint16 of a ReLU": Form(
            lambda d: d.layer(d.pair(d.op("Relu", "image"), np.uint16(0), F32(2e-4))), False
        ),
        "int16": Form(lambda d: d.layer(d.pair("image", np.int16(0), F32(2e-4))), False),
        "uint16 around the middle": Form(
            lambda d: d.layer(d.pair("image", np.uint16(32768), F32(2e-4))), False
        ),
    },
    "epsilon-lost": {
        "LayerNormalization": Form(lambda d: normed(d, image(d)), True, size=(8, 8)),
        "LayerNormalization of images": Form(lambda d: normed(d, image(d), axis=1), True, 2),
        "InstanceNormalization": Form(lambda d: normed(d, image(d), kind="Instance"), True),
        "GroupNormalization": Form(lambda d: normed(d, image(d), kind="Group"), True, 2),
        "transposed": Form(
            lambda d: normed(d, d.op("Transpose", image(d), perm=[0, 1, 3, 2]), kind="Instance"), True
        ),
        "pooled": Form(lambda d: normed(d, pooled(d, image(d)), kind="Instance"), True),
        "ReLU": Form(lambda d: normed(d, d.op("Relu", image(d)), kind="Instance"), True),
        "a factor": Form(
            lambda d: normed(d, d.op("Mul", image(d), d.const(F32(0.7))), kind="Instance"), True
        ),
        "a small epsilon": Form(lambda d: normed(d, image(d), epsilon=1e-5, kind="Instance"), False),
        "channels last": Form(lambda d: normed(d, image(d)), False),
        "a zero point": Form(lambda d: normed(d, d.pair("image", U128, F32(0.0217)), kind="Instance"), False),
        "a Max between": Form(
            lambda d: normed(d, d.op("Max", image(d), d.const(np.finfo(F32).min)), kind="Instance"), False
        ),
        "float": Form(lambda d: normed(d, d.layer(image(d)), kind="Instance"), False),
    },
}
CASES = [(rule, name) for rule, forms in FORMS.items() for name in forms]


@pytest.mark.parametrize(("rule", "name"), CASES)
def test_what_lint_says_is_what_openvino_does(tmp_path: Path, rule: str, name: str) -> None:
    form, draft = FORMS[rule][name], Sketch()
    path = draft.write(tmp_path / "m.onnx", form.write(draft), batch=form.batch, size=form.size)
    assert (rule in {f.rule for f in lint(path, "openvino")}) is form.wrong
    assert rule not in {f.rule for f in [*lint(path, "onnxruntime"), *lint(path, "tensorrt")]}
    pytest.importorskip("openvino")
    x = np.random.default_rng(5).normal(0, 1.5, [2, *form.size]).astype(F32)
    assert (difference(path, x) < 45) is form.wrong


def difference(path: Path, x: np.ndarray) -> float:
    """SQNR of OpenVINO's results, that of the worst output; 0 where it does not load the file."""
    import openvino

    expected = onnxruntime_session(path, level="none").run(None, {"image": x})
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    try:
        compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    except RuntimeError:
        return 0.0
    found = compiled([x])
    worst = math.inf
    for a, output in zip(expected, compiled.outputs, strict=True):
        error = np.square(a.astype(np.float64) - found[output]).sum()
        worst = min(
            worst, 10 * math.log10(np.square(a.astype(np.float64)).sum() / error) if error else math.inf
        )
    return worst


def test_every_rule_has_forms() -> None:
    assert {*FORMS, "zero-point-shared"} == {rule.id for rule in RULES}
    assert all({form.wrong for form in forms.values()} == {True, False} for forms in FORMS.values())


@pytest.mark.parametrize("shared", [True, False])
def test_a_zero_point_of_a_convolution_and_a_linear_layer(tmp_path: Path, shared: bool) -> None:
    d = Sketch()
    zeros = [d.const(np.zeros(8, np.int8), "zeros"), "zeros" if shared else d.const(np.zeros(8, np.int8))]
    weights = [
        d.op(
            "DequantizeLinear",
            d.const(d.random.integers(-100, 100, shape).astype(np.int8)),
            d.vector(),
            zero,
            axis=0,
        )
        for shape, zero in zip([(8, 8, 3, 3), (8, 8)], zeros, strict=True)
    ]
    x = d.op("Conv", d.pair("image", INT8), weights[0], d.vector(), pads=[1] * 4)
    x = d.op("MatMul", d.pair(x, INT8, F32(2)), d.op("Transpose", weights[1], perm=[1, 0]))
    path = d.write(tmp_path / "m.onnx", x, batch=None, size=(8, 8, 8))
    assert ("zero-point-shared" in {f.rule for f in lint(path, "openvino")}) is shared
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    model = core.read_model(str(path))
    model.reshape([1, 8, 8, 8])
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    infos = [op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops()]
    kinds = {i["layerType"].astype(str): i["runtimePrecision"].astype(str) for i in infos}
    assert kinds["FullyConnected"] == ("f32" if shared else "i8")
