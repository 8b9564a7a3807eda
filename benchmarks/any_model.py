"""``qzoo.quantize`` against other tools: whole networks of torchvision and timm in ONNX Runtime and OpenVINO.

    python -m benchmarks.any_model --out benchmarks/results/any_model.json

Weights are seeded, BatchNorm statistics are those of noise, images have 224 pixels. One thread, batch 1, CPU time, sets
of processes that take turns, as in ``benchmarks.runtimes``. A file that is there keeps the results of networks that are
not measured again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import nn

import qzoo
from benchmarks.measure import machine
from benchmarks.runtimes import compare, record, versions
from qzoo.bench.options import Options
from qzoo.placement.factory import build_float

NETWORKS = """
torchvision:efficientnet_b0 torchvision:regnet_y_400mf torchvision:squeezenet1_1 timm:deit_tiny_patch16_224
timm:convnext_atto timm:mixer_s32_224 torchvision:shufflenet_v2_x1_0 torchvision:mobilenet_v3_small
torchvision:resnet18 torchvision:mobilenet_v2
"""
PEERS = {"onnxruntime": "quantize_static", "openvino": "nncf"}


def network(name: str) -> nn.Module:
    """A network with seeded weights, in eval mode."""
    torch.manual_seed(0)
    model = build_float(name)
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 224, 224))
    return model.eval()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", default=NETWORKS.split(), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    options = Options(tuple(PEERS), (1,), 1, args.seconds, tuple(PEERS.values()), progress=False)
    head = {**machine(), "threads": 1, "seconds": args.seconds, **versions(options.compare)}
    for name in args.names:
        reference, images = network(name), torch.randn(4, 3, 224, 224)
        quantized = qzoo.quantize(reference, images)
        qzoo.calibrate(quantized, [images], progress=False)
        entries = compare(name, quantized, reference, images[:1], options)
        print(*map(json.dumps, entries), sep="\n", flush=True)
        record(args.out, head, entries)


if __name__ == "__main__":
    main()
