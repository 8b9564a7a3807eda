"""Export a model to an ONNX file with QuantizeLinear/DequantizeLinear pairs, placed for one runtime."""

from __future__ import annotations

import copy
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.errors import ExportError, MissingDependencyError
from qzoo.export.lint.coverage import warn_of_float
from qzoo.export.order import Order
from qzoo.export.prepare import Draft, prepare
from qzoo.export.write import write
from qzoo.scheme import DEFAULT_TARGET


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    target: str = DEFAULT_TARGET,
    opset: int | None = None,
    batch: str | int = "dynamic",
    weights: str = "int8",
    example: Tensor | None = None,
    reduce_range: bool = False,
    dtype: str = "float32",
) -> Path:
    """Export a model to ONNX with Q/DQ nodes and int8 weights; the model itself stays as it is.

    A quantized model of which the runtime will compute less than half of the multiply-adds in int8 is written with a
    warning; :func:`qzoo.lint` names the reasons.

    BatchNorm is folded (integers unchanged), Q/DQ stand where the target wants them, weights are integer initializers
    with a DequantizeLinear. Other formats than int8 are in :mod:`qzoo.export.formats`. A float model is written as
    float, in its own precision. A quantized float16 or bfloat16 model takes and gives its own type, and is float32
    and int8 between. The input is named ``image`` ([batch, C, H, W]), the output ``logits`` ([batch, classes]); nodes
    are named by module path. The file's metadata has qzoo's version, the checkpoint, its preprocessing and labels.

    Args:
        model: takes one batch of images and returns one tensor. Out of the wrappers of ``torch.compile`` and of data
            parallel training it is taken by itself.
        path: the file to write; it appears complete or not at all. Missing folders are made, and a symbolic link is
            written through. Beyond 2 GiB the weights go into a second file
            beside it, ``<name>.<hash>.data``.
        target: ``"onnxruntime"``, ``"openvino"`` or ``"tensorrt"`` (see :mod:`qzoo.scheme`).
        opset: ONNX operator set, 18 to 25; by default the lowest that has the model's formats and
            operators: 18 for int8, 20 with GELU.
        batch: ``"dynamic"`` or a fixed batch size.
        weights: ``"int8"``; ``"int4"`` to store weights of at most 4 bits as such, the others as int8; ``"float"`` to
            keep float weights with a QuantizeLinear each.
        example: an input batch of the size to export for; by default two images of the size in the model's config.
        reduce_range: round weights of 8 bits to 7, for x86 processors without VNNI: there the sum of two products of a
            uint8 and an int8 is cut off at 16 bits (:func:`qzoo.runtimes.processor.saturates`). The file then differs
            from the simulation by that rounding, and ONNX Runtime multiplies two activations as uint8, more slowly.
        dtype: of what is not quantized: ``"float32"``, or for TensorRT ``"float16"``: its networks are strongly typed,
            and what a file says in float32 runs in float32. Scales are float16 too, to which ranges are widened, and
            the lowest opset is 19. A float32 model takes and gives float32 all the same.

    Returns:
        The path.

    Raises:
        ExportError: quantizers without ranges or in a form that runtimes do not take, an opset that can't be written,
            no example or one that the model does not run (an error of the module or of its hooks is the cause), a
            result that is not one tensor, a path that can't be written to, an operator that ONNX has no form for.
        MissingDependencyError: onnxscript is not installed.
        TypeError: a module, path, opset or example of another type.
        ValueError: an unknown target, batch, weights or dtype; float16 for another target than TensorRT.

    Example:
        >>> path = qzoo.export_onnx(model, "resnet20.onnx", target="onnxruntime")
    """
    order = Order.of(model, path, target, opset, batch, weights, example, reduce_range, dtype)
    from qzoo.export.naming import describe, name_by_module
    from qzoo.export.rewrites import rewrites

    draft = prepare(order)
    graph = record(draft, dynamic=order.dynamic)
    for rewrite in rewrites(order.target, order.weights, order.image.dtype, order.half, order.reduce_range):
        rewrite(graph)
    name_by_module(graph)
    describe(graph, order.model, order.target)
    write(graph, order.path)
    if draft.quantized:
        warn_of_float(order.path, order.target, type(order.model).__name__)
    return order.path


def record(draft: Draft, *, dynamic: bool) -> Any:
    """Record a prepared module as an ``onnx_ir`` model, by torch's exporter.

    Args:
        draft: from :func:`qzoo.export.prepare.prepare`.
        dynamic: leave the number of images open; the draft's example then has two or more.

    Raises:
        ExportError: the exporter failed, or wrote another opset than asked for.
    """
    try:
        import onnxscript  # noqa: F401  (the exporter's own message does not say what to install)
    except ImportError as error:
        raise MissingDependencyError("ONNX export needs onnxscript: pip install 'qzoo[onnx]'") from error
    from qzoo.export import passes
    from qzoo.quant import onnx_translation

    _leave_hard_swish_whole_(draft.module, draft.image[:1])
    name = type(draft.module).__name__
    try:
        with warnings.catch_warnings(), _keep_translations():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                draft.module,
                (draft.image,),
                dynamo=True,
                opset_version=draft.opset,
                input_names=["image"],
                output_names=["logits"],
                dynamic_shapes=({0: "batch"},) if dynamic else None,
                custom_translation_table={
                    **onnx_translation.custom_translation_table(),
                    torch.ops.aten.as_strided.default: _translate_view,
                },
                verbose=False,
                optimize=False,
            )
    except Exception as error:  # the exporter raises many types; the user needs one
        raise ExportError(_refusal(name, error, dynamic)) from error
    if program is None:
        raise ExportError(f"torch.onnx.export gave nothing for {name}")
    graph: Any = program.model
    written = graph.opset_imports.get("")
    if written != draft.opset:
        raise ExportError(
            f"opset {draft.opset} was asked for, but the exporter wrote {written}: choose {written} or higher"
        )
    passes.simplify(graph)
    return graph


def _translate_view(
    x: Any, size: Sequence[Any], stride: Sequence[Any], storage_offset: int | None = None
) -> Any:
    """``aten::as_strided``: the tensor itself where the view has its shape and order.

    An average over all pixels ends in such a view where its input is a permutation, as in Swin and ConvNeXt. Torch's
    own translation gathers the elements by numbers computed from the batch size, which keeps the average out of int8,
    and which OpenVINO does not bear (:func:`qzoo.export.for_openvino.expand_without_sizes`).
    """
    shape, contiguous = list(x.shape), 1
    same = not storage_offset and len(size) == len(shape)
    for length, step, own in reversed([*zip(size[1:], stride[1:], shape[1:], strict=False)]):
        same = same and length == own and (length == 1 or step == contiguous)
        contiguous *= own if isinstance(own, int) else 0
    # An open number of images is a symbol in the one and a value in the other.
    if same and stride[0] == contiguous and not (isinstance(size[0], int) and size[0] != shape[0]):
        return x
    from onnxscript.function_libs.torch_lib.ops.core import aten_as_strided

    return aten_as_strided(x, size, stride, storage_offset)


@contextmanager
def _keep_translations() -> Iterator[None]:
    """Let torch's exporter make the table of its own translations once a process.

    It makes it anew for each export, out of the source text of some 500 functions: a quarter of the time of a small
    network. The names are private; where a version of torch has others, nothing is kept.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        original, read = vars(ONNXRegistry)["from_torchlib"], ONNXRegistry.from_torchlib
    except (ImportError, KeyError):
        yield
        return

    def from_torchlib(*args: Any, **options: Any) -> Any:
        registry = copy.copy(_torchlib(read, *args, **options))
        # Lists of its own: the translations of an export's own table are added to them.
        registry.functions = {
            target: list(translations) for target, translations in registry.functions.items()
        }
        return registry

    ONNXRegistry.from_torchlib = staticmethod(from_torchlib)  # type: ignore[method-assign]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = original  # type: ignore[method-assign]


@functools.cache
def _torchlib(read: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return read(*args, **options)


def _refusal(name: str, error: BaseException, dynamic: bool) -> str:
    """The exporter's innermost error in one line; it puts a page of advice around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    reason = " ".join(str(error).split())
    if dynamic and ("inferred a static shape" in reason or "Constraints violated" in reason):
        return (
            f"the forward of {name} makes a Python number of the batch size, so that its file takes only one: pass "
            "batch=1 or another number"
        )
    return f"torch.onnx.export could not write {name}: {type(error).__name__}: {reason}"


@torch.no_grad()
def _leave_hard_swish_whole_(ready: nn.Module, image: Tensor) -> None:
    """Let hard-swish make a new tensor, in place on the model, where that changes nothing.

    The exporter traces the form that overwrites its input as six operators of symbolic sizes, only to drop them again:
    a third of the time that MobileNetV3-small takes.
    """
    activations = [
        module for module in ready.modules() if isinstance(module, nn.Hardswish) and module.inplace
    ]
    if not activations:
        return
    expected = ready(image)
    for module in activations:
        module.inplace = False
    if not torch.equal(ready(image), expected):  # a forward that reads on under the old name
        for module in activations:
            module.inplace = True
