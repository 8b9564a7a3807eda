"""Does the file compute what the simulation does? Runs it in its runtime; layer by layer where the two differ."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from qzoo.accuracy import Fidelity, sqnr
from qzoo.errors import DataError, ExportError
from qzoo.export.lint import written_for
from qzoo.export.lint.graph import Graph
from qzoo.export.prepare import copy_for
from qzoo.fields import finite
from qzoo.files import temporary_folder
from qzoo.quant.fold import attach
from qzoo.quant.nn import TensorQuantizer
from qzoo.scheme import DEFAULT_TARGET, target_named

if TYPE_CHECKING:
    from qzoo.runtimes.base import Runner

_INTEGERS = ("int8", "uint8", "int16", "uint16")
_TYPES = {
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.DOUBLE: torch.float64,
}
_DEFAULT_IMAGES = 8
_MISREAD_DB = 10.0
_FLIPS_DB = 45.0  # flipped roundings may leave no more in any network
_FAR = float(2**31)  # steps: what is not finite in the simulation counts as this far off


@dataclass(frozen=True)
class LayerDifference:
    """The integers of one quantizer in the file against those of the simulation.

    Attributes:
        name: module path of the quantizer.
        differing: share of the integers that differ, in percent.
        steps: the largest difference, in steps of the quantizer.
        sqnr_db: 10 log10(sum of squares / sum of squared differences) of the values.
    """

    name: str
    differing: float
    steps: int
    sqnr_db: float


@dataclass(frozen=True)
class Check:
    """Differences of a file in a runtime from the simulation of the same target.

    Attributes:
        target, runtime: whose placement it is, and what ran it.
        images: number of images.
        agreement: share of images with the same highest logit, in percent.
        sqnr_db: 10 log10(sum of squared logits / sum of squared differences); infinite when equal, -infinite where
            logits are not finite.
        max_difference: the largest difference of two logits; NaN or infinite where they are.
        layers: quantizer by quantizer in the order of the file; empty where the logits are equal, or nothing is
            quantized.

    Example:
        >>> qzoo.export.check("model.onnx", model, images[:2]).agreement
        100.0
    """

    target: str
    runtime: str
    images: int
    agreement: float
    sqnr_db: float
    max_difference: float
    layers: tuple[LayerDifference, ...] = ()
    as_written_db: float | None = None

    @property
    def misread(self) -> bool:
        """Whether the runtime computes something else than the file says: over 10 dB below ONNX Runtime.

        Above 35 dB never: there a few flipped roundings make such differences.
        """
        return (
            self.as_written_db is not None and self.sqnr_db < min(self.as_written_db, _FLIPS_DB) - _MISREAD_DB
        )

    @property
    def exact(self) -> bool:
        """Whether all logits are equal to the bit."""
        return self.max_difference == 0

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary; an infinite SQNR becomes None."""
        values: dict[str, Any] = finite(asdict(self))
        return values

    def __str__(self) -> str:
        head = (
            f"{self.runtime} against the simulation for {self.target}, {self.images} images: top-1 agreement "
            f"{self.agreement:.2f} %, SQNR {self.sqnr_db:.1f} dB, largest difference {self.max_difference:.4g}"
        )
        if self.exact:
            return f"{head} (equal to the bit)"
        if not math.isfinite(self.max_difference):
            head += " (NaN or infinity among the logits)"
        if self.misread:
            head += (
                f"\n  OpenVINO computes something else than the file says: ONNX Runtime has {self.as_written_db:.1f} "
                f"dB on the same file; qzoo lint FILE --target openvino names known forms (docs/openvino.md)"
            )
        if not self.layers:
            return head
        rows = [
            f"  {row.differing:8.4f} %  {row.steps:4d}  {row.sqnr_db:6.1f} dB  {row.name}"
            for row in self.layers
        ]
        return "\n".join([head, "  integers that differ, by how many steps at most, SQNR, quantizer:", *rows])


def check(
    path: str | os.PathLike[str],
    model: nn.Module,
    images: Tensor | None = None,
    *,
    target: str | None = None,
    runtime: str | None = None,
) -> Check:
    """Check an exported file: run it and the model it came from on the same images.

    Where the logits differ, a copy of the file with every activation's integers as outputs is run too, which shows
    the layer that they differ from on. Two correct implementations differ a little: a value that lies between two
    integers is rounded up by one and down by the other, and the flip grows from layer to layer.

    Args:
        path: from :func:`qzoo.export_onnx`.
        model: the model that was exported; it is copied.
        images: [B, C, H, W], preprocessed; by default 8 images of normally distributed noise, on which a trained
            network's agreement says little.
        target: whose placement the file has; by default what the file says.
        runtime: by default the target's own. TensorRT files run in ONNX Runtime where TensorRT is not installed.

    Returns:
        Agreement, SQNR and the largest difference; the layers that differ.

    Raises:
        MissingDependencyError: the runtime is not installed; the message has the line that installs it.
        DataError: no images, or of another size than the file or the model takes.
        ExportError: the model has no range, the runtime can't load or run the file, or model and file give logits of
            another shape.
        TypeError: images that are no tensor.
        ValueError: an unknown target or runtime.

    Example:
        >>> found = qzoo.export.check("model.onnx", model, images)
        >>> found.agreement, found.exact
        (100.0, False)
    """
    _refuse(images)
    target = target_named(target or written_for(path) or DEFAULT_TARGET).name
    runtime = runtime or _runtime_of(target)
    run = _runner(path, runtime, target)
    graph = Graph(path)
    x = _noise(graph) if images is None else images.detach().cpu()
    inputs = x.to(_input_type(graph))
    simulation = copy_for(model, target)
    logits, expected = run(inputs), _simulate(simulation, x)
    if logits.shape != expected.shape:
        raise ExportError(
            f"{path}: logits of shape {tuple(logits.shape)}, the model's {tuple(expected.shape)}"
        )
    result = _compare(logits.double(), expected.double(), target, runtime)
    if result.exact:
        return result
    layers = compare_layers(path, simulation, x, runtime)
    if runtime != "openvino":
        return replace(result, layers=layers)
    as_written = Fidelity.of(_as_written(path, inputs).double(), expected.double())
    return replace(result, layers=layers, as_written_db=as_written.sqnr_db)


def _refuse(images: object) -> None:
    """Raise TypeError or DataError for what are no images."""
    if images is None:
        return
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor [B, C, H, W], not {type(images).__name__}")
    if images.dim() == 0 or images.numel() == 0:
        raise DataError(
            f"images of shape {list(images.shape)}: nothing to check with; give at least one image"
        )


def _compare(logits: Tensor, expected: Tensor, target: str, runtime: str) -> Check:
    fidelity = Fidelity.of(logits, expected)
    return Check(
        target,
        runtime,
        len(logits),
        agreement=fidelity.agreement,
        sqnr_db=fidelity.sqnr_db,
        max_difference=(logits - expected).abs().max().item(),
    )


def _as_written(path: str | os.PathLike[str], images: Tensor) -> Tensor:
    """The logits in ONNX Runtime, which computes float32 between each DQ and Q when it does not optimize."""
    from qzoo.runtimes.ort import OnnxRuntimeRunner

    return OnnxRuntimeRunner(path, level="none")(images)


def compare_layers(
    path: str | os.PathLike[str], simulation: nn.Module, images: Tensor, runtime: str = "onnxruntime"
) -> tuple[LayerDifference, ...]:
    """Compare the integers of every activation quantizer, in a copy of the file that gives them as outputs.

    Args:
        simulation: of the file's target, float32, in eval mode.
        runtime: ``"onnxruntime"`` or ``"openvino"``; for others () is returned.
    """
    graph = Graph(path)
    recorded = _recorded(graph, simulation)
    if runtime not in ("onnxruntime", "openvino") or not recorded:
        return ()
    with temporary_folder() as folder:
        copy = _with_outputs(path, [(q.output, q.kind) for q in recorded], folder)
        integers = _run_all(copy, images.to(_input_type(graph)).numpy(), runtime)
    values = _record(simulation, [q.name for q in recorded], images)
    return tuple(
        _difference(q.name, output.astype(np.int64) - q.zero_point, values[q.name], q.step)
        for q, output in zip(recorded, integers, strict=True)
        # Else it is quantized before the max pooling in the file, behind it in the module.
        if output.shape == values[q.name].shape
    )


@dataclass(frozen=True)
class _RecordedQuantizer:
    """A quantizer of activations in a file, by its module path: the tensor of its integers, and how to read them."""

    name: str
    output: str
    kind: str
    step: float
    zero_point: int


def _recorded(graph: Graph, simulation: nn.Module) -> list[_RecordedQuantizer]:
    """The quantizers of activations with one scale that file and simulation have in common."""
    modules = dict(simulation.named_modules())
    quantizers = {}
    for node in graph.of("QuantizeLinear"):
        name, scale, zero = str(node.name).rpartition("/")[0], graph.scale(node), graph.zero_point(node)
        kind = graph.int_type(node)
        if scale is None or zero is None or scale.size != 1 or kind not in _INTEGERS:
            continue
        if isinstance(modules.get(name), TensorQuantizer) and not graph.is_weight(node):
            readers = graph.readers(node)
            last = readers[0] if [r.op_type for r in readers] == ["Clip"] else node  # to fewer than 8 bits
            quantizers[name] = _RecordedQuantizer(
                name, str(last.outputs[0].name), kind, float(scale), int(zero)
            )
    return list(quantizers.values())


def _difference(name: str, q: np.ndarray, value: Tensor, scale: float) -> LayerDifference:
    integers = torch.from_numpy(q)
    expected = (value.double() / scale).round().nan_to_num(_FAR, _FAR, -_FAR)
    apart = (integers - expected).abs()
    return LayerDifference(
        name, 100 * (apart > 0).double().mean().item(), int(apart.max()), sqnr(expected, integers.double())
    )


def _runtime_of(target: str) -> str:
    from qzoo import runtimes

    return "onnxruntime" if target == "tensorrt" and "tensorrt" not in runtimes.installed() else target


def _runner(path: str | os.PathLike[str], runtime: str, target: str) -> Runner:
    """The runtime on the file; ONNX Runtime takes one for TensorRT as it is written.

    Its optimizer drops a ReLU before Q to float8 (:mod:`qzoo.export.for_onnxruntime`), which TensorRT does not.
    """
    from qzoo import runtimes

    if (runtime, target) == ("onnxruntime", "tensorrt"):
        from qzoo.runtimes.ort import OnnxRuntimeRunner

        return OnnxRuntimeRunner(path, level="basic")
    return runtimes.load(path, runtime)


def _simulate(simulation: nn.Module, images: Tensor) -> Tensor:
    dtype = next((p.dtype for p in simulation.parameters() if p.is_floating_point()), torch.float32)
    try:
        with torch.inference_mode():
            result: Any = simulation(images.to(dtype))
    except Exception as error:  # the module's own, or torch's words for a shape that a layer does not take
        raise DataError(
            f"{type(simulation).__name__} can't run the images, {list(images.shape)}: {error}"
        ) from error
    if not isinstance(result, Tensor):
        raise ExportError(
            f"{type(simulation).__name__} returns a {type(result).__name__}, not one tensor as the file does"
        )
    return result


def _record(simulation: nn.Module, names: list[str], images: Tensor) -> dict[str, Tensor]:
    """What these quantizers give."""
    values: dict[str, Tensor] = {}
    handles = [
        simulation.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: values.__setitem__(name, output)
        )
        for name in names
    ]
    with attach(handles):
        _simulate(simulation, images)
    return values


def _noise(graph: Graph) -> Tensor:
    dims = graph.model.graph.inputs[0].shape or ()
    sizes = [d if isinstance(d, int) and d else _DEFAULT_IMAGES for d in dims]
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0))


def _input_type(graph: Graph) -> torch.dtype:
    kind = graph.model.graph.inputs[0].dtype
    return torch.float32 if kind is None else _TYPES.get(kind, torch.float32)


def _with_outputs(path: str | os.PathLike[str], tensors: list[tuple[str, str]], folder: Path) -> Path:
    """A copy of the file whose outputs are these tensors."""
    proto = onnx.load(path)
    del proto.graph.output[:]
    for name, kind in tensors:
        code = getattr(onnx.TensorProto, kind.upper())
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, code, None))
    copy = folder / "layers.onnx"
    onnx.save(proto, copy, save_as_external_data=proto.ByteSize() > 2**30)
    return copy


def _run_all(path: Path, images: np.ndarray, runtime: str) -> list[np.ndarray]:
    from qzoo.runtimes import sessions

    try:
        if runtime == "onnxruntime":
            session = sessions.onnxruntime_session(path, 1)
            outputs: list[np.ndarray] = session.run(None, {session.get_inputs()[0].name: images})
            return outputs
        compiled = sessions.openvino_model(path, 1)
        result = compiled([images])
        return [result[output] for output in compiled.outputs]
    except Exception as error:  # the runtimes' own types
        raise ExportError(
            f"{runtime} can't run the file with the layers' integers as outputs: {error}"
        ) from error
