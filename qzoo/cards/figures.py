"""What a card says of measurements: accuracy, latency, size."""

from __future__ import annotations

from collections.abc import Iterable

from qzoo.cards.markdown import number, table, without_broken
from qzoo.config import WEIGHTS, Config, Latency, Measurement
from qzoo.zoo.checkpoint import empty_model

NAMES = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "tensorrt": "TensorRT"}


def measured(config: Config) -> str:
    """Write the section of a card on what was measured."""
    if not config.metrics:
        without = config.calibration is not None and config.calibration.applied().data_free
        return "Calibrated without data, accuracy not measured." if without else "Nothing yet."
    head = (
        "runtime",
        "precision",
        "top-1, % (95 % interval)",
        "top-5, %",
        "agreement, %",
        "SQNR, dB",
        "images",
    )
    rows = [
        (
            runtime_name(row),
            row.precision,
            f"{row.top1:.2f} ({row.top1_interval[0]:.2f} to {row.top1_interval[1]:.2f})",
            f"{row.top5:.2f}",
            number(row.agreement),
            number(row.sqnr_db),
            f"{row.images:,}",
        )
        for row in config.metrics
    ]
    text = table(head, rows)
    places = sorted(
        {f"{row.data}, images {row.subset}{without_broken(row.skipped)}" for row in config.metrics}
    )
    text += f"\n\nImages: {'; '.join(places)}."
    if config.seen:
        text += " None of them was trained or calibrated on."
    if config.scheme is not None:
        text += (
            " Float and quantized saw the same images in the same run. Agreement (same top-1) and SQNR (of the logits) "
            "are against the float model in PyTorch."
        )
    if config.latency:
        text += f"\n\n{_latency(config)}"
    size = size_of_weights(config)
    built = f"`{WEIGHTS}` ({config.form}): {size}." if size else "No weights have been built."
    return f"{text}\n\n{built}"


def _latency(config: Config) -> str:
    head = ("runtime", "precision", "batch", "threads", "median, ms", "p90, ms", "speed-up (95 % interval)")
    rows = [
        (
            NAMES.get(r.runtime, r.runtime),
            r.precision,
            str(r.batch),
            str(r.threads),
            f"{r.median_ms:.2f}",
            f"{r.p90_ms:.2f}",
            _speedup(r),
        )
        for r in config.latency
    ]
    where = sorted({f"{r.machine}; {r.versions}; {r.date}" for r in config.latency})
    clock = clocks_in_words(r.speedup_clock for r in config.latency if r.speedup is not None)
    return (
        f"Latency of one call, wall time; speed-up over float in the same runtime, {clock}:\n\n"
        f"{table(head, rows)}\n\n"
        f"Measured on {'. '.join(where)}."
    )


def _speedup(row: Latency) -> str:
    if row.speedup is None:
        return ""
    if row.speedup_interval is None:
        return f"{row.speedup:.2f}"
    return f"{row.speedup:.2f} ({row.speedup_interval[0]:.2f} to {row.speedup_interval[1]:.2f})"


def size_of_weights(config: Config) -> str:
    """Format the size of the weights, ``"4.87 MB, 26.0 % of the float tensors"``; "" where none have been built."""
    size = config.sizes.get(WEIGHTS)
    if size is None:
        return ""
    share = f", {100 * size / float_bytes(config):.1f} % of the float tensors" if config.scheme else ""
    return f"{size / 1e6:.2f} MB{share}"


def float_bytes(config: Config) -> int:
    """Count the bytes of the float model's tensors."""
    return sum(tensor.nbytes for tensor in empty_model(config, None).state_dict().values())


def runtime_name(row: Measurement) -> str:
    """Name the runtime that a row was measured in."""
    runtime = NAMES.get(row.runtime, row.runtime)
    if row.target is None or row.runtime == row.target:
        return runtime
    return f"{runtime}, simulating {NAMES[row.target]}"


def clocks_in_words(clocks: Iterable[str]) -> str:
    """Name the clocks of speed-ups, ``"by CPU time"`` for {"cpu"}; both where some of the models run on GPUs."""
    kinds = set(clocks)
    if kinds == {"cpu", "wall"}:
        return "by CPU time, on GPUs by wall time"
    return "by wall time" if kinds == {"wall"} else "by CPU time"
