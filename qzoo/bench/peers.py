"""Quantize the same float weights with other tools, at their best documented settings, to compare with.

| peer | made by | runs in |
|---|---|---|
| ``quantize_static`` | ``onnxruntime.quantization`` | ``onnxruntime`` |
| ``nncf`` | ``nncf.quantize`` | ``openvino`` |
| ``torchvision`` | ``torchvision.models.quantization`` and ``torch.ao`` | ``pytorch`` |
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.errors import ArgumentError, BenchmarkError, DataError, MissingDependencyError

RUNS_IN = {"quantize_static": "onnxruntime", "nncf": "openvino", "torchvision": "pytorch"}
_NEEDS = {
    "quantize_static": ("onnxruntime", "pip install 'qzoo[onnx]'"),
    "nncf": ("nncf", "pip install nncf"),
}


@dataclass(frozen=True)
class Peer:
    """A peer's model of one network.

    Attributes:
        name: one of :data:`RUNS_IN`.
        model: a file, or a module for PyTorch.
        bytes: its size on disk, None for a module.
    """

    name: str
    model: Path | nn.Module
    bytes: int | None


def check(peers: tuple[str, ...], runtimes: tuple[str, ...]) -> None:
    """Check that the peers can be compared in the chosen runtimes.

    Raises:
        ValueError: an unknown peer, or one whose runtime is not measured.
        MissingDependencyError: one that is not installed; the message has the line that installs it.
    """
    for peer in peers:
        if peer not in RUNS_IN:
            raise ArgumentError(f"no peer {peer!r}; expected some of {', '.join(RUNS_IN)}")
        package, install = _NEEDS.get(peer, ("", ""))
        if package and find_spec(package) is None:
            raise MissingDependencyError(f"the peer {peer!r} is not installed: {install}")
        runtime = RUNS_IN[peer]
        if runtime not in runtimes:
            raise ArgumentError(
                f"the peer {peer!r} runs in {runtime}; add it to the runtimes {', '.join(runtimes)}"
            )


def unavailable(peer: str, reference: nn.Module) -> str:
    """Explain why a peer has no model of this network; "" when it has one."""
    if peer != "torchvision":
        return ""
    architecture = _architecture(reference)
    import torchvision.models.quantization as quantized

    if architecture in dir(quantized):
        return ""
    return f"torchvision has no quantized {architecture or 'model of this kind'}: not compared"


def make(peer: str, reference: nn.Module, file: Path | None, images: Tensor | None, folder: Path) -> Peer:
    """Quantize the float model as the peer does.

    Args:
        reference: the float model.
        file: the float model in ONNX, for the peers that read it.
        images: calibration images [N, C, H, W], not among those that are evaluated.

    Raises:
        DataError: no calibration images.
        BenchmarkError: the peer failed.
    """
    if images is None or not len(images):
        raise DataError(f"the peer {peer!r} needs calibration images")
    try:
        if peer == "torchvision":
            return Peer(peer, _torchvision(reference, images), None)
        if file is None:
            raise BenchmarkError("there is no ONNX file of the float model")
        path = {"quantize_static": _quantize_static, "nncf": _nncf}[peer](file, images, folder)
    except Exception as error:
        raise BenchmarkError(f"the peer {peer!r} could not quantize the model: {error}") from error
    parts = [path, *([path.with_suffix(".bin")] if path.suffix == ".xml" else [])]
    return Peer(peer, path, sum(part.stat().st_size for part in parts))


def _architecture(reference: nn.Module) -> str:
    return getattr(getattr(reference, "qzoo_config", None), "architecture", "")


def _quantize_static(file: Path, images: Tensor, folder: Path) -> Path:
    """ONNX Runtime's model as its page "Quantize ONNX models" recommends for x86-64 processors with VNNI: pre-processed
    graph, Q/DQ, uint8 activations, int8 weights with a scale a channel."""
    from onnxruntime import quantization as ort

    class Reader(ort.CalibrationDataReader):
        def __init__(self) -> None:
            self._images: Iterator[Tensor] = iter(images.split(8))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._images, None)
            return None if batch is None else {"image": batch.numpy()}

    prepared, path = folder / "prepared.onnx", folder / "quantize_static.onnx"
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it advises the pre-processing that has been done
    try:
        _pre_process(file, prepared)
        ort.quantize_static(
            prepared,
            path,
            Reader(),
            quant_format=ort.QuantFormat.QDQ,
            per_channel=True,
            activation_type=ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            calibrate_method=ort.CalibrationMethod.MinMax,
        )
    finally:
        logging.disable(previous)
    return path


def _pre_process(file: Path, path: Path) -> None:
    """Pre-process as ONNX Runtime does; without its symbolic shapes where it can't infer them, as of EdgeNeXt."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    try:
        quant_pre_process(file, path)
    except Exception:  # of many kinds
        quant_pre_process(file, path, skip_symbolic_shape=True)


def _nncf(file: Path, images: Tensor, folder: Path) -> Path:
    """Post-training quantization with the mixed preset (asymmetric activations: the more accurate of its two).

    A network with LayerNorm is called a transformer, as its documentation asks for.
    """
    import nncf
    import openvino

    dataset = nncf.Dataset([batch.numpy() for batch in images.split(1)])
    model = openvino.Core().read_model(str(file))
    layer_norm = any(operator.get_type_name() == "MVN" for operator in model.get_ops())
    quantized = nncf.quantize(
        model,
        dataset,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(images),
        model_type=nncf.ModelType.TRANSFORMER if layer_norm else None,
    )
    path = folder / "nncf.xml"
    openvino.save_model(quantized, str(path), compress_to_fp16=False)
    return path


def _torchvision(reference: nn.Module, images: Tensor) -> nn.Module:
    """torchvision's quantizable definition with the same weights, calibrated as its own recipe does."""
    import torchvision.models.quantization as quantized
    from torch.ao import quantization as ao

    classes = [m for m in reference.modules() if isinstance(m, nn.Linear)][-1].out_features
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.ao announces its successor
        model: Any = getattr(quantized, _architecture(reference))(
            weights=None, quantize=False, num_classes=classes
        )
        model.load_state_dict(copy.deepcopy(reference.state_dict()))
        model.eval().fuse_model()
        torch.backends.quantized.engine = "x86"
        model.qconfig = ao.get_default_qconfig("x86")
        ao.prepare(model, inplace=True)
        for batch in images.split(8):
            model(batch)
        ao.convert(model, inplace=True)
    result: nn.Module = model
    return result
