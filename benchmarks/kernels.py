"""The kernels against torch and against plain memory traffic, each comparison interleaved in one run.

    python -m benchmarks.kernels                      # print
    python -m benchmarks.kernels --out benchmarks/results/kernels.json

Each bar is measured in a process of its own twice: with glibc's default and with pages reused (see
`measure.REUSE`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import REUSE, interleaved, machine, malloc_setting, repeated
from qzoo.quant import ops
from qzoo.quant.ops.schema import references

ACTIVATION = (32, 256, 56, 56)
WEIGHT = (512, 512, 3, 3)


@dataclass(frozen=True)
class Result:
    """One bar: `ours` and `other` in milliseconds, their ratio, and what was asked."""

    bar: str
    threads: int
    ours_ms: float
    other: str
    other_ms: float
    ratio: float
    asked: str
    met: bool


def at_most(bar: str, ours: float, other: str, base: float, limit: float) -> Result:
    """Ours may cost `limit` times the other."""
    ratio = ours / base
    return _result(bar, ours, other, base, ratio, f"<= {limit:g} x", ratio <= limit)


def faster(bar: str, ours: float, other: str, base: float, factor: float) -> Result:
    """Ours has to be `factor` times as fast as the other."""
    ratio = base / ours
    return _result(bar, ours, other, base, ratio, f">= {factor:g} x faster", ratio >= factor)


def within(bar: str, ours: float, limit_ms: float) -> Result:
    """Ours has to take at most `limit_ms`."""
    return _result(
        bar,
        ours,
        "limit",
        limit_ms / 1e3,
        ours * 1e3 / limit_ms,
        f"<= {limit_ms:g} ms",
        ours * 1e3 <= limit_ms,
    )


def _result(bar: str, ours: float, other: str, base: float, ratio: float, asked: str, met: bool) -> Result:
    return Result(
        bar,
        torch.get_num_threads(),
        round(ours * 1e3, 4),
        other,
        round(base * 1e3, 4),
        round(ratio, 2),
        asked,
        met,
    )


def forward(threads: int) -> Iterator[Result]:
    x = torch.randn(ACTIVATION)
    y = torch.empty_like(x)
    amax, scale = torch.tensor(2.5), 2.5 / 127
    per_channel, zeros = torch.rand(1, 256, 1, 1) + 1, torch.zeros(256, dtype=torch.int32)
    last, last_out = (t.contiguous(memory_format=torch.channels_last) for t in (x, y))
    scales = per_channel.flatten() / 127
    t = interleaved(
        {
            "memcpy": lambda: y.copy_(x),
            "ours": lambda: ops.fake_quantize_out(x, amax, out=y),
            "channels": lambda: ops.fake_quantize_out(x, per_channel, out=y),
            "channels_last": lambda: ops.fake_quantize_out(last, per_channel, out=last_out),
            "new memory": lambda: ops.fake_quantize(x, amax),
            "torch": lambda: torch.fake_quantize_per_tensor_affine(x, scale, 0, -128, 127),
            "torch channels": lambda: torch.fake_quantize_per_channel_affine(x, scales, zeros, 1, -128, 127),
        }
    )
    yield at_most("forward into reused memory", t["ours"], "memcpy", t["memcpy"], 1.2)
    yield faster(
        "forward into reused memory", t["ours"], "torch.fake_quantize_per_tensor_affine", t["torch"], 8
    )
    yield faster(
        "forward, new tensor", t["new memory"], "torch.fake_quantize_per_tensor_affine", t["torch"], 1
    )
    yield at_most("forward per channel", t["channels"], "ours per tensor", t["ours"], 1.2)
    yield at_most("forward per channel, channels_last", t["channels_last"], "ours per tensor", t["ours"], 1.2)
    yield faster(
        "forward per channel", t["channels"], "torch.fake_quantize_per_channel_affine", t["torch channels"], 8
    )


def backward(threads: int) -> Iterator[Result]:
    x = torch.randn(ACTIVATION, requires_grad=True)
    grad = torch.randn(ACTIVATION)
    amax, scale = torch.tensor(2.5), 2.5 / 127

    def step(quantize: Callable[[], torch.Tensor]) -> None:
        torch.autograd.grad(quantize(), x, grad)

    t = interleaved(
        {
            "ours": lambda: step(lambda: ops.fake_quantize(x, amax)),
            "torch": lambda: step(lambda: torch.fake_quantize_per_tensor_affine(x, scale, 0, -128, 127)),
        },
        rounds=9,
    )
    yield faster("forward + backward", t["ours"], "torch.fake_quantize_per_tensor_affine", t["torch"], 5)


def small(threads: int) -> Iterator[Result]:
    x, amax, scale = torch.randn(64), torch.tensor(2.5), 2.5 / 127
    rows, channel = torch.randn(8, 8), torch.rand(8, 1) + 1
    scales, zeros = torch.rand(8) / 127, torch.zeros(8, dtype=torch.int32)
    t = interleaved(
        {
            "ours": repeated(lambda: ops.fake_quantize(x, amax)),
            "torch": repeated(lambda: torch.fake_quantize_per_tensor_affine(x, scale, 0, -128, 127)),
            "channels": repeated(lambda: ops.fake_quantize(rows, channel)),
            "torch channels": repeated(
                lambda: torch.fake_quantize_per_channel_affine(rows, scales, zeros, 0, -128, 127)
            ),
        }
    )
    yield at_most("2000 calls on 64 elements", t["ours"], "torch's own op", t["torch"], 3)
    yield at_most("2000 calls on 8 x 8, per row", t["channels"], "torch's own op", t["torch channels"], 3)


def collection(threads: int) -> Iterator[Result]:
    x = torch.randn(ACTIVATION)
    relu = x.relu()
    top = relu.max().item()
    counts = torch.zeros(2048, dtype=torch.int64)
    t = interleaved(
        {
            "amax": lambda: ops.reduce_amax_op(x),
            "channels": lambda: ops.reduce_amax_op(x, [1]),
            "aminmax": lambda: torch.aminmax(x),
            "histogram": lambda: ops.histogram_(counts, relu, top / 2048, limit=top),
            "histc": lambda: torch.histc(relu, 2048, 0, top),
            "histogram of normal": lambda: ops.histogram_(counts, x, top / 2048, limit=top),
        },
        rounds=9,
    )
    yield at_most("max collection", t["amax"], "torch.aminmax", t["aminmax"], 1.5)
    yield at_most("max collection per channel", t["channels"], "torch.aminmax", t["aminmax"], 1.5)
    yield faster("histogram, 2048 bins, ReLU output", t["histogram"], "torch.histc", t["histc"], 4)
    yield faster(
        "histogram, 2048 bins, normal", t["histogram of normal"], "torch.histc of ReLU", t["histc"], 4
    )


def weights_by_mse(weight: torch.Tensor) -> torch.Tensor:
    """What calibrating a weight per channel by mse does: a histogram and a search for every channel."""
    counts, largest = ops.histogram_rows(weight, 2048)
    centers = (torch.arange(2048) + 0.5) * (largest[:, None] / 2048)
    return ops.mse_search(counts, centers)


def searches(threads: int) -> Iterator[Result]:
    relu = torch.randn(ACTIVATION).relu()
    top = relu.max().item()
    weight = torch.randn(WEIGHT)
    for bins in (2048, 8192):
        counts = torch.zeros(bins, dtype=torch.int64)
        ops.histogram_(counts, relu, top / bins, limit=top)
        centers = (torch.arange(bins) + 0.5) * (top / bins)
        t = interleaved(
            {
                "entropy": lambda counts=counts: ops.entropy_search(counts),  # type: ignore[misc]
                "mse": lambda counts=counts, centers=centers: ops.mse_search(counts, centers),  # type: ignore[misc]
            }
        )
        yield within(f"entropy search, {bins} bins", t["entropy"], 20)
        yield within(f"mse search, {bins} bins", t["mse"], 10)
    t = interleaved({"weights": lambda: weights_by_mse(weight)}, rounds=5, warmup=1)
    yield within("weights 512x512x3x3 per channel by mse", t["weights"], 1000)


def packing(threads: int) -> Iterator[Result]:
    """Two 4-bit values a byte in one pass, against the same in plain torch operations (the reference)."""
    weight = torch.randn(4096, 4096)
    rows = weight.abs().amax(1, keepdim=True)
    grouped = weight.view(4096, 128, 32)
    groups = grouped.abs().amax(2, keepdim=True)
    q = ops.quantize(weight, rows, 4)
    packed = ops.quantize_int4(weight, rows)
    t = interleaved(
        {
            "quantize": lambda: ops.quantize_int4(weight, rows),
            "quantize blocks": lambda: ops.quantize_int4(grouped, groups),
            "plain quantize": lambda: references["quantize_int4"](weight, rows, 4, False, True),
            "dequantize": lambda: ops.dequantize_int4(packed, rows, weight.shape),
            "dequantize blocks": lambda: ops.dequantize_int4(packed, groups, grouped.shape),
            "plain dequantize": lambda: references["dequantize_int4"](
                packed, rows, [4096, 4096], 4, False, torch.float32
            ),
            "pack": lambda: ops.pack_int4(q),
            "plain pack": lambda: references["pack_int4"](q),
            "unpack": lambda: ops.unpack_int4(packed, weight.shape),
            "plain unpack": lambda: references["unpack_int4"](packed, False),
        },
        rounds=7,
    )
    for name, what in (
        ("quantize", "quantize 4096x4096 to packed int4, per row"),
        ("quantize blocks", "quantize 4096x4096 to packed int4, blocks of 32"),
        ("dequantize", "dequantize packed int4, per row"),
        ("dequantize blocks", "dequantize packed int4, blocks of 32"),
        ("pack", "pack int8 to int4, values checked"),
        ("unpack", "unpack int4 to int8"),
    ):
        yield faster(what, t[name], "torch operations", t[f"plain {name.split()[0]}"], 1)


SUITES = {
    "forward": forward,
    "backward": backward,
    "small": small,
    "collection": collection,
    "searches": searches,
    "packing": packing,
}


def run_suite(name: str, threads: int) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with torch.set_grad_enabled(name == "backward"):
        return [{"malloc": malloc_setting(), **asdict(result)} for result in SUITES[name](threads)]


def run_all(threads: list[int], names: list[str]) -> list[dict[str, Any]]:
    """Every suite in a fresh process, for each malloc setting and number of threads."""
    results = []
    for environment in ({}, REUSE):
        for count in threads:
            for name in names:
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.kernels",
                    "--suite",
                    name,
                    "--threads",
                    str(count),
                ]
                env = {**os.environ, **environment, "OMP_NUM_THREADS": str(count)}
                done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
                results += json.loads(done.stdout)
                for result in results[-len(json.loads(done.stdout)) :]:
                    print(line(result), flush=True)
    return results


def line(r: dict[str, Any]) -> str:
    mark = "ok  " if r["met"] else "MISS"
    return (
        f"{mark} {r['bar']}: {r['ours_ms']} ms, {r['other']} {r['other_ms']} ms, {r['ratio']} "
        f"(asked {r['asked']}), {r['threads']} thread(s), {r['malloc'].split(' (')[0]}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--suite", choices=SUITES)
    parser.add_argument("--only", choices=SUITES, action="append", help="of the suites (default: all)")
    parser.add_argument("--threads", type=int, action="append")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--note", default="", help="written into the file: what else ran on the machine, say")
    args = parser.parse_args()
    if args.suite:
        print(json.dumps(run_suite(args.suite, (args.threads or [1])[0])))
        return
    head = machine()
    results = run_all(args.threads or [1], args.only or list(SUITES))
    if args.out:
        args.out.write_text(json.dumps({**head, "note": args.note, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
