"""Where a network's time goes: milliseconds by group of operators, float and int8, in ONNX Runtime or OpenVINO.

    python -m benchmarks.account deit_tiny_patch16_224 swin_t
    python -m benchmarks.account convnext_tiny --batch 1 --runtime onnxruntime

Batch 1, one thread, random weights; by the runtime's own profile, the median of each operator's runs. ``--batch 1``
writes files of that size, where otherwise the batch is open. Below the table stands how near the int8 file is to the
limit: what runs in float for want of an integer kernel, and the speed-up if all that only quantizes and moves took no
time.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import torch

import qzoo
from benchmarks.runtimes import network
from qzoo.bench.profile import node_times

LAYERS, ATTENTION, GELU = "layers, with what is fused", "attention: products, softmax", "GELU"
NORMS, ADDS, QUANTIZE, MOVES = "norms, means", "adds, factors (with a Q)", "Q, DQ", "moves, reorders"
GROUPS = (LAYERS, ATTENTION, NORMS, GELU, ADDS, QUANTIZE, MOVES)
FLOAT = "in float"

_PRODUCTS = ("Softmax", "FusedMatMul")
_INTEGER = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat")  # whatever they write
_LAYERS = (
    "FullyConnected", "FullyConnectedQuantizedLegacy", "Convolution", "GroupConvolution", *_INTEGER,
    "Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul",
)  # fmt: skip
_NORMS = ("MVN", "LayerNormalization", "SkipLayerNormalization", "GlobalAveragePool", "Pooling")
_QUANTIZE = ("QuantizeLinear", "DequantizeLinear", "FakeQuantize", "Convert")
_MOVES = (
    "Transpose", "Reorder", "ReorderInput", "ReorderOutput", "Reshape", "Squeeze", "Unsqueeze", "Concat", "Split",
    "VariadicSplit", "Slice", "Gather", "Pad",
)  # fmt: skip


def group(node: dict[str, Any], products: set[str]) -> str:
    """Name the group of an executed operator.

    Args:
        node: an entry of :func:`qzoo.bench.profile.node_times`.
        products: names of the file's products of two activations.
    """
    op, names = node["op"], node.get("fused") or [node["name"]]
    kinds = {name.rpartition("/")[2].partition("_")[0] for name in names}
    if op in _PRODUCTS or "Softmax" in kinds or products & {node["name"], *names}:
        return ATTENTION
    if op in _LAYERS:
        return LAYERS
    if op in _NORMS or op.startswith("Reduce"):
        return NORMS
    if op.endswith("Gelu") or kinds & {"Gelu", "Erf"}:
        return GELU
    if op in _MOVES:
        return MOVES
    return QUANTIZE if op in _QUANTIZE or kinds <= set(_QUANTIZE) else ADDS


def account(source: Path, runtime: str, image: torch.Tensor, runs: int) -> Counter[str]:
    """Milliseconds of a file by group; :data:`FLOAT` is the part that runs in float, of all but Q, DQ and moves."""
    graph = onnx.load(source, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    maker = {name: node for node in graph.node for name in node.output}

    def is_weight(name: str) -> bool:
        while name in maker and maker[name].op_type in ("DequantizeLinear", "Transpose"):
            name = maker[name].input[0]
        return name in weights

    products = {
        node.name for node in graph.node if node.op_type == "MatMul" and not any(map(is_weight, node.input))
    }
    millis: Counter[str] = Counter()
    for node in node_times(runtime, str(source), 1, image.numpy(), runs, source.parent):
        kind = group(node, products)
        millis[kind] += node["micros"] / 1e3
        if kind not in (QUANTIZE, MOVES) and node["precision"] != "int8" and node["op"] not in _INTEGER:
            millis[FLOAT] += node["micros"] / 1e3
    return millis


def main() -> None:
    """Measure and print a table for each network."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--runtime", choices=("onnxruntime", "openvino"), default="openvino")
    parser.add_argument("--batch", choices=("dynamic", "1"), default="dynamic")
    parser.add_argument("--runs", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.names:
        both: Any = network(name)
        image = torch.randn(1, *both[0].qzoo_config.preprocessing.input_size)
        batch = "dynamic" if args.batch == "dynamic" else 1
        with tempfile.TemporaryDirectory() as folder:
            sources = [
                qzoo.export_onnx(model, Path(folder) / f"{i}.onnx", target=args.runtime, batch=batch)
                for i, model in enumerate(both)
            ]
            show(
                f"{name}, {args.runtime}, batch {args.batch}",
                *(account(source, args.runtime, image, args.runs) for source in sources),
            )


def show(title: str, plain: Counter[str], int8: Counter[str]) -> None:
    """Print a table of Markdown, and how near the int8 file is to the limit."""
    whole, total = (sum(millis[kind] for kind in GROUPS) for millis in (plain, int8))
    print(f"\n| {title} | float, ms | int8, ms | int8, % |\n|---|---|---|---|")
    for kind in GROUPS:
        print(f"| {kind} | {plain[kind]:.2f} | {int8[kind]:.2f} | {100 * int8[kind] / total:.0f} |")
    print(f"| together | {whole:.2f} | {total:.2f} | {whole / total:.2f} times |")
    for kind in (MOVES, QUANTIZE):
        plain[kind] = int8[kind] = 0
    left, rest = (sum(millis[kind] for kind in GROUPS) for millis in (plain, int8))
    print(
        f"\nIn float: {100 * int8[FLOAT] / total:.0f} % of int8's time. Without Q and moves: {whole / rest:.2f} times "
        f"as fast as float, {left / rest:.2f} as float without moves.",
        flush=True,
    )


if __name__ == "__main__":
    main()
