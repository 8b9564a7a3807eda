"""Study the single layers for a benchmark's page: sensitivity, ranges, histograms, and the time of every node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.analysis.inspect import inspect
from qzoo.analysis.sensitivity import sensitivity
from qzoo.bench.contenders import profiled
from qzoo.bench.lane import Lane
from qzoo.bench.options import Options
from qzoo.progress import track
from qzoo.quant.fold import attach, evaluating
from qzoo.quant.nn import TensorQuantizer
from qzoo.quantizers import require_quantizers, switch_target

IMAGES = 16
"""Images behind sensitivity and histograms: enough to rank layers, and seconds, not minutes, for large networks."""

BINS = 64
_RUNS = 20


def model_details(
    name: str,
    quantized: nn.Module,
    images: Tensor,
    lanes: Sequence[Lane],
    options: Options,
) -> dict[str, Any]:
    """Collect what is known of a model's layers, JSON-ready: sensitivity, inspection, histograms, profiles.

    Args:
        quantized: any target; measured as ONNX Runtime's.
        images: a batch, of which :data:`IMAGES` are used.
    """
    import copy

    model = copy.deepcopy(quantized)
    switch_target(model, "onnxruntime")
    few = images[:IMAGES]
    return {
        "model": name,
        "images": len(few),
        "sensitivity": sensitivity(model, [few], images=IMAGES, progress=options.progress).to_dict(),
        "inspection": inspect(model, [few], images=IMAGES).to_dict()["quantizers"],
        "histograms": histograms(model, few),
        "profiles": _profiles(lanes, few[:1], options),
    }


@torch.no_grad()
def histograms(model: nn.Module, images: Tensor) -> list[dict[str, Any]]:
    """Count histograms of the inputs of all active quantizers, in equal bins from the smallest to the largest value.

    Returns:
        for each: ``name``, ``role``, ``low`` and ``high`` (edges of the first and last bin), ``counts`` and ``amax``,
        the least and the largest range (they differ for weights with a range a channel); ``limits``, both ends of one
        with a zero point, where there is one.
    """
    entries: list[dict[str, Any]] = []

    def watch(name: str) -> Any:
        def hook(quantizer: TensorQuantizer, args: tuple[Tensor, ...]) -> None:
            if not quantizer.is_on or any(h["name"] == name for h in entries):
                return
            x = args[0].detach().float().flatten()
            low, high = x.min().item(), x.max().item()
            high = high if high > low else low + 1.0
            counts = torch.histc(x, BINS, low, high)
            amax = quantizer.range_for(args[0])
            spans = [_short(amax.min().item()), _short(amax.max().item())]
            entry = {"name": name, "role": quantizer.role, "low": _short(low), "high": _short(high)}
            if quantizer.affine and quantizer.limits is not None:
                entry["limits"] = [_short(end) for end in quantizer.limits.tolist()]
            entries.append({**entry, "amax": spans, "counts": [int(c) for c in counts]})

        return hook

    quantizers = require_quantizers(model)
    handles = [q.register_forward_pre_hook(watch(name)) for name, q in quantizers.items()]
    with attach(handles), evaluating(model):
        model(images)
    return entries


def _short(value: float) -> float:
    """Five significant digits: the page is read by people."""
    return float(f"{value:.5g}")


def _profiles(lanes: Sequence[Lane], image: Tensor, options: Options) -> list[dict[str, Any]]:
    profiles = []
    shown = [lane for lane in lanes if profiled(lane.contender)]
    for lane in track(shown, "time every node", show=options.progress):
        own = lane.contender
        lane.process.images(image.numpy())
        nodes = lane.process.profile(own.runtime, own.path, options.threads, _RUNS)
        head = {"runtime": own.runtime, "precision": own.precision, "source": own.source}
        profiles.append({**head, "batch": 1, "nodes": nodes})
    return profiles
