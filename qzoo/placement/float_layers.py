"""Layers that a scheme keeps in float (``Scheme.layers`` with ``"float"``), between others in int8."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qzoo.placement.trace import Operation, Trace, trace
from qzoo.placement.wants import wants_of
from qzoo.quant.fold import evaluating
from qzoo.quant.nn import TensorQuantizer
from qzoo.quant.nn.modules._utils import QuantMixin, input_quantizer_of, weight_quantizer_of
from qzoo.quant.swap import replacement_of
from qzoo.quantizers import adopt, no_such_layer, quantizers
from qzoo.scheme import Scheme

_OF_INTEGERS = ("activation", "norm")  # roles of what is quantized because an integer kernel made it


@torch.no_grad()
def keep_in_float(model: nn.Module, scheme: Scheme, image: Tensor) -> nn.Module:
    """Keep the layers that ``scheme.layers`` names as ``"float"`` in float, in place.

    Their weights lose their quantizers. Their inputs, too, except those that an integer kernel of ONNX Runtime makes:
    it needs a Q right behind, without which it would run in float itself, so that the quantizer stays, as an
    ``activation`` (the other runtimes' kernels can write float); where a layer in int8 reads the same tensor, as an
    ``input``, as OpenVINO would run that layer in float, too. What was quantized only because the layer itself had an
    integer kernel, such as the logits, is so no longer.

    Args:
        model: with quantizers, in any mode; on any device, "meta" included.
        scheme: that it was built with.
        image: a batch of one of the model's size, on its device.

    Returns:
        The model.

    Raises:
        QuantizationError: the model has no quantized layer of that name.

    Example:
        >>> scheme = qzoo.Scheme(layers=(("conv1", "float"),))
        >>> model = keep_in_float(qzoo.resnet20(quantize=scheme), scheme, torch.zeros(1, 1, 28, 28))
        >>> "conv1._weight_quantizer" in quantizers(model)
        False
    """
    names = scheme.float_layers
    if not names:
        return model
    modules = dict(model.named_modules())
    for name in names:
        if weight_quantizer_of(modules.get(name)) is None or input_quantizer_of(modules.get(name)) is None:
            raise no_such_layer(model, name)
    layers = {n for n, m in modules.items() if isinstance(m, QuantMixin) or replacement_of(m) is not None}
    with evaluating(model):
        graph = trace(model, image, layers)
    before, after = wants_of(graph), wants_of(graph, names)
    for name in names:
        read = {value for operation in _calls(graph, name) for value in operation.operands[:1]}
        source = input_quantizer_of(modules[name])
        if source is not None and not read.isdisjoint(after.integers):
            readers = [edge for value in read if value is not None for edge in value.readers]
            others = {after.edges[edge].role for edge in readers if edge in after.edges}
            source.num_bits = scheme.edge.activation_bits
            adopt(scheme, source, "input" if "input" in others else "activation", source.nonnegative)
        elif source is not None:
            _take_away(model, source)
        weight = weight_quantizer_of(modules[name])
        if weight is not None:
            _take_away(model, weight)
    for name, quantizer in quantizers(model).items():
        value = graph.quantized.get(name)
        if quantizer.role == "output":
            needless = before.result is not None and after.result is None
        else:
            needless = quantizer.role in _OF_INTEGERS and value in before.integers - after.integers
        if needless:
            _take_away(model, quantizer)
    return model


def _calls(graph: Trace, layer: str) -> list[Operation]:
    """The calls of a layer, or of a function on its weight."""
    return [op for op in graph.operations if layer in (op.layer, op.weight.rpartition(".")[0])]


def _take_away(model: nn.Module, quantizer: TensorQuantizer) -> None:
    """Put an ``nn.Identity`` where a quantizer is, under all its names."""
    for _, parent in list(model.named_modules(remove_duplicate=False)):
        for key, child in parent._modules.items():
            if child is quantizer:
                parent._modules[key] = nn.Identity()
