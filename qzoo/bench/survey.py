"""``qzoo survey``: float and int8 latency of many architectures on this machine, with random weights and no data.

Speed hardly depends on the values of weights, so that nothing is downloaded: weights are random with a fixed seed, and
the statistics of BatchNorms and the ranges are those of noise, which keeps activations in a sane range (numbers near
zero, which a processor computes slowly, would be measured otherwise). Accuracy is not measured: beside the latencies
stands the top-1 that the publisher of the float weights gives.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

from qzoo.config import Config
from qzoo.errors import ArgumentError, CheckpointError, QzooError, shown
from qzoo.fields import decode
from qzoo.files import temporary_folder, write_text
from qzoo.progress import track
from qzoo.scheme import OPTIONAL

SCHEMA = 1
FILE = "survey.json"
_START = "import sys; sys.path[:] = filter(None, sys.path); from qzoo.bench.survey import main; main()"
_ROUNDS = (5, 300)
# What a latency depends on; a file of another machine, or of other versions, is not gone on with.
_SAME = ("qzoo", "processor", "torch")


@dataclass(frozen=True)
class SurveyOptions:
    """How a survey measures.

    Attributes:
        runtime: one that runs ONNX files.
        threads: that a call may use.
        seconds: about how long each precision is timed; at least 5 rounds in which float and int8 take turns.
        limit: seconds that one model may take as a whole.
    """

    runtime: str = "onnxruntime"
    threads: int = 1
    seconds: float = 1.0
    limit: float = 600.0


@dataclass(frozen=True)
class Cost:
    """Latency of one precision at batch 1 in milliseconds a call, size of its file, memory of its process."""

    wall_ms: float
    wall_p90_ms: float
    cpu_ms: float
    wall_over_cpu: float
    calls: int
    file_bytes: int
    peak_rss_bytes: int | None


@dataclass(frozen=True)
class SurveyRow:
    """One architecture, with its latencies or the reason why there are none.

    Attributes:
        family: the file of its definition.
        weights: name of the float weights that top-1 and image size belong to; "" where none are published.
        top1: of the float weights on ImageNet, in percent, as their publisher gives it; None where it gives none.
        size: of an image.
        parameters: their number.
        seconds: that the model took, from its definition to the last call.
        error: why there are no figures; "" where there are.
        speedup: how many times as fast int8 is, by CPU time for one thread, else by wall time, and its 95 % interval.
    """

    model: str
    family: str
    weights: str
    top1: float | None
    size: tuple[int, int, int]
    parameters: int
    seconds: float
    error: str = field(default="", metadata=OPTIONAL)
    float32: Cost | None = field(default=None, metadata=OPTIONAL)
    int8: Cost | None = field(default=None, metadata=OPTIONAL)
    speedup: tuple[float, float, float] | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class Survey:
    """Results of a survey so far.

    Attributes:
        models: in the order of their names.
        machine: processor and versions (:func:`qzoo.bench.environment.describe`).
        date: of the last model measured, ISO 8601, UTC.
    """

    options: SurveyOptions
    machine: dict[str, str]
    date: str
    models: tuple[SurveyRow, ...] = field(default=())

    @property
    def measured(self) -> list[SurveyRow]:
        """The models with figures, the fastest in int8 first."""
        models = [model for model in self.models if model.int8 is not None]
        return sorted(models, key=lambda model: model.int8.wall_ms if model.int8 else 0.0)

    def front(self, precision: str) -> set[str]:
        """List the models on the Pareto front of a precision: no other one is both faster and more accurate."""
        points = [
            (cost.wall_ms, -model.top1, model.model)
            for model in self.measured
            if (cost := getattr(model, precision)) is not None and model.top1 is not None
        ]
        best, names = 0.0, set()
        for _, negative, name in sorted(points):
            if -negative > best:
                best = -negative
                names.add(name)
        return names

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        values = dataclasses.asdict(self)
        return {"schema": SCHEMA, **values}


def survey(
    pattern: str | Sequence[str] = "*",
    options: SurveyOptions = SurveyOptions(),
    *,
    out: str | Path,
    imports: Sequence[str] = (),
    progress: bool = True,
    report: Callable[[SurveyRow], None] | None = None,
) -> Survey:
    """Measure the latency of architectures, float and int8, each in a process of its own.

    The results file is written anew after every model, whole or not at all. Called again, also after it was killed, it
    goes on with the models that have no figures yet; those of models that are not asked for stay.

    Args:
        pattern: shell patterns on the names of architectures.
        options: runtime, threads and times.
        out: the folder of the results file, ``survey.json``.
        imports: modules and files that register architectures, for the processes.
        progress: show a progress bar.
        report: called with each model that is done.

    Returns:
        All that the file has. A model that failed is among it, with the reason.

    Raises:
        ArgumentError: no architecture matches, a runtime that runs no files, or a file of another machine or of other
            options.
        MissingDependencyError: the runtime is not installed.

    Example:
        >>> options = SurveyOptions(seconds=0.01)
        >>> results = survey("resnet20", options, out="survey", progress=False)  # doctest: +SKIP
        >>> results.measured[0].speedup[0] > 1
        True
    """
    names = _names(pattern)
    _check(options)
    path = Path(out) / FILE
    results = _resume(path, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {model.model for model in results.models if not model.error}
    for name in track([name for name in names if name not in done], "survey", show=progress):
        row = _measure(name, options, imports)
        others = [model for model in results.models if model.model != name]
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        results = dataclasses.replace(results, date=date, models=_in_order([*others, row]))
        write_text(path, json.dumps(results.to_dict(), indent=1, allow_nan=False) + "\n")
        if report is not None:
            report(row)
    return results


def read_survey(path: str | Path) -> Survey:
    """Read a results file.

    Raises:
        QzooError: no such file, or one that no survey wrote.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        schema = values.pop("schema")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise QzooError(f"{path} can't be read as a survey ({error}); remove it to begin anew") from error
    if schema != SCHEMA:
        raise QzooError(
            f"{path} has schema {shown(str(schema))[1:-1]}; this qzoo reads schema {SCHEMA}: measure again"
        )
    try:
        return cast(Survey, decode(Survey, values, ""))
    except CheckpointError as error:
        reason = str(error).removeprefix("config.json: ")
        raise QzooError(f"{path} can't be read as a survey ({reason}); remove it to begin anew") from error


def _names(pattern: str | Sequence[str]) -> list[str]:
    from qzoo.registry import list_architectures

    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    matches = {text: list_architectures(text) for text in patterns}
    for text, names in matches.items():
        if not names:
            raise ArgumentError(f"no architecture matches {shown(text)}; `qzoo list` lists all")
    return list(dict.fromkeys(name for names in matches.values() for name in names))


def _check(options: SurveyOptions) -> None:
    from qzoo import runtimes as rt
    from qzoo.bench.options import Options

    if not rt.runtime_named(options.runtime).runs_files:
        raise ArgumentError(
            f"{options.runtime} runs no ONNX files; a survey needs a runtime such as onnxruntime"
        )
    rt.check(options.runtime)
    Options((options.runtime,), (1,), options.threads, options.seconds, limit=options.limit)


def _resume(path: Path, options: SurveyOptions) -> Survey:
    """The results in the file, which are of the same machine and options; without a file none."""
    from qzoo.bench.environment import describe

    results = Survey(options, describe(), datetime.now(timezone.utc).isoformat(timespec="seconds"))
    if not path.exists():
        return results
    earlier = read_survey(path)
    keys = (*_SAME, options.runtime)
    before = (
        [earlier.machine.get(key) for key in keys],
        dataclasses.replace(earlier.options, limit=options.limit),
    )
    if before != ([results.machine.get(key) for key in keys], options):
        raise ArgumentError(
            f"{path} has figures of another machine, other versions or options ({earlier.options}; {before[0]}); give "
            "another folder, or remove the file"
        )
    return earlier


def _in_order(models: Iterable[SurveyRow]) -> tuple[SurveyRow, ...]:
    from qzoo.registry import natural_key

    return tuple(sorted(models, key=lambda model: natural_key(model.model)))


def _measure(name: str, options: SurveyOptions, imports: Sequence[str]) -> SurveyRow:
    """Measure one architecture in a process of its own; an error there is the row's."""
    start = time.monotonic()
    with temporary_folder() as folder:
        request = {
            "name": name,
            "options": dataclasses.asdict(options),
            "imports": list(imports),
            "folder": str(folder),
        }
        log = folder / "log"
        with log.open("wb") as output:
            child = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(request)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path)},
            )
        try:
            child.wait(timeout=options.limit)
            error = ""
        except subprocess.TimeoutExpired:
            error = f"not done within {options.limit:g} s"
        finally:
            child.kill()
            child.wait()
            if child.stdin is not None:
                child.stdin.close()
        answer = folder / "answer.json"
        if not error and answer.is_file():
            values = json.loads(answer.read_text(encoding="utf-8"))
            return cast(SurveyRow, decode(SurveyRow, {**values, "seconds": time.monotonic() - start}, name))
        if not error:
            words = " ".join(log.read_text(errors="replace").split()[-60:])
            error = f"its process ended with status {child.returncode}; it said: {words or 'nothing'}"
    return SurveyRow(**_facts(name), seconds=time.monotonic() - start, error=error)


def _facts(name: str) -> dict[str, Any]:
    """The columns of a row that need no measurement."""
    from qzoo.registry import architecture
    from qzoo.zoo.checkpoint import empty_model

    entry, config = architecture(name), _config(name)
    weights = entry.weights.get(entry.default_tag or "")
    published = weights is not None and weights.labels == "imagenet-1k"
    return {
        "model": name,
        "family": entry.build.__module__.rpartition(".")[2],
        "weights": f"{name}.{entry.default_tag}" if entry.default_tag else "",
        "top1": weights.top1 if weights is not None and published else None,
        "size": config.preprocessing.input_size,
        "parameters": sum(parameter.numel() for parameter in empty_model(config, None).parameters()),
    }


def _config(name: str) -> Config:
    """The config of an architecture as its default weights have it: their classes, channels and image size."""
    from qzoo.registry import architecture
    from qzoo.zoo.request import new_config

    tag = architecture(name).default_tag
    return new_config(f"{name}.{tag}" if tag else name)


# ---- the process of one model ----


def main() -> None:
    """Measure the architecture that the process was started for, and write the answer."""
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    request = json.loads(sys.argv[1])
    options, folder = SurveyOptions(**request["options"]), Path(request["folder"])
    answer = _facts(request["name"]) if not request["imports"] else {}
    try:
        for where in request["imports"]:
            from qzoo.registry import import_models

            import_models(where)
        answer = answer or _facts(request["name"])
        answer |= _latencies(request["name"], options, folder)
    except (QzooError, RuntimeError, MemoryError, OSError) as error:
        first = str(error).strip().partition("\n")[0]
        answer["error"] = f"{type(error).__name__}: {first}"[:400]
    write_text(folder / "answer.json", json.dumps(answer, allow_nan=False))


def _end_with_the_parent() -> None:
    """End this process when the pipe from its parent closes: it was killed."""
    sys.stdin.read()
    os._exit(1)


def _latencies(name: str, options: SurveyOptions, folder: Path) -> dict[str, Any]:
    from qzoo.bench import contenders
    from qzoo.bench.lane import running, time_in_turns
    from qzoo.bench.options import Options
    from qzoo.runtimes import runtime_named

    settings = Options(
        (options.runtime,),
        (1,),
        options.threads,
        options.seconds,
        progress=False,
        limit=options.limit,
        rounds=_ROUNDS,
    )
    quantized, reference, image = random_pair(name, runtime_named(options.runtime).target)
    candidates, _ = contenders.write(quantized, reference, image, settings, None, folder)
    del quantized, reference  # their memory
    with running(candidates, name, settings) as lanes:
        time_in_turns(lanes, name, image, settings)
        rows = [lane.row(name, lanes) for lane in lanes]
    float32, int8 = ({**row.to_dict(), **row.to_dict()["batches"][0]} for row in rows)
    return {
        "float32": _cost(float32),
        "int8": _cost(int8),
        "speedup": list(int8[f"speedup_{int8['clock']}"].values()),
    }


def _cost(row: dict[str, Any]) -> dict[str, Any]:
    return {entry.name: row[entry.name] for entry in dataclasses.fields(Cost)}


def random_pair(name: str, target: str) -> tuple[Any, Any, Any]:
    """Make an architecture with random weights, quantized and float, and an image.

    BatchNorms have the statistics of noise, quantizers its ranges.

    Returns:
        The quantized model, the float model and a batch of one image, for a latency.

    Example:
        >>> quantized, reference, image = random_pair("resnet20", "onnxruntime")
        >>> quantized(image).shape
        torch.Size([1, 10])
    """
    import torch
    from torch import nn

    from qzoo.ptq.ranges import calibrate
    from qzoo.registry import architecture
    from qzoo.zoo.checkpoint import build, empty_model
    from qzoo.zoo.tensors import assign_state

    torch.manual_seed(0)
    config, scheme = _config(name), architecture(name).scheme("w8a8", target)
    reference = build(config, None).eval()
    images = torch.randn(2, *config.preprocessing.input_size)
    norms = [m for m in reference.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None  # the mean of what it sees
        norm.train()
    with torch.no_grad():
        if norms:
            reference(images)
        reference.eval()
    quantized = empty_model(dataclasses.replace(config, scheme=scheme), scheme)
    assign_state(quantized, reference.state_dict().items(), name)
    calibrate(quantized.eval(), [images[:1]], method="max", progress=False)
    return quantized, reference, images[:1]
