"""What a figure depends on: versions, processor, threads, and which kernels run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

from qzoo.runtimes.processor import processor_facts

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "tensorrt",
    "nncf",
)


def describe() -> dict[str, str]:
    """Describe the machine: versions of qzoo and the packages it works with, and the state of the native kernels."""
    import torch

    from qzoo.quant import native
    from qzoo.version import __version__

    facts = {"qzoo": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    facts.update(processor())
    facts["processors for this process"] = str(_processors())
    if hasattr(os, "getloadavg"):
        facts["load average"] = f"{os.getloadavg()[0]:.1f}"
    facts["torch threads"] = str(torch.get_num_threads())
    facts["cuda"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "not available"
    for library, state in native.describe().items():
        facts[f"kernels ({library})"] = "native" if state["loaded"] else f"reference ({state['reason']})"
    return facts


def _processors() -> int:
    """How many this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> dict[str, str]:
    """Describe the processor: name, instruction sets that matter for int8 and bf16, frequency governor (Linux)."""
    facts = {"processor": platform.processor() or platform.machine()}
    lines = processor_facts()
    if lines:
        facts["processor"] = lines.get("model name", facts["processor"])
        sets = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")
        flags = lines.get("flags", lines.get("Features", "")).split()
        facts["instruction sets"] = " ".join(flag for flag in sets if flag in flags) or "none of interest"
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    facts["frequency governor"] = governor.read_text().strip() if governor.exists() else "unknown"
    return facts
