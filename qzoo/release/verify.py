"""``verify``: are the checkpoints that this package names still there, whole, and what their cards say?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from qzoo import runtimes
from qzoo.accuracy import evaluate
from qzoo.bench.latency import speedup_text
from qzoo.cards.card import card
from qzoo.cards.eval_results import PATH as EVAL_RESULTS
from qzoo.cards.eval_results import eval_results
from qzoo.config import Config, Measurement, read_config
from qzoo.errors import QzooError
from qzoo.export.onnx import export_onnx
from qzoo.files import temporary_folder
from qzoo.pipeline.measure import can_run_onnx
from qzoo.pipeline.onnx_files import onnx_name
from qzoo.progress import track
from qzoo.quantizers import set_target
from qzoo.release.zoo_page import page_at
from qzoo.zoo import hub
from qzoo.zoo.checkpoint import load_pretrained
from qzoo.zoo.store import stored

Load = Callable[[Config, Measurement], Iterable[tuple[Tensor, Tensor]] | None]


@dataclass(frozen=True)
class Finding:
    """The result for one checkpoint.

    Attributes:
        name, place: which, and where it is.
        problem: what is wrong with it, "" if nothing.
        speedup: what its config records of its speed, "" if nothing.
        measured: how many of its recorded figures were measured again.
        note: why the others were not, though it was asked for; "" if there are none.
    """

    name: str
    place: str
    problem: str
    speedup: str = ""
    measured: int = 0
    note: str = ""


def verify(
    names: Iterable[str] | None = None, load: Load | None = None, progress: bool = True
) -> list[Finding]:
    """Verify checkpoints: the pin resolves, hashes match, the model loads, and the card is the config's.

    Args:
        names: of checkpoints, or their folders; all that the package knows by default.
        load: gives the labelled images of a recorded measurement, None where they are not at hand; then its figures
            are measured again, simulated and in ONNX Runtime where that is installed, and must lie in the recorded
            intervals.
        progress: show a progress bar.

    Returns:
        A finding for each checkpoint; its ``problem`` is empty when nothing is wrong.

    Raises:
        UnknownModelError: a name that the package does not know, and no folder.

    Example:
        >>> [found] = qzoo.verify(["resnet20.fmnist-w8a8"], progress=False)
        >>> found.problem
        ''
    """
    chosen = list(names) if names is not None else hub.checkpoints()
    findings = []
    for name in track(chosen, "verify", show=progress):
        if names is not None and (Path(name) / "config.json").is_file():
            findings.append(_finding(name, "folder", Path, "", load))
            continue
        if name in stored():
            findings.append(_finding(name, str(stored()[name]), hub.named, "", load))
        if name in hub.embedded():
            findings.append(_finding(name, "embedded", hub.embedded().__getitem__, "", load))
        if name in hub.pins():
            pin = hub.pins()[name]
            findings.append(_finding(name, f"{pin.repo} at {pin.revision}", _download_all, pin.repo, load))
        if name not in hub.checkpoints():
            folder = hub.locate(name)  # or the error that suggests
            findings.append(_finding(name, "Hub", {name: folder}.__getitem__, "", load))
    return findings


def verify_page(path: str | Path) -> Finding:
    """Check that the zoo's page is what the configs generate."""
    try:
        same = Path(path).read_text(encoding="utf-8") == page_at(path)
        problem = "" if same else f"it differs from what the configs generate; `qzoo card --page {path}`"
    except (OSError, QzooError) as error:
        problem = str(error)
    return Finding("the zoo's page", str(path), problem)


def _finding(name: str, place: str, find: Callable[[str], Path], repo: str, load: Load | None) -> Finding:
    try:
        folder = find(name)
        config = read_config(folder)
        model = load_pretrained(folder)
        finding = Finding(name, place, _files_problem(folder, config, repo), speedup_text(config))
        if finding.problem or load is None:
            return finding
        return _measure_again(finding, folder, model, config, load)
    except (QzooError, OSError) as error:
        return Finding(name, place, str(error))


def _files_problem(folder: Path, config: Config, repo: str) -> str:
    """What is wrong with the files; a repository has all of them, an embedded folder need not."""
    for file, digest in config.files.items():
        path = folder / file
        if not path.is_file():
            continue
        size = path.stat().st_size  # of another size it need not be hashed
        if size != config.sizes.get(file, size) or hub.sha256_of(path) != digest:
            return f"{file} has another SHA-256 than config.json says"
    generated = {"README.md": card(config, repo), EVAL_RESULTS: eval_results(config)}
    for file, text in generated.items():
        path = folder / file
        if not path.is_file():
            if repo and text:
                return f"{file} is missing"
        elif path.read_text(encoding="utf-8", errors="replace") != text:
            return f"{file} differs from what config.json generates; `qzoo card` and `qzoo publish` write it again"
    return ""


def _measure_again(finding: Finding, folder: Path, model: nn.Module, config: Config, load: Load) -> Finding:
    """The finding with what its recorded figures are today."""
    measured, missing = 0, ""
    with temporary_folder() as scratch:
        for row in config.metrics:
            run = _as_measured(row, folder, model, config, scratch)
            if run is None:
                continue
            images = load(config, row)
            if images is None:
                missing = row.data
                continue
            measured += 1
            top1 = evaluate(run, images, progress=False).top1
            low, high = row.top1_interval
            if not low <= top1 <= high:
                place = f" in {row.runtime}" if row.runtime != "torch" else ""
                where = f" for {row.target}" if row.target else ""
                problem = f"top-1{place}{where} is {top1:.2f} %, outside the recorded {low:.2f} to {high:.2f}"
                return replace(finding, problem=problem, measured=measured)
    note = f"not measured again, as its images are not at hand: {missing}" if missing else ""
    return replace(finding, measured=measured, note=note)


def _as_measured(
    row: Measurement, folder: Path, model: nn.Module, config: Config, scratch: Path
) -> Callable[[Tensor], Tensor] | None:
    """What a recorded figure is of; None for the float model beside a quantized one, and for runtimes not here."""
    if (row.precision == "float") != (config.scheme is None):
        return None
    if row.target is not None:
        set_target(model, row.target)
    if row.runtime == "torch":
        return model
    if row.runtime != "onnxruntime" or not can_run_onnx():
        return None
    target = row.target or "onnxruntime"
    file = folder / onnx_name(config, target)
    if not file.is_file():
        file = export_onnx(model, scratch / f"{target}.onnx", target=target)
    return runtimes.load(file, "onnxruntime", threads=torch.get_num_threads())


def _download_all(name: str) -> Path:
    """Every file of a pinned checkpoint: the card, the results and the ONNX files too."""
    pin, folder = hub.pins()[name], hub.download_pin(name)
    config = read_config(folder)
    hub.fetch(pin.repo, "README.md", pin.revision)
    if eval_results(config):
        hub.fetch(pin.repo, EVAL_RESULTS, pin.revision)
    for file, digest in config.files.items():
        hub.fetch(pin.repo, file, pin.revision, digest)
    return folder
