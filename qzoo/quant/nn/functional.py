"""``clip``: clamp with learnable bounds."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function

from qzoo.errors import ArgumentError

__all__ = ["ClipFunction", "clip"]


class ClipFunction(Function):
    """Autograd function of a clamp with learnable bounds, ``max(min(input, hi), lo)``; bounds broadcast.

    Gradients: of the input where ``lo < x < hi``; of ``lo`` the sum of the gradient where ``x <= lo``; of
    ``hi`` where ``x >= hi``. Bounds that need a gradient must have one element (ValueError in backward
    otherwise).

    Args:
        input: any shape.
        clip_value_min, clip_value_max: the bounds, numbers or tensors that broadcast.

    Raises:
        ValueError: in backward, a bound that needs a gradient and has more than one element.

    Example:
        >>> ClipFunction.apply(torch.tensor([-3.0, 0.5, 3.0]), -1.0, 1.0)
        tensor([-1.0000,  0.5000,  1.0000])
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        clip_value_min: torch.Tensor | float,
        clip_value_max: torch.Tensor | float,
    ) -> torch.Tensor:
        low = _as_tensor(clip_value_min, input)
        high = _as_tensor(clip_value_max, input)
        ctx.save_for_backward(input, low, high)
        return torch.max(torch.min(input, high.to(input.dtype)), low.to(input.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        input, low, high = ctx.saved_tensors
        grad = grads[0]
        zero = grad.new_zeros(())
        grad_low = grad_high = None
        if ctx.needs_input_grad[1]:
            grad_low = _bound_grad(torch.where(input <= low, grad, zero), low, "clip_value_min")
        if ctx.needs_input_grad[2]:
            grad_high = _bound_grad(torch.where(input >= high, grad, zero), high, "clip_value_max")
        return torch.where((input > low) & (input < high), grad, zero), grad_low, grad_high


def _as_tensor(value: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    return (
        value
        if isinstance(value, torch.Tensor)
        else torch.as_tensor(value, dtype=like.dtype, device=like.device)
    )


def _bound_grad(grad: torch.Tensor, bound: torch.Tensor, name: str) -> torch.Tensor:
    if bound.numel() != 1:
        raise ArgumentError(f"learnable {name} can only be scalar, not of shape {tuple(bound.shape)}")
    return grad.sum().to(bound.dtype).reshape(bound.shape)


clip = ClipFunction.apply
