"""``export_onnx``: a model as an ONNX file with QuantizeLinear/DequantizeLinear pairs, placed for one runtime."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.errors import ExportError, MissingDependencyError
from qzoo.export.formats import choose_opset
from qzoo.export.prepare import copy_for, fold_and_store_, is_quantized
from qzoo.export.write import write
from qzoo.scheme import target_named

WEIGHTS = ("int8", "int4", "float")


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    target: str = "onnxruntime",
    opset: int | None = None,
    batch: str | int = "dynamic",
    weights: str = "int8",
    example: Tensor | None = None,
) -> Path:
    """Write ``model`` for a runtime; the model itself stays as it is (mode, device, weights, hooks, target).

    BatchNorm is folded (integers unchanged), Q/DQ stand where the target wants them, weights are integer initializers
    with a DequantizeLinear. Other formats than int8 are in :mod:`qzoo.export.formats`. A float model is written as
    float, in its own precision. A quantized float16 or bfloat16 model takes and gives its own type, and is float32
    and int8 between. The input is named ``image`` ([batch, C, H, W]), the output ``logits`` ([batch, classes]); nodes
    are named by module path. The file's metadata has qzoo's version, the checkpoint, its preprocessing and labels.

    Args:
        path: the file to write; it appears complete or not at all. Beyond 2 GiB the weights go into a second file
            beside it, ``<name>.<hash>.data``.
        target: ``"onnxruntime"``, ``"openvino"`` or ``"tensorrt"`` (see :mod:`qzoo.scheme`).
        opset: ONNX operator set; by default the lowest that has the model's formats: 18 for int8.
        batch: ``"dynamic"`` or a fixed batch size.
        weights: ``"int8"``; ``"int4"`` to store weights of at most 4 bits as such, the others as int8; ``"float"`` to
            keep float weights with a QuantizeLinear each.
        example: an input batch of the size to export for; by default two images of the size in the model's config.

    Returns:
        The path.

    Raises:
        ExportError: quantizers without ranges, an opset that can't be written, no example or one that the model does
            not take, a path that is a folder, an operator that ONNX has no form for.
        MissingDependencyError: onnxscript is not installed.
        TypeError: no module.
        ValueError: an unknown target, batch or weights.
    """
    target_named(target)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a module, not {model!r:.60}; qzoo.create_model(NAME, pretrained=True) makes one"
        )
    if Path(path).is_dir():
        raise ExportError(f"{os.fspath(path)!r} is a folder; give the file to write")
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, not {weights!r}")
    if (batch != "dynamic" and not (isinstance(batch, int) and batch > 0)) or batch is True:
        raise ValueError(f"batch must be 'dynamic' or a positive number, not {batch!r}")
    image = _example(model, example, 2 if batch == "dynamic" else int(batch))
    from qzoo.export import naming, passes

    ready = copy_for(model, target)
    opset = choose_opset(ready, target, opset, weights)
    inner = image.float() if is_quantized(ready) else image
    try:
        fold_and_store_(ready, inner)
    except ExportError:
        raise
    except RuntimeError as error:  # torch's own words for a shape that a layer does not take
        raise ExportError(
            f"{type(model).__name__} can't run the example, {list(image.shape)} {image.dtype}: {error}"
        ) from error
    graph = to_graph(ready, inner, opset, dynamic=batch == "dynamic")
    _rewrite(graph, target, weights)
    if inner.dtype != image.dtype:
        passes.widen(graph, image.dtype)
    naming.name_by_module(graph)
    naming.drop_shapes(graph)
    naming.describe(graph, model, target)
    return write(graph, Path(path))


def _rewrite(graph: Any, target: str, weights: str) -> None:
    """The passes, in an order in which each finds what the one before has made."""
    from qzoo.export import for_onnxruntime, passes

    passes.use_global_pooling(graph)
    passes.merge_padding(graph)
    passes.merge_pairs(graph)
    if weights != "float":
        passes.store_integer_weights(graph)
    if weights == "int4":
        passes.store_4_bits(graph)
    if target == "onnxruntime":
        for_onnxruntime.use_unsigned_activations(graph)
        for_onnxruntime.clip_integers(graph)
        for_onnxruntime.keep_activations_before_float8(graph)
        for_onnxruntime.pad_image_channels(graph)
    if target == "openvino":
        passes.quantize_before_moves(graph)
    passes.share_zero_points(graph)
    passes.drop_defaults(graph)
    passes.drop_unused(graph)
    if target == "onnxruntime":
        for_onnxruntime.copy_for_each_quantizer(graph)


def to_graph(ready: nn.Module, image: Tensor, opset: int, *, dynamic: bool = True) -> Any:
    """The ``onnx_ir`` model of a prepared module, as the exporter writes it.

    Args:
        ready: from :func:`qzoo.export.prepare.prepare`.
        image: example input [B, C, H, W] on the CPU, B >= 2 when ``dynamic``.

    Raises:
        ExportError: the exporter failed, or wrote another opset than asked for.
    """
    try:
        import onnxscript  # noqa: F401  (the exporter's own message does not say what to install)
    except ImportError as error:
        raise MissingDependencyError("ONNX export needs onnxscript: pip install 'qzoo[onnx]'") from error
    from qzoo.quant import onnx_translation

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                ready,
                (image,),
                dynamo=True,
                opset_version=opset,
                input_names=["image"],
                output_names=["logits"],
                dynamic_shapes=({0: "batch"},) if dynamic else None,
                custom_translation_table=onnx_translation.custom_translation_table(),
                verbose=False,
            )
    except Exception as error:  # the exporter raises many types; the user needs one
        raise ExportError(f"torch.onnx.export could not write {type(ready).__name__}: {error}") from error
    if program is None:
        raise ExportError(f"torch.onnx.export gave nothing for {type(ready).__name__}")
    graph: Any = program.model
    written = graph.opset_imports.get("")
    if written != opset:
        raise ExportError(
            f"opset {opset} was asked for, but the exporter wrote {written}: choose {written} or higher"
        )
    return graph


def _example(model: nn.Module, example: Tensor | None, batch: int) -> Tensor:
    """A batch on the CPU in the dtype of the model."""
    if example is None:
        config = getattr(model, "qzoo_config", None)
        if config is None:
            raise ExportError(
                "the input size is not known: pass example=, a batch such as torch.zeros(1, 3, 224, 224)"
            )
        example = torch.zeros(1, *config.preprocessing.input_size)
    if not example.is_floating_point() or example.dim() < 2 or len(example) == 0:
        raise ExportError(
            f"example must be a batch of floating-point images, not {tuple(example.shape)} {example.dtype}"
        )
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    one = example[:1].detach().cpu().to(dtype)
    return one.expand(batch, *one.shape[1:]).contiguous()
