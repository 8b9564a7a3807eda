"""Write the contenders of one network: float, int8 and peers in each runtime, each as a file to open."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzoo import runtimes as rt
from qzoo.accuracy import Fidelity
from qzoo.bench import peers
from qzoo.bench.options import Options
from qzoo.errors import DataError
from qzoo.export import export_onnx, lint
from qzoo.progress import track
from qzoo.quantizers import switch_target

WRITTEN_ANYWAY = ("tensorrt", "onnxruntime-tensorrt")
"""Runtimes that few machines have: a benchmark that asks for them goes on without, and checks their file."""


@dataclass(frozen=True)
class Contender:
    """One model in one runtime.

    Attributes:
        runtime, precision: such as ``"onnxruntime"``, ``"int8"``.
        source: who quantized it: ``"qzoo"`` or a peer.
        path: an ONNX file, or for PyTorch a module as ``torch.save`` writes it.
        bytes: size of the model's file; None where it has no form of its own (the simulation).
        modules: Python modules that the classes of a PyTorch module come from.
        batch: the only number of images that the file takes; None for any.
    """

    runtime: str
    precision: str
    source: str
    path: Path
    bytes: int | None
    modules: tuple[str, ...] = ()
    batch: int | None = None

    @property
    def title(self) -> str:
        """Runtime, precision and, of a peer, its name."""
        return " ".join((self.runtime, self.precision, *([self.source] if self.source != "qzoo" else [])))


def write(
    quantized: nn.Module,
    reference: nn.Module,
    images: Tensor,
    options: Options,
    calibration: Tensor | None,
    folder: Path,
) -> tuple[list[Contender], list[str]]:
    """Write the files. In each runtime float comes first; PyTorch simulates ONNX Runtime's placement.

    Args:
        images: a batch, whose size the files are written for.

    Returns:
        the contenders, and notes: of each peer that has no model of this network, and of TensorRT where it is not.
    """
    image = images[:1]
    candidates: list[Contender] = []
    notes: list[str] = []
    for runtime in track(options.runtimes, "write the files", show=options.progress):
        chosen = rt.runtime_named(runtime)
        problem = chosen.missing()
        if problem and runtime in WRITTEN_ANYWAY:
            notes.append(_written_only(runtime, problem, quantized, images, folder))
            continue
        if not chosen.runs_files:
            simulation = copy.deepcopy(quantized)
            switch_target(simulation, chosen.target)
            size = sum(t.numel() * t.element_size() for t in reference.state_dict().values())
            candidates.append(_module(runtime, "float32", "qzoo", reference, size, folder))
            candidates.append(_module(runtime, "fake-quant int8", "qzoo", simulation, None, folder))
            continue
        for model, precision in ((reference, "float32"), (quantized, "int8")):
            path = folder / f"{runtime}_{precision}.onnx"
            export_onnx(model, path, target=chosen.target, example=image)
            candidates.append(Contender(runtime, precision, "qzoo", path, path.stat().st_size))
    others, remarks = _peers(candidates, reference, options, calibration, folder)
    return [*candidates, *others], [*notes, *remarks]


def _written_only(runtime: str, problem: str, quantized: nn.Module, images: Tensor, folder: Path) -> str:
    """What can be said of a file whose runtime is not here: its lint, and what it computes in ONNX Runtime."""
    path = export_onnx(quantized, folder / f"{runtime}.onnx", target="tensorrt", example=images[:1])
    findings = lint(path, "tensorrt")
    note = f"{runtime} was not run ({problem}). Its file was written; "
    note += f"TensorRT's rules of explicit quantization: {len(findings) or 'no'} finding(s)"
    if rt.runtime_named("onnxruntime").missing():
        return f"{note}; not run anywhere, as ONNX Runtime is not installed"
    simulation = copy.deepcopy(quantized).cpu().eval()
    switch_target(simulation, "tensorrt")
    with torch.no_grad():
        fidelity = Fidelity.of(rt.load(path, "onnxruntime")(images), simulation(images))
    agreement = (
        f"{fidelity.agreement:.2f} % top-1 agreement and {fidelity.sqnr_db:.1f} dB with its simulation"
    )
    return f"{note}; in ONNX Runtime {agreement}"


def _peers(
    own: list[Contender], reference: nn.Module, options: Options, calibration: Tensor | None, folder: Path
) -> tuple[list[Contender], list[str]]:
    others: list[Contender] = []
    notes: list[str] = []
    show = options.progress and bool(options.compare)
    for peer in track(options.compare, "quantize with peers", show=show):
        problem = peers.unavailable(peer, reference)
        if problem:
            notes.append(problem)
            continue
        runtime = peers.RUNS_IN[peer]
        files = [c.path for c in own if (c.runtime, c.precision) == (runtime, "float32")]
        file = files[0] if rt.runtime_named(runtime).runs_files else None
        result = peers.make(peer, reference, file, calibration, folder)
        if isinstance(result.model, nn.Module):
            others.append(_module(runtime, "int8", peer, result.model, result.bytes, folder))
        else:
            others.append(Contender(runtime, "int8", peer, result.model, result.bytes))
    return others, notes


def _module(
    runtime: str, precision: str, source: str, model: nn.Module, size: int | None, folder: Path
) -> Contender:
    """A PyTorch module on disk.

    Raises:
        DataError: a class that another process can't import.
    """
    modules = tuple(sorted({type(module).__module__ for module in model.modules()}))
    if "__main__" in modules:
        raise DataError(
            "a class of the model is defined in the script itself; move it to a module of its own, so that the "
            "process that measures it can import it"
        )
    path = folder / f"{runtime}_{precision}_{source}.pt".replace(" ", "_")
    torch.save(model, path)
    if source != "qzoo":
        size = path.stat().st_size
    return Contender(runtime, precision, source, path, size, modules)


def profiled(contender: Contender) -> bool:
    """Check whether its runtime reports the time of every node."""
    runtime: Any = rt.runtime_named(contender.runtime)
    return bool(runtime.provider) or contender.runtime == "openvino"
