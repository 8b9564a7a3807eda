"""``export_onnx``: a model as an ONNX file with QuantizeLinear/DequantizeLinear pairs, placed for one runtime."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.errors import ExportError, MissingDependencyError
from qzoo.export.prepare import is_quantized, prepare
from qzoo.scheme import target_named

DEFAULT_OPSET = 18
"""The lowest that the exporter writes, and enough for int8: the widest choice of runtimes."""

_PROTOBUF_LIMIT = 2**31 - 2**24  # one protobuf message holds less than 2 GiB


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
    """Write ``model`` for a runtime; the model itself stays as it is (mode, device, weights, target).

    BatchNorm is folded (integers unchanged), Q/DQ stand where the target wants them, weights are int8 initializers
    with a DequantizeLinear. A float model is written as float. The input is named ``image`` ([batch, C, H, W]), the
    output ``logits`` ([batch, classes]); nodes are named by module path.

    Args:
        path: the file to write; it appears complete or not at all.
        target: ``"onnxruntime"``, ``"openvino"`` or ``"tensorrt"`` (see :mod:`qzoo.scheme`).
        opset: ONNX operator set, 18 by default.
        batch: ``"dynamic"`` or a fixed batch size.
        weights: ``"int8"``, or ``"float"`` to keep float weights with a QuantizeLinear each.
        example: an input batch of the size to export for; by default two images of the size in the model's config.

    Returns:
        The path.

    Raises:
        ExportError: quantizers without ranges, an opset that can't be written, no example, an operator that
            ONNX has no form for.
        MissingDependencyError: onnxscript is not installed.
        ValueError: an unknown target, batch or weights.
    """
    target_named(target)
    if weights not in ("int8", "float"):
        raise ValueError(f"weights must be 'int8' or 'float', not {weights!r}")
    if batch != "dynamic" and not (isinstance(batch, int) and batch > 0):
        raise ValueError(f"batch must be 'dynamic' or a positive number, not {batch!r}")
    image = _example(model, example, 2 if batch == "dynamic" else int(batch))
    ready = prepare(model, target, image)
    graph = to_graph(ready, image, opset or DEFAULT_OPSET, dynamic=batch == "dynamic")

    from qzoo.export import naming, passes

    passes.use_global_pooling(graph)
    passes.merge_padding(graph)
    passes.merge_pairs(graph)
    if weights == "int8":
        passes.store_integer_weights(graph)
    if target == "onnxruntime":
        passes.use_unsigned_activations(graph)
    passes.drop_unused(graph)
    naming.name_by_module(graph)
    naming.describe(graph, model, target if is_quantized(ready) else None)
    return _write(graph, Path(path))


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


def _write(graph: Any, path: Path) -> Path:
    """Check the model and write it beside its place, then move it there."""
    import onnx
    import onnx_ir as ir

    path.parent.mkdir(parents=True, exist_ok=True)
    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    external = f"{path.name}.data" if size > _PROTOBUF_LIMIT else None
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        draft = Path(folder) / path.name
        ir.save(graph, draft, format="protobuf", external_data=external)
        try:
            onnx.checker.check_model(str(draft), full_check=True)
        except Exception as error:
            raise ExportError(f"the exported graph is not valid ONNX: {error}") from error
        if external is not None:
            os.replace(Path(folder) / external, path.parent / external)
        os.replace(draft, path)
    return path
