"""Pages that MkDocs makes while it builds the site: models, support matrix, API reference, ``llms.txt``,
notebooks, pictures and the demo.

Nothing of them is kept in the repository: they come from the registry, the checkpoints' ``config.json``, the table of
operators and ``scheme.TARGETS``, so that they can't be stale.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from demo import demo
from figures import figures, sensitivity_command, sensitivity_of
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from notebooks import notebooks

import qzoo
from qzoo.bench.latency import speedup_text
from qzoo.cards.markdown import number, table
from qzoo.config import Config
from qzoo.errors import ExportError
from qzoo.export.formats import choose_opset
from qzoo.registry import ModelEntry, architecture, list_architectures
from qzoo.release.tables import drop_text, embedded_configs, quantized_row, size_text
from qzoo.runtimes.operators import OPERATORS
from qzoo.scheme import ROLES, TARGETS
from qzoo.zoo import hub

ROOT = Path(__file__).parent.parent
API = (
    "qzoo",
    "qzoo.ptq",
    "qzoo.qat",
    "qzoo.export",
    "qzoo.runtimes",
    "qzoo.data",
    "qzoo.quantizers",
    "qzoo.accuracy",
    "qzoo.scheme",
    "qzoo.registry",
    "qzoo.models.layers",
    "qzoo.quant",
    "qzoo.quant.nn",
    "qzoo.quant.calib",
    "qzoo.quant.tensor_quant",
    "qzoo.quant.quant_modules",
    "qzoo.quant.utils",
)
FORMATS = (
    ("int8 weights and activations", "w8a8", "int8"),
    ("weights of 4 bits, stored as int8", "w4a8", "int8"),
    ('weights of 4 bits, packed: `weights="int4"`', "w4a8", "int4"),
    ("weights of 4 bits with a range for every 32 inputs", "w4g32a8", "int8"),
    ("weights and activations of 4 bits, stored as int8", "w4a4", "int8"),
    ("weights of 8-bit floating point, E4M3", "w8e4m3a8", "int8"),
)
_METHOD = "[how we measure](../benchmark.md)."


def generated() -> dict[str, str]:
    """All pages that are made, by their path in the site."""
    configs = embedded_configs()
    pages = {"support.md": support(), "models/index.md": browser(configs)}
    pages |= {f"models/{arch}.md": model_page(arch, configs) for arch in list_architectures()}
    pages |= {f"cards/{config.name}.md": card(config.name) for config in configs}
    return pages | reference()


# Support matrix


def support() -> str:
    """Operators, roles and formats by runtime, from the tables that lint, placement and export use."""
    targets = list(TARGETS)
    operators = [
        (f"`{row.name}`", row.kind, *(row.on(target) for target in targets), row.note)
        for row in OPERATORS.values()
    ]
    roles = [(role, *("quantized" if role in TARGETS[t].roles else "" for t in targets)) for role in ROLES]
    rules = [
        ("non-negative activations", *("uint8" if TARGETS[t].unsigned else "int8" for t in targets)),
        (
            "zero points other than 0 (affine activations)",
            *("yes" if TARGETS[t].affine else "no" for t in targets),
        ),
    ]
    formats = [
        (text, *(opset(scheme, target, weights) for target in targets)) for text, scheme, weights in FORMATS
    ]
    return f"""# Support matrix

Made from the tables that `qzoo lint`, the placement of quantizers and the export use. Rows of ONNX Runtime and OpenVINO
were seen in the graphs that these runtimes make of small files; TensorRT's are what it documents: the project has not
run it.

## Operators

| how | the runtime |
| --- | --- |
| int8 | has an integer kernel between a DequantizeLinear before each operand and a QuantizeLinear behind |
| fused | computes it with the layer before, or with the Q behind: no pair between that layer and it |
| carried | moves Q and DQ across it: one pair, on the side of the input, is enough |
| shared | computes it on integers between pairs of one range |
| float | computes it in float, and converts the tensor before and behind |

<div class="filterable" markdown="1">

{table(("operator", "kind", *targets, "note"), operators)}

</div>

Operators that are not listed count as float.

## Roles of quantizers

{table(("role", *targets), roles)}

{table(("", *targets), rules)}

## Formats

The lowest opset of the file that `export_onnx` writes, or why it refuses.

{table(("format", *targets), formats)}
"""


def opset(scheme: str, target: str, weights: str) -> str:
    """The opset that a ResNet-20 of a scheme needs for a target, or the reason why there is none."""
    model = qzoo.set_target(qzoo.create_model("resnet20", quantize=scheme), target)
    try:
        return f"opset {choose_opset(model, target, None, weights)}"
    except ExportError as error:
        return str(error).partition("; ")[0]


# Models


def browser(configs: list[Config]) -> str:
    """One table of all checkpoints and architectures."""
    rows = []
    for arch in list_architectures():
        entry = architecture(arch)
        own = [config for config in configs if config.architecture == arch]
        rows += [_checkpoint_row(config) for config in own]
        if not own:
            licences = ", ".join(sorted({weights.license for weights in entry.weights.values()}))
            rows.append(
                (f"[{arch}]({arch}.md)", _family(entry), _task(entry), "recipe only", *[""] * 6, licences)
            )
    head = (
        "name", "family", "task", "weights and activations", "size, MB (of float)", "top-1, %", "drop, points",
        "agreement, %", "latency in ONNX Runtime, ms", "speed-up in ONNX Runtime", "licence",
    )  # fmt: skip
    return f"""# Models

Click a heading to sort. The field filters by words, and by limits on columns: `resnet w8a8`, `size<1 drop<0.2`,
`latency<1 apache`. Latency is of one image on one thread, on the machine that the card names. Top-1 is of the images
that the card names: Fashion-MNIST's test images, or images of the ImageNet sample; rows of different data can't be
compared. Where only a recipe stands, `qzoo build NAME --data DIR` makes the checkpoint, and no figure is claimed.
Reproduce: `qzoo verify --measure` measures what is embedded again, `qzoo benchmark NAME` the latencies.

<div class="filterable" markdown="1">

{table(head, rows)}

</div>

All names, recipes and sources: [the zoo](../zoo.md).
"""


def _family(entry: ModelEntry) -> str:
    return entry.build.__module__.rpartition(".")[2]


def _task(entry: ModelEntry) -> str:
    return "features" if entry.default("num_classes") == 0 else "classification"


def _checkpoint_row(config: Config) -> tuple[str, ...]:
    quantized = config.scheme is not None and len(config.metrics) > 1
    row = quantized_row(config) if quantized else next(iter(config.metrics), None)
    return (
        f"[{config.name}]({config.architecture}.md)",
        _family(architecture(config.architecture)),
        _task(architecture(config.architecture)),
        str(config.scheme or "float"),
        size_text(config),
        f"{row.top1:.2f}" if row else "",
        drop_text(config) if quantized else "",
        number(row.agreement) if row and quantized else "",
        _latency_text(config) if quantized else "",
        speedup_text(config) if quantized else "",
        config.license,
    )


def _latency_text(config: Config) -> str:
    """Of the quantized file in ONNX Runtime, one image on one thread."""
    rows = (row for row in config.latency if (row.runtime, row.batch, row.threads) == ("onnxruntime", 1, 1))
    return next((f"{row.median_ms:.2f}" for row in rows if row.speedup is not None), "")


def _latencies(configs: list[Config]) -> list[tuple[str, ...]]:
    """Every timed run of some checkpoints."""
    return [
        (config.name, row.runtime, row.precision, str(row.batch), str(row.threads), f"{row.median_ms:.2f}",
         f"{row.p90_ms:.2f}", f"{row.speedup:.2f}" if row.speedup else "", row.machine, row.date)
        for config in configs for row in config.latency
    ]  # fmt: skip


def model_page(arch: str, configs: list[Config]) -> str:
    """One architecture: what it is, its weights and checkpoints, the commands, its definition."""
    entry = architecture(arch)
    own = [config for config in configs if config.architecture == arch]
    module = importlib.import_module(entry.build.__module__)
    source = Path(module.__file__ or "").resolve().relative_to(ROOT)
    about = re.sub(
        r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", (module.__doc__ or "").strip()
    )
    float_weights = [
        (f"`{arch}.{tag}`", f"`{weights.sources[0]}`", weights.license)
        for tag, weights in entry.weights.items()
    ]
    parts = [f"# {arch}", about]
    if float_weights:
        parts += ["## Float weights", table(("name", "first source", "licence"), float_weights)]
    if own:
        rows = [
            (f"[`{config.name}`](../cards/{config.name}.md)", *_checkpoint_row(config)[3:]) for config in own
        ]
        head = ("checkpoint", "bits", "size, MB (of float)", "top-1, %", "drop, points", "agreement, %",
                "latency in ONNX Runtime, ms", "speed-up in ONNX Runtime", "licence")  # fmt: skip
        parts += [
            "## Checkpoints",
            table(head, rows),
            "Each card has the images behind the figures, latencies with their machine, and the command that made it.",
        ]
    elif float_weights:
        parts += [
            "## Checkpoints",
            "None is published: nothing is measured. The commands below make one, and measure it on your images.",
        ]
    timed = _latencies(own)
    if timed:
        head = ("checkpoint", "runtime", "precision", "batch", "threads", "median, ms", "90 %, ms", "speed-up",
                "machine", "date")  # fmt: skip
        parts += [
            "## Latency",
            table(head, timed),
            f"Reproduce: `qzoo benchmark NAME --batch 1 8`; {_METHOD}",
        ]
    for config in own:
        if sensitivity_of(config.name) is not None:
            parts += [
                f"## Sensitivity of {config.name}",
                f"![SQNR of the logits, layer by layer](../figures/sensitivity-{config.name}.svg)",
                "The longest bars lose least. Compared with the checkpoint's weights and no quantizer: their rounding, "
                f"which is stored, costs nothing here. Reproduce: `{sensitivity_command(config.name)}`.",
            ]
    parts += ["## Commands", "```bash\n" + "\n".join(_commands(arch, entry, own)) + "\n```"]
    if entry.family.citation:
        parts += ["## Citation", f"```bibtex\n{entry.family.citation.strip()}\n```"]
    parts += ["## Definition", f"`{source}`", f"```python\n{(ROOT / source).read_text(encoding='utf-8')}```"]
    return "\n\n".join(parts) + "\n"


def _commands(arch: str, entry: ModelEntry, own: list[Config]) -> list[str]:
    """From a name to a checkpoint, where none is embedded, and what there is to do with it."""
    if own:
        name, before = own[-1].name, []
    elif entry.default_tag:
        name = f"{arch}.{entry.default_tag}-w8a8"
        before = [f"qzoo build {name} --data imagenet"]
    else:  # the zoo has no weights: your own
        name = f"{arch}.mine-w8a8"
        before = [
            f"qzoo train {arch}.mine --dataset imagenet-1k --data imagenet",
            f"qzoo build {name} --float {arch}.mine --data imagenet",
        ]
    if entry.default("num_classes") == 0:  # an image encoder, for which labelled images are no use
        return [
            f"qzoo build {name}",
            f"qzoo benchmark {name} --out report",
            f"qzoo export {name} {arch}.onnx --target onnxruntime",
        ]
    data = "" if ".fmnist" in name else " --data imagenet"
    return [
        *before,
        f"qzoo benchmark {name}{data} --out report",
        f"qzoo export {name} {arch}.onnx --target onnxruntime",
        f"qzoo sensitivity {name}{data}",
    ]


def card(name: str) -> str:
    """A model card without the front matter that the Hub reads."""
    text = (hub.embedded()[name] / "README.md").read_text(encoding="utf-8")
    return re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)


# API reference and llms.txt


def reference() -> dict[str, str]:
    """A page a module: its public names, each on the first page that has it."""
    pages, seen = {}, set()
    for name in API:
        module = importlib.import_module(name)
        own = [path for path in dict.fromkeys(_public(module)) if path not in seen]
        seen |= set(own)
        first = (module.__doc__ or name).strip().partition("\n\n")[0]
        objects = "\n\n".join(f"::: {path}" for path in own)
        pages[f"api/{'index' if name == 'qzoo' else name}.md"] = f"# {name}\n\n{first}\n\n{objects}\n"
    return pages


def _public(module: Any) -> Iterator[str]:
    """Where the public functions and classes of a module are defined."""
    listed = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", "") == module.__name__
        and callable(value)
    ]
    for name in listed:
        value = getattr(module, name)
        home = getattr(value, "__module__", "")
        if callable(value) and home.startswith("qzoo") and getattr(value, "__doc__", None):
            yield f"{home}.{value.__qualname__}"


def llms(pages: list[tuple[str, str]]) -> str:
    """``llms.txt`` (llmstxt.org): what the project is, and one line for each page."""
    lines = "\n".join(f"- [{title}]({url})" for title, url in pages)
    return f"""# qzoo

> A zoo of pre-quantized vision models for PyTorch: calibrated int8 checkpoints, Q/DQ ONNX for ONNX Runtime, OpenVINO
> and TensorRT, and the quantization core that replaces NVIDIA's pytorch-quantization.

{lines}
"""


def _heading(file: File) -> str:
    """The first heading of a page that the navigation gives no title."""
    return next(line[2:] for line in file.content_string.splitlines() if line.startswith("# "))


# MkDocs calls these.


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    for path, content in {**generated(), **notebooks(), **figures(), **demo()}.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links into the repository at the pages of the site that show the same."""
    up = "../" * page.file.src_uri.count("/")
    markdown = re.sub(r"\[(\w+)\]\(\.\./models/\w+\.py\)", rf"[\1]({up}models/\1.md)", markdown)
    return re.sub(r"\((?:\.\./)+model_cards/([^/)]+)/README\.md\)", rf"({up}cards/\1.md)", markdown)


def on_nav(nav: Any, config: MkDocsConfig, files: Files) -> None:
    """Keep the titles of the pages in reading order for llms.txt."""
    titles = [(page.title or _heading(page.file), page.url or "./") for page in nav.pages]
    files.append(File.generated(config, "llms.txt", content=llms(titles)))
