"""Time and memory of exporting a network in W8A8, beside its float file (four bytes a parameter).

    python -m benchmarks.export_cost --out benchmarks/results/export.json

One thread, a fresh process for each target. Memory: peak of the resident set during the export, less what the process
had before it with the model in it. The exporter is imported, and has written a small model, before.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import machine

# The bars, for ResNet-50: CPU time, which other work on the machine hardly changes, and memory of the float file.
SECONDS, TIMES_FILE = 30.0, 4.0


def measure(name: str, target: str) -> dict[str, Any]:
    """Export one network in this process."""
    import qzoo
    from qzoo.quant.nn import TensorQuantizer

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        qzoo.export_onnx(nn.Sequential(nn.Conv2d(3, 4, 3)), path, example=torch.zeros(1, 3, 8, 8))
        model = qzoo.create_model(name, quantize=True).eval()
        for module in model.modules():
            if isinstance(module, TensorQuantizer):
                module.amax = 2.0 if module.role != "weight" else 0.5
        float_file = 4 * sum(p.numel() for p in model.parameters())
        Path("/proc/self/clear_refs").write_text("5")
        before, wall, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
        qzoo.export_onnx(model, path, target=target)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        extra = memory("VmHWM") - before
        size = path.stat().st_size
    return {
        "model": name,
        "target": target,
        "wall_s": round(wall, 2),
        "cpu_s": round(cpu, 2),
        "extra_memory_of_float_file": round(extra / float_file, 2),
        "file_of_float_file": round(size / float_file, 3),
        "met": (cpu <= SECONDS and extra <= TIMES_FILE * float_file) if name == "resnet50" else None,
    }


def memory(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, bytes (Linux)."""
    line = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(line[1]) if line else 0


def main() -> None:
    """Measure in processes of their own, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--name", default="resnet50")
    parser.add_argument("--target", nargs="+", default=["onnxruntime", "openvino", "tensorrt"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--here", action="store_true", help="in this process, one target, as JSON")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args.name, args.target[0])))
        return
    entries = []
    for target in args.target:
        command = [
            sys.executable,
            "-m",
            "benchmarks.export_cost",
            "--here",
            "--name",
            args.name,
            "--target",
            target,
        ]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        entries.append(json.loads(output.splitlines()[-1]))
        print(json.dumps(entries[-1]), flush=True)
    if args.out:
        args.out.write_text(json.dumps({**machine(), "threads": 1, "results": entries}, indent=1) + "\n")


if __name__ == "__main__":
    main()
