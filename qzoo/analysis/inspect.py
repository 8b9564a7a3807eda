"""``qzoo.inspect``: the quantizers of a model as a tree, with their ranges and how well these are used."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.errors import ArgumentError, DataError
from qzoo.ptq.collect import images_of
from qzoo.quant import ops
from qzoo.quant.fold import attach, evaluating
from qzoo.quant.nn import TensorQuantizer
from qzoo.quant.nn.modules._utils import QuantMixin
from qzoo.quantizers import device_of, float_layers, require_quantizers
from qzoo.runtimes.pytorch import run


@dataclass(frozen=True)
class QuantizerInfo:
    """Bits, range and statistics of one quantizer. Shares are in percent; None where there is nothing to count.

    Attributes:
        name, role: its place in the model, and what it is for there.
        on: whether it quantizes, with the target set now.
        format: such as ``"int8"``, ``"uint8"``, ``"int4"``, ``"fp8 (4, 3)"``.
        ranges: number of ranges: 1 per tensor, else one a channel or block.
        amax_low, amax_high: the smallest and the largest range; None without one.
        limits: both ends of the range where it has a zero point, else None.
        largest: the largest magnitude seen.
        saturated: share of values beyond their range.
        dead: share of the integer levels that no value takes (of any channel).
        group: the quantizer whose range it shares, of those that :func:`qzoo.quantize` ties; "" for none.
    """

    name: str
    role: str
    on: bool
    format: str
    ranges: int
    amax_low: float | None
    amax_high: float | None
    limits: tuple[float, float] | None = None
    largest: float | None = None
    saturated: float | None = None
    dead: float | None = None
    group: str = ""


@dataclass(frozen=True)
class Inspection:
    """The quantizers of a model in its own order; ``print`` it for the tree.

    Attributes:
        images: number of images the activations were counted on.
        left: layers and operations that stay in float: names, each with the reason.
    """

    model: str
    images: int
    quantizers: tuple[QuantizerInfo, ...]
    left: tuple[tuple[str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return asdict(self)

    def __str__(self) -> str:
        tree: dict[str, Any] = {}
        for info in self.quantizers:
            node = tree
            for part in info.name.split("."):
                node = node.setdefault(part, {})
            node[""] = info
        rows = list(_lines(tree, ""))
        width = max(len(left) for left, _ in rows)
        counted = f", activations counted on {self.images} images" if self.images else ""
        head = f"{len(self.quantizers)} quantizers, {sum(q.on for q in self.quantizers)} on{counted}"
        titles = f"{self.model:{width}}  {'format':8} {'ranges':>6}  {'range':>19}  {'largest':>8}  {'satur. %':>8}"
        body = [f"{left:{width}}{_cells(info) if info else ''}".rstrip() for left, info in rows]
        kept = [f"in float: {name}, {reason}" for name, reason in self.left]
        return "\n".join([head, f"{titles}  {'dead %':>6}  role", *body, *kept])


class _Counts:
    """What passed through one quantizer."""

    def __init__(self, quantizer: TensorQuantizer) -> None:
        self.quantizer = quantizer
        self.values = self.beyond = 0
        self.largest = 0.0
        bits = quantizer.num_bits
        self.levels = torch.zeros(2**bits, dtype=torch.bool) if isinstance(bits, int) and bits <= 8 else None

    def add(self, x: Tensor) -> None:
        quantizer = self.quantizer
        x = x.detach()
        if quantizer.pre_quant_scale is not None:
            x = x * quantizer.pre_quant_scale
        self.values += x.numel()
        if not x.numel():
            return
        self.largest = max(self.largest, x.abs().max().item())
        if quantizer.amax is None or quantizer.block is not None:
            return
        if quantizer.affine:
            self._add_codes(x)
            return
        amax = quantizer.range_for(x)
        # The range itself is within it, also where a weight was computed back from its integer.
        self.beyond += int((x.abs() > amax * (1 + 2.0**-20)).sum())
        if self.levels is not None:
            bits: Any = quantizer.num_bits
            low = ops.bounds(bits, quantizer.unsigned, quantizer.narrow_range)[0]
            integers = ops.quantize(x, amax, bits, quantizer.unsigned, quantizer.narrow_range)
            self.levels |= torch.bincount(integers.flatten().long() - low, minlength=2**bits).cpu() > 0

    def _add_codes(self, x: Tensor) -> None:
        """Count between both ends of a range, whose codes start at the low one."""
        limits, bits = self.quantizer.limits, self.quantizer.num_bits
        if limits is None or not isinstance(bits, int):
            return
        low, high = limits.to(x.device)
        reach = 1 + 2.0**-20
        self.beyond += int(((x > high * reach) | (x < low * reach)).sum())
        if self.levels is not None:
            scale, zero = ops.affine_parameters(limits.to(x.device), bits)
            codes = ((x.float() / scale).round() + zero).clamp(0, 2**bits - 1)
            self.levels |= torch.bincount(codes.flatten().long(), minlength=2**bits).cpu() > 0

    def shares(self) -> dict[str, float | None]:
        quantizer = self.quantizer
        if not self.values:
            return {}
        shares: dict[str, float | None] = {"largest": self.largest}
        if quantizer.amax is not None and quantizer.block is None:
            shares["saturated"] = 100 * self.beyond / self.values
            if self.levels is not None:
                low, high = ops.bounds(
                    len(self.levels).bit_length() - 1,
                    quantizer.unsigned or quantizer.affine,
                    quantizer.narrow_range,
                )
                count = high - low + 1
                shares["dead"] = 100 * (1 - int(self.levels.sum()) / count)
        return shares


@torch.no_grad()
def inspect(model: nn.Module, loader: Iterable[Any] | None = None, *, images: int = 64) -> Inspection:
    """Inspect the quantizers of a model: bits, range, and on data the share that saturates and the levels unused.

    Weights are always counted; activations where a quantizer is on, as the quantized model has them.

    Args:
        model: with quantizers; left as it is.
        loader: batches of images [B, C, H, W], alone or first in a tuple; None leaves activations uncounted.
        images: number of images to count on.

    Returns:
        A row for each quantizer; ``str()`` is a table.

    Raises:
        CalibrationError: the model has no quantizers.
        DataError: the loader gave no images.
        ValueError: ``images`` below 1, with a loader.

    Example:
        >>> print(qzoo.inspect(model, loader))
        64 quantizers, 64 on, activations counted on 16 images
        CifarResNet                    format   ranges                range   largest  satur. %  dead %  role
        ├─ conv1
        │  ├─ _input_quantizer         int8          1                2.018     2.023     1.307    30.1  input
        ...
    """
    if loader is not None and images < 1:
        raise ArgumentError(f"images must be at least 1, not {images}; without a loader none are counted")
    quantizers = require_quantizers(model)
    counts = {name: _Counts(quantizer) for name, quantizer in quantizers.items()}
    weights = set()
    for name, module in model.named_modules():
        key = f"{name}._weight_quantizer".lstrip(".")
        if key in quantizers and isinstance(getattr(module, "weight", None), Tensor):
            counts[key].add(module.weight)  # type: ignore[arg-type]
            weights.add(key)
    seen = 0 if loader is None else _count_activations(model, loader, images, counts, weights)
    infos = [_info(name, quantizer, counts[name]) for name, quantizer in quantizers.items()]
    return Inspection(type(model).__name__, seen, tuple(infos), _left(model))


def _left(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """What stays in float, and why: as :func:`qzoo.quantize` says, else the layers without quantizers."""
    placement = getattr(model, "qzoo_placement", None)
    asked = () if placement is None else placement.excluded
    kept = tuple((name, "as the scheme says") for name in float_layers(model) if name not in asked)
    if placement is not None:
        return (*placement.reasons, *kept)
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    return kept + tuple(
        (name, "which has no quantizers")
        for name, module in model.named_modules()
        if isinstance(module, layers) and not isinstance(module, QuantMixin)
    )


def _count_activations(
    model: nn.Module, loader: Iterable[Any], images: int, counts: dict[str, _Counts], weights: set[str]
) -> int:
    def watch(entry: _Counts) -> Any:
        return lambda module, args: entry.add(args[0])

    watched = [entry for name, entry in counts.items() if name not in weights and entry.quantizer.is_on]
    handles = [entry.quantizer.register_forward_pre_hook(watch(entry)) for entry in watched]
    device = device_of(model)
    seen = 0
    with attach(handles), evaluating(model):
        for batch in loader:
            x = images_of(batch)[: images - seen]
            run(model, x.to(device))
            seen += len(x)
            if seen >= images:
                break
    if not seen:
        raise DataError("the loader gave no images; check the folder, the split and the subset")
    return seen


def _info(name: str, quantizer: TensorQuantizer, counts: _Counts) -> QuantizerInfo:
    amax, bits = quantizer.amax, quantizer.num_bits
    sign = "u" if quantizer.unsigned or quantizer.affine else ""
    limits = quantizer.limits if quantizer.affine else None
    return QuantizerInfo(
        name=name,
        role=quantizer.role,
        on=quantizer.is_on,
        format=f"{sign}int{bits}" if isinstance(bits, int) else f"fp8 {bits}",
        ranges=0 if amax is None else amax.numel(),
        amax_low=None if amax is None else amax.min().item(),
        amax_high=None if amax is None else amax.max().item(),
        limits=None if limits is None else (limits[0].item(), limits[1].item()),
        group=quantizer.group if quantizer.group != name else "",
        **counts.shares(),
    )


def _lines(tree: dict[str, Any], indent: str) -> Iterable[tuple[str, QuantizerInfo | None]]:
    """Rows of the tree; a module with one child shares its line with it."""
    children = [(name, child) for name, child in tree.items() if name]
    for i, (name, child) in enumerate(children):
        while "" not in child and len(child) == 1:
            ((only, grandchild),) = child.items()
            name, child = f"{name}.{only}", grandchild
        last = i == len(children) - 1
        yield f"{indent}{'└─ ' if last else '├─ '}{name}", child.get("")
        yield from _lines(child, indent + ("   " if last else "│  "))


def _cells(info: QuantizerInfo) -> str:
    if info.limits is not None:
        span = f"{info.limits[0]:.4g} to {info.limits[1]:.4g}"
    elif info.amax_low is None or info.amax_high is None:
        span = "none"
    elif info.ranges == 1:
        span = f"{info.amax_high:.4g}"
    else:
        span = f"{info.amax_low:.4g} to {info.amax_high:.4g}"
    shares = (
        "" if info.saturated is None else f"{info.saturated:.3f}",
        "" if info.dead is None else f"{info.dead:.1f}",
    )
    largest = "" if info.largest is None else f"{info.largest:.4g}"
    state = f"  {info.role}" + (f", the range of {info.group}" if info.group else "")
    state += "" if info.on else ", off"
    cells = f"  {info.format:8} {info.ranges:6}  {span:>19}  {largest:>8}  {shares[0]:>8}  {shares[1]:>6}"
    return cells + state
