"""Which images of a data set a job calibrates on, trains on and measures on: parts that share nothing.

A folder that is one split is cut once. What a model was made on is kept in its config
(:class:`qzoo.data.sets.SeenImages`), so that whatever is made from it, and whatever measures it later, keeps to the
same cut.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from qzoo.config import Arguments, Config
from qzoo.data import ImageFolder, Loader, image_files, load_data, parse_subset
from qzoo.data.files import ImageFiles
from qzoo.data.folders import split_folder
from qzoo.data.sets import DATA_SETS, SAMPLES, SeenImages, data_set, is_stream
from qzoo.data.sources import UNKNOWN, open_source
from qzoo.data.streams import LabelMap
from qzoo.errors import DataError
from qzoo.export.description import OnnxDescription

BATCH = 32


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

    def load(
        self,
        model: Config | OnnxDescription,
        data: str | Path | None,
        *,
        batch_size: int = BATCH,
        workers: int = 0,
        skip_broken: bool = False,
    ) -> Loader:
        """Load them as batches that are prepared for a model; see :func:`qzoo.data.load_data`."""
        return load_data(
            model.preprocessing,
            model.labels,
            data,
            split=self.split,
            subset=self.subset,
            batch_size=batch_size,
            workers=workers,
            classes=model.classes or (model.arguments.num_classes if isinstance(model, Config) else None),
            skip_broken=skip_broken,
        )


NONE = Images("none", "", "", 0)


class _Range(NamedTuple):
    """Positions in a split's order, from ``start`` up to ``stop``, and what they are used for."""

    start: int
    stop: int
    use: str

    def shares(self, start: int, stop: int) -> int:
        """Count the images that it has in common with other positions."""
        return max(0, min(self.stop, stop) - max(self.start, start))


def for_data_set(config: Config, dataset: str) -> Config:
    """Return the config of a model whose images are named: of weights of your own, which may not say what they are for.

    Args:
        dataset: a name of :data:`qzoo.data.sets.DATA_SETS`; "" leaves it to the config.

    Raises:
        DataError: an unknown one, one of other images than the config's, or of another number of classes.
    """
    if config.is_encoder and dataset:
        raise _no_labels(config)
    if dataset in ("", config.labels):
        return config
    classes = data_set(dataset).classes
    if config.labels:
        raise DataError(f"{config.name} is for {config.labels}, not for {dataset}; leave --dataset out")
    if classes not in (None, config.arguments.num_classes):
        raise DataError(f"{dataset} has {classes} classes, but {config.name} {config.arguments.num_classes}")
    return replace(config, labels=dataset)


def calibration_images(config: Config, data: str | Path | None, subset: str | None) -> Images:
    """Choose the images to calibrate a model on, by default the first ones: 512 of a data set with a training split,
    at most 128, and a quarter, of a folder, out of those that the model was trained on.

    Raises:
        DataError: no such data, or a subset that they don't have.
    """
    whole, files = _split(config, data, "train")
    start, stop = _trained_on(config, files, whole) or (0, whole.count)
    first = data_set(config.labels).calibration or max(1, min(128, whole.count // 4))
    return _part(whole, subset or f"{start}:{min(start + first, stop)}")


def training_images(config: Config, data: str | Path | None, subset: str | None) -> Images:
    """Choose the images to train on: the whole training split; of a folder that is one split, those that the model was
    trained on before, else four fifths.

    Raises:
        DataError: no such data, a subset that they don't have, or images whose number is not known.
    """
    whole, files = _split(config, data, "train")
    if subset is None and whole.count == UNKNOWN:
        raise DataError(
            f"how many images {whole.text} has is not known before the end, and an epoch has a length; say which to "
            "train on, such as :1281167 (--subset)"
        )
    if subset is None and whole.split == "test":
        start, stop = _trained_on(config, files, whole) or (0, max(1, whole.count * 4 // 5))
        subset = f"{start}:{stop}"
    return _part(whole, subset or ":")


def evaluation_images(config: Config, data: str | Path | None, subset: str | None, before: Images) -> Images:
    """Choose the images to measure a new model on: the whole test split, without what it is made on.

    Args:
        before: what it is calibrated or trained on now. What it was made from says the rest.
        subset: by default the longest part of the split that has none of these.

    Raises:
        DataError: no such data, a subset that they don't have, or images that the model is made on.
    """
    whole, files = _split(config, data, "test")
    used = _used(config, files, whole)
    if before.split == whole.split:
        used.append(_Range(*parse_subset(before.subset, whole.count), "calibration or training"))
    if subset is None:
        return _part(whole, _longest_rest(whole, used))
    checks = _part(whole, subset)
    for part in used:
        if part.shares(*parse_subset(subset, whole.count)):
            raise DataError(
                f"{part.start}:{part.stop} for {part.use} and {checks.subset} for evaluation share images; a figure "
                "measured on images that the model was made with says little"
            )
    return checks


def measured_images(
    config: Config, data: str | Path | None, subset: str | None, first: int = 0
) -> tuple[Images, str]:
    """Choose the images to measure a finished model on, and what is to be said of them, "" if nothing.

    Args:
        subset: by default the longest part of the test split that the model was neither trained nor calibrated on.
        first: so many images at the start are used for something else.

    Raises:
        DataError: no such data, a subset that they don't have, or no images that the model was not made on.
    """
    whole, files = _split(config, data, "test")
    used = _used(config, files, whole)
    if files is None and subset is None and not is_stream(data):
        return Images(whole.text, "test", f"{first}:", whole.count - first), ""
    if first:
        used.append(_Range(0, first, "other tools"))
    if subset is None:
        chosen = _part(whole, _longest_rest(whole, used))
        left_out = whole.count - chosen.count
        return chosen, f"{left_out} images that it was made on are left out" if left_out else ""
    chosen = _part(whole, subset)
    shared = {part.use: part.shares(*parse_subset(subset, whole.count)) for part in used}
    notes = [
        f"{count} of these {chosen.count} images were used in its {use}"
        for use, count in shared.items()
        if count
    ]
    return chosen, "; ".join(notes)


def images_of_file(
    file: OnnxDescription, name: str, data: str | Path | None, subset: str | None
) -> tuple[Images, str]:
    """Choose the images to measure an ONNX file on, as :func:`measured_images` of the model that it was exported from.

    Args:
        name: of the file, for errors.
        subset: all images by default, where the file does not say what its model was made on.
    """
    if not file.seen or data is None:
        return Images("", "test", subset or ":", 0), ""
    sizes = Arguments(len(file.classes), file.preprocessing.input_size[0])
    config = Config(
        name, "", sizes, None, file.preprocessing, file.labels, classes=file.classes, seen=file.seen
    )
    return measured_images(config, data, subset)


def all_images(config: Config, data: str | Path | None, split: str) -> Images:
    """Return all images of a split; a folder without ``train`` and ``val`` is its own test split.

    Raises:
        DataError: no such data.
    """
    return _split(config, data, split)[0]


def made_on(config: Config, data: str | Path | None, images: Images, use: str) -> Config:
    """Record in a config which images of a folder its model was made on, and what their classes are called.

    Args:
        images: of :func:`training_images` or :func:`calibration_images`.
        use: "training" or "calibration".
    """
    if not images.count or data is None or not data_set(config.labels).in_folders:
        return config
    if is_stream(data):  # what it was made on is in its records, by the places in the stream
        if config.classes or data_set(config.labels).classes is not None:
            return config
        return replace(config, classes=open_source(str(data), images.split).names)
    files = _files(config, data, images.split)
    start, stop = parse_subset(images.subset, len(files))
    step = max(1, (stop - start) // SAMPLES)
    samples = [files.files[i] for i in range(start, stop, step)][:SAMPLES]
    new = SeenImages(
        use,
        _key(files, start),
        _key(files, stop - 1),
        stop - start,
        {files.place(item)[:16]: _content(item[0]) for item in samples},
    )
    classes = files.classes if isinstance(files, ImageFolder) else config.classes
    return replace(config, seen=(*(old for old in config.seen if old != new), new), classes=classes)


# ---- splits ----


def _no_labels(config: Config) -> DataError:
    return DataError(
        f"{config.name} is an image encoder, which has no classes for labelled images; calibrate it without data, or "
        "on images of yours by qzoo.calibrate(model, images), and measure it by qzoo.compare_features"
    )


def _split(config: Config, data: str | Path | None, split: str) -> tuple[Images, ImageFiles | None]:
    """All images of a split, and their files where it is a folder; one without ``train`` and ``val`` is its own test
    split."""
    if config.is_encoder:
        raise _no_labels(config)
    if config.labels not in DATA_SETS:
        raise DataError(
            f"no data set is known for the labels {config.labels!r} of {config.name}; give one with --dataset"
        )
    known = DATA_SETS[config.labels]
    if data is not None and is_stream(data):
        return _stream(config, str(data), split), None
    if known.sizes is not None:
        return Images(f"{known.title} {split}", split, ":", known.sizes[split == "test"]), None
    if data is None:
        raise DataError(f"{config.name} needs images: pass data=FOLDER (--data FOLDER)")
    files = _files(config, data, split)
    count = len(files)
    title = "" if known.classes is None else f"{known.title}, "
    if files.root == Path(data):
        return Images(f"{title}{files.root.resolve().name} ({count} images)", "test", ":", count), files
    name = f"{title}{Path(data).resolve().name} {files.root.name} ({count} images)"
    return Images(name, split, ":", count), files


def _stream(config: Config, data: str, split: str) -> Images:
    """All images of a split of a stream, whose classes must be the model's.

    Raises:
        DataError: they are not.
    """
    classes = config.arguments.num_classes
    source = open_source(data, split, classes)
    try:
        LabelMap(config.labels, source.names, config.classes or classes)
    except DataError as error:
        raise DataError(f"{data}: {error}") from error
    count = "" if source.count == UNKNOWN else f" ({source.count} images)"
    one_split = "" if source.split == "test" else f" {source.split}"
    return Images(f"{data}{one_split}{count}", source.split, ":", source.count)


def _files(config: Config, data: str | Path, split: str) -> ImageFiles:
    """The images of a folder, whose classes must be as many as the model's.

    Raises:
        DataError: they are not; a folder's classes are numbered by its own names.
    """
    files = image_files(config.labels, split_folder(data, split), config.preprocessing)
    if isinstance(files, ImageFolder) and len(files.classes) != config.arguments.num_classes:
        raise DataError(
            f"{files.root} has {len(files.classes)} classes, but {config.name} {config.arguments.num_classes}; give "
            "the folder that the float model was trained on"
        )
    if isinstance(files, ImageFolder) and config.classes not in ((), files.classes):
        other = sorted(set(files.classes) ^ set(config.classes))
        raise DataError(
            f"{files.root} has other classes than {config.name} ({', '.join(other[:5])} in one only), and they are "
            "numbered by their names; name its folders as those that the model was trained on"
        )
    return files


def _part(whole: Images, subset: str) -> Images:
    start, stop = parse_subset(subset, whole.count)
    end = "" if stop == UNKNOWN else stop
    return Images(whole.text, whole.split, f"{start}:{end}", stop - start)


# ---- what a model was made on ----


def _used(config: Config, files: ImageFiles | None, whole: Images | None = None) -> list[_Range]:
    """The images of a folder, or of a stream, that a model was made on."""
    if files is None:
        return [] if whole is None else _recorded(config, whole)
    places = [(_positions(files, old), old.use) for old in config.seen]
    return [_Range(*positions, use) for positions, use in places if positions is not None]


def _recorded(config: Config, whole: Images) -> list[_Range]:
    """Places in a stream, or in a data set of one order, that the records of calibration and training name."""
    calibration, training = config.calibration, config.training or {}
    records: list[tuple[str, Any, Any]] = [("training", training.get("data"), training.get("subset"))]
    if calibration is not None:
        records.append(("calibration", calibration.data, calibration.subset))
    return [
        _Range(*parse_subset(str(subset), whole.count), use)
        for use, data, subset in records
        if subset and data == whole.text
    ]


def _trained_on(config: Config, files: ImageFiles | None, whole: Images) -> tuple[int, int] | None:
    """Positions of the images that a model was trained on last, None where the data have none of them."""
    stream = whole if is_stream(whole.text) else None
    trained = [part for part in _used(config, files, stream) if part.use == "training"]
    return (trained[-1].start, trained[-1].stop) if trained else None


def _positions(files: ImageFiles, old: SeenImages) -> tuple[int, int] | None:
    """Where in a folder the images lie that a model has seen; None where it is another folder: it has fewer than half
    of the samples, which may be doubles."""
    matches = 0
    for key, content in old.samples.items():
        at = bisect_left(files.files, key, key=lambda item: files.place(item)[:16])
        matches += at < len(files) and _key(files, at) == key and _content(files.files[at][0]) == content
    if 2 * matches < len(old.samples):
        return None
    start = bisect_left(files.files, old.first, key=lambda item: files.place(item)[:16])
    stop = bisect_right(files.files, old.last, key=lambda item: files.place(item)[:16])
    return (start, stop) if start < stop else None


def _key(files: ImageFiles, index: int) -> str:
    return files.place(files.files[index])[:16]


def _content(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise DataError(f"{path} can't be read ({error}); replace or remove it") from error


def _longest_rest(whole: Images, others: list[_Range]) -> str:
    """The longest part of a split that is not used; the last one of these.

    Raises:
        DataError: all of it is.
    """
    place, rests = 0, []
    for part in sorted(others):
        rests.append((part.start - place, place, part.start))
        place = max(place, part.stop)
    rests.append((whole.count - place, place, whole.count))
    length, start, stop = max(rests)
    if length < 1:
        parts = ", ".join(f"{part.start}:{part.stop} by {part.use}" for part in others)
        raise DataError(
            f"no images are left to measure on: of {whole.text}, {parts} are used up; give other images, or a subset "
            "that you choose yourself"
        )
    return f"{start}:{stop}"
