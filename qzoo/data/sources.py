"""Images where they lie, in place of a folder: Hugging Face data sets, WebDataset shards, Parquet files, NPZ arrays.

``--data`` and :func:`qzoo.data.load_data` take

========================  ==========================================================================================
``hfds:NAME[:SPLIT]``     a data set on the Hub, or a folder that ``datasets`` reads; it is streamed
``wds:PATTERN``           tar shards (Aizman et al. 2019, arXiv:2001.01858), local or by URL: ``val-{000..063}.tar``
``parquet:PATH``          Parquet files with a column of encoded images and one of labels: a file, a folder, a pattern
``npz:FILE``              NumPy arrays ``images`` (uint8) and ``labels``, or ``train_images``, ``x_test`` and the like
========================  ==========================================================================================

Each has one fixed order, in which a subset is cut; the first images are had without reading the others. No content is
ever unpickled. timm's readers share a stream out by shards and workers, so that its order depends on their number, and
go on after a damaged shard; this is why they are not used here.
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from urllib.request import urlopen

import numpy as np

from qzoo.data.files import FORMATS
from qzoo.errors import DataError, MissingDependencyError, QzooError

UNKNOWN = 1 << 40
"""Stands for the number of images where nothing says it before they are read: shards on another machine."""

_LARGE = 256  # images of a file that a process, or an epoch's order, may well take as a whole
_TIMEOUT = 60.0  # seconds that a server may be silent
_TESTS = ("validation", "val", "valid", "test")
_IMAGES = frozenset(suffix[1:] for suffix in FORMATS)
WNID = re.compile(r"(?:.*/)?(n\d{8})(?:[_/].*)?")


@dataclass(frozen=True)
class Sample:
    """One image as it is stored, with its label and a name for messages.

    Attributes:
        image: an encoded file, or uint8 pixels [H, W] or [H, W, C].
        label: a class index, a WordNet id or the name of a class.
    """

    name: str
    image: bytes | np.ndarray
    label: int | str


@dataclass(frozen=True)
class Part:
    """A file of a source, which is read without the others.

    Attributes:
        count: number of its images, or :data:`UNKNOWN`.
        samples: reads them, from a position on.
    """

    count: int
    samples: Callable[[int], Iterator[Sample]]


class Source(Protocol):
    """Labelled images in one order.

    Attributes:
        count: their number, or :data:`UNKNOWN`.
        parts: its files, in order.
        names: of the classes, by index, where the data say them.
        split: "train" or "test"; data that have one split are their own "test".
    """

    count: int
    parts: tuple[Part, ...]
    names: tuple[str, ...]
    split: str


def open_source(data: str | Path, split: str, classes: int | None = None) -> Source:
    """Find the images of a split.

    Args:
        data: one of the forms above.
        split: "train" or "test".
        classes: of the model, which tells the column of labels where there are several.

    Raises:
        DataError: nothing there, or not laid out as expected.
        MissingDependencyError: the extra "data" is not installed.
    """
    kind, _, rest = str(data).partition(":")
    if not rest:
        raise DataError(f"{data}: nothing follows the colon; expected such as {kind}:{_KINDS[kind][1]}")
    return _KINDS[kind][0](rest, split, classes)


# ---- Hugging Face data sets and Parquet ----


def _extra(package: str) -> Any:
    from importlib import import_module

    try:
        return import_module(package)
    except ImportError as error:
        raise MissingDependencyError(f"this data needs {package}: pip install 'qzoo[data]'") from error


class _Rows:
    """Rows of a streamed data set of the package ``datasets``.

    Args:
        stream: gives the ``datasets.IterableDataset``.
        title: for messages.
        counts: rows of each of its files, or of all of them.
    """

    def __init__(
        self, stream: Callable[[], Any], title: str, split: str, counts: list[int], classes: int | None
    ) -> None:
        self.title, self.split, self.count = title, split, min(UNKNOWN, sum(counts))
        with _reading(title):
            self.rows = stream()
            features = self.rows.features or self.rows._resolve_features().features or {}
        self.image = _one(
            title, "images", features, [name for name, kind in features.items() if _is_image(name, kind)]
        )
        labelled = [name for name, kind in features.items() if type(kind).__name__ == "ClassLabel"]
        fitting = [name for name in labelled if features[name].num_classes == classes]
        plain = [name for name in ("label", "labels", "fine_label", "cls", "wnid") if name in features]
        self.label = _one(title, "labels", features, fitting or labelled or plain)
        self.names = tuple(getattr(features[self.label], "names", None) or ())
        files = self.rows.num_shards
        if (
            len(counts) != files
        ):  # one number is that of all files, which are worth a part each where they are large
            files, counts = (
                (files, [UNKNOWN] * files) if files * _LARGE <= self.count < UNKNOWN else (1, [self.count])
            )
        self.parts = tuple(Part(count, partial(self._part, i, files)) for i, count in enumerate(counts))

    def _part(self, index: int, files: int, start: int) -> Iterator[Sample]:
        images = _extra("datasets").Image(decode=False)
        title = self.title if files == 1 else f"{self.title}, file {index}"
        with _reading(self.title):
            rows = self.rows if files == 1 else self.rows.shard(num_shards=files, index=index)
            rows = rows.select_columns([self.image, self.label]).cast_column(self.image, images)
            for i, row in enumerate(rows.skip(start) if start else rows, start):
                stored = row[self.image] or {}
                name = f"{title}, image {i}" + (f" ({stored['path']})" if stored.get("path") else "")
                yield Sample(name, stored.get("bytes") or _content(stored.get("path")), row[self.label])


def _hub(rest: str, split: str, classes: int | None) -> Source:
    """``NAME[:SPLIT]``."""
    datasets = _extra("datasets")
    name, _, choice = rest.partition(":")
    with _reading(f"hfds:{rest}"):
        builder = datasets.load_dataset_builder(name)
        splits = builder.info.splits or {}
        names = list(splits) or datasets.get_dataset_split_names(name)
    if choice and choice not in names:
        raise DataError(f"hfds:{rest}: no split {choice!r}; expected one of {', '.join(names)}")
    tests = [key for key in _TESTS if key in names]
    alone = bool(choice) or not tests or "train" not in names
    chosen = choice or ("train" if split == "train" and not alone else [*tests, *names][0])
    count = getattr(splits.get(chosen), "num_examples", 0) or UNKNOWN
    return _Rows(
        lambda: builder.as_streaming_dataset(split=chosen),
        f"hfds:{name}:{chosen}",
        "test" if alone else split,
        [count],
        classes,
    )


def _parquet(rest: str, split: str, classes: int | None) -> Source:
    """A file, the files of a folder, or those of a pattern."""
    datasets = _extra("datasets")
    import pyarrow.parquet as parquet

    files = _local(rest, "*.parquet")
    with _reading(f"parquet:{rest}"):
        counts = [parquet.read_metadata(file).num_rows for file in files]

    def stream() -> Any:
        return datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)

    return _Rows(stream, f"parquet:{rest}", "test", counts, classes)


def _local(pattern: str, inside: str) -> list[str]:
    """Files by name, by a pattern, or in a folder; sorted."""
    import glob

    where = str(Path(pattern) / "**" / inside) if Path(pattern).is_dir() else pattern
    files = [pattern] if Path(pattern).is_file() else sorted(glob.glob(where, recursive=True))
    if not files:
        raise DataError(f"{pattern}: no such file, and no files of that pattern ({inside})")
    return files


def _is_image(name: str, kind: Any) -> bool:
    """Whether a column holds images: as such, as bytes with a path, or as bytes under a usual name."""
    if type(kind).__name__ == "Image":
        return True
    if isinstance(kind, dict):
        return "bytes" in kind
    return getattr(kind, "dtype", "") == "binary" and name in ("image", "img", "bytes", *_IMAGES)


def _one(title: str, what: str, features: dict[str, Any], names: list[str]) -> str:
    if not names:
        raise DataError(
            f"{title} has no column of {what}; its columns are {', '.join(features) or 'unknown'}"
        )
    return names[0]


def _content(path: str | None) -> bytes:
    """An image that is stored beside the rows."""
    if not path:
        return b""
    with _extra("fsspec").open(path, "rb") as file:
        return bytes(file.read())


@contextmanager
def _reading(title: str) -> Iterator[None]:
    """Explain what goes wrong in the readers of other packages, in one line."""
    try:
        yield
    except QzooError:
        raise
    except Exception as error:  # they raise nearly every type
        words = str(error.args[0]) if error.args else str(error)  # webdataset adds what it was reading
        text = (words or type(error).__name__).strip().splitlines()[0].partition(" @ <")[0]
        if isinstance(error, tarfile.ReadError) and "unexpected end of data" in text:
            raise _cut_off(title) from error
        on_hub = title.startswith("hf")
        chain = f"{error!r} {error.__cause__!r} {error.__context__!r}"
        if on_hub and re.search(r"gated|\b40[13]\b|Unauthorized|authenticated|GatedRepo", chain):
            raise DataError(
                f"{title}: access is refused ({text}); accept its terms on the Hub, then log in with `hf auth "
                "login` or set HF_TOKEN"
            ) from error
        raise DataError(f"{title} can't be read ({text}); check the name, or download it again") from error


# ---- WebDataset shards ----


class _Shards:
    """Shards by the readers of ``webdataset``, of whose samples image and label are taken as bytes.

    Its decoders, which would unpickle a ``.pyd``, and its own opening of URLs, which may run a shell, are not used;
    other files in the shards are passed over.
    """

    split = "test"
    names: tuple[str, ...] = ()

    def __init__(self, rest: str, split: str, classes: int | None) -> None:
        self.tars = _extra("webdataset.tariterators")
        self.title = f"wds:{rest}"
        with _reading(self.title):
            expanded = list(_extra("braceexpand").braceexpand(rest))
        self.urls = [u for part in expanded for u in ([part] if "://" in part else _local(part, "*.tar"))]
        if any(url.startswith("pipe:") for url in self.urls):
            raise DataError(f"{self.title}: a pipe would run a command; give files or URLs of shards")
        self.parts = tuple(Part(self._images(url), partial(self._shard, url)) for url in self.urls)
        self.count = min(UNKNOWN, sum(part.count for part in self.parts))

    def _images(self, path: str) -> int:
        """Number of images in a local shard, by the names in it; unknown of one on another machine."""
        if "://" in path:
            return UNKNOWN
        with _reading(path), tarfile.open(path) as tar:
            names = [member.name for member in tar if member.isreg()]
            tar.fileobj.seek(tar.offset)  # type: ignore[union-attr]
            ended = tar.fileobj.read(512) == bytes(512)  # type: ignore[union-attr]
        if not ended:
            raise _cut_off(path)
        return len({base for base, suffix in map(self.tars.base_plus_ext, names) if _kind(suffix) == "image"})

    def _shard(self, url: str, start: int) -> Iterator[Sample]:
        return itertools.islice(self._samples(url), start, None)

    def _samples(self, url: str) -> Iterator[Sample]:
        with _reading(url), _open(url) as raw:
            stream: Any = _WatchedFile(gzip.GzipFile(fileobj=raw) if url.endswith(("gz", "tgz")) else raw)
            files = self.tars.tar_file_expander([{"url": url, "stream": stream}], select_files=_wanted)
            for fields in self.tars.group_by_keys(files):
                image = next((fields[key] for key in fields if _kind(key) == "image"), None)
                if image is not None:
                    name = f"{url}, {fields['__key__']}"
                    yield Sample(name, image, _label(name, fields))
            if not stream.ended:
                raise _cut_off(url)


def _open(url: str) -> Any:
    """A shard as a file. fsspec's own HTTP would need one more package, and reads ahead in pieces."""
    if url.startswith(("http://", "https://")):
        return urlopen(url, timeout=_TIMEOUT)
    return _extra("fsspec").open(url, "rb")


def _cut_off(url: str) -> DataError:
    return DataError(f"{url} is cut off: the end of the archive is missing; download it again")


class _WatchedFile:
    """A file whose last bytes are known: tarfile takes a file that ends early for a whole one."""

    def __init__(self, file: Any) -> None:
        self.file, self.tail = file, b""

    def read(self, size: int = -1) -> bytes:
        data: bytes = self.file.read(size)
        self.tail = (self.tail + data[-512:])[-512:]
        return data

    @property
    def ended(self) -> bool:
        """Whether a block of zeros was read last, which ends an archive."""
        return self.tail == bytes(512)


def _kind(suffix: str | None) -> str:
    """What a file of a shard is: "image", "label" or ""."""
    if suffix is None or suffix.startswith("__"):
        return ""
    last = suffix.lower().rpartition(".")[2]
    return "image" if last in _IMAGES else "label" if suffix.lower() in ("cls", "json") else ""


def _wanted(name: str) -> bool:
    return bool(_kind(name.rpartition("/")[2].partition(".")[2]))


def _label(name: str, fields: dict[str, Any]) -> int | str:
    """A class index, a WordNet id or a name: of ``.cls``, else of "label" in ``.json``, else in the image's name."""
    try:
        if "cls" in fields:
            return fields["cls"].decode().strip()  # type: ignore[no-any-return]
        label = json.loads(fields["json"])["label"] if "json" in fields else None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{name} has a label that can't be read ({error!r}); write a class index") from error
    match = WNID.fullmatch(fields["__key__"])
    if label is None and match:
        return match[1]
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise DataError(f"{name} has no label; expected .cls, or .json with 'label', beside the image")
    return label


# ---- NumPy arrays ----


class _Arrays:
    """Two arrays of an NPZ file, in memory."""

    names: tuple[str, ...] = ()

    def __init__(self, rest: str, split: str, classes: int | None) -> None:
        self.title = f"npz:{rest}"
        with _reading(self.title):
            file = np.load(rest, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise DataError(f"{self.title} is no NPZ file; numpy.savez makes one")
        with _reading(self.title), file:
            train, tests = _keys(file, "train"), [keys for name in _TESTS if (keys := _keys(file, name))]
            whole = _keys(file, "")
            self.split = split if train and tests else "test"
            keys = (train if split == "train" and tests else None) or (tests and tests[0]) or whole or train
            if not keys:
                raise DataError(f"{self.title} holds {', '.join(file.files)}; expected 'images' and 'labels'")
            self.images, self.labels = file[keys[0]], file[keys[1]].reshape(-1)
        if self.images.ndim == 4 and self.images.shape[1] in (1, 3) and self.images.shape[3] not in (1, 3):
            self.images = self.images.transpose(0, 2, 3, 1)
        if (
            self.images.dtype != np.uint8
            or self.images.ndim not in (3, 4)
            or self.labels.dtype.kind not in "iuU"
        ):
            raise DataError(
                f"{self.title}: {keys[0]} are {self.images.dtype} {list(self.images.shape)} and {keys[1]} "
                f"{self.labels.dtype}; expected uint8 [N, H, W] or [N, H, W, C], and class indices or names"
            )
        if len(self.images) != len(self.labels):
            raise DataError(f"{self.title} has {len(self.images)} images but {len(self.labels)} labels")
        self.count = len(self.images)
        self.parts: tuple[Part, ...] = (Part(self.count, self._samples),)

    def _samples(self, start: int) -> Iterator[Sample]:
        for i in range(start, self.count):
            yield Sample(f"{self.title}, image {i}", self.images[i], self.labels[i].item())


def _keys(file: Iterable[str], split: str) -> tuple[str, str] | None:
    """Names of the arrays of a split."""
    pairs = [("images", "labels"), ("x", "y"), ("data", "target")]
    forms = [(f"{split}_{a}", f"{split}_{b}") for a, b in pairs] + [
        (f"{a}_{split}", f"{b}_{split}") for a, b in pairs
    ]
    names = set(file)
    return next((form for form in (forms if split else pairs) if names.issuperset(form)), None)


_KINDS: dict[str, tuple[Callable[[str, str, int | None], Source], str]] = {
    "hfds": (_hub, "ILSVRC/imagenet-1k:validation"),
    "wds": (_Shards, "val-{000..063}.tar"),
    "parquet": (_parquet, "val.parquet"),
    "npz": (_Arrays, "images.npz"),
}
