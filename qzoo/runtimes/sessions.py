"""How each runtime opens a file, without torch: what runners and the measuring processes share."""

from __future__ import annotations

import os
from typing import Any

from qzoo.runtimes.base import existing


def onnxruntime_session(
    path: str | os.PathLike[str],
    threads: int = 1,
    *,
    provider: str = "CPUExecutionProvider",
    level: str = "all",
    optimized: str | os.PathLike[str] | None = None,
    profile: str | os.PathLike[str] | None = None,
) -> Any:
    """Open an ``onnxruntime.InferenceSession``.

    Args:
        provider: the execution provider; another one than the CPU's falls back to it node by node.
        level: graph optimization: ``"none"``, ``"basic"``, ``"extended"``, ``"all"``.
        optimized: where to write the graph as the runtime optimized it (to see which kernels run), or None.
        profile: start of the name of a file that gets the time of every node, or None.
    """
    import onnxruntime as ort

    levels = ort.GraphOptimizationLevel
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.graph_optimization_level = {
        "none": levels.ORT_DISABLE_ALL,
        "basic": levels.ORT_ENABLE_BASIC,
        "extended": levels.ORT_ENABLE_EXTENDED,
        "all": levels.ORT_ENABLE_ALL,
    }[level]
    if optimized is not None:
        options.optimized_model_filepath = os.fspath(optimized)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, os.fspath(profile)
    providers = list(dict.fromkeys((provider, "CPUExecutionProvider")))
    session = ort.InferenceSession(str(existing(path)), options, providers=providers)
    if session.get_providers()[0] != provider:  # ONNX Runtime itself only prints that it could not
        raise RuntimeError(f"ONNX Runtime could not start {provider}; see its messages above")
    return session


def openvino_model(path: str | os.PathLike[str], threads: int = 1, *, profile: bool = False) -> Any:
    """Compile an ONNX or an XML file with OpenVINO for the CPU; ``profile`` takes the time of every node.

    What is not int8 is computed in float32: OpenVINO's own default is bfloat16 where the processor has it, which
    would compare an int8 model with a bfloat16 one under the name of float.
    """
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "PERF_COUNT": profile,
    }
    return openvino.Core().compile_model(str(existing(path)), "CPU", settings)
