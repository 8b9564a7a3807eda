"""Find, make, place and switch the quantizers of a model: from a scheme and a role to a ``TensorQuantizer``, by target.

A definition makes its quantizers by :func:`activation_quantizer` and by the layers of :mod:`qzoo.models.layers`;
:func:`set_target` then switches all of them to what a runtime computes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qzoo.errors import ArgumentError, CalibrationError, QuantizationError
from qzoo.quant.nn import TensorQuantizer
from qzoo.quant.tensor_quant import QuantDescriptor
from qzoo.scheme import ROLES, TARGETS, Scheme, Target, target_named

logger = logging.getLogger(__name__)


# ---- finding them ----


def quantizers(model: nn.Module) -> dict[str, TensorQuantizer]:
    """Find all quantizers of a model, by name; what occurs twice has its first name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, TensorQuantizer)}


def require_quantizers(model: nn.Module) -> dict[str, TensorQuantizer]:
    """Find all quantizers of a model that must have some.

    Raises:
        CalibrationError: there are none.
        ArgumentError: what is given is no module.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"the model must be a torch.nn.Module, not a {type(model).__name__}; qzoo.create_model builds one by name"
        )
    found = quantizers(model)
    if not found:
        raise CalibrationError(
            f"{type(model).__name__} has no quantizers; build it with quantize=True or quantize='w8a8'"
        )
    return found


def active_quantizers(model: nn.Module) -> dict[str, TensorQuantizer]:
    """Find the quantizers that quantize, by name."""
    return {name: quantizer for name, quantizer in quantizers(model).items() if quantizer.is_on}


def weight_quantizers(model: nn.Module) -> dict[str, tuple[Tensor, TensorQuantizer]]:
    """Find every quantized weight by its state-dict key, with its quantizer."""
    return {
        f"{name}.weight" if name else "weight": (module.weight, quantizer)
        for name, module in model.named_modules()
        if isinstance(quantizer := getattr(module, "_weight_quantizer", None), TensorQuantizer)
        and isinstance(module.weight, Tensor)
    }


def name_quantizers(model: nn.Module) -> dict[str, TensorQuantizer]:
    """Tell every quantizer its place in the model, for error messages. Returns them by name."""
    found = quantizers(model)
    for name, quantizer in found.items():
        quantizer.name = name
    return found


def device_of(model: nn.Module) -> torch.device:
    """Find the device of a model's first parameter; the CPU, where it has none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


# ---- making them ----


def activation_quantizer(scheme: Scheme | None, role: str, nonnegative: bool = False) -> nn.Module:
    """Make the quantizer of an activation, such as a block's ``residual_quantizer``.

    Args:
        scheme: None makes no quantizer: an ``nn.Identity``, so that ``forward`` is the same with and without.
        role: one of :data:`qzoo.scheme.ROLES`.
        nonnegative: the tensor is never below zero (it follows a ReLU, say).

    Raises:
        ValueError: an unknown role.

    Example:
        >>> activation_quantizer(None, "residual")
        Identity()
        >>> activation_quantizer(Scheme(target="onnxruntime"), "residual", nonnegative=True).unsigned
        True
    """
    if scheme is None:
        return nn.Identity()
    bits = scheme if role == "input" else scheme.edge
    return adopt(scheme, TensorQuantizer(activation_descriptor(bits)), role, nonnegative)


def adopt(
    scheme: Scheme, quantizer: TensorQuantizer, role: str, nonnegative: bool = False
) -> TensorQuantizer:
    """Give a quantizer its role, demand a calibrated range of it, and switch it as the scheme's target wants."""
    if role not in ROLES:
        raise ArgumentError(f"role must be one of {', '.join(ROLES)}, not {role!r}")
    quantizer.role, quantizer.nonnegative, quantizer.dynamic = role, nonnegative, False
    _switch(quantizer, TARGETS[scheme.target])
    return quantizer


def activation_descriptor(scheme: Scheme) -> QuantDescriptor:
    """Describe the quantizer of an activation: per tensor, full range, a histogram (one pass serves every method)."""
    return QuantDescriptor(scheme.activation_bits, calib_method="histogram")


def weight_descriptor(scheme: Scheme, inputs: int = 0) -> QuantDescriptor:
    """Describe a weight's quantizer: a range per output channel (axis 0), narrow.

    Args:
        inputs: the weight's size along axis 1; where it divides into the scheme's groups, each has a range of its own.
    """
    block = (1, scheme.group) if scheme.group and inputs and inputs % scheme.group == 0 else None
    if scheme.weight_format != "int":
        return QuantDescriptor(8, axis=0, narrow_range=True, block=block, float_format=scheme.weight_format)
    return QuantDescriptor(scheme.weight_bits, axis=0, narrow_range=True, block=block)


# ---- switching them ----


def set_target(model: nn.Module, target: str) -> nn.Module:
    """Switch the simulation, in place, to what that runtime will compute. Returns the model.

    Quantizers without a role (not the zoo's) are left alone; where all are without one, a warning says so.

    Raises:
        ValueError: an unknown target.

    Example:
        >>> import qzoo
        >>> model = qzoo.set_target(qzoo.resnet20(quantize=True), "openvino")
    """
    if switch_target(model, target) == 0:
        logger.warning(
            "set_target(%r) changed nothing: %s has no quantizers with a role, which those of the zoo's models have; "
            "export_onnx(..., target=%r) writes for that runtime all the same",
            target,
            type(model).__name__,
            target,
        )
    return model


def switch_target(model: nn.Module, target: str) -> int:
    """Switch the quantizers that have a role to what the target wants, in place. Returns their number."""
    chosen = target_named(target)
    found = [quantizer for quantizer in quantizers(model).values() if quantizer.role]
    for quantizer in found:
        _switch(quantizer, chosen)
    return len(found)


def _switch(quantizer: TensorQuantizer, target: Target) -> None:
    if quantizer.role in target.roles:
        quantizer.enable()
    else:
        quantizer.disable()
    if quantizer.role != "weight":
        quantizer.unsigned = quantizer.nonnegative and target.unsigned


@contextmanager
def quantizers_off(model: nn.Module) -> Iterator[None]:
    """Make it the float model within: no quantizer changes what passes through it.

    Raises:
        CalibrationError: the model has no quantizers.
    """
    found = require_quantizers(model).values()
    with switches_restored(found):
        for quantizer in found:
            quantizer.switches = quantizer.switches._replace(quant=False, clip=False)
        yield


@contextmanager
def switches_restored(found: Iterable[TensorQuantizer]) -> Iterator[None]:
    """Put the switches and the calibrators of quantizers back afterwards, also after an error."""
    before = [(quantizer, quantizer.switches, quantizer.calibrator) for quantizer in found]
    try:
        yield
    finally:
        for quantizer, switches, calibrator in before:
            quantizer.switches, quantizer.calibrator = switches, calibrator


def set_layer_bits(model: nn.Module, scheme: Scheme) -> nn.Module:
    """Give the layers of ``scheme.layers`` their bits, in place. Returns the model, which was built with the scheme.

    Raises:
        QuantizationError: the model has no quantized layer of that name.
    """
    modules = dict(model.named_modules()) if scheme.layers else {}
    for name, bits in scheme.layers:
        weight = getattr(modules.get(name), "_weight_quantizer", None)
        inputs = getattr(modules.get(name), "_input_quantizer", None)
        if not isinstance(weight, TensorQuantizer) or not isinstance(inputs, TensorQuantizer):
            raise QuantizationError(
                f"Scheme.layers names {name!r}, which is no quantized layer of {type(model).__name__}"
            )
        weight.num_bits = bits
        if isinstance(inputs.num_bits, int):
            inputs.num_bits = max(bits, inputs.num_bits)
    return model
