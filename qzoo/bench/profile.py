"""Profile a model in its runtime: the nodes of the graph as the runtime runs them, each with time and precision."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np

_FLOATS = {"float": "float32", "float16": "float16"}


def node_times(
    runtime: str, source: str, threads: int, images: np.ndarray, runs: int, folder: Path
) -> list[dict[str, Any]]:
    """Run a file with the runtime's profiler.

    Args:
        images: one batch.
        runs: timed runs, after two that are not.
        folder: for the profiler's file.

    Returns:
        For each node, in the order of execution: ``name``, ``op``, ``precision`` (the type that it computes in as far
        as the profiler says, such as ``"int8"``, ``"float32"``) and ``micros``, the median microseconds of a run; in
        OpenVINO also ``fused``, the names of the nodes that it computes as one.
    """
    if runtime == "openvino":
        return _openvino(source, threads, images, runs)
    return _onnxruntime(source, threads, images, runs, folder)


def _onnxruntime(
    source: str, threads: int, images: np.ndarray, runs: int, folder: Path
) -> list[dict[str, Any]]:
    from qzoo.runtimes.sessions import onnxruntime_session

    session = onnxruntime_session(source, threads, profile=folder / "profile")
    name = session.get_inputs()[0].name
    for _ in range(2 + runs):
        session.run(None, {name: images})
    events = json.loads(Path(session.end_profiling()).read_text())
    nodes: dict[str, dict[str, Any]] = {}
    times: dict[str, list[int]] = {}
    for event in events:
        title, kind = event.get("name", ""), "_kernel_time"
        if event.get("cat") != "Node" or not title.endswith(kind):
            continue
        node = title.removesuffix(kind)
        times.setdefault(node, []).append(event["dur"])
        nodes.setdefault(
            node, {"name": node, "op": event["args"]["op_name"], "precision": _precision(event["args"])}
        )
    return [{**node, "micros": statistics.median(times[name][2:])} for name, node in nodes.items()]


def _precision(args: dict[str, Any]) -> str:
    """Integer when the node reads and writes integers; a conversion is named by both types."""
    first, last = (
        next(iter(args[key][0])) if args.get(key) else "" for key in ("input_type_shape", "output_type_shape")
    )
    if first in ("int8", "uint8") and last in ("int8", "uint8"):
        return "int8"
    if first == last:
        return _FLOATS.get(first, first)
    return f"{_FLOATS.get(first, first)} to {_FLOATS.get(last, last)}"


def _openvino(source: str, threads: int, images: np.ndarray, runs: int) -> list[dict[str, Any]]:
    from qzoo.runtimes.sessions import openvino_model

    model = openvino_model(source, threads, profile=True)
    fused = {
        op.get_friendly_name(): [
            name for name in op.get_rt_info()["originalLayersNames"].astype(str).split(",") if name
        ]
        for op in model.get_runtime_model().get_ops()
    }
    request = model.create_infer_request()
    nodes: dict[str, dict[str, Any]] = {}
    times: dict[str, list[float]] = {}
    for run in range(2 + runs):
        request.infer([images], share_inputs=True)
        for info in request.profiling_info if run >= 2 else []:
            if info.status.name != "EXECUTED":
                continue
            times.setdefault(info.node_name, []).append(info.real_time.total_seconds() * 1e6)
            nodes[info.node_name] = {
                "name": info.node_name,
                "op": info.node_type,
                "precision": _of_kernel(info.exec_type),
                "fused": fused.get(info.node_name, []),
            }
    return [{**node, "micros": statistics.median(times[name])} for name, node in nodes.items()]


def _of_kernel(kernel: str) -> str:
    """The precision in a kernel's name such as ``brgconv_avx512_I8``."""
    match = re.search(r"_(i8|u8|f32|fp32|f16|fp16|bf16|i32|i64)$", kernel, re.IGNORECASE)
    name = match[1].upper().replace("FP", "F") if match else ""
    return {"I8": "int8", "U8": "int8", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(
        name, kernel
    )
