"""The gradient of a fake quantization: passed straight through within the range, zero beyond it, none to the range.

Paper: "Estimating or Propagating Gradients Through Stochastic Neurons" (Bengio et al., 2013, arXiv:1308.3432).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from qzoo.quant.ops.schema import declare

_Operator = Callable[..., Tensor]


def declare_fake_quantization(
    name: str,
    signature: str,
    reference: _Operator,
    gradient: Callable[[Tensor, Tensor, Tensor], Tensor],
    kept: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[_Operator, _Operator]:
    """Declare `qzoo::name`, whose first argument has a gradient, and `qzoo::name_forward`, which has none.

    Args:
        name, signature, reference: see :func:`qzoo.quant.ops.schema.declare`; the first argument is quantized.
        gradient: of the first argument, from the gradient of the result and what is kept.
        kept: the input and the range that decides about its gradient, from the arguments.

    Returns:
        `qzoo::name`, which is all that traced programs see, and a function with the same arguments for eager calls.
        That one takes `qzoo::name_forward`, because a formula written in Python costs three times as much as the whole
        operator on a small tensor.
    """
    operator = declare(name, signature, reference, _empty_like)
    none = (None,) * (len(operator._schema.arguments) - 1)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*kept(*inputs))

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return gradient(grads[0], *ctx.saved_tensors), *none

    torch.library.register_autograd(f"qzoo::{name}", backward, setup_context=save)
    forward_operator = declare(f"{name}_forward", signature, reference, _empty_like)
    return operator, _eager(forward_operator, backward, gradient, kept)


def _eager(
    forward_operator: _Operator,
    backward: Callable[..., Any],
    gradient: Callable[[Tensor, Tensor, Tensor], Tensor],
    kept: Callable[..., tuple[Tensor, Tensor]],
) -> _Operator:
    """Give an operator that has no gradient one, for eager calls."""

    class StraightThrough(torch.autograd.Function):
        """The same gradient with less overhead than the registered formula."""

        @staticmethod
        def forward(ctx: Any, *args: Any) -> Tensor:
            ctx.save_for_backward(*kept(*args))
            return forward_operator(*args)

    class Transformed(torch.autograd.Function):
        """The same under ``torch.func`` (``grad``, ``vmap``, ``jvp``) and for forward-mode differentiation.

        A function of its own: torch calls this form of function four times as slowly.
        """

        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Tensor:
            return forward_operator(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            tensors = kept(*inputs)
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Tensor:
            return gradient(tangents[0], *ctx.saved_tensors)  # the Jacobian is diagonal

    StraightThrough.backward = Transformed.backward = staticmethod(backward)  # type: ignore[assignment]

    # Names of the function's own: each look-up in a module counts where a call takes three microseconds.
    are_transforms_active, is_grad_enabled = torch._C._are_functorch_transforms_active, torch.is_grad_enabled

    def eager(x: Tensor, *args: Any) -> Tensor:
        if forward_ad._current_level >= 0 or are_transforms_active():
            result: Tensor = Transformed.apply(x, *args)
        elif x.requires_grad and is_grad_enabled():
            result = StraightThrough.apply(x, *args)
        else:
            result = forward_operator(x, *args)
        return result

    return eager


def declare_gradient(
    name: str, signature: str, inside: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Declare `qzoo::name`, the gradient of a fake quantization: it is linear, so it is its own gradient.

    Args:
        name, signature: see :func:`qzoo.quant.ops.schema.declare`; the arguments are the gradient of the result, the
            input and the range.
        inside: where the gradient passes, from the input and the range.
    """

    def reference(grad: Tensor, x: Tensor, limits: Tensor) -> Tensor:
        nothing = torch.zeros((), dtype=grad.dtype, device=grad.device)
        return torch.empty_like(x).copy_(torch.where(inside(x, limits), grad, nothing))

    operator = declare(name, signature, reference, lambda grad, x, limits: torch.empty_like(x))

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[1:])

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return operator(grad, *ctx.saved_tensors), None, None

    torch.library.register_autograd(f"qzoo::{name}", backward, setup_context=save)

    def eager(grad: Tensor, x: Tensor, limits: Tensor) -> Tensor:
        if torch._C._are_functorch_transforms_active():  # they know no gradient of an operator declared here
            return torch.where(inside(x, limits), grad, 0.0)
        result: Tensor = operator(grad, x, limits)
        return result

    return eager


def _empty_like(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)
