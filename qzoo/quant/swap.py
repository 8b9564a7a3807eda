"""``quantize_``: quantize a model that exists already, in place, without replacing anything outside it."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn import modules as float_nn

from qzoo.errors import ArgumentError
from qzoo.quant import nn as quant_nn
from qzoo.quant.descriptor import QuantDescriptor
from qzoo.quant.fold import standardized_types
from qzoo.quant.nn.modules._utils import QuantInputMixin, QuantMixin
from qzoo.quant.nn.modules.quant_attention import QuantMultiheadAttention
from qzoo.quant.nn.modules.quant_rnn import QuantGRU, QuantRNN
from qzoo.quant.nn.modules.tensor_quantizer import TensorQuantizer
from qzoo.quant.quant_modules import LAYERS

__all__ = ["DEFAULT_MAPPING", "quantize_"]

logger = logging.getLogger(__name__)

_RECURRENT: dict[type[nn.Module], type[nn.Module]] = {
    float_nn.LSTM: quant_nn.QuantLSTM,
    float_nn.GRU: QuantGRU,
    float_nn.RNN: QuantRNN,
    float_nn.LSTMCell: quant_nn.QuantLSTMCell,
    float_nn.GRUCell: quant_nn.QuantGRUCell,
}

DEFAULT_MAPPING: dict[type[nn.Module], type[nn.Module]] = {
    **{getattr(float_nn, name): getattr(quant_nn, f"Quant{name}") for name in LAYERS},
    **_RECURRENT,
    float_nn.MultiheadAttention: QuantMultiheadAttention,
}
"""Float classes and what replaces them; matched by exact type."""


def quantize_(
    model: nn.Module,
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
    *,
    quant_desc_input: QuantDescriptor | None = None,
    quant_desc_weight: QuantDescriptor | None = None,
    mapping: dict[type[nn.Module], type[nn.Module]] | None = None,
) -> list[str]:
    """Replace the layers inside ``model`` by their quantized forms, in place.

    Weighted layers and average poolings only, as the old toolkit did; for int8 speed in a runtime every add and
    activation between them needs a quantizer too, which :func:`qzoo.quantize` places.

    Parameters, buffers and hooks stay the same objects (optimizers and tied weights keep working), names and
    state_dict keys do not change; the new quantizers know their names. Layers of a subclass of a known class
    are left alone, because a subclass may compute something else, and named in a warning.

    Args:
        model: any module; a layer that occurs twice is replaced by one quantized layer.
        include, exclude: shell patterns on the module's name, such as ``"layer1.*"`` or ``"*.fc"``.
        quant_desc_input, quant_desc_weight: instead of the defaults of the quantized classes.
        mapping: additional or other replacements by exact type; a class built on ``QuantMixin`` or
            ``QuantInputMixin`` that otherwise has the attributes of the float class.

    Returns:
        The names of the replaced modules.

    Raises:
        ValueError: ``model`` itself is a layer that should be replaced (its owner has to do that); a layer
            whose options the quantized form doesn't have.

    Example:
        >>> from qzoo.quant import quantize_
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> quantize_(network)
        ['0']
    """
    replacements = {**DEFAULT_MAPPING, **_timm_mapping(), **(mapping or {})}
    wanted, unwanted = _patterns(include), _patterns(exclude)
    if type(model) in replacements:
        raise ArgumentError(
            f"the model is itself a {type(model).__name__} and can't be replaced in place; "
            "put it into an nn.Sequential"
        )
    done: dict[nn.Module, nn.Module] = {}
    names: list[str] = []
    left: list[str] = []
    for parent_name, parent in list(model.named_modules()):
        for child_name, child in list(parent._modules.items()):  # with repeats, unlike named_children()
            if child is None:
                continue
            name = f"{parent_name}.{child_name}" if parent_name else child_name
            if not _matches(name, wanted) or _matches(name, unwanted) or _inside_attention(parent):
                continue
            quantized = replacements.get(type(child))
            if quantized is None:
                known = isinstance(child, tuple(DEFAULT_MAPPING)) and not isinstance(child, QuantInputMixin)
                left += [f"{name} ({type(child).__name__})"] if known else []
                continue
            if child not in done:
                done[child] = quantized_layer(child, quantized, quant_desc_input, quant_desc_weight)
            parent._modules[child_name] = done[child]
            names.append(name)
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and not module.name:
            module.name = name
    keep_from_fused_kernels(model, quantized_only=True)
    if left:
        logger.warning("left as they are, subclasses of known layers: %s%s", ", ".join(left), _cure(model))
    return names


def _timm_mapping() -> dict[type[nn.Module], type[nn.Module]]:
    """timm's own layers, if timm has been imported: a model of it can't exist otherwise."""
    timm_layers = sys.modules.get("timm.layers")
    if timm_layers is None:
        return {}
    return {timm_layers.Conv2dSame: quant_nn.QuantConv2dSame, timm_layers.Linear: quant_nn.QuantLinear}


def _cure(model: nn.Module) -> str:
    """What makes known layers of those that are left, for the warning."""
    if not any(isinstance(module, standardized_types()) for module in model.modules()):
        return ""
    return (
        "; those that standardize their weight become plain convolutions, which can be quantized, by "
        "qzoo.quant.fold.fold_weight_standardization_(model) before quantize_"
    )


def _inside_attention(parent: nn.Module) -> bool:
    # Its output projection only holds parameters: the whole attention is replaced, or nothing of it.
    return isinstance(parent, float_nn.MultiheadAttention)


def keep_from_fused_kernels(model: nn.Module, quantized_only: bool = False) -> None:
    """Keep the transformer encoders of a model from torch's fused kernel, which would read weights past quantizers.

    Args:
        model: changed in place.
        quantized_only: leave those without quantizers alone.
    """
    for module in model.modules():
        if quantized_only and not any(isinstance(m, TensorQuantizer) for m in module.modules()):
            continue
        if isinstance(module, float_nn.TransformerEncoder):
            module.use_nested_tensor = False
        elif isinstance(module, float_nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # type: ignore[assignment] # only the fused kernel asks for it


def _patterns(value: str | Iterable[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


_WEIGHTED = (float_nn.conv._ConvNd, float_nn.Linear, float_nn.MultiheadAttention)


def replacement_of(layer: nn.Module) -> type[nn.Module] | None:
    """Find the quantized class of a convolution, linear layer or attention; None where there is none.

    A subclass that computes what its base does, so that only its name or its initialization is its own, has the base's;
    one that says its own has an attribute ``quantized_form``.
    """
    stated: type[nn.Module] | None = type(layer).__dict__.get("quantized_form")
    if stated is not None:
        return stated
    known = {**DEFAULT_MAPPING, **_timm_mapping()}
    for kind in type(layer).__mro__:
        replacement = known.get(kind)
        if replacement is None or not issubclass(kind, _WEIGHTED):
            continue
        same = all(
            getattr(type(layer), method, None) is getattr(kind, method, None)
            for method in ("forward", "_conv_forward")
        )
        return replacement if same else None
    return None


def quantized_layer(
    layer: nn.Module,
    quantized: type[nn.Module],
    input_desc: QuantDescriptor | None = None,
    weight_desc: QuantDescriptor | None = None,
) -> Any:
    """Make the quantized form of a layer, with the layer's own parameters, buffers and hooks.

    Args:
        layer: stays as it is.
        quantized: its class, built on ``QuantMixin`` or ``QuantInputMixin``.
        input_desc, weight_desc: instead of the defaults of the class.

    Raises:
        ValueError: another class, or an option of the layer that the quantized form doesn't have.
    """
    if not issubclass(quantized, QuantInputMixin):
        raise ArgumentError(f"{quantized.__name__} isn't built on QuantMixin or QuantInputMixin")
    descriptors = [input_desc or quantized.default_quant_desc_input]
    if issubclass(quantized, QuantMixin):
        descriptors.append(weight_desc or quantized.default_quant_desc_weight)
    if type(layer) in _RECURRENT:
        new = _rebuilt(layer, quantized, _recurrent_arguments(layer), descriptors)
    elif isinstance(layer, float_nn.MultiheadAttention):
        new = _attention(layer, quantized, descriptors)
    else:
        new = quantized.__new__(quantized)
        # The quantized class adds nothing but quantizers, so the float layer's own state is its state.
        new.__dict__.update(
            {k: copy.copy(v) if isinstance(v, dict) else v for k, v in layer.__dict__.items()}
        )
        new._create_quantizers(*descriptors)  # type: ignore[operator]
    return new.train(layer.training)


def _rebuilt(
    layer: nn.Module,
    quantized: type[nn.Module],
    arguments: dict[str, Any],
    descriptors: list[QuantDescriptor],
) -> nn.Module:
    new = quantized(
        **arguments, device="meta", quant_desc_input=descriptors[0], quant_desc_weight=descriptors[1]
    )
    for name, parameter in layer.named_parameters(recurse=False):
        new._parameters[name] = parameter
    for key, value in layer.__dict__.items():
        if "hooks" in key and isinstance(value, dict):
            new.__dict__[key] = copy.copy(value)
    return new


def _recurrent_arguments(layer: Any) -> dict[str, Any]:
    arguments = {"input_size": layer.input_size, "hidden_size": layer.hidden_size, "bias": layer.bias}
    if isinstance(layer, float_nn.RNNBase):
        keys = ("num_layers", "batch_first", "dropout", "bidirectional", "proj_size")
        arguments.update({key: getattr(layer, key) for key in keys})
        if isinstance(layer, float_nn.RNN):
            arguments["nonlinearity"] = layer.nonlinearity
    return arguments


def _attention(layer: Any, quantized: type[nn.Module], descriptors: list[QuantDescriptor]) -> nn.Module:
    arguments = {
        "embed_dim": layer.embed_dim,
        "num_heads": layer.num_heads,
        "dropout": layer.dropout,
        "bias": layer.in_proj_bias is not None,
        "add_bias_kv": layer.bias_k is not None,
        "add_zero_attn": layer.add_zero_attn,
        "kdim": layer.kdim,
        "vdim": layer.vdim,
        "batch_first": layer.batch_first,
    }
    new: Any = _rebuilt(layer, quantized, arguments, descriptors)
    new.out_proj._parameters.update(layer.out_proj._parameters)
    return new
