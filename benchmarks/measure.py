"""Interleaved timing: the contestants take turns, so that what disturbs one disturbs all."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch

import qzoo
from qzoo.bench.environment import processor
from qzoo.quant import native

REUSE = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "4000000000"}
"""glibc settings under which freed pages are used again instead of being returned and faulted in anew."""


def malloc_setting() -> str:
    """What the environment says about memory: it decides most figures that allocate."""
    if os.environ.get("MALLOC_MMAP_MAX_") != "0":
        return "glibc default"
    return "pages reused (" + " ".join(f"{key}={value}" for key, value in REUSE.items()) + ")"


def interleaved(
    contestants: Mapping[str, Callable[[], Any]], rounds: int = 15, warmup: int = 2
) -> dict[str, float]:
    """Median seconds of each contestant: CPU time with one thread, elapsed time with more."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for round_ in range(warmup + rounds):
        for name, work in contestants.items():
            start = clock()
            work()
            taken = clock() - start
            if round_ >= warmup:
                samples[name].append(taken)
    return {name: statistics.median(taken) for name, taken in samples.items()}


def repeated(work: Callable[[], Any], times: int = 2000) -> Callable[[], None]:
    """`work` many times over, for calls too short to time one by one."""

    def run() -> None:
        for _ in range(times):
            work()

    return run


def machine() -> dict[str, Any]:
    """Processor, versions and date for the head of a results file."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(
            line.split(":", 1) for line in cpuinfo.read_text().split("\n\n")[0].splitlines() if ":" in line
        )
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        model = f"{fields.get('model name', model)}, family {fields.get('cpu family')}"
        model += f" model {fields.get('model')}"
        model += f", {os.cpu_count()} cores, {processor()['instruction sets']}"
    return {
        "date": date.today().isoformat(),
        "machine": model,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "qzoo": qzoo.__version__,
        "native kernels": native.describe()["cpu"]["reason"],
        "load average at start": round(os.getloadavg()[0], 1),
    }
