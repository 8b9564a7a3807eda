"""What the table of operators says of ONNX Runtime and OpenVINO is what they make of a file with the operator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import helper
from qdq_graphs import SCALE, UINT8, Draft, openvino_layers, optimized_ops

from qzoo.runtimes.operators import (
    CARRIED,
    CLAMPS,
    FLOAT,
    FUSED,
    INT8,
    OPERATORS,
    SHARED,
    WEIGHTED,
    Operator,
)

F32, I64 = np.float32, np.int64
MIDDLE, OTHER = np.uint8(128), np.float32(0.07)
Form = Callable[[Draft, str], str]


def sizes(d: Draft, *values: int) -> str:
    return d.const(np.array(values, I64))


def alone(kind: str, **attributes) -> Form:
    return lambda d, y: d.op(kind, y, **attributes)


def sized(kind: str, *values: int, **attributes) -> Form:
    return lambda d, y: d.op(kind, y, sizes(d, *values), **attributes)


def joined(kind: str, **attributes) -> Form:
    return lambda d, y: d.op(kind, y, d.pair("image"), **attributes)


def norm(kind: str, parameters: int, **attributes) -> Form:
    return lambda d, y: d.op(kind, y, *(d.const(np.ones(8, F32)) for _ in range(parameters)), **attributes)


def split(d: Draft, y: str) -> str:
    """ONNX Runtime takes a Split on integers where each part is quantized."""
    d.nodes.append(helper.make_node("Split", [y], ["s0", "s1"], name="split0", num_outputs=2, axis=2))
    return d.op("Concat", d.pair("s0"), d.pair("s1"), axis=2)


FORMS: dict[str, Form] = {
    "MaxPool": alone("MaxPool", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    "Reshape": sized("Reshape", 2, 8, 4, 16),
    "Flatten": lambda d, y: d.op("Reshape", d.op("Flatten", y), sizes(d, 2, 8, 8, 8)),
    "Transpose": alone("Transpose", perm=[0, 1, 3, 2]),
    "Squeeze": lambda d, y: d.op("Squeeze", d.op("Unsqueeze", y, sizes(d, 0)), sizes(d, 0)),
    "Unsqueeze": lambda d, y: d.op("Reshape", d.op("Unsqueeze", y, sizes(d, 0)), sizes(d, 2, 8, 8, 8)),
    "Identity": alone("Identity"),
    "Dropout": alone("Dropout"),
    "DepthToSpace": lambda d, y: d.op(
        "Reshape", d.pair(d.op("DepthToSpace", y, blocksize=2)), sizes(d, 2, 8, 8, 8)
    ),
    "SpaceToDepth": lambda d, y: d.op(
        "Reshape", d.pair(d.op("SpaceToDepth", y, blocksize=2)), sizes(d, 2, 8, 8, 8)
    ),
    "Slice": lambda d, y: d.op("Slice", y, sizes(d, 0), sizes(d, 6), sizes(d, 2)),
    "Gather": sized("Gather", 0, 2, 1, 3, axis=2),
    "Split": split,
    "Expand": sized("Expand", 2, 2, 8, 8, 8),
    "Tile": sized("Tile", 1, 1, 2, 1),
    "Pad": sized("Pad", 0, 0, 1, 1, 0, 0, 1, 1),
    "Relu": alone("Relu"),
    "Clip": lambda d, y: d.op("Clip", y, d.const(F32(0)), d.const(F32(255 * SCALE))),
    "AveragePool": alone("AveragePool", kernel_shape=[2, 2]),
    "GlobalAveragePool": alone("GlobalAveragePool"),
    "ReduceMean": sized("ReduceMean", 2, 3),
    "ReduceMax": sized("ReduceMax", 2, 3),
    "ReduceMin": sized("ReduceMin", 2, 3),
    "GlobalMaxPool": alone("GlobalMaxPool"),
    "Resize": lambda d, y: d.op("Resize", y, "", d.const(np.array([1, 1, 2, 2], F32)), mode="nearest"),
    "Concat": joined("Concat", axis=2),
    "Where": lambda d, y: d.op("Where", d.const(np.eye(8, dtype=bool)), y, d.pair("image")),
    **{kind: joined(kind) for kind in ("Add", "Mul", "Sub", "Div")},
    "PRelu": lambda d, y: d.op("PRelu", y, d.const(np.full((8, 1, 1), 0.1, F32))),
    "BatchNormalization": norm("BatchNormalization", 4),
    "InstanceNormalization": norm("InstanceNormalization", 2),
    "LayerNormalization": norm("LayerNormalization", 1),
    "GroupNormalization": norm("GroupNormalization", 2, num_groups=2),
    "LRN": alone("LRN", size=3),
    "CumSum": lambda d, y: d.op("CumSum", y, d.const(I64(2))),
}
NAMES = [name for name in OPERATORS if name not in (*WEIGHTED, "TopK")]


def written(path: Path, name: str, before: np.ndarray | None, behind: np.ndarray, zero=UINT8) -> Path:
    """A convolution, a pair of scale ``before`` (None for none), the operator, a pair of ``behind``, a convolution."""
    d = Draft(21)
    y = d.conv(d.pair("image"))
    if before is not None:
        y = d.pair(y, zero, before)
    y = FORMS.get(name, alone(name))(d, y)
    y = d.conv(_image(d, name, d.pair(y, zero, behind)))
    return d.save(path / "model.onnx", d.pair(y), checked=False)


def _image(d: Draft, name: str, y: str) -> str:
    return d.op("Reshape", y, sizes(d, 4, 8, 8, 8)) if name == "Expand" else y


def onnxruntime_takes(path: Path, row: Operator) -> str:
    """How ONNX Runtime takes the operator, as far as the graphs that it makes tell."""
    ops = optimized_ops(written(path, row.name, None, SCALE))
    if ops["QLinearConv"] == 2:  # the layer before has a Q to write to
        return FUSED if row.name not in ops and row.kind == "clamp" else CARRIED
    ops = optimized_ops(written(path, row.name, SCALE, OTHER))
    if any(kind.startswith("QLinear") and row.name in kind for kind in ops):
        return INT8
    ops = optimized_ops(written(path, row.name, SCALE, SCALE))
    return SHARED if ops["QuantizeLinear"] == 1 else FLOAT  # that of the image alone


def openvino_between(path: Path) -> set[tuple[str, str]]:
    """Type and precision of what OpenVINO runs between the two convolutions."""
    layers = [(kind, precision) for kind, precision, _ in openvino_layers(path)]
    first, last = (i for i, (kind, _) in enumerate(layers) if kind == "Convolution")
    return {layer for layer in layers[first + 1 : last] if layer[0] not in ("Input", "Const", "Reorder")}


def is_float(layer: tuple[str, str]) -> bool:
    return layer[1] == "f32" and layer[0] not in ("Subgraph", "FakeQuantize")


@pytest.mark.parametrize("name", NAMES)
def test_in_onnxruntime(tmp_path: Path, name: str) -> None:
    assert onnxruntime_takes(tmp_path, OPERATORS[name]) == OPERATORS[name].onnxruntime


@pytest.mark.parametrize("name", NAMES)
def test_in_openvino(tmp_path: Path, name: str) -> None:
    pytest.importorskip("openvino")
    how = OPERATORS[name].openvino
    fused = not any(map(is_float, openvino_between(written(tmp_path, name, None, SCALE))))
    pairs = openvino_between(written(tmp_path, name, SCALE, SCALE, MIDDLE if how == FLOAT else UINT8))
    if how == FUSED:
        assert fused
    elif how == FLOAT:
        assert any(map(is_float, pairs))
    else:
        assert not any(precision == "f32" for _, precision in pairs)


def test_shared_in_openvino(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Concat whose inputs have two ranges: one of them is computed in float first."""
    pytest.importorskip("openvino")
    assert OPERATORS["Concat"].openvino == SHARED
    other = lambda d, y: d.op("Concat", y, d.pair("image", scale=F32(0.03)), axis=2)  # noqa: E731
    monkeypatch.setitem(FORMS, "Concat", other)
    assert ("Subgraph", "f32") in openvino_between(written(tmp_path, "Concat", SCALE, SCALE))


def test_every_clamp_is_fused() -> None:
    assert {OPERATORS[name].on(target) for name in CLAMPS for target in ("onnxruntime", "openvino")} == {
        FUSED
    }
