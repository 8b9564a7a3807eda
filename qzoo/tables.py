"""The README's table of the zoo, made from the checkpoints' config.json files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qzoo import hub
from qzoo.cards import float_bytes, number, table
from qzoo.config import WEIGHTS, Config, read_config
from qzoo.errors import QzooError
from qzoo.registry import ModelName, architecture, list_architectures, natural_key

_START, _END = "<!-- zoo-table:start -->", "<!-- zoo-table:end -->"


def zoo_table(configs: Sequence[Config]) -> str:
    """Markdown: the quantized checkpoints with their figures, and the names that can be built."""
    head = (
        "checkpoint", "size, MB (of float)", "float top-1, %", "quantized top-1, % (95 % interval)",
        "agreement, %", "SQNR, dB", "images measured",
    )  # fmt: skip
    rows = [_zoo_row(config) for config in configs if config.scheme is not None and config.metrics]
    listed = table(head, rows) if rows else "No checkpoint has been built yet."
    floats = [f"`{c.name}` (top-1 {c.metrics[0].top1:.2f} %)" for c in configs if not c.scheme and c.metrics]
    text = f"{listed}\n\n"
    if rows:
        text += (
            f"Measured with qzoo {', '.join(sorted({c.qzoo_version for c in configs}))}. "
            "Quantized figures are of the ONNX file in ONNX Runtime where it was run, else of its "
            "simulation; float "
            "and quantized saw the same images. Cards: `model_cards/`.\n\n"
        )
    if floats:
        text += f"Float checkpoints: {', '.join(floats)}.\n\n"
    recipes = [f"`{name}`" for name in unbuilt({config.name for config in configs})]
    return f"{text}Not built yet; `qzoo build NAME --data DIR` makes them: {', '.join(recipes)}.\n"


def unbuilt(built: set[str]) -> list[str]:
    """W8A8 names that can be built from public float weights, and are not among ``built``.

    The zoo's own float weights count where they have been trained.
    """
    names = {
        str(ModelName(arch, tag, "w8a8"))
        for arch in list_architectures()
        for tag, weights in architecture(arch).weights.items()
        if any(not s.startswith("qzoo:") or s.removeprefix("qzoo:") in built for s in weights.sources)
    }
    return sorted(names - built, key=natural_key)


def _zoo_row(config: Config) -> tuple[str, ...]:
    reference = next(row for row in config.metrics if row.precision == "float")
    quantized = [row for row in config.metrics if row.precision != "float"]
    best = next((row for row in quantized if row.runtime == "onnxruntime"), quantized[0])
    size = config.sizes.get(WEIGHTS, 0)
    return (
        f"[`{config.name}`](model_cards/{config.name}/README.md)",
        f"{size / 1e6:.2f} ({100 * size / float_bytes(config):.1f} %)",
        f"{reference.top1:.2f}",
        f"{best.top1:.2f} ({best.top1_interval[0]:.2f} to {best.top1_interval[1]:.2f})",
        number(best.agreement),
        number(best.sqnr_db),
        f"{best.images:,}: {best.data}",
    )


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
    folders = (
        Path(cards).glob("*/config.json") if cards else (f / "config.json" for f in hub.embedded().values())
    )
    names = sorted((path.parent for path in folders), key=lambda f: natural_key(f.name))
    before, _, rest = text.partition(_START)
    after = rest.partition(_END)[2]
    new = f"{before}{_START}\n{zoo_table([read_config(folder) for folder in names])}{_END}{after}"
    path.write_text(new, encoding="utf-8")
    return new != text
