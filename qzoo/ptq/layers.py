"""The quantized layers of a model, in the order in which they run, with the BatchNorm that follows each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qzoo.errors import CalibrationError, QuantizationError
from qzoo.ptq.calls import calls_of
from qzoo.quant.fold import evaluating
from qzoo.quant.nn import QuantConv2d, QuantConv2dSame, QuantLinear
from qzoo.quant.nn.modules.quant_conv_same import pad_same
from qzoo.quantizers import float_layers, quantizers_off

_TOLERANCE = 1e-3  # of the largest output, on the first batch


@contextmanager
def rescaling(model: nn.Module, images: Tensor, what: str, cause: str) -> Iterator[None]:
    """Rescale weights within, in eval mode and without quantizers, such that the model's output stays.

    Args:
        images: a batch that the output is compared on.
        what, cause: the operation and why it may change the output, for the error.

    Raises:
        QuantizationError: the output has changed; the weights are as before.
    """
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with evaluating(model), quantizers_off(model):
        expected = model(images)
        yield
        change = (model(images) - expected).abs().max().item()
    if not change <= _TOLERANCE * expected.abs().max().item():
        model.load_state_dict(state)
        raise QuantizationError(f"{what} would change the model's output by {change:.3g}: {cause}")


@dataclass(frozen=True)
class Layer:
    """A quantized convolution or linear layer.

    Attributes:
        name: its place in the model.
        module: the layer.
        norm: the BatchNorm that reads its output, None where there is none.
    """

    name: str
    module: QuantConv2d | QuantLinear
    norm: _BatchNorm | None

    @property
    def amax(self) -> Tensor:
        """The weight's range, [out, 1, ...] or one for all."""
        amax = self.module.weight_quantizer.amax
        if amax is None:
            raise CalibrationError(f"the weight of {self.name!r} has no range yet; call calibrate() first")
        return amax

    @property
    def bits(self) -> int:
        """Bits of the weight.

        Raises:
            CalibrationError: its format is no integer.
        """
        bits = self.module.weight_quantizer.num_bits
        if not isinstance(bits, int):
            raise CalibrationError(f"the weight of {self.name!r} has the format {bits}; expected integers")
        return bits

    @property
    def one_range_a_row(self) -> bool:
        """Whether all weights of an output channel share a range; False for ranges per group of inputs."""
        return self.amax.numel() in (1, len(self.module.weight))

    @property
    def groups(self) -> int:
        """Groups of the convolution, 1 for a linear layer."""
        return self.module.groups if isinstance(self.module, QuantConv2d) else 1

    def mean(self, output: Tensor) -> Tensor:
        """Average each channel of the layer's output, [N, out, H, W] or [.., out] -> [out], float64."""
        channel = 1 if isinstance(self.module, QuantConv2d) else output.dim() - 1
        return output.double().mean([d for d in range(output.dim()) if d != channel])

    def shift(self, delta: Tensor) -> None:
        """Subtract ``delta`` [out] from the layer's output: in the BatchNorm's mean, else in its bias."""
        with torch.no_grad():
            if self.norm is not None and self.norm.running_mean is not None:
                self.norm.running_mean += delta.to(self.norm.running_mean)
            elif self.module.bias is not None:
                self.module.bias -= delta.to(self.module.bias)
            else:
                self.module.bias = nn.Parameter(-delta.to(self.module.weight))
                self.module.bias_added = True

    def patches(self, x: Tensor, positions: int, generator: torch.Generator) -> Tensor:
        """Return what the layer's weight is multiplied with, at some positions of its output.

        Args:
            x: the layer's input, [N, in, H, W] or [..., in].
            positions: at most this many an image, drawn at random.

        Returns:
            [groups, samples, n]: n weights of one output channel, as ``weight.flatten(1)`` has them.
        """
        module = self.module
        if isinstance(module, QuantLinear):
            return x.reshape(1, -1, x.shape[-1])
        if isinstance(module, QuantConv2dSame):
            x = pad_same(x, module.kernel_size, module.stride, module.dilation)
        else:
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        size = [(k - 1) * d + 1 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        windows = x.unfold(2, size[0], module.stride[0]).unfold(3, size[1], module.stride[1])
        windows = windows[..., :: module.dilation[0], :: module.dilation[1]]
        height, width = windows.shape[2:4]
        chosen = draw(height * width, positions, generator).to(x.device)
        patches = windows[:, :, chosen // width, chosen % width]  # [N, in, positions, k, k]
        count, channels = patches.shape[:2]
        patches = patches.reshape(count, module.groups, channels // module.groups, len(chosen), -1)
        return patches.permute(1, 0, 3, 2, 4).reshape(module.groups, count * len(chosen), -1)


def draw(count: int, most: int, generator: torch.Generator) -> Tensor:
    """Draw at most ``most`` of the numbers below ``count``, on the generator's device."""
    return torch.randperm(count, generator=generator, device=generator.device)[:most]


def rows_only(layers: list[Layer]) -> list[Layer]:
    """Return the layers, for rounding that is learned.

    Raises:
        CalibrationError: a weight has a range per group of inputs.
    """
    for layer in layers:
        if not layer.one_range_a_row:
            raise CalibrationError(
                f"the weight of {layer.name!r} has a range for every group of inputs; learned rounding needs one for "
                "each output channel: leave it out, or choose a scheme without groups"
            )
    return layers


@torch.no_grad()
def layers_of(model: nn.Module, example: Tensor | None, calibrated: bool = True) -> list[Layer]:
    """List the layers that run once in a forward pass of ``example``, in that order.

    Raises:
        CalibrationError: there are none, one has no weight range yet, or there is no example.
    """
    if example is None:
        raise CalibrationError("the loader gave no images; pass calibration images")
    modules = dict(model.named_modules())
    kept = {modules[name] for name in float_layers(model)}
    kinds = (QuantConv2d, QuantLinear, _BatchNorm)
    watched = [m for m in modules.values() if isinstance(m, kinds) and m not in kept]
    with evaluating(model), quantizers_off(model):
        calls = calls_of(model, example, watched)
    order: list[Any] = []
    makers: dict[int, nn.Module] = {}
    norms: dict[nn.Module, _BatchNorm] = {}
    for call in calls:
        if not isinstance(call.module, _BatchNorm):
            order.append(call.module)
            makers[call.gives] = call.module
        elif call.reads in makers and call.module.running_mean is not None:
            norms[makers[call.reads]] = call.module
    names = {module: name for name, module in modules.items()}
    layers = [Layer(names[m], m, norms.get(m)) for m in order if order.count(m) == 1]
    if not layers:
        raise CalibrationError(
            f"{type(model).__name__} runs no quantized layers; build it with quantize='w8a8'"
        )
    for layer in layers if calibrated else []:
        _ = layer.amax  # raises where there is none
    return layers
