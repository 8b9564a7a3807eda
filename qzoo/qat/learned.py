"""Ranges that are trained with the weights: LSQ and PACT.

While a model trains, a :class:`LearnedRange` sits in each quantizer as its submodule ``learner``.
:func:`freeze_ranges` writes the values back into the ordinary ranges (``_amax``), with which the quantizer computes
the same to the bit, and takes the learners away: checkpoints and export see nothing new.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qzoo.errors import ArgumentError, CalibrationError
from qzoo.quant import ops
from qzoo.quant.calib.weights import quantized_weights
from qzoo.quant.nn import Range, TensorQuantizer
from qzoo.quantizers import quantizers, shared_ranges

_SMALLEST = 1e-6


class _Learned(nn.Module):
    """The rule of a range that is trained, and the unit of its parameter."""

    def __init__(self, rule: str, bound: float) -> None:
        super().__init__()
        self.rule, self.unit = rule, float(bound) if rule == "lsq" else 1.0

    def extra_repr(self) -> str:
        return self.rule


class LearnedRange(_Learned):
    """Range of a quantizer as a parameter that is trained.

    * ``"lsq"``: Esser et al. 2020, "Learned Step Size Quantization" (arXiv:1902.08153). The parameter is the step
      s = amax / Qp; its gradient is (q - x/s) inside the range and +-Qp outside (equation 3), scaled by
      1 / sqrt(N Qp), with N the number of weights that share the step, or of features of one image (section 2.2).
    * ``"pact"``: Choi et al. 2018, "PACT: Parameterized Clipping Activation" (arXiv:1805.06085). The parameter is
      the clipping level itself; only what is clipped moves it (equation 3).

    Args:
        amax: the start, float32, 0-d or broadcastable to the quantizer's input.
        rule: "lsq" or "pact".
        bound: Qp, the highest integer.

    Example:
        >>> learned = LearnedRange(torch.tensor(1.0), "lsq", bound=127)
        >>> learned(torch.tensor([0.5, 2.0]), num_bits=8, unsigned=False, narrow_range=True)
        tensor([0.5039, 1.0000], grad_fn=...)
    """

    def __init__(self, amax: Tensor, rule: str, bound: float) -> None:
        super().__init__(rule, bound)
        self.value = nn.Parameter((amax.detach().float() / self.unit).clamp(min=_SMALLEST))

    @property
    def amax(self) -> Tensor:
        """The range, in the shape of the parameter; no gradient."""
        return self.value.detach().clamp(min=_SMALLEST) * self.unit

    def forward(self, x: Tensor, num_bits: int, unsigned: bool, narrow_range: bool) -> Tensor:
        """Fake-quantize ``x``, with gradients to it and to the range."""
        factor = 1.0
        if self.rule == "lsq":
            shared = x[0].numel() if self.value.dim() == 0 else x.numel() // self.value.numel()
            factor = (shared * self.unit) ** -0.5
        gain = self.unit * factor
        result: Tensor = _FakeQuantize.apply(
            x, self.value, self.amax, num_bits, unsigned, narrow_range, gain, self.rule == "lsq"
        )
        return result


class _FakeQuantize(torch.autograd.Function):
    """Fake quantization with a gradient to ``value``, ``gain`` times the one to ``amax``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        value: Tensor,
        amax: Tensor,
        num_bits: int,
        unsigned: bool,
        narrow_range: bool,
        gain: float,
        rounding: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, amax)
        ctx.gain, ctx.format = gain, (num_bits, unsigned, narrow_range, rounding)
        return ops.fake_quantize(x, amax, num_bits, unsigned, narrow_range)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, amax = ctx.saved_tensors
        grad_x, moved = ops.fake_quantize_learned_backward(grads[0], x, amax, *ctx.format)
        return grad_x, moved * ctx.gain, None, None, None, None, None, None


class LearnedLimits(_Learned):
    """Both ends of a quantizer's range as a parameter that is trained.

    * ``"lsq"``: LSQ+, Bhalgat et al. 2020, "LSQ+: Improving low-bit quantization through learnable offsets and better
      initialization" (arXiv:2004.09576), in terms of the ends: low = beta, high = beta + s p (equations 4 to 6). The
      parameter is the ends over p, the highest code, so that its gradients are of the size of LSQ's; they are scaled
      by 1 / sqrt(N p), with N the number of features of one image. Zero stays a code: the zero point is rounded.
    * ``"pact"``: only what is clipped moves the ends, as in :class:`LearnedRange`.

    Args:
        limits: the start, float32 ``[2]``.
        rule: "lsq" or "pact".
        bound: p.

    Example:
        >>> learned = LearnedLimits(torch.tensor([-0.25, 1.0]), "lsq", bound=255)
        >>> learned(torch.tensor([-9.0, 0.0, 2.0]), num_bits=8, unsigned=False, narrow_range=False)
        tensor([-0.2500,  0.0000,  1.0000], grad_fn=...)
    """

    def __init__(self, limits: Tensor, rule: str, bound: float) -> None:
        super().__init__(rule, bound)
        self.value = nn.Parameter(limits.detach().float() / self.unit)

    @property
    def limits(self) -> Tensor:
        """Both ends ``[2]``, zero within and not the whole; no gradient."""
        low, high = (self.value.detach() * self.unit).unbind()
        low = low.clamp(max=0)
        return torch.stack([low, torch.maximum(high.clamp(min=0), low + _SMALLEST)])

    def forward(self, x: Tensor, num_bits: int, unsigned: bool, narrow_range: bool) -> Tensor:
        """Fake-quantize ``x``, with gradients to it and to both ends."""
        factor = (x[0].numel() * self.unit) ** -0.5 if self.rule == "lsq" else 1.0
        result: Tensor = _FakeQuantizeAffine.apply(
            x, self.value, self.limits, num_bits, self.unit * factor, self.rule == "lsq"
        )
        return result


class _FakeQuantizeAffine(torch.autograd.Function):
    """Affine fake quantization with a gradient to ``value``, ``gain`` times the one to the ends."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, value: Tensor, limits: Tensor, num_bits: int, gain: float, rounding: bool
    ) -> Tensor:
        ctx.save_for_backward(x, limits)
        ctx.gain, ctx.format = gain, (num_bits, rounding)
        return ops.fake_quantize_affine(x, limits, num_bits)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, limits = ctx.saved_tensors
        grad_x, moved = ops.fake_quantize_affine_learned_backward(grads[0], x, limits, *ctx.format)
        return grad_x, moved * ctx.gain, None, None, None, None


@torch.no_grad()
def learn_ranges(model: nn.Module, rule: str) -> list[str]:
    """Make the ranges of a model's quantizers trainable (LSQ, PACT), in place.

    Every quantizer that is on gets a :class:`LearnedRange`, or :class:`LearnedLimits` where it has a zero point. With
    "lsq" every range is learned, starting from the calibrated one; weights of fewer than 8 bits start from
    2 mean(abs(w)) / sqrt(Qp) a step (Esser et al., section 2.1). With "pact" the activations are; weights keep their
    frozen ranges. Quantizers that share a range learn one.

    Args:
        model: calibrated, every quantizer with one range or one per channel.
        rule: "lsq" or "pact".

    Returns:
        Names of the quantizers.

    Raises:
        ValueError: another rule.
        CalibrationError: a quantizer that is on has no range.

    Example:
        >>> learn_ranges(model, "lsq")[:2]
        ['conv1._input_quantizer', 'conv1._weight_quantizer']
    """
    if rule not in ("lsq", "pact"):
        raise ArgumentError(f"rule must be 'lsq' or 'pact', not {rule!r}")
    weights = {
        id(quantizer): weight for module in model.modules() for weight, quantizer in quantized_weights(module)
    }
    names = []
    for name, quantizer in model.named_modules():
        if not isinstance(quantizer, TensorQuantizer) or not quantizer.is_on:
            continue
        weight = weights.get(id(quantizer))
        if not isinstance(quantizer.num_bits, int) or quantizer.block is not None:
            continue  # 8-bit floats and groups keep their ranges
        if rule == "pact" and weight is not None:
            continue
        amax = quantizer.amax
        if amax is None:
            raise CalibrationError(f"{name} has no range to start from; call qzoo.calibrate() first")
        if quantizer.affine:
            if quantizer.limits is None:
                raise CalibrationError(f"{name} has no ends to start from; call qzoo.calibrate() first")
            quantizer.learner = LearnedLimits(quantizer.limits, rule, quantizer.maxbound)
            names.append(name)
            continue
        if rule == "lsq" and weight is not None and quantizer.num_bits < 8:
            dims = [d for d in range(weight.dim()) if amax.dim() == 0 or amax.shape[d] == 1]
            mean = weight.abs().mean(dims, keepdim=amax.dim() > 0)
            amax = 2 * mean * quantizer.maxbound**0.5
        quantizer.learner = LearnedRange(amax, rule, quantizer.maxbound)
        names.append(name)
    by_name = quantizers(model)
    for shared in shared_ranges(model):
        learning = [by_name[name] for name in shared if name in names]
        for quantizer in learning[1:]:
            quantizer.learner = learning[0].learner
    return names


@torch.no_grad()
def freeze_ranges(model: nn.Module) -> list[str]:
    """Freeze learned ranges: write them into the quantizers and remove the learners, in place.

    The outputs stay the same. Of a two-ended range the other form, which the target of the training does not use, goes
    along: the symmetric one becomes the larger of the ends, the ends are scaled as the symmetric one was.

    Args:
        model: after :func:`learn_ranges`.

    Returns:
        Names of the quantizers that had one.

    Example:
        >>> names = learn_ranges(model, "lsq")
        >>> freeze_ranges(model) == names
        True
    """
    names = []
    for name, quantizer in model.named_modules():
        if isinstance(quantizer, TensorQuantizer) and hasattr(quantizer, "learner"):
            learner, stored = quantizer.learner, quantizer.range
            if stored is None or not isinstance(learner, LearnedRange | LearnedLimits):
                raise CalibrationError(
                    f"{name} has lost its range; call learn_ranges() on a calibrated model"
                )
            quantizer.set_range(*_learned(learner, stored))
            del quantizer.learner
            names.append(name)
    return names


def _learned(learner: LearnedRange | LearnedLimits, before: Range) -> Range:
    """The range that was learned, and what goes along with it."""
    if isinstance(learner, LearnedLimits):
        return Range(learner.limits.abs().max().reshape(before.amax.shape), learner.limits)
    amax, limits = learner.amax.reshape(before.amax.shape), before.limits
    return Range(amax, None if limits is None else limits * (amax / before.amax.clamp(min=_SMALLEST)))


def learned_parameters(model: nn.Module) -> list[nn.Parameter]:
    """List the learned ranges of a model, the parameters that get a learning rate of their own.

    They get no weight decay but PACT's.

    Args:
        model: after :func:`learn_ranges`.

    Returns:
        The parameters.

    Example:
        >>> names = learn_ranges(model, "lsq")
        >>> len(learned_parameters(model)) == len(names)
        True
    """
    return [module.value for module in model.modules() if isinstance(module, LearnedRange | LearnedLimits)]
