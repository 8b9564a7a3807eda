"""int8 against float in ONNX Runtime and OpenVINO, and against other tools' int8 models, for whole networks.

    python -m benchmarks.runtimes --out FILE.json
    python -m benchmarks.runtimes --runtimes openvino --compare nncf --out FILE.json
    python -m benchmarks.runtimes --families --batches 1 --compare quantize_static nncf --seconds 2 --out FILE.json

The last one is of a member or two of each family. A file that is there keeps the results of networks that are not
measured again.

Weights are random (the speed of a network does not depend on them), BatchNorm statistics and ranges are those of noise.
One thread, CPU time. The processes of a set take turns; then they end, and the next set begins, since where a process
has its memory decides a few percent (now and then much more) for as long as it lives. A ratio is the median over the
sets of the ratio of medians, with its 95 % interval by a bootstrap over sets and over the turns in them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import qzoo
from benchmarks.measure import machine
from qzoo import runtimes
from qzoo.bench import contenders
from qzoo.bench.lane import running, time_in_turns
from qzoo.bench.options import Options
from qzoo.bench.peers import RUNS_IN

SETS = 7  # of processes

# The least ratio of float's CPU time to int8's, by runtime and batch; on a processor with VNNI.
BARS = {
    "resnet18": {"onnxruntime": {1: 3.3, 8: 3.3}},
    "resnet50": {"onnxruntime": {1: 3.3, 8: 3.3}, "openvino": {1: 3.5, 8: 3.9}},
    "tf_efficientnet_lite0": {"onnxruntime": {1: 2.1, 8: 2.4}, "openvino": {1: 2.25, 8: 3.0}},
    "mobilenet_v2": {"onnxruntime": {1: 1.8, 8: 1.8}},
    "deit_tiny_patch16_224": {"onnxruntime": {1: 2.1}, "openvino": {1: 2.6}},
    "deit_small_patch16_224": {"onnxruntime": {1: 2.7}, "openvino": {1: 3.2}},
    "vit_base_patch16_224": {"onnxruntime": {1: 2.9}, "openvino": {1: 3.5}},
    "convnext_tiny": {"onnxruntime": {1: 2.0}, "openvino": {1: 2.5}},
    "swin_t": {"onnxruntime": {1: 2.0}, "openvino": {1: 2.5}},
}

FAMILIES = """
alexnet convnext_mini convnext_tiny convnextv2_tiny deit_small_patch16_224 deit_tiny_patch16_224 densenet121 dla34
edgenext_xx_small efficientnet_b0 efficientnet_v2_s ghostnetv2_100 googlenet hrnet_w18_small inception_v3 lcnet_050
levit_128s maxvit_t mnasnet0_5 mobilenet_v2 mobilenet_v3_small mobilenetv4_conv_small mobilevit_xxs regnet_x_400mf
regnet_y_400mf repvgg_a0 repvgg_a0_reparam res2net50_14w_8s resnest14d resnet18 resnet20 resnext50_32x4d seresnet50
shufflenet_v2_x0_5 squeezenet1_1 swin_mini swin_t swin_v2_t tf_efficientnet_lite0 vgg11_bn vit_base_patch16_224
vit_mini
"""


def network(name: str) -> tuple[nn.Module, nn.Module]:
    """Float, and quantized with the same weights; both in eval mode."""
    torch.manual_seed(0)
    reference: Any = qzoo.create_model(name)
    size = reference.qzoo_config.preprocessing.input_size
    with torch.no_grad():
        reference.train()(torch.randn(8, *size))
    quantized = qzoo.create_model(name, quantize=True)
    quantized.load_state_dict(reference.eval().state_dict())
    qzoo.calibrate(quantized.eval(), [torch.randn(4, *size)], progress=False)
    return reference, quantized


def compare(
    name: str, quantized: nn.Module, reference: nn.Module, image: Tensor, options: Options
) -> list[dict[str, Any]]:
    """One entry for each runtime and batch size: int8 against float, and against the peers' int8.

    Each set of processes has its share of ``options.seconds``, and of the least number of rounds.
    """
    share = replace(options, seconds=options.seconds / SETS, rounds=(8, options.rounds[1]))
    with tempfile.TemporaryDirectory() as folder:
        noise = torch.randn(8, *image.shape[1:])
        candidates, _ = contenders.write(quantized, reference, image, options, noise, Path(folder))
        sets = [
            turns_of_a_set([*candidates[i:], *candidates[:i]], name, image, share)
            for i in (number % len(candidates) for number in range(SETS))
        ]
    entries = []
    for runtime in options.runtimes:
        others = {"float": (runtime, "float32", "qzoo")}
        others |= {p: (runtime, "int8", p) for p in options.compare if RUNS_IN[p] == runtime}
        for batch in options.batches:
            ours = [turns[runtime, "int8", "qzoo", batch] for turns in sets]
            entry: dict[str, Any] = {"model": name, "runtime": runtime, "batch": batch}
            entry["int8_cpu_ms"] = round(1e3 * float(np.median([np.median(turns) for turns in ours])), 3)
            entry |= {"sets": SETS, "rounds": sum(map(len, ours))}
            for other, key in others.items():
                theirs = [turns[(*key, batch)] for turns in sets]
                entry[f"times_as_fast_as_{other}"] = [round(v, 3) for v in ratio_of_sets(theirs, ours)]
            entries.append(entry)
    return entries


def turns_of_a_set(
    candidates: Sequence[contenders.Contender], name: str, image: Tensor, options: Options
) -> dict[tuple[str, str, str, int], np.ndarray]:
    """CPU seconds of each turn, by runtime, precision, source and batch size, of processes that start and end here."""
    with running(candidates, name, options) as lanes:
        time_in_turns(lanes, name, image, options)
    return {
        (own.runtime, own.precision, own.source, batch): samples.cpu
        for own, lane in zip(candidates, lanes, strict=True)
        for batch, samples in lane.samples.items()
    }


def ratio_of_sets(slow: Sequence[np.ndarray], fast: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Compute a speed-up over sets of processes: the median of their ratios of medians, and its 95 % interval.

    Args:
        slow, fast: seconds of each turn, an array [turns] for each set, of the same rounds.
    """
    generator = np.random.default_rng(0)
    draws = np.empty((len(slow), 1000))
    for row, a, b in zip(draws, slow, fast, strict=True):
        picks = generator.integers(0, len(a), (1000, len(a)))
        row[:] = np.median(a[picks], axis=1) / np.median(b[picks], axis=1)
    chosen = generator.integers(0, len(slow), draws.shape)
    low, high = np.percentile(np.median(np.take_along_axis(draws, chosen, axis=0), axis=0), (2.5, 97.5))
    middle = np.median([np.median(a) / np.median(b) for a, b in zip(slow, fast, strict=True)])
    return float(middle), float(low), float(high)


def measure_network(name: str, options: Options) -> list[dict[str, Any]]:
    """One entry for each runtime and batch size, with its bar."""
    reference, quantized = network(name)
    image = torch.randn(1, *reference.qzoo_config.preprocessing.input_size)
    entries = compare(name, quantized, reference, image, options)
    for entry in entries:
        bar = BARS.get(name, {}).get(entry["runtime"], {}).get(entry["batch"])
        entry["bar"] = bar
        entry["met"] = None if bar is None else entry["times_as_fast_as_float"][0] >= bar
        print(json.dumps(entry), flush=True)
    return entries


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--families", action="store_true", help="one network of each family")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], metavar="N")
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino"], metavar="NAME")
    parser.add_argument("--compare", nargs="*", default=["quantize_static"], metavar="PEER")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = tuple(name for name in args.runtimes if name in runtimes.installed())
    options = Options(chosen, tuple(args.batches), 1, args.seconds, tuple(args.compare), progress=False)
    head = {**machine(), "threads": 1, "seconds": args.seconds, **versions(options.compare)}
    for name in args.names or (FAMILIES.split() if args.families else BARS):
        record(args.out, head, measure_network(name, options))


def record(path: Path | None, head: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """Put entries into a file, in place of those that it has of the same networks."""
    if path is None:
        return
    before = json.loads(path.read_text())["results"] if path.exists() else []
    new = {entry["model"] for entry in entries}
    others = [entry for entry in before if entry["model"] not in new]
    path.write_text(json.dumps({**head, "results": others + entries}, indent=1) + "\n")


def versions(peers: Iterable[str]) -> dict[str, str]:
    """Versions of the runtimes, and of peers that are packages of their own."""
    from qzoo.bench.environment import describe

    facts = describe()
    own = {peer: version(peer) for peer in peers if peer == "nncf"}
    return {package: facts[package] for package in ("onnxruntime", "openvino")} | own


if __name__ == "__main__":
    main()
