"""The shapes of a graph's tensors, as far as they follow from those of its inputs."""

from __future__ import annotations

from math import prod

import onnx
from onnx import ModelProto, TensorProto

from qzoo.export.lint.load import every_node

_LARGE = 1024  # numbers; a shape has fewer
_MAX_SHAPE = 2**20  # numbers that shape inference may carry along for one tensor
_OF_SHAPES = (
    *("Shape", "Constant", "Concat", "Gather", "Slice", "Squeeze", "Unsqueeze", "Cast", "Identity"),
    *("Add", "Sub", "Mul", "Div", "Reshape"),
)


def shapes_of(model: ModelProto) -> dict[str, list[int]]:
    """Infer the shapes of tensors; an open first size of an input is taken to be 1, of one image.

    Weights are not read. What the shapes do not follow for is left out.
    """
    light = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    graph = light.graph
    graph.node.extend(model.graph.node)
    graph.output.extend(model.graph.output)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    graph.input.extend(value for value in model.graph.input if value.name not in weights)
    for entry in graph.input:
        dims = entry.type.tensor_type.shape.dim
        if dims and not dims[0].dim_value:
            dims[0].dim_value = 1
    for tensor in weights.values():
        if prod(tensor.dims) > _LARGE or tensor.data_location == TensorProto.EXTERNAL:
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            graph.input.append(value)
        else:
            graph.initializer.append(tensor)
    try:
        result = onnx.shape_inference.infer_shapes(light, data_prop=_is_safe(light))
    except Exception:  # of the native code: then the sizes are not known
        return {}
    values = [*result.graph.value_info, *result.graph.input, *result.graph.output]
    dims_of = {value.name: value.type.tensor_type.shape.dim for value in values}
    shapes = {name: [dim.dim_value for dim in dims] for name, dims in dims_of.items()}
    shapes |= {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    return {name: sizes for name, sizes in shapes.items() if sizes and all(size > 0 for size in sizes)}


def _is_safe(model: ModelProto) -> bool:
    """Whether no shape that is computed in the graph grows without end, as by Concat(x, x) again and again."""
    sizes = {tensor.name: prod(tensor.dims) for tensor in model.graph.initializer}
    for node in every_node(model.graph.node):
        if node.op_type not in _OF_SHAPES:
            continue
        parts = [sizes.get(name, 0) for name in node.input]
        size = sum(parts) if node.op_type == "Concat" else max(parts, default=0)
        size = _LARGE if node.op_type in ("Shape", "Constant") else size
        if size > _MAX_SHAPE:
            return False
        sizes.update(dict.fromkeys(node.output, size))
    return True
