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

from qzoo.errors import ArgumentError, CalibrationError, QuantizationError, shown
from qzoo.quant.nn import TensorQuantizer
from qzoo.quant.nn.modules._utils import QuantMixin, input_quantizer_of, weight_quantizer_of
from qzoo.quant.tensor_quant import QuantDescriptor
from qzoo.registry import suggest
from qzoo.scheme import ROLES, TARGETS, Scheme, Target, target_named

logger = logging.getLogger(__name__)
_SHOWN = 3  # layers that an error names


# ---- finding them ----


def quantizers(model: nn.Module) -> dict[str, TensorQuantizer]:
    """Find all quantizers of a model, by name.

    Args:
        model: any module.

    Returns:
        The quantizers in the order of ``named_modules``; what occurs twice has its first name.

    Example:
        >>> list(quantizers(model))[:2]
        ['conv1._input_quantizer', 'conv1._weight_quantizer']
    """
    return {name: m for name, m in model.named_modules() if isinstance(m, TensorQuantizer)}


def require_quantizers(model: nn.Module) -> dict[str, TensorQuantizer]:
    """Find all quantizers of a model that must have some.

    Args:
        model: a module.

    Returns:
        The quantizers by name, see :func:`quantizers`.

    Raises:
        CalibrationError: there are none.
        ArgumentError: what is given is no module.

    Example:
        >>> len(require_quantizers(model))
        64
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"the model must be a torch.nn.Module, not a {type(model).__name__}; qzoo.create_model builds one by name"
        )
    result = quantizers(model)
    if not result:
        raise CalibrationError(
            f"{type(model).__name__} has no quantizers; build it with quantize=True or quantize='w8a8', or place them "
            "in any network: qzoo.quantize(model, images)"
        )
    return result


def active_quantizers(model: nn.Module) -> dict[str, TensorQuantizer]:
    """Find the quantizers that are switched on, by name.

    Args:
        model: any module.

    Returns:
        Those whose quantization stage is on and that are not disabled.

    Example:
        >>> set(quantizers(model)) == set(active_quantizers(model))
        True
    """
    return {name: quantizer for name, quantizer in quantizers(model).items() if quantizer.is_on}


def weight_quantizers(model: nn.Module) -> dict[str, tuple[Tensor, TensorQuantizer]]:
    """Find the quantized weights of a model, each with its quantizer.

    Args:
        model: any module.

    Returns:
        Weight and quantizer by the weight's key in the state dict.

    Example:
        >>> weight, quantizer = weight_quantizers(model)["conv1.weight"]
        >>> tuple(weight.shape), tuple(quantizer.amax.shape)
        ((16, 1, 3, 3), (16, 1, 1, 1))
    """
    return {
        f"{name}.{key}".lstrip("."): (getattr(module, key), quantizer)
        for name, module in model.named_modules()
        if (quantizer := weight_quantizer_of(module)) is not None
        for key in ("weight", "in_proj_weight")  # of attention: that of query, key and value
        if isinstance(getattr(module, key, None), Tensor)
    }


def shared_ranges(model: nn.Module) -> list[list[str]]:
    """List the quantizers that have one range: those of a group (:func:`qzoo.quantize` makes them) with the same bits.

    Args:
        model: any module.

    Returns:
        Their names, a list for each range that several have.

    Example:
        >>> shared_ranges(model)
        []
    """
    groups: dict[tuple[str, object], list[str]] = {}
    for name, quantizer in quantizers(model).items():
        if quantizer.group:
            groups.setdefault((quantizer.group, quantizer.num_bits), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def name_quantizers(model: nn.Module) -> dict[str, TensorQuantizer]:
    """Name the quantizers of a model by their place in it, for error messages.

    Args:
        model: any module.

    Returns:
        The quantizers by name.

    Example:
        >>> name_quantizers(model)["fc._input_quantizer"].name
        'fc._input_quantizer'
    """
    result = quantizers(model)
    for name, quantizer in result.items():
        quantizer.name = name
    return result


def float_layers(model: nn.Module) -> list[str]:
    """List the layers that a scheme keeps in float (``Scheme.layers`` with ``"float"``), by name.

    Args:
        model: any module.

    Returns:
        The names of layers whose weight quantizer was taken away.

    Example:
        >>> float_layers(model)
        []
    """
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, QuantMixin)
        and isinstance(getattr(module, "weight_quantizer", None), nn.Identity)
    ]


def device_of(model: nn.Module) -> torch.device:
    """Find the device of a model: that of its first parameter, or the CPU where it has none.

    Args:
        model: any module.

    Returns:
        The device.

    Example:
        >>> device_of(model)
        device(type='cpu')
    """
    return next((p.device for p in model.parameters()), torch.device("cpu"))


# ---- making them ----


def activation_quantizer(
    scheme: Scheme | None, role: str, nonnegative: bool = False, symmetric: bool = False
) -> nn.Module:
    """Make the quantizer of an activation, such as a block's ``residual_quantizer``.

    Args:
        scheme: None makes no quantizer: an ``nn.Identity``, so that ``forward`` is the same with and without.
        role: one of :data:`qzoo.scheme.ROLES`.
        nonnegative: the tensor is never below zero (it follows a ReLU, say).
        symmetric: it has no zero point in an affine scheme either: an operand of a product of two activations.

    Returns:
        The quantizer, or an ``nn.Identity``.

    Raises:
        ValueError: an unknown role.

    Example:
        >>> activation_quantizer(None, "residual")
        Identity()
        >>> activation_quantizer(qzoo.Scheme(target="onnxruntime"), "residual", nonnegative=True).unsigned
        True
    """
    if scheme is None:
        return nn.Identity()
    bits = scheme if role in ("input", "product") else scheme.edge
    quantizer = TensorQuantizer(activation_descriptor(bits))
    quantizer.symmetric = symmetric
    return adopt(scheme, quantizer, role, nonnegative)


def is_idle(quantizer: nn.Module) -> bool:
    """Check whether a quantizer is idle: neither quantizes nor collects, and passes its input on.

    Args:
        quantizer: a TensorQuantizer, or the ``nn.Identity`` that stands for none.

    Returns:
        True if it is off.

    Example:
        >>> is_idle(activation_quantizer(None, "pool"))
        True
    """
    if not isinstance(quantizer, TensorQuantizer):
        return True
    disabled, quant, _, calib = quantizer.switches
    return disabled or not (quant or calib)


def adopt(
    scheme: Scheme, quantizer: TensorQuantizer, role: str, nonnegative: bool = False
) -> TensorQuantizer:
    """Adopt a quantizer into a scheme: give it a role, and switch it as the scheme's target wants.

    From then on it refuses to run without a calibrated range. Of an affine scheme, activations that may be negative
    get a range of two ends, if the quantizer is not ``symmetric``.

    Args:
        scheme: bits and target.
        quantizer: changed in place.
        role: one of :data:`qzoo.scheme.ROLES`.
        nonnegative: its input is never below zero.

    Returns:
        The quantizer.

    Example:
        >>> from qzoo.quant import TensorQuantizer
        >>> adopt(qzoo.Scheme(), TensorQuantizer(), "residual").role
        'residual'
    """
    if role not in ROLES:
        raise ArgumentError(f"role must be one of {', '.join(ROLES)}, not {role!r}")
    quantizer.role, quantizer.nonnegative, quantizer.dynamic = role, nonnegative, False
    one_range = quantizer.axis is None and quantizer.block is None and isinstance(quantizer.num_bits, int)
    leans = role != "weight" and not nonnegative and not quantizer.symmetric
    quantizer.two_ended = scheme.affine and leans and one_range
    _switch(quantizer, TARGETS[scheme.target])
    return quantizer


def activation_descriptor(scheme: Scheme) -> QuantDescriptor:
    """Describe the quantizer of an activation: one range per tensor, found from a histogram.

    Args:
        scheme: the bits; one pass over the data serves every calibration method.

    Returns:
        The descriptor, for the quantized layers' ``quant_desc_input``.

    Example:
        >>> activation_descriptor(qzoo.Scheme(activation_bits=4)).num_bits
        4
    """
    return QuantDescriptor(scheme.activation_bits, calib_method="histogram")


def weight_descriptor(scheme: Scheme, inputs: int = 0, axis: int = 0) -> QuantDescriptor:
    """Describe the quantizer of a weight: a range per output channel, narrow.

    Args:
        scheme: the bits.
        inputs: the weight's size along axis 1; where it divides into the scheme's groups, each has a range of its own.
        axis: that of the output channels; 1 for transposed convolutions.

    Returns:
        The descriptor, for the quantized layers' ``quant_desc_weight``.

    Example:
        >>> weight_descriptor(qzoo.Scheme(weight_bits=4)).axis
        0
    """
    grouped = scheme.group and axis == 0 and inputs and inputs % scheme.group == 0
    block = (1, scheme.group) if grouped else None
    if scheme.weight_format != "int":
        return QuantDescriptor(
            8, axis=axis, narrow_range=True, block=block, float_format=scheme.weight_format
        )
    return QuantDescriptor(scheme.weight_bits, axis=axis, narrow_range=True, block=block)


# ---- switching them ----


def set_target(model: nn.Module, target: str) -> nn.Module:
    """Set the target of a model, in place: simulate what that runtime will compute.

    Quantizers without a role (not the zoo's) are left alone; where all are without one, a warning says so.

    Args:
        model: of the zoo, with quantizers.
        target: ``"onnxruntime"``, ``"openvino"`` or ``"tensorrt"``.

    Returns:
        The model.

    Raises:
        ValueError: an unknown target.

    Example:
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
    """Switch the quantizers that have a role to what a target wants, in place; :func:`set_target` without its warning.

    Args:
        model: any module.
        target: ``"onnxruntime"``, ``"openvino"`` or ``"tensorrt"``.

    Returns:
        The number of quantizers that have a role.

    Raises:
        ValueError: an unknown target.

    Example:
        >>> switch_target(model, "tensorrt")
        64
    """
    chosen = target_named(target)
    switchable = [quantizer for quantizer in quantizers(model).values() if quantizer.role]
    for quantizer in switchable:
        _switch(quantizer, chosen)
    return len(switchable)


def _switch(quantizer: TensorQuantizer, target: Target) -> None:
    if quantizer.role in target.roles:
        quantizer.enable()
    else:
        quantizer.disable()
    if quantizer.role != "weight":
        quantizer.unsigned = quantizer.nonnegative and target.unsigned
        quantizer.affine = quantizer.two_ended and target.affine


@contextmanager
def quantizers_off(model: nn.Module) -> Iterator[None]:
    """Turn all quantizers off within a ``with`` block, so that the model computes in float.

    Args:
        model: a module with quantizers.

    Raises:
        CalibrationError: the model has no quantizers.

    Example:
        >>> with quantizers_off(model):
        ...     logits = model(images)  # the float model's
    """
    all_quantizers = require_quantizers(model).values()
    with restore_switches(all_quantizers):
        for quantizer in all_quantizers:
            quantizer.switches = quantizer.switches._replace(quant=False, clip=False)
        yield


@contextmanager
def restore_switches(quantizers: Iterable[TensorQuantizer]) -> Iterator[None]:
    """Restore the switches and the calibrators of quantizers after a ``with`` block, also after an error.

    Args:
        quantizers: those whose switches are restored.

    Example:
        >>> with restore_switches(quantizers(model).values()):
        ...     qzoo.set_target(model, "tensorrt").qzoo_config.target
        'onnxruntime'
    """
    before = [(quantizer, quantizer.switches, quantizer.calibrator) for quantizer in quantizers]
    try:
        yield
    finally:
        for quantizer, switches, calibrator in before:
            quantizer.switches, quantizer.calibrator = switches, calibrator


def set_layer_bits(model: nn.Module, scheme: Scheme) -> nn.Module:
    """Set the bits of the single layers that ``scheme.layers`` names (mixed precision), in place.

    Layers that stay in float are left to :func:`qzoo.placement.float_layers.keep_in_float`, which needs an image.

    Args:
        model: built with the scheme.
        scheme: with ``layers``.

    Returns:
        The model.

    Raises:
        QuantizationError: the model has no quantized layer of that name.

    Example:
        >>> scheme = qzoo.Scheme(4, 8, layers=(("fc", 8),))
        >>> model = set_layer_bits(qzoo.resnet20(quantize=scheme), scheme)
        >>> quantizers(model)["fc._weight_quantizer"].num_bits
        8
    """
    modules = dict(model.named_modules()) if scheme.layers else {}
    for name, bits in scheme.layers:
        if not isinstance(bits, int):
            continue
        weight, inputs = weight_quantizer_of(modules.get(name)), input_quantizer_of(modules.get(name))
        if weight is None or inputs is None:
            raise no_such_layer(model, name)
        weight.num_bits = bits
        if isinstance(inputs.num_bits, int):
            inputs.num_bits = max(bits, inputs.num_bits)
    return model


def no_such_layer(model: nn.Module, name: str) -> QuantizationError:
    """Make the error for a name in ``Scheme.layers`` that is no quantized layer's.

    Args:
        model: built with the scheme.
        name: that is wrong.

    Returns:
        The error, with the layers of the block where the name is a block's, else with near names.

    Example:
        >>> str(no_such_layer(model, "layer1.0"))[-34:]
        "'layer1.0.conv1', 'layer1.0.conv2'"
    """
    layers = [
        other
        for other, module in model.named_modules()
        if weight_quantizer_of(module) is not None and input_quantizer_of(module) is not None
    ]
    inside = [layer for layer in layers if layer.startswith(f"{name}.")]
    if inside:
        hint = f"; it is a block: name its layers, {_first(inside)}"
    else:
        hint = suggest(name, layers) or f"; its layers are {_first(layers)}"
    return QuantizationError(
        f"Scheme.layers names {shown(name)}, which is no quantized layer of {type(model).__name__}{hint}"
    )


def _first(names: list[str]) -> str:
    """The first few names, quoted, and the number of the others."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
