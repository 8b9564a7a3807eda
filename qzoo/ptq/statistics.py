"""Derive the statistics of activations from a network's BatchNorms, without a single image.

Paper: "Data-Free Quantization Through Weight Equalization and Bias Correction" (Nagel et al., 2019,
arXiv:1906.04721), section 4.2 and appendix C: behind a BatchNorm channel c has the mean beta_c and the standard
deviation gamma_c; a ReLU or ReLU6 makes a clipped normal distribution of it, whose moments are known. From there the
moments go on through the other operations: linear ones keep means exactly and variances as if channels were
independent, an add sums both, a pooling keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qzoo.errors import CalibrationError
from qzoo.quant.fold import attach, evaluating
from qzoo.quant.nn import TensorQuantizer
from qzoo.quant.nn.modules._utils import QuantInputMixin
from qzoo.quantizers import quantizers_off, weight_quantizers


@dataclass(frozen=True)
class Channels:
    """Expected statistics of one tensor, per channel [C], float64.

    Attributes:
        mean, variance: over images and positions.
        low, high: what hardly any value is beyond.
    """

    mean: Tensor
    variance: Tensor
    low: Tensor
    high: Tensor

    def amax(self) -> Tensor:
        """Return the range of the tensor, 0-d float32."""
        return torch.maximum(self.low.abs(), self.high.abs()).max().float()

    def limits(self) -> Tensor:
        """Return both ends of the tensor's range, float32 ``[2]``; zero is within."""
        return torch.stack([self.low.min().clamp(max=0), self.high.max().clamp(min=0)]).float()

    def clipped(self, low: float, high: float) -> Channels:
        """Compute the channels after ``clamp(low, high)`` of a normal distribution."""
        mean, variance = clipped_normal(self.mean, self.variance.sqrt(), low, high)
        return Channels(mean, variance, self.low.clamp(low, high), self.high.clamp(low, high))


def clipped_normal(mean: Tensor, deviation: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Compute mean and variance of ``clamp(x, low, high)`` with x normal; float64, any shape."""
    sigma = deviation.clamp(min=1e-12)
    a, b = (low - mean) / sigma, (high - mean) / sigma
    below, above = _normal_cdf(a), 1 - _normal_cdf(b)
    inside, density_a, density_b = 1 - below - above, _density(a), _density(b)
    first = inside * mean + sigma * (density_a - density_b)
    second = inside * (mean.square() + sigma.square()) + sigma * (
        density_a * (mean + low) - density_b * (mean + (high if math.isfinite(high) else 0.0))
    )
    first, second = first + below * low, second + below * low * low
    if math.isfinite(high):
        first, second = first + above * high, second + above * high * high
    return first, (second - first.square()).clamp(min=0)


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-x / math.sqrt(2.0))


def _density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x.square()) / math.sqrt(2.0 * math.pi)


@torch.no_grad()
def batchnorm_statistics(
    model: nn.Module, inputs: Channels, image: Tensor, sigmas: float
) -> dict[str, Channels]:
    """Expect statistics of the tensor that each activation quantizer and quantized layer reads, by module name.

    Args:
        model: with quantizers; needs no ranges.
        inputs: of the images.
        image: any image [1, C, H, W]; its shape counts, not its values.
        sigmas: standard deviations between mean and the ``low`` and ``high`` of a normal distribution.

    Raises:
        CalibrationError: an operation whose effect on the moments is not known, in front of a quantizer.
    """
    tracer = _Tracer(sigmas)
    tracer.set(image, inputs)
    statistics: dict[str, Channels] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            statistics[name] = tracer.get(args[0], name)

        return hook

    weights = {quantizer for _, quantizer in weight_quantizers(model).values()}
    handles = []
    for name, module in model.named_modules():
        is_layer = isinstance(module, QuantInputMixin) and hasattr(module, "weight")
        if is_layer or (isinstance(module, TensorQuantizer) and module not in weights):
            handles.append(module.register_forward_pre_hook(watch(name)))
    with attach(handles), evaluating(model), quantizers_off(model), tracer:
        model(image)
    return statistics


class _Tracer(TorchFunctionMode):
    """Hands the moments on from the inputs of every torch function to its output."""

    def __init__(self, sigmas: float) -> None:
        super().__init__()
        self.sigmas = sigmas
        self._known: dict[int, Channels] = {}
        self._names: dict[int, str] = {}
        self._keep: list[Tensor] = []  # a freed tensor's id could be another's

    def set(self, x: Tensor, channels: Channels | None, function: str = "") -> None:
        self._keep.append(x)
        self._names[id(x)] = function
        self._known.pop(id(x), None)
        if channels is not None:
            self._known[id(x)] = channels

    def get(self, x: Tensor, name: str) -> Channels:
        if id(x) not in self._known:
            function = self._names.get(id(x), "an operation on no activation")
            raise CalibrationError(
                f"the input of {name!r} comes from {function}, whose statistics don't follow from BatchNorms; "
                "calibrate this model on images"
            )
        return self._known[id(x)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func)).strip("_")
        sources = [self._known.get(id(a)) for a in args if isinstance(a, Tensor)]
        rule = RULES.get(name)
        after: Channels | None = None
        if rule is not None and sources and sources[0] is not None:
            after = rule(self, args, kwargs, [s for s in sources if s is not None])
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            if name in SAME and sources:
                after = sources[0]
            self.set(result, after, name)
        return result

    def normal(self, mean: Tensor, variance: Tensor) -> Channels:
        """Make the channels of a normal distribution."""
        reach = self.sigmas * variance.clamp(min=0).sqrt()
        return Channels(mean, variance.clamp(min=0), mean - reach, mean + reach)


Rule = Callable[[_Tracer, Any, dict[str, Any], list[Channels]], Channels | None]

SAME = frozenset(
    {
        "dropout",
        "pad",
        "contiguous",
        "to",
        "float",
        "clone",
        "max_pool2d",
        "boolean_dispatch",
        "identity",
        "alias",
    }
)
"""Functions that leave the channels as they are (or nearly: zeros of a padding, the larger ones of a max pooling)."""


def _argument(args: Any, kwargs: dict[str, Any], place: int, name: str, default: Any = None) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


def _batch_norm(tracer: _Tracer, args: Any, kwargs: dict[str, Any], _: list[Channels]) -> Channels | None:
    weight, bias = _argument(args, kwargs, 3, "weight"), _argument(args, kwargs, 4, "bias")
    if weight is None or bias is None:
        return None
    return tracer.normal(bias.double(), weight.double().square())


def _linear(tracer: _Tracer, args: Any, kwargs: dict[str, Any], known: list[Channels]) -> Channels:
    weight, bias, source = args[1].double(), _argument(args, kwargs, 2, "bias"), known[0]
    groups = _argument(args, kwargs, 6, "groups", 1) if weight.dim() > 2 else 1
    rows = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)
    mean = torch.einsum("grnk,gn->gr", rows, source.mean.reshape(groups, -1)).flatten()
    variance = torch.einsum("grnk,gn->gr", rows.square(), source.variance.reshape(groups, -1)).flatten()
    return tracer.normal(mean if bias is None else mean + bias.double(), variance)


def _add(tracer: _Tracer, args: Any, kwargs: dict[str, Any], known: list[Channels]) -> Channels | None:
    if len(known) != 2:
        return None
    a, b = known
    mean = a.mean + b.mean
    below = ((a.mean - a.low).square() + (b.mean - b.low).square()).sqrt()
    above = ((a.high - a.mean).square() + (b.high - b.mean).square()).sqrt()
    return Channels(
        mean,
        a.variance + b.variance,
        torch.maximum(mean - below, a.low + b.low),
        torch.minimum(mean + above, a.high + b.high),
    )


def _pool(tracer: _Tracer, args: Any, kwargs: dict[str, Any], known: list[Channels]) -> Channels:
    normal = tracer.normal(known[0].mean, known[0].variance)
    low, high = known[0].low, known[0].high
    return replace(known[0], low=torch.maximum(normal.low, low), high=torch.minimum(normal.high, high))


def _relu(tracer: _Tracer, args: Any, kwargs: dict[str, Any], known: list[Channels]) -> Channels:
    return known[0].clipped(0.0, math.inf)


def _hardtanh(tracer: _Tracer, args: Any, kwargs: dict[str, Any], known: list[Channels]) -> Channels:
    low, high = _argument(args, kwargs, 1, "min_val", -1.0), _argument(args, kwargs, 2, "max_val", 1.0)
    return known[0].clipped(low, high)


def _flatten(tracer: _Tracer, args: Any, kwargs: dict[str, Any], known: list[Channels]) -> Channels | None:
    x, start = args[0], _argument(args, kwargs, 1, "start_dim", 0)
    return known[0] if start == 1 and x[0].numel() == len(known[0].mean) else None


RULES: dict[str, Rule] = {
    "batch_norm": _batch_norm,
    "conv2d": _linear,
    "linear": _linear,
    "add": _add,
    "iadd": _add,
    "relu": _relu,
    "relu6": lambda tracer, args, kwargs, known: known[0].clipped(0.0, 6.0),
    "hardtanh": _hardtanh,
    "adaptive_avg_pool2d": _pool,
    "avg_pool2d": _pool,
    "mean": _pool,
    "flatten": _flatten,
}
