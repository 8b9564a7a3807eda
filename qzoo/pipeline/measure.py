"""Float and quantized on the same images: the rows of a checkpoint's config."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzoo.accuracy import Evaluation, RecordedLogits, evaluate
from qzoo.config import Measurement, config_of
from qzoo.distributed import Group
from qzoo.errors import MissingDependencyError
from qzoo.export.onnx import export_onnx
from qzoo.fields import decode, encode, finite
from qzoo.files import temporary_folder
from qzoo.pipeline.parts import Images
from qzoo.pipeline.steps import Steps
from qzoo.quantizers import device_of, set_target

TARGETS = ("onnxruntime", "tensorrt")
Load = Callable[[], Iterable[tuple[Tensor, Tensor]]]
_LOGITS = "float_logits.safetensors"


def measure(
    model: nn.Module,
    reference: nn.Module,
    load: Load,
    images: Images,
    progress: bool,
    targets: tuple[str, ...] = TARGETS,
    *,
    onnx: Path | None = None,
    steps: Steps | None = None,
    inputs: dict[str, Any] | None = None,
    group: Group | None = None,
) -> tuple[Measurement, ...]:
    """Measure the accuracy of the float model, the simulation for each target, and the ONNX file where it can run.

    Args:
        model: quantized; its target is changed.
        reference: the float model.
        load: gives the labelled images, the same each time.
        images: what they are called.
        onnx: the file for ONNX Runtime, exported here if None.
        steps: remembers finished rows.
        inputs: what the figures depend on, for ``steps``.
        group: the processes that share the images; on its device are the rows in torch. Afterwards both models are on
            the CPU.
    """
    group = group or Group()
    scheme = str(config_of(model).scheme)
    rows = Rows(reference, load, images, progress, steps or Steps(group=group), inputs or {}, group)
    for module in (model, reference):
        module.to(group.device)
    metrics = [rows.float_row()]
    for target in targets:
        metrics.append(rows.row(set_target(model, target), "torch", scheme, target))
    for module in (model, reference):
        module.to("cpu")
    if onnx is not None:
        metrics.append(rows.row(_Session(onnx), "onnxruntime", scheme, "onnxruntime"))
    elif can_run_onnx():
        with temporary_folder() as scratch:
            file = scratch / "model.onnx"
            if group.first:
                export_onnx(model, file, target="onnxruntime")
            file.write_bytes(group.broadcast(file.read_bytes() if group.first else b""))
            metrics.append(rows.row(_Session(file), "onnxruntime", scheme, "onnxruntime"))
    return tuple(metrics)


def can_run_onnx() -> bool:
    """Check whether the packages that export and run ONNX files are installed."""
    return all(importlib.util.find_spec(package) for package in ("onnxruntime", "onnxscript"))


class Rows:
    """Measurements against one reference, whose logits are computed once: they are kept, in the steps' folder too."""

    def __init__(
        self,
        reference: nn.Module,
        load: Load,
        images: Images,
        progress: bool,
        steps: Steps,
        inputs: dict[str, Any],
        group: Group,
    ) -> None:
        self._reference, self._load, self._images = reference, load, images
        self._progress, self._steps, self._group = progress, steps, group
        self._inputs = {**inputs, "images": encode(images)}
        self._logits: list[Tensor] = []

    def float_row(self) -> Measurement:
        """Measure the reference itself; call it first."""

        file = None if self._steps.folder is None else self._steps.folder / _LOGITS
        alone = self._group.world == 1  # a process of several has the logits of its own batches only

        def action() -> Any:
            self._logits.clear()
            result = evaluate(self._record, self._load(), progress=self._progress, group=self._group)
            if file is not None and alone:
                _save_logits(file, torch.cat(self._logits))
            elif file is not None and self._group.first:
                file.unlink(missing_ok=True)
            return encode(measurement(result, self._images, "torch", "float", None))

        files = (_LOGITS,) if file is not None and alone else ()
        row = self._steps.run("evaluate float", self._inputs, action, files)
        return decode(Measurement, row, "float row")

    def row(
        self, model: Callable[[Tensor], Tensor], runtime: str, precision: str, target: str
    ) -> Measurement:
        """Measure a quantized model against the reference."""

        def action() -> Any:
            result = evaluate(
                model, self._load(), reference=self._recorded(), progress=self._progress, group=self._group
            )
            return encode(measurement(result, self._images, runtime, precision, target))

        name = f"evaluate {precision} in {runtime} for {target}"
        return decode(Measurement, self._steps.run(name, self._inputs, action), name)

    def _record(self, images: Tensor) -> Tensor:
        device = device_of(self._reference)
        logits = self._reference(images.to(device)).cpu()
        self._logits.append(logits)
        return logits

    def _recorded(self) -> Callable[[Tensor], Tensor] | Tensor:
        """The reference's logits, or itself where they were not kept."""
        file = None if self._steps.folder is None else self._steps.folder / _LOGITS
        if self._group.world > 1:
            return RecordedLogits(torch.cat(self._logits)) if self._logits else self._reference
        if not self._logits and file is not None and file.is_file():
            from safetensors.torch import load_file

            self._logits.append(load_file(file)["logits"])
        return torch.cat(self._logits) if self._logits else self._reference


class _Session:
    """An ONNX file in ONNX Runtime, loaded at the first call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._run: Callable[[Tensor], Tensor] | None = None

    def __call__(self, images: Tensor) -> Tensor:
        if self._run is None:
            from qzoo.runtimes import load

            self._run = load(self._path, runtime="onnxruntime", threads=torch.get_num_threads())
        return self._run(images)


def _save_logits(path: Path, logits: Tensor) -> None:
    """Whole or not at all, as all that a step leaves."""
    from safetensors.torch import save_file

    temporary = path.with_suffix(".tmp")
    save_file({"logits": logits.float().cpu().contiguous()}, temporary)
    temporary.replace(path)


def measurement(
    result: Evaluation, images: Images, runtime: str, precision: str, target: str | None
) -> Measurement:
    """Convert an evaluation to a row of the config, where a stream's end is known."""
    start, _, stop = images.subset.partition(":")
    return Measurement(
        runtime=runtime,
        precision=precision,
        target=target,
        data=images.text,
        subset=f"{start}:{stop or int(start or 0) + result.images + result.skipped}",
        images=result.images,
        top1=result.top1,
        top1_interval=result.top1_interval,
        top5=result.top5,
        top5_interval=result.top5_interval,
        loss=result.loss,
        agreement=result.agreement,
        sqnr_db=finite(result.sqnr_db),
        skipped=result.skipped,
    )


def require_onnx(what: str) -> None:
    """Check that ONNX can be exported and run, before an hour's work that needs it.

    Raises:
        MissingDependencyError: the packages of the extra "onnx" are missing.
    """
    if not can_run_onnx():
        raise MissingDependencyError(f"{what} needs onnxscript and onnxruntime: pip install 'qzoo[onnx]'")
