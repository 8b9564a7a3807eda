"""What a card says of how a checkpoint was made, with the command that makes it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from qzoo.cards.markdown import number, table, without_broken, word
from qzoo.config import CalibrationRecord, Config
from qzoo.data.sets import DATA_SETS, is_stream
from qzoo.options import PROCEDURAL, flag, flags_of, plain, train_options
from qzoo.registry import architecture
from qzoo.scheme import Scheme

# What trainings on data that need no --data record of it.
_FOUND = {f"{known.title} train" for known in DATA_SETS.values() if known.at_hand}


def recipe(config: Config) -> str:
    """Write the section of a card on how the checkpoint was made."""
    parts = []
    if config.scheme is not None:
        parts.append(_places(config, config.scheme))
    if config.calibration is not None:
        parts.append(_ranges(config, config.calibration))
        if config.calibration.candidates:
            parts.append(_candidates(config.calibration))
        if config.training is None:
            parts.append(f"Built by `{_build_command(config)}`, qzoo {config.qzoo_version}.")
    if config.training is not None:
        parts += _training(config, config.training)
    return "\n\n".join(parts) or "Not recorded."


def _places(config: Config, scheme: Scheme) -> str:
    if scheme.weight_format == "int":
        weights = f"{scheme.weight_bits} bits, symmetric"
    else:
        weights = f"8-bit floats ({scheme.weight_format.upper()})"
    ranges = "one range per output channel"
    if scheme.group:
        ranges = (
            f"one range for {scheme.group} input channels of an output channel; for all where they don't divide into "
            "such groups"
        )
    return (
        f"- Weights: {weights}, {ranges} ({_weight_rule(config)}).{_edges(scheme)}{_mixed(config, scheme)}\n"
        f"- Activations: {scheme.activation_bits} bits, {_sides(scheme)}, one range per tensor."
        f"{_edge_activations(scheme)}\n"
        f"- Not quantized: biases and BatchNorm, which is folded on export.{_half(config)}"
    )


def _sides(scheme: Scheme) -> str:
    if not scheme.affine:
        return "symmetric or unsigned"
    return "with a zero point (symmetric for TensorRT) or unsigned"


def _ranges(config: Config, record: CalibrationRecord) -> str:
    percentile = f" {record.percentile:g}" if record.method == "percentile" and record.percentile else ""
    if record.images:
        images = f"from {record.images} images ({record.data}, images {record.subset}{without_broken(record.skipped)})"
    elif record.method == PROCEDURAL:
        images = "without data: from procedural images"
    else:
        images = "without data: from the statistics in the BatchNorm layers"
    agreement = (
        ""
        if record.agreement is None
        else f" On {number(record.agreement)} % of other procedural images the float model has the same top-1."
    )
    return f"Ranges of activations: method *{record.method}{percentile}*, {images}.{_steps(config, record)}{agreement}"


def _candidates(record: CalibrationRecord) -> str:
    rows = [(r.method, number(r.sqnr_db), number(r.agreement)) for r in record.candidates]
    head = ("method", "SQNR of the logits, dB", "agreement with float, %")
    what = "Methods compared on the calibration images"
    if record.recipe:
        images = f"{record.images - record.held_back} of the calibration images and compared on the other"
        if not record.images:
            images = "some procedural images and compared on"
        what = f"Recipes applied with {images} {record.held_back}; the best was then applied with all of them"
    return f"{what}:\n\n{table(head, rows)}"


def _training(config: Config, options: dict[str, Any]) -> list[str]:
    parts = []
    if options.get("method") in ("lsq", "pact"):
        parts.append(
            f"From there they were trained with the weights ({options['method'].upper()}), for the "
            f"placement of target `{config.target}`."
        )
    # What a script of the repository trained says so; its options may be others than those of qzoo train.
    command = options.get("script") or _train_command(config.name, options)
    rows = [(key.replace("_", " "), plain(value)) for key, value in options.items() if key != "script"]
    parts.append(table(("option", "value"), rows))
    parts.append(f"Trained by `{command}`.")
    return parts


def _edges(scheme: Scheme) -> str:
    """What the first and the last layer have, where it differs; a sentence, or nothing."""
    if scheme.edge.weight_bits == scheme.weight_bits:
        return ""
    return f" The first and the last layer have {scheme.edge.weight_bits}."


def _edge_activations(scheme: Scheme) -> str:
    """Which activations have other bits; a sentence, or nothing."""
    bits = scheme.edge.activation_bits
    if bits == scheme.activation_bits:
        return ""
    return f" Those of the first and the last layer, and what is added, pooled and given out, have {bits}."


def _mixed(config: Config, scheme: Scheme) -> str:
    """Which layers have bits of their own, and why; sentences, or nothing."""
    text = ""
    for bits in sorted({bits for _, bits in scheme.layers if isinstance(bits, int)}, reverse=True):
        names = [f"`{name}`" for name, own in scheme.layers if own == bits]
        inputs = ", inputs too," if bits > scheme.activation_bits else ""
        text += f" Mixed precision: {bits} bits{inputs} have {', '.join(names)}."
    if scheme.float_layers:
        text += f" In float stay {', '.join(f'`{name}`' for name in scheme.float_layers)}."
    drop = config.calibration.drop if config.calibration is not None else 0.0
    if drop:
        text += f" It takes these for at most {drop:g} % of the held-back calibration images to change their top-1."
    return text


def _train_command(name: str, options: dict[str, Any]) -> str:
    """The command that repeats a training; on another machine or number of threads the last bits differ."""
    values = {**options, "data": None if options.get("data") in _FOUND else "DIR"}
    keys = (
        "dataset",
        "data",
        "float",
        "start",
        "layer_bits",
        "subset",
        "evaluation_subset",
        "batch_size",
        "threads",
    )
    flags = {flag(key): str(values[key]).split(" ") for key in keys if values.get(key) is not None}
    if options.get("skipped"):
        flags["--skip-broken"] = []
    processes = options.get("processes", 1)
    start = f"torchrun --nproc-per-node {word(processes)} -m qzoo train" if processes != 1 else "qzoo train"
    return _command(f"{start} {name}", {**flags, **flags_of(train_options(), options)})


def _half(config: Config) -> str:
    if config.calibration is None or not config.calibration.half:
        return ""
    return " BatchNorm's numbers and the weights' ranges are values that float16 holds."


def _weight_rule(config: Config) -> str:
    if config.training is not None and config.training.get("method") == "lsq":
        return "learned in training"
    if config.calibration is not None and config.calibration.rounding == "learned":
        return "range and rounding learned on the calibration images, as AdaRound does"
    if config.calibration is not None and config.calibration.rounding == "sequential":
        return (
            "range and rounding learned on the calibration images, layer after layer, each making up for the errors "
            "of those before it"
        )
    return "its maximum"


def _build_command(config: Config) -> str:
    """The command that makes the checkpoint again: what differs from the defaults."""
    if config.factory:
        return _quantize_command(config)
    known, source = DATA_SETS.get(config.labels), config.float_source
    from_elsewhere = config.calibration is not None and is_stream(config.calibration.data)
    at_hand = known is not None and known.at_hand and not from_elsewhere
    without = at_hand or (not config.metrics and not config.plan.needs_images)
    flags: dict[str, list[object]] = {} if without else {"--data": ["DIR"]}
    if source is not None and source.source.startswith("folder:"):
        flags |= {"--dataset": [config.labels], "--float": [source.source.removeprefix("folder:")]}
    if any(row.skipped for row in (config.calibration, *config.metrics) if row is not None):
        flags["--skip-broken"] = []
    plan = replace(config.plan, evaluation_subset=None)
    defaults = architecture(config.architecture).family.defaults
    if plan.affine == defaults.affine:
        plan = replace(plan, affine=None)
    flags |= plan.flags()
    learned = defaults.recipe_for(config.scheme or Scheme()).rounding != "nearest"
    if learned and not plan.best and plan.recipe.rounding == "nearest":
        flags["--rounding"] = ["nearest"]  # the default of the flag, but not of the family
    return _command(f"qzoo build {config.name}", flags)


def _quantize_command(config: Config) -> str:
    """The command for a network that is not the zoo's."""
    names = {"--calibration-subset": "--subset"}
    shared = ("--method", "--percentile", "--affine", "--no-affine", "--layer-bits", "--target", *names)
    flags: dict[str, list[object]] = {
        "--scheme": [config.scheme],
        "--data": ["DIR"],
        "--size": [config.preprocessing.input_size[1]],
    }
    flags |= {names.get(key, key): [*values] for key, values in config.plan.flags().items() if key in shared}
    if config.exclude:
        flags["--exclude"] = [*config.exclude]
    return _command(f"qzoo quantize {word(config.factory)}", {**flags, "--out": ["FOLDER"]})


def _command(start: str, flags: Mapping[str, Sequence[object]]) -> str:
    return " ".join([start, *(part for name, values in flags.items() for part in (name, *map(word, values)))])


def _steps(config: Config, record: CalibrationRecord) -> str:
    """What else was done to the model, a sentence, or nothing."""
    alpha = "" if record.alpha is None else f" (alpha {record.alpha:g})"
    steps = [f"SmoothQuant{alpha}"] if record.smooth else []
    plain = " with a ReLU in place of every ReLU6" if config.plain_relu else ""
    steps += [f"cross-layer equalization{plain}"] if record.equalize else []
    if record.bias_correction != "none":
        steps.append(f"{record.bias_correction} bias correction")
    return f" Also: {', '.join(steps)}." if steps else ""
