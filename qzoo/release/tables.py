"""The README's table of the zoo, made from the checkpoints' config.json files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qzoo.bench.latency import speedup_text
from qzoo.cards.figures import float_bytes
from qzoo.cards.markdown import number, table
from qzoo.config import WEIGHTS, Config, Measurement, read_config
from qzoo.errors import QzooError
from qzoo.files import write_text
from qzoo.registry import ModelName, architecture, list_architectures, natural_key
from qzoo.zoo import hub

HOW_TO_GET = (
    "`qzoo.create_model(NAME, pretrained=True)` calibrates the float weights without data, unmeasured; "
    "`qzoo build NAME --data DIR` makes a measured one"
)
_START, _END = "<!-- zoo-table:start -->", "<!-- zoo-table:end -->"


def zoo_table(configs: Sequence[Config]) -> str:
    """Write a Markdown table of the quantized checkpoints with their figures, and of names not published yet."""
    head = [
        "checkpoint", "size, MB (of float)", "float top-1, %", "quantized top-1, % (95 % interval)", "drop, points",
        "agreement, %", "SQNR, dB", "images measured",
    ]  # fmt: skip
    shown = [config for config in configs if config.scheme is not None and config.metrics]
    timed = any(speedup_text(config) for config in shown)
    if timed:
        head.insert(5, "speed-up in ONNX Runtime")
    rows = [_zoo_row(config, timed) for config in shown]
    listed = table(head, rows) if rows else "No checkpoint has been built yet."
    floats = [f"`{c.name}` (top-1 {c.metrics[0].top1:.2f} %)" for c in configs if not c.scheme and c.metrics]
    text = f"{listed}\n\n"
    if rows:
        text += (
            f"Measured with qzoo {', '.join(sorted({c.qzoo_version for c in configs}))}. "
            "Quantized figures are of the ONNX file in ONNX Runtime where it was run, else of its simulation; float "
            "and quantized saw the same images. "
        )
        text += (
            "Speed-ups are over float in the same runtime, on the card's machine, by CPU time where not marked. "
            if timed
            else ""
        )
        text += "Cards: `model_cards/`; everything in one page: [docs/zoo.md](docs/zoo.md).\n\n"
    if floats:
        text += f"Float checkpoints: {', '.join(floats)}.\n\n"
    recipes = unbuilt({config.name for config in configs})
    example = next((name for name in recipes if name.startswith("resnet50.")), recipes[0])
    return (
        f"{text}No checkpoint is published of {len(recipes)} others ([all of them](docs/zoo.md)), such as `{example}`: "
        f"{HOW_TO_GET}.\n"
    )


def unbuilt(built: set[str]) -> list[str]:
    """List the W8A8 names that can be built from public float weights and are not among ``built``.

    The zoo's own float weights count where they have been trained.
    """
    names = {
        str(ModelName(arch, tag, "w8a8"))
        for arch in list_architectures()
        for tag, weights in architecture(arch).weights.items()
        if any(not s.startswith("qzoo:") or s.removeprefix("qzoo:") in built for s in weights.sources)
    }
    return sorted(names - built, key=natural_key)


def quantized_row(config: Config) -> Measurement:
    """Choose the row that tables show: of the ONNX file in ONNX Runtime where it was run, else of a simulation."""
    rows = [row for row in config.metrics if row.precision != "float"]
    return next((row for row in rows if row.runtime == "onnxruntime"), rows[0])


def drop_text(config: Config) -> str:
    """Format the drop of top-1: float less quantized, in points."""
    reference = next(row for row in config.metrics if row.precision == "float")
    drop = reference.top1 - quantized_row(config).top1
    return f"{drop:.2f}" if abs(drop) >= 0.005 else "0.00"


def size_text(config: Config) -> str:
    """Format the size of the weights: megabytes, and percent of the float tensors."""
    size = config.sizes.get(WEIGHTS, 0)
    return f"{size / 1e6:.2f} ({100 * size / float_bytes(config):.1f} %)"


def _zoo_row(config: Config, timed: bool) -> tuple[str, ...]:
    reference = next(row for row in config.metrics if row.precision == "float")
    best = quantized_row(config)
    return (
        f"[`{config.name}`](model_cards/{config.name}/README.md)",
        size_text(config),
        f"{reference.top1:.2f}",
        f"{best.top1:.2f} ({best.top1_interval[0]:.2f} to {best.top1_interval[1]:.2f})",
        drop_text(config),
        *([speedup_text(config)] if timed else []),
        number(best.agreement),
        number(best.sqnr_db),
        f"{best.images:,}: {best.data}",
    )


def embedded_configs(cards: str | Path | None = None) -> list[Config]:
    """Read the configs of the checkpoints in a folder; the package's own by default."""
    folders = (p.parent for p in Path(cards).glob("*/config.json")) if cards else hub.embedded().values()
    return [read_config(folder) for folder in sorted(folders, key=lambda f: natural_key(f.name))]


def update_readme(readme: str | Path, cards: str | Path | None = None) -> bool:
    """Rewrite the table between the markers of a README; True when the text changed.

    Args:
        readme: the file.
        cards: folder of checkpoint folders; the package's own by default.

    Raises:
        QzooError: the markers are not there.
    """
    path = Path(readme)
    text = path.read_text(encoding="utf-8")
    if text.count(_START) != 1 or text.count(_END) != 1:
        raise QzooError(f"{readme} needs the lines {_START} and {_END}, once each")
    before, _, rest = text.partition(_START)
    after = rest.partition(_END)[2]
    new = f"{before}{_START}\n{zoo_table(embedded_configs(cards))}{_END}{after}"
    if new != text:
        write_text(path, new)
    return new != text
