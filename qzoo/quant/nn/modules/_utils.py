"""Mixins for quantized modules: the default descriptors, and the quantizers under their usual names.

A quantized module of your own::

    class QuantMaxPool2d(nn.MaxPool2d, QuantInputMixin):
        def __init__(self, kernel_size, **kwargs):
            super().__init__(kernel_size)
            self.init_quantizer(pop_quant_desc_in_kwargs(self.__class__, input_only=True, **kwargs))

        def forward(self, input):
            return super().forward(self._input_quantizer(input))
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import nn

from qzoo.errors import ArgumentError
from qzoo.quant.descriptor import QUANT_DESC_8BIT_PER_TENSOR, QuantDescriptor
from qzoo.quant.nn.modules.tensor_quantizer import TensorQuantizer

__all__ = [
    "QuantInputMixin",
    "QuantMixin",
    "input_quantizer_of",
    "pop_quant_desc_in_kwargs",
    "replace_weight_quantizer",
    "weight_quantizer_of",
]


class QuantInputMixin:
    """Gives a module ``_input_quantizer`` and a default descriptor for it."""

    default_quant_desc_input: QuantDescriptor = QUANT_DESC_8BIT_PER_TENSOR
    _input_quantizer: TensorQuantizer

    @classmethod
    def set_default_quant_desc_input(cls, value: QuantDescriptor) -> None:
        """Set the default of this class to a copy. Raises ValueError for anything but a descriptor."""
        cls.default_quant_desc_input = _copy(value)

    def init_quantizer(self, quant_desc_input: QuantDescriptor) -> None:
        """Create ``_input_quantizer``; to be called from ``__init__``.

        Raises:
            ValueError: a descriptor of real quantization.
            TypeError: called from elsewhere.
        """
        _require_init(sys._getframe(1).f_code.co_name)
        self._create_quantizers(quant_desc_input)

    def _create_quantizers(self, quant_desc_input: QuantDescriptor) -> None:
        _only_fake(quant_desc_input)
        self._input_quantizer = _quantizer_of(self, "input", quant_desc_input)

    @property
    def input_quantizer(self) -> TensorQuantizer:
        """The quantizer of the input."""
        return self._input_quantizer


class InputQuantized(QuantInputMixin):
    """Gives a layer of torch, the next base class, a quantized input; the layer's ``forward`` stays torch's own."""

    def forward(self, input: torch.Tensor) -> Any:
        return super().forward(self._input_quantizer(input))  # type: ignore[misc]


class QuantMixin(QuantInputMixin):
    """Gives a module ``_input_quantizer`` and ``_weight_quantizer``, and default descriptors for them."""

    default_quant_desc_weight: QuantDescriptor = QUANT_DESC_8BIT_PER_TENSOR
    bias_added: bool = False  # its bias is none of the float layer's: a correction needed one
    _weight_quantizer: TensorQuantizer
    _input_quantizers: nn.ModuleList
    _weight_quantizers: nn.ModuleList

    @classmethod
    def set_default_quant_desc_weight(cls, value: QuantDescriptor) -> None:
        """Set the default of this class to a copy. Raises ValueError for anything but a descriptor."""
        cls.default_quant_desc_weight = _copy(value)

    def init_quantizer(  # type: ignore[override]
        self,
        quant_desc_input: QuantDescriptor,
        quant_desc_weight: QuantDescriptor,
        num_layers: int | None = None,
    ) -> None:
        """Create the two quantizers; with ``num_layers`` lists ``_input_quantizers``, ``_weight_quantizers``.

        Raises:
            ValueError: a descriptor of real quantization.
            TypeError: called from elsewhere than an ``__init__``.
        """
        _require_init(sys._getframe(1).f_code.co_name)
        self._create_quantizers(quant_desc_input, quant_desc_weight, num_layers)

    def _create_quantizers(  # type: ignore[override]
        self,
        quant_desc_input: QuantDescriptor,
        quant_desc_weight: QuantDescriptor,
        num_layers: int | None = None,
    ) -> None:
        _only_fake(quant_desc_input, quant_desc_weight)
        if num_layers is None:
            self._input_quantizer = _quantizer_of(self, "input", quant_desc_input)
            self._weight_quantizer = _quantizer_of(self, "weight", quant_desc_weight)
        else:
            self._input_quantizers = nn.ModuleList(
                _quantizer_of(self, "input", quant_desc_input) for _ in range(num_layers)
            )
            self._weight_quantizers = nn.ModuleList(
                _quantizer_of(self, "weight", quant_desc_weight) for _ in range(num_layers)
            )

    @property
    def weight_quantizer(self) -> TensorQuantizer:
        """The quantizer of the weight."""
        return self._weight_quantizer


def input_quantizer_of(module: object) -> TensorQuantizer | None:
    """Return the quantizer of a module's input; None where it has none."""
    quantizer = getattr(module, "_input_quantizer", None)
    return quantizer if isinstance(quantizer, TensorQuantizer) else None


def weight_quantizer_of(module: object) -> TensorQuantizer | None:
    """Return the quantizer of a module's weight; None where it has none."""
    quantizer = getattr(module, "_weight_quantizer", None)
    return quantizer if isinstance(quantizer, TensorQuantizer) else None


def replace_weight_quantizer(module: nn.Module, replacement: nn.Module) -> None:
    """Let another module take the place of the quantizer of a module's weight."""
    module._weight_quantizer = replacement


def pop_quant_desc_in_kwargs(quant_cls: type, input_only: bool = False, **kwargs: Any) -> Any:
    """Take ``quant_desc_input`` and ``quant_desc_weight``, or the class's defaults, out of the arguments.

    Returns:
        ``(input, weight)``, or the input's alone with ``input_only``.

    Raises:
        TypeError: "Unused keys", when anything else is left.
    """
    descriptors = kwargs.pop("quant_desc_input", getattr(quant_cls, "default_quant_desc_input", None))
    if not input_only:
        descriptors = (
            descriptors,
            kwargs.pop("quant_desc_weight", getattr(quant_cls, "default_quant_desc_weight", None)),
        )
    if kwargs:
        raise TypeError(f"Unused keys: {', '.join(sorted(kwargs))} ({quant_cls.__name__} doesn't know them)")
    return descriptors


def _quantizer_of(layer: object, part: str, descriptor: QuantDescriptor) -> TensorQuantizer:
    quantizer = TensorQuantizer(descriptor)
    quantizer.owner = f"the {part} quantizer of a {type(layer).__name__}"
    return quantizer


def _copy(value: object) -> QuantDescriptor:
    if not isinstance(value, QuantDescriptor):
        raise ArgumentError(f"expected a QuantDescriptor, got {type(value).__name__}")
    return copy.deepcopy(value)


def _only_fake(*descriptors: QuantDescriptor) -> None:
    for descriptor in descriptors:
        if not descriptor.fake_quant:
            raise ArgumentError(f"Only fake quantization is supported in quantized modules, not {descriptor}")


def _require_init(caller: str) -> None:
    if caller != "__init__":
        raise TypeError(f"init_quantizer must be called from __init__, not from {caller}")
