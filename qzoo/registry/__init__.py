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
from qzoo.registry.defaults import CONVOLUTIONAL, DEPTHWISE, HYBRID, SWISH, TRANSFORMER, Defaults
from qzoo.registry.weights import (
    TIMM_RELEASES,
    FloatWeights,
    KeyMap,
    renamed_modules,
    timm_weights,
    torchvision_weights,
    with_epsilon,
)
from qzoo.scheme import DEFAULT_TARGET, SCHEME_PATTERN, Scheme

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "CONVOLUTIONAL",
    "DEPTHWISE",
    "HYBRID",
    "SWISH",
    "TIMM_RELEASES",
    "TRANSFORMER",
    "Defaults",
    "Family",
    "FloatWeights",
    "KeyMap",
    "ModelEntry",
    "ModelName",
    "ModelOptions",
    "Pin",
    "architecture",
    "import_models",
    "list_architectures",
    "parse_name",
    "register_model",
    "renamed_modules",
    "timm_weights",
    "torchvision_weights",
    "with_epsilon",
]
_NAME = re.compile(
    rf"(?P<arch>[a-z0-9_]+)(?:\.(?P<tag>[a-z0-9_]+))?(?:-(?P<scheme>{SCHEME_PATTERN})(?P<qat>_qat)?)?"
)
_ARCHITECTURE = re.compile(r"[a-z0-9_]+")
_ARGUMENTS = ("num_classes", "in_channels", "quantize")
PLUGINS = "qzoo.models"
"""Group of the entry points whose modules register models: packages that are installed beside qzoo."""
_LONGEST = 200  # characters of a name: folders and files are named after it


@dataclass(frozen=True)
class ModelOptions:
    """Options of an architecture's function: ``def resnet18(**options)`` passes these on.

    Attributes:
        num_classes: size of the classifier.
        in_channels: of the image.
        quantize: None builds plain ``torch.nn`` layers.

    Example:
        >>> ModelOptions(num_classes=10)
        ModelOptions(num_classes=10, in_channels=3, quantize=None)
    """

    num_classes: int = 1000
    in_channels: int = 3
    quantize: Scheme | None = None


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
    """A checkpoint on the Hub, for ``register_model(published=...)``.

    Attributes:
        repo: ``org/name``.
        revision: its commit.
        sha256: of its config.json, which holds those of all other files.

    Example:
        >>> Pin("org/resnet50.tv_in1k-w8a8", revision="0" * 40, sha256="1" * 64).repo
        'org/resnet50.tv_in1k-w8a8'
    """

    repo: str
    revision: str
    sha256: str


@dataclass(frozen=True)
class ModelEntry:
    """One architecture, as :func:`architecture` finds it.

    Attributes:
        name: in the zoo.
        build: ``build(num_classes=, in_channels=, quantize=)`` gives the network with random weights.
        weights: its float weights by tag.
        family: citation, and how it is quantized where nothing else is said.
        published: its checkpoints on the Hub, by name.
        tuning: epochs, learning rate and the like of a QAT on ImageNet (:class:`qzoo.options.TrainOptions`); None
            where no schedule is known.
        aliases: other names of the same network, of torchvision or timm.
        key_map: from the names of parameters that torchvision, timm or a publisher has and the definition has not.
        image_size: height and width of its images, in pixels, where no weights say it.

    Example:
        >>> architecture("resnet50").default_tag
        'tv_in1k'
    """

    name: str
    build: Callable[..., nn.Module]
    weights: Mapping[str, FloatWeights]
    family: Family = Family()
    tuning: Mapping[str, Any] | None = None
    published: Mapping[str, Pin] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    key_map: KeyMap | None = None
    image_size: int = 32

    @property
    def default_tag(self) -> str | None:
        """The tag that ``pretrained=True`` means when none is given; None without public weights."""
        return next(iter(self.weights), None)

    @property
    def is_encoder(self) -> bool:
        """Whether it gives features where nothing else is asked for: its builder's own ``num_classes`` is 0."""
        return inspect.signature(self.build).parameters["num_classes"].default == 0

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
    """A model name in its parts; ``str()`` puts it together again.

    Attributes:
        arch: name of the architecture.
        tag: of the float weights.
        scheme: bits of a quantized checkpoint.
        qat: its weights were tuned.

    Example:
        >>> str(ModelName("resnet50", "tv_in1k", "w8a8"))
        'resnet50.tv_in1k-w8a8'
    """

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
    image_size: int = 32,
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
        image_size: height and width of its images, in pixels, where it has no float weights to say it.

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
            image_size,
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

    Example:
        >>> import_models("qzoo.models.resnet")
        >>> import_models("my_net.py")
        Traceback (most recent call last):
        qzoo.errors.ArgumentError: there is no file 'my_net.py' to import models from
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
    function = module.__dict__.get(name)
    return function if callable(function) else None


@functools.cache
def families() -> tuple[str, ...]:
    """List the modules in ``qzoo.models`` that define architectures: one file a family."""
    folder = Path(__file__).parents[1] / "models"
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

    Args:
        name: the zoo's, or an alias.

    Returns:
        The entry: builder, float weights, family.

    Raises:
        UnknownModelError: no such architecture; the message suggests near names.

    Example:
        >>> architecture("resnet50").weights["tv_in1k"].top1
        76.13
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

    Args:
        pattern: of a name or an alias.

    Returns:
        The zoo's names.

    Example:
        >>> list_architectures("resnet?0")
        ['resnet20', 'resnet50']
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

    Args:
        name: such as ``"resnet50.tv_in1k-w8a8"``.

    Returns:
        The parts; an alias of an architecture is its name in the zoo there.

    Raises:
        UnknownModelError: the text does not have that form.

    Example:
        >>> parse_name("resnet20.fmnist-w4a4_qat")
        ModelName(arch='resnet20', tag='fmnist', scheme='w4a4', qat=True)
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
