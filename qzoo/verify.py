"""``verify``: are the checkpoints that this package names still there, whole, and what their cards say?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from qzoo import hub
from qzoo.cards import card
from qzoo.checkpoint import load_pretrained
from qzoo.config import Config, Measurement, read_config
from qzoo.errors import QzooError
from qzoo.evaluate import evaluate
from qzoo.progress import track
from qzoo.scheme import set_target

Load = Callable[[Config, Measurement], Iterable[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Finding:
    """The result for one checkpoint: where it is, and what is wrong with it ("" if nothing)."""

    name: str
    place: str
    problem: str


def verify(
    names: Iterable[str] | None = None, load: Load | None = None, progress: bool = True
) -> list[Finding]:
    """Check checkpoints: the pin resolves, every hash matches, the model loads, the card equals its config.

    Args:
        names: of checkpoints; all that the package knows by default.
        load: gives the labelled images of a recorded measurement; then its simulated figures are measured
            again and must lie in the recorded intervals.
        progress: show a progress bar.

    Raises:
        UnknownModelError: a name that the package does not know.
    """
    chosen = list(names) if names is not None else hub.checkpoints()
    findings = []
    for name in track(chosen, "verify", show=progress):
        if name in hub.embedded():
            findings.append(Finding(name, "embedded", _problem(hub.embedded().__getitem__, name, load)))
        if name in hub.pins():
            pin = hub.pins()[name]
            place = f"{pin.repo} at {pin.revision}"
            findings.append(Finding(name, place, _problem(_download_all, name, load)))
        if name not in hub.checkpoints():
            hub.locate(name)  # raises the error that suggests
    return findings


def _problem(find: Callable[[str], Path], name: str, load: Load | None) -> str:
    try:
        folder = find(name)
        config = read_config(folder)
        model = load_pretrained(folder)
        for file, digest in config.files.items():
            path = folder / file
            if path.is_file() and hub.sha256_of(path) != digest:
                return f"{file} has another SHA-256 than config.json says"
        readme = folder / "README.md"
        if readme.is_file() and readme.read_text(encoding="utf-8") != card(config):
            return "README.md differs from what config.json generates; `qzoo card` writes it again"
        return _measure_again(model, config, load) if load is not None else ""
    except QzooError as error:
        return str(error)


def _measure_again(model: nn.Module, config: Config, load: Load) -> str:
    for row in config.metrics:
        if row.runtime != "torch" or (row.precision == "float") != (config.scheme is None):
            continue  # another runtime's figure, or the float model's in a quantized checkpoint
        if row.target is not None:
            set_target(model, row.target)
        found = evaluate(model, load(config, row), progress=False).top1
        low, high = row.top1_interval
        if not low <= found <= high:
            where = f" for {row.target}" if row.target else ""
            return f"top-1{where} is {found:.2f} %, outside the recorded {low:.2f} to {high:.2f}"
    return ""


def _download_all(name: str) -> Path:
    """Every file of a pinned checkpoint, the card and the ONNX files too."""
    pin, folder = hub.pins()[name], hub.download_pin(name)
    hub.fetch(pin.repo, "README.md", pin.revision)
    for file, digest in read_config(folder).files.items():
        hub.fetch(pin.repo, file, pin.revision, digest)
    return folder
