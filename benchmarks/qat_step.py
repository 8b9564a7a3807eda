"""A training step of ResNet-18, quantized (QAT) against float: time, interleaved, and peak memory.

    python -m benchmarks.qat_step --out benchmarks/results/qat_step.json

Eager mode, SGD with momentum, batch 16 at 224 px, scheme w8a8 with fixed ranges. Time is elapsed time with 2 threads
and CPU time with `--threads 1`, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.measure import REUSE, interleaved, machine, malloc_setting
from qzoo.models.resnet import resnet18
from qzoo.quant.calib import HistogramCalibrator
from qzoo.quant.nn import TensorQuantizer
from qzoo.scheme import Scheme

BATCH, SIZE = 16, 224


def model(quantized: bool, images: Tensor) -> nn.Module:
    """ResNet-18 in training mode; every quantizer gets the maximum of the first batch as its range."""
    torch.manual_seed(0)
    net = resnet18(quantize=Scheme() if quantized else None).train()
    quantizers = [m for m in net.modules() if isinstance(m, TensorQuantizer) and not m.switches.disabled]
    for quantizer in quantizers:
        quantizer.disable_quant()
        quantizer.enable_calib()
    with torch.no_grad():
        net(images)
    for quantizer in quantizers:
        method = ("max",) if isinstance(quantizer.calibrator, HistogramCalibrator) else ()
        quantizer.load_calib_amax(*method)
        quantizer.disable_calib()
        quantizer.enable_quant()
    return net


def trainer(quantized: bool, memory_format: torch.memory_format) -> Callable[[], None]:
    """One step of training as a function without arguments."""
    images = torch.randn(BATCH, 3, SIZE, SIZE).contiguous(memory_format=memory_format)
    labels = torch.randint(0, 1000, (BATCH,))
    net = model(quantized, images).to(memory_format=memory_format)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        loss = cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def peak_memory(quantized: bool, memory_format: torch.memory_format) -> float:
    """MiB that three steps add to the process at their worst."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = trainer(quantized, memory_format)
    for _ in range(3):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def in_process(environment: dict[str, str], *arguments: str) -> dict[str, float | str]:
    """The answer of this module run with `arguments` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.qat_step", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    answer: dict[str, float | str] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--part", choices=["time", "float", "quantized"])
    parser.add_argument(
        "--format", choices=["contiguous_format", "channels_last"], default="contiguous_format"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    common = ("--threads", str(args.threads), "--rounds", str(args.rounds))
    memory_format = getattr(torch, args.format)
    if args.part == "time":
        steps = {name: trainer(name == "quantized", memory_format) for name in ("float", "quantized")}
        print(json.dumps({**interleaved(steps, rounds=args.rounds, warmup=1), "malloc": malloc_setting()}))
        return
    if args.part:
        print(json.dumps({"MiB": peak_memory(args.part == "quantized", memory_format)}))
        return
    head, results = machine(), []
    for layout in ("contiguous_format", "channels_last"):
        memory = {
            part: float(in_process({}, "--part", part, "--format", layout, *common)["MiB"])
            for part in ("float", "quantized")
        }
        for environment in ({}, REUSE):
            seconds = in_process(environment, "--part", "time", "--format", layout, *common)
            ratio = float(seconds["quantized"]) / float(seconds["float"])
            results.append(
                {
                    "layout": layout,
                    "threads": args.threads,
                    "malloc": seconds["malloc"],
                    "float_s": round(float(seconds["float"]), 3),
                    "quantized_s": round(float(seconds["quantized"]), 3),
                    "time_ratio": round(ratio, 3),
                    "time_met": ratio <= 1.25,
                    "float_peak_MiB": round(memory["float"]),
                    "quantized_peak_MiB": round(memory["quantized"]),
                    "memory_ratio": round(memory["quantized"] / memory["float"], 3),
                    "memory_met": memory["quantized"] <= 1.5 * memory["float"],
                }
            )
            print(json.dumps(results[-1]), flush=True)
    if args.out:
        args.out.write_text(
            json.dumps({**head, "batch": BATCH, "px": SIZE, "results": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
