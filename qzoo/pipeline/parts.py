"""Which images of a data set a job calibrates on, trains on and measures on: parts that share nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qzoo.config import Config
from qzoo.data import image_files, parse_subset
from qzoo.data.folders import split_folder
from qzoo.data.sets import DATA_SETS, data_set
from qzoo.errors import DataError


@dataclass(frozen=True)
class Images:
    """Part of a data set: what to load, and what to call it.

    Attributes:
        text: in words.
        split: "train" or "test", as :func:`qzoo.data.load_data` takes it.
        subset: ``"start:stop"`` in the split's fixed order.
        count: number of images.
    """

    text: str
    split: str
    subset: str
    count: int


NONE = Images("none", "", "", 0)


def calibration_images(config: Config, data: str | Path | None, subset: str | None) -> Images:
    """The images to calibrate a model on, by default the first ones: 512 of a data set with a training split,
    at most 128, and a quarter, of a folder.

    Raises:
        DataError: no such data, or a subset that they don't have.
    """
    whole = all_images(config, data, "train")
    first = data_set(config.labels).calibration or max(1, min(128, whole.count // 4))
    return _part(whole, subset or f"0:{first}")


def evaluation_images(config: Config, data: str | Path | None, subset: str | None, before: Images) -> Images:
    """The images to measure on: the whole test split; of a folder that is one split, what follows ``before``.

    Raises:
        DataError: no such data, a subset that they don't have, or images that ``before`` has too.
    """
    whole = all_images(config, data, "test")
    if before.split != whole.split:
        return _part(whole, subset or ":")
    stop = before.subset.partition(":")[2]
    if subset is None and int(stop) >= whole.count:
        raise DataError(
            f"no images are left to measure on: {before.subset} of {whole.count} are used up; choose a smaller part, "
            "or give folders train and val in the data's folder"
        )
    checks = _part(whole, subset or f"{stop}:")
    first, second = (parse_subset(part.subset, whole.count) for part in (before, checks))
    if max(first[0], second[0]) < min(first[1], second[1]):
        raise DataError(
            f"{before.subset} for calibration or training and {checks.subset} for evaluation share images; a figure "
            "measured on images that the model was made with says little"
        )
    return checks


def training_images(config: Config, data: str | Path | None, subset: str | None) -> Images:
    """The images to train on: the whole training split; four fifths of a folder that is one split.

    Raises:
        DataError: no such data, or a subset that they don't have.
    """
    whole = all_images(config, data, "train")
    return _part(whole, subset or (":" if whole.split == "train" else f"0:{max(1, whole.count * 4 // 5)}"))


def all_images(config: Config, data: str | Path | None, split: str) -> Images:
    """All images of a split; a folder without ``train`` and ``val`` is its own test split."""
    if config.labels not in DATA_SETS:
        raise DataError(
            f"no data set is known for the labels {config.labels!r} of {config.name}; give one with --dataset"
        )
    known = DATA_SETS[config.labels]
    if known.sizes is not None:
        return Images(f"{known.title} {split}", split, ":", known.sizes[split == "test"])
    if data is None:
        raise DataError(f"{config.name} needs images: pass data=FOLDER (--data FOLDER)")
    root = split_folder(data, split)
    count = len(image_files(config.labels, root, config.preprocessing))
    title = "" if known.classes is None else f"{known.title}, "
    if root == Path(data):
        return Images(f"{title}{root.resolve().name} ({count} images)", "test", ":", count)
    return Images(f"{title}{Path(data).resolve().name} {root.name} ({count} images)", split, ":", count)


def _part(whole: Images, subset: str) -> Images:
    start, stop = parse_subset(subset, whole.count)
    return Images(whole.text, whole.split, f"{start}:{stop}", stop - start)
