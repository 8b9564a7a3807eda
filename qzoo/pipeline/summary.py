"""What a job came to, as a table for the terminal: figures, size, recipe, and the line that uses the result."""

from __future__ import annotations

from pathlib import Path

from qzoo.cards.figures import runtime_name, size_of_weights
from qzoo.cards.markdown import number
from qzoo.config import Config, Measurement, read_config
from qzoo.zoo import hub

_HEAD = ("", "top-1, %", "95 % interval", "drop, points", "agreement, %", "SQNR, dB")


def summary(folder: str | Path) -> str:
    """Summarize a checkpoint: accuracy against float, size, how it was made, and how to load it.

    Args:
        folder: of the checkpoint; all of this is in its config.json.

    Returns:
        Lines of text, aligned.

    Raises:
        CheckpointError: no valid config.json is there.

    Example:
        >>> print(summary(qzoo.build("resnet20.fmnist-w8a8")))  # doctest: +SKIP
    """
    config = read_config(folder)
    facts = {
        "images": _images(config),
        "size": size_of_weights(config),
        "recipe": _recipe(config),
        "tried": _trials(config),
        "use": _use(config, Path(folder)),
    }
    lines = [config.name, *_figures(config), *(f"{key:8}{text}" for key, text in facts.items() if text)]
    return "\n".join(lines)


def _figures(config: Config) -> list[str]:
    """A line of the table for each row that was measured, under their heads."""
    if not config.metrics:
        return []
    exact = next((row for row in config.metrics if row.precision == "float"), None)
    rows = [_HEAD, *(_cells(row, exact) for row in config.metrics)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    columns = [i for i in range(len(_HEAD)) if any(row[i] for row in rows[1:])]  # float alone has no drop
    return [
        "  ".join(row[i].ljust(widths[i]) if i == 0 else row[i].rjust(widths[i]) for i in columns)
        for row in rows
    ]


def _cells(row: Measurement, exact: Measurement | None) -> tuple[str, ...]:
    low, high = row.top1_interval
    quantized = exact is not None and row is not exact
    return (
        f"{row.precision}, {runtime_name(row)}",
        f"{row.top1:.2f}",
        f"{low:.2f} to {high:.2f}",
        f"{exact.top1 - row.top1:.2f}" if exact is not None and quantized else "",
        number(row.agreement),
        number(row.sqnr_db),
    )


def _images(config: Config) -> str:
    if not config.metrics:
        return f"not measured yet; `qzoo evaluate` does, and `qzoo build {config.name}` does all in one"
    row = config.metrics[0]
    unseen = ", none of which it was made on" if config.seen else ""
    return f"{row.images:,}: {row.data}, {row.subset}{unseen}"


def _recipe(config: Config) -> str:
    """How the checkpoint was made: the recipe of its calibration, the options of its training."""
    parts = []
    record = config.calibration
    if record is not None:
        chosen = " (the best of those tried)" if record.recipe else ""
        images = f"{record.images} images" if record.images else "no images"
        parts.append(f"{record.applied()}{chosen}, on {images}")
    if config.scheme is not None and config.scheme.layers:
        parts.append("bits of layers " + ", ".join(f"{name} {bits}" for name, bits in config.scheme.layers))
    options = config.training
    if options is not None:
        parts.append(
            f"{options['epochs']} epochs, lr {options['lr']:g}, batches of {options['batch_size']}, "
            f"{options['images']:,} images"
        )
    return "; ".join(parts)


def _trials(config: Config) -> str:
    candidates = config.calibration.candidates if config.calibration is not None else ()
    lines = [f"{number(c.sqnr_db):>6} dB  agreement {c.agreement:6.2f} %  {c.method}" for c in candidates]
    return f"\n{'':8}".join(lines)


def _use(config: Config, folder: Path) -> str:
    """A line of Python that loads the checkpoint, by its name where that finds this folder."""
    if folder.resolve() in [local.resolve() for local in hub.local_folders(config.name)[:1]]:
        return f'qzoo.create_model("{config.name}", pretrained=True)'
    return f'qzoo.load_pretrained("{folder}")'
