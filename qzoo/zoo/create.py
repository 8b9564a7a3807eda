"""``create_model``: a name to a module. Registry, float weights and checkpoints come together here."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from qzoo.config import WEIGHTS, Arguments, Config, FloatSource, config_of, fresh, read_config
from qzoo.data.sets import DATA_SETS
from qzoo.errors import ArgumentError, CheckpointError, UnknownModelError
from qzoo.preprocessing import Preprocessing
from qzoo.registry import (
    FloatWeights,
    ModelEntry,
    ModelName,
    architecture,
    list_architectures,
    natural_key,
    parse_name,
    suggest,
)
from qzoo.scheme import DEFAULT_TARGET, Scheme, as_scheme, target_named, with_target
from qzoo.zoo import hub
from qzoo.zoo.calibrated import load_calibrated, may_calibrate, recipe_without_data
from qzoo.zoo.checkpoint import build, empty_model, load_pretrained
from qzoo.zoo.sources import load_float_weights
from qzoo.zoo.tensors import assign_state

CLASSES = {name: known.classes for name, known in DATA_SETS.items() if known.classes is not None}


def create_model(
    name: str,
    pretrained: bool | Literal["float"] = False,
    quantize: bool | str | Scheme | None = None,
    *,
    target: str | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
    calibrate: Literal["auto", "never"] | None = None,
) -> nn.Module:
    """Build a model by name, with or without weights.

    Args:
        name: ``arch``, ``arch.tag`` or ``arch.tag-scheme``: ``"resnet50"``, ``"resnet50.tv_in1k"``,
            ``"resnet50.tv_in1k-w8a8"``. Without a tag the architecture's first one is meant.
        pretrained: False gives random weights. True gives the float weights, or for a quantized model its
            calibrated checkpoint; where none is published, one is made of the float weights, see ``calibrate``.
            ``"float"`` puts the float weights into a quantized model, to calibrate.
        quantize: True (W8A8), a text such as ``"w4a8"``, or a Scheme; what the name says by default. A checkpoint
            must have all the bits of a Scheme, also those that its name does not tell.
        target: the runtime that quantizers simulate; the Scheme's by default, else the one that the
            checkpoint was made for, else "onnxruntime".
        num_classes: of a model with random weights; with float weights a classifier of another size is new, with
            random weights. By default what the tag's data have.
        in_channels: of a model with random weights; by default what the tag's data have.
        calibrate: ``"auto"`` calibrates the float weights without data where no checkpoint is published, says so in a
            warning and keeps the result in a cache (``QZOO_HOME``); ``"never"`` raises UnknownModelError there. By
            default what the environment variable ``QZOO_CALIBRATE`` says, else "auto".

    Returns:
        The module with its :class:`~qzoo.config.Config` as ``qzoo_config``; in eval mode when pretrained.

    Raises:
        UnknownModelError: no such architecture, tag, or checkpoint (with near names, and how to build it).
        HubError, CheckpointError: the weights can't be had, are not what they should be, or have other sizes or bits.
        ArgumentError: arguments that make no sense, or contradict each other.

    Example:
        >>> model = qzoo.create_model("resnet20.fmnist-w8a8", pretrained=True)
        >>> body = qzoo.create_model("resnet20.fmnist", pretrained=True, num_classes=5)  # to fine-tune
    """
    asked = Request.parse(name, pretrained, quantize, target, num_classes, in_channels)
    if not pretrained:
        return build(asked.config(), asked.scheme)
    if pretrained is True and asked.scheme is not None:
        if may_calibrate(calibrate) and asked.can_be_calibrated:
            return _calibrated(asked, asked.scheme)
        return load_pretrained(asked.checkpoint(), target=asked.target)
    return _with_float_weights(asked)


@dataclass(frozen=True)
class Request:
    """What :func:`create_model` was asked for, made sense of; what can't be had is refused here.

    Attributes:
        name: with its scheme, and where weights are wanted with its tag.
        entry: of its architecture.
        scheme: of the quantizers, for the target; None for a float model.
        exact: the Scheme that was passed, whose bits a checkpoint must have; None where a text or name was.
        target: that was asked for; None leaves it to the checkpoint.
        num_classes, in_channels: that were asked for.
    """

    name: ModelName
    entry: ModelEntry
    scheme: Scheme | None = None
    exact: Scheme | None = None
    target: str | None = None
    num_classes: int | None = None
    in_channels: int | None = None

    @classmethod
    def parse(
        cls,
        name: str,
        pretrained: bool | Literal["float"] = False,
        quantize: bool | str | Scheme | None = None,
        target: str | None = None,
        num_classes: int | None = None,
        in_channels: int | None = None,
    ) -> Request:
        """Arguments of :func:`create_model`; raises what that raises."""
        if pretrained not in (True, False, "float"):
            raise ArgumentError(f"pretrained must be True, False or 'float', not {pretrained!r}")
        for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ArgumentError(f"{argument} must be a whole number of 1 or more, not {value!r}")
        if not isinstance(name, str):
            raise ArgumentError(f"name must be a text such as 'resnet50', not {type(name).__name__}")
        if "/" in name:
            raise UnknownModelError(
                f"{name!r} is no name of the zoo; qzoo.load_pretrained loads folders and repositories of the Hub"
            )
        parsed = parse_name(name)
        entry = architecture(parsed.arch)
        _check_tag(parsed, entry)
        scheme = _scheme(parsed, quantize, target)
        tag = parsed.tag or (entry.default_tag or _only_tag(parsed.arch) if pretrained else None)
        parsed = dataclasses.replace(parsed, tag=tag, scheme=str(scheme) if scheme else None)
        exact = quantize if isinstance(quantize, Scheme) else None
        target = target or (exact.target if exact else None)
        return cls(parsed, entry, scheme, exact, target, num_classes, in_channels)

    @property
    def float_name(self) -> str:
        """``arch.tag``."""
        return str(dataclasses.replace(self.name, scheme=None, qat=False))

    def config(self) -> Config:
        """The config of a model without weights."""
        return _new_config(self.name, self.entry, self.scheme, self.num_classes, self.in_channels)

    @property
    def can_be_calibrated(self) -> bool:
        """Whether the quantized checkpoint is nowhere, and can be made of float weights without training."""
        known = hub.checkpoints()
        if _checkpoint_name(self.name) in known or self.name.qat or self.name.tag is None:
            return False
        weights = self.entry.weights.get(self.name.tag)
        public = weights is not None and any(not source.startswith("qzoo:") for source in weights.sources)
        return public or self.float_name in known

    def checkpoint(self) -> Path:
        """The folder of the quantized checkpoint.

        Raises:
            UnknownModelError: there is none.
            CheckpointError: it has other bits, or a classifier or an input of another size.
        """
        folder = hub.named(_checkpoint_name(self.name))
        config = read_config(folder)
        if self.exact is not None and config.scheme is not None and not _same_bits(self.exact, config.scheme):
            raise CheckpointError(
                f"the checkpoint {config.name} has {_bits(config.scheme)}, not {_bits(self.exact)}; quantize="
                f"{str(self.exact)!r} takes it as it is, `qzoo build {config.name} --edge-bits N --layer-bits LAYER=N "
                "--data DIR` makes another one"
            )
        self.check_sizes(config)
        return folder

    def check_sizes(self, config: Config) -> None:
        """Raises CheckpointError where a quantized model of other sizes than its checkpoint's was asked for."""
        self.check_channels(config)
        if self.num_classes not in (None, config.arguments.num_classes):
            base = parse_name(config.name)
            raise CheckpointError(
                f"num_classes={self.num_classes}, but the checkpoint {config.name} has num_classes="
                f"{config.arguments.num_classes}; a quantized checkpoint gets no new classifier. Fine-tune the float "
                f"model, qzoo.create_model({str(dataclasses.replace(base, scheme=None, qat=False))!r}, "
                f"pretrained=True, num_classes={self.num_classes}), and quantize that"
            )

    def check_channels(self, config: Config) -> None:
        """Raises CheckpointError where weights for another number of channels were asked for."""
        has = config.arguments.in_channels
        if self.in_channels not in (None, has):
            raise CheckpointError(
                f"in_channels={self.in_channels}, but the weights {config.name} have in_channels={has}; leave it out "
                f"and pass images of {has} channel{'s' if has > 1 else ''}, or build with pretrained=False"
            )


def _calibrated(asked: Request, scheme: Scheme) -> nn.Module:
    """The quantized model, calibrated without data on this machine: now, or when it was first asked for."""
    if asked.float_name in hub.checkpoints():
        weights = read_config(hub.named(asked.float_name)).files[WEIGHTS]
    else:  # every source has its digest, which a download is held to
        public = _public_weights(asked.name, asked.entry)
        weights = str((public.sources, public.sha256, public.revision))
    start = dataclasses.replace(
        asked, scheme=with_target(scheme, DEFAULT_TARGET)
    )  # one checkpoint for all targets
    config = _new_config(asked.name, asked.entry, start.scheme, None, None)
    asked.check_sizes(config)
    recipe = recipe_without_data(asked.entry.family, scheme)
    return load_calibrated(config, recipe, weights, lambda: _with_float_weights(start), asked.target)


def _with_float_weights(asked: Request) -> nn.Module:
    """The float weights ``arch.tag``, with or without quantizers, and with a classifier of the size asked for."""
    if asked.float_name in hub.checkpoints():
        exact = load_pretrained(hub.named(asked.float_name))
        config = config_of(exact)
        asked.check_channels(config)
        if asked.scheme is None and asked.num_classes in (None, config.arguments.num_classes):
            return exact
        state = exact.state_dict()
        config = dataclasses.replace(
            fresh(config, str(asked.name)), scheme=asked.scheme, float_source=_source_of(config, asked.entry)
        )
    else:
        weights = _public_weights(asked.name, asked.entry)
        config = _new_config(asked.name, asked.entry, asked.scheme, None, None)
        asked.check_channels(config)
        config, state = _loaded(config, weights)
    return filled(config, state, asked.num_classes)


def _public_weights(name: ModelName, entry: ModelEntry) -> FloatWeights:
    if name.tag is None or name.tag not in entry.weights:
        made = [other for other in hub.checkpoints() if parse_name(other).arch == name.arch]
        here = f" (checkpoints: {', '.join(made)})" if made else ""
        raise UnknownModelError(
            f"{name.arch} has no public float weights{here}; `qzoo train {name.arch}.mine` makes some, or build it "
            "with pretrained=False and load your own state dict"
        )
    return entry.weights[name.tag]


def _loaded(config: Config, weights: FloatWeights) -> tuple[Config, dict[str, Tensor]]:
    """The config with the source that was found, and its tensors."""
    keys = empty_model(config, None).state_dict().keys()
    name = dataclasses.replace(parse_name(config.name), scheme=None, qat=False)
    state, source = load_float_weights(weights, str(name), keys, architecture(name.arch).key_map)
    return dataclasses.replace(config, float_source=source), state


def filled(config: Config, state: dict[str, Tensor], num_classes: int | None = None) -> nn.Module:
    """The config's model with the float weights, in eval mode.

    Args:
        num_classes: another number of classes: what depends on it starts from random values, and nothing else.
    """
    where = config.float_source.source if config.float_source else config.name
    model = empty_model(config, config.scheme)
    if num_classes not in (None, config.arguments.num_classes):
        shapes = {key: value.shape for key, value in model.state_dict().items()}
        arguments = Arguments(num_classes or 0, config.arguments.in_channels)
        model = build(dataclasses.replace(config, arguments=arguments, labels="", classes=()), config.scheme)
        start = {key: value for key, value in model.state_dict().items() if value.shape != shapes.get(key)}
        state = {**state, **start}
    assign_state(model, state.items(), where)
    return model.eval()


def _source_of(config: Config, entry: ModelEntry) -> FloatSource:
    """A float checkpoint, as the place that others are made from."""
    weights = entry.weights.get(parse_name(config.name).tag or "")
    if weights is not None:
        return FloatSource(f"qzoo:{config.name}", "", config.files[WEIGHTS], weights.license)
    return FloatSource(f"folder:{config.name}", "", config.files[WEIGHTS], config.license)


def list_models(pattern: str = "*", pretrained: bool = False) -> list[str]:
    """List the models that :func:`create_model` knows: architectures, or with ``pretrained`` all that has weights.

    Args:
        pattern: shell pattern, matched against the whole name and against its architecture.
        pretrained: list ``arch.tag`` (float weights) and ``arch.tag-scheme`` (calibrated checkpoints), of the user's
            store too, instead.

    Returns:
        The names, architecture by architecture.

    Example:
        >>> qzoo.list_models("resnet3*")
        ['resnet32', 'resnet34']
        >>> qzoo.list_models("resnet20.fmnist-w*", pretrained=True)
        ['resnet20.fmnist-w2a2_qat', 'resnet20.fmnist-w3a3_qat', 'resnet20.fmnist-w4a4_qat', 'resnet20.fmnist-w8a8']
    """
    if not pretrained:
        return list_architectures(pattern)
    known = hub.checkpoints()
    names = set(known)
    for arch in list_architectures():
        for tag, weights in architecture(arch).weights.items():
            if any(not s.startswith("qzoo:") or s.removeprefix("qzoo:") in known for s in weights.sources):
                names.add(f"{arch}.{tag}")
    matching = list_architectures(pattern)
    chosen = [n for n in names if fnmatch.fnmatch(n, pattern) or n.partition(".")[0] in matching]
    return sorted(chosen, key=natural_key)


def float_model(config: Config) -> nn.Module:
    """The float model that a quantized checkpoint was made from, in eval mode: the reference of comparisons.

    Raises:
        UnknownModelError: its float weights are not public, and in no store.
        HubError: they can't be had here; says from where, why, and what to do.
        CheckpointError: they are not those that the checkpoint was made from.
    """
    name = dataclasses.replace(parse_name(config.name), scheme=None, qat=False)
    made_from = config.float_source
    if made_from is None:
        return create_model(str(name), pretrained=True)
    kind, _, checkpoint = made_from.source.partition(":")
    if kind in ("qzoo", "folder"):
        return _float_checkpoint(config.name, made_from, checkpoint)
    entry = architecture(name.arch)
    weights = _public_weights(name, entry)
    found, state = _loaded(_new_config(name, entry, None, None, None), weights)
    source = found.float_source
    if source is not None and source.source == made_from.source:  # other places have files of their own
        _check_same(config.name, made_from, source.sha256)
    return filled(found, state)


def _float_checkpoint(name: str, made_from: FloatSource, checkpoint: str) -> nn.Module:
    """The float checkpoint that ``name`` was made from: of those that have its name, the one with its SHA-256."""
    for folder in hub.local_folders(checkpoint):
        if read_config(folder).files.get(WEIGHTS) == made_from.sha256:
            return load_pretrained(folder)
    if made_from.source.startswith("folder:"):
        raise CheckpointError(
            f"{name} was made from the float weights of a folder ({checkpoint}); name the folder with --float"
        )
    model = load_pretrained(hub.named(checkpoint))
    _check_same(name, made_from, config_of(model).files[WEIGHTS])
    return model


def _check_same(name: str, made_from: FloatSource, here: str) -> None:
    if here != made_from.sha256:
        raise CheckpointError(
            f"{name} was made from {made_from.source} with SHA-256 {made_from.sha256}, but here that is {here}"
        )


def entry_point(arch: str) -> Callable[..., nn.Module]:
    """The function ``qzoo.<arch>``: :func:`create_model` with the architecture filled in.

    Raises:
        UnknownModelError: no such architecture.
    """

    def build(
        pretrained: bool | Literal["float"] = False,
        quantize: bool | str | Scheme | None = None,
        *,
        target: str | None = None,
        num_classes: int | None = None,
        in_channels: int | None = None,
        calibrate: Literal["auto", "never"] | None = None,
    ) -> nn.Module:
        return create_model(
            arch,
            pretrained=pretrained,
            quantize=quantize,
            target=target,
            num_classes=num_classes,
            in_channels=in_channels,
            calibrate=calibrate,
        )

    summary = (architecture(arch).build.__doc__ or arch).partition("\n")[0]
    described = (create_model.__doc__ or "").partition("    Example:")[0].rstrip()
    _, first, rest = described.partition("        pretrained:")  # after the name
    build.__name__ = build.__qualname__ = arch
    build.__module__ = "qzoo"
    build.__doc__ = f"{summary}\n\n    Args:\n{first}{rest}\n    "
    return build


def new_config(name: str) -> Config:
    """The config of ``arch.tag-scheme`` before anything is built.

    Raises:
        UnknownModelError: no such architecture, or no weights of it with the tag.
    """
    parsed = parse_name(name)
    entry = architecture(parsed.arch)
    _check_tag(parsed, entry)
    return _new_config(parsed, entry, _scheme(parsed, None, None), None, None)


# ---- what a name means ----


def _check_tag(parsed: ModelName, entry: ModelEntry) -> None:
    if parsed.tag is None or parsed.tag in entry.weights:
        return
    names = [parse_name(name) for name in hub.checkpoints()]
    known = [*entry.weights, *(name.tag for name in names if name.arch == parsed.arch and name.tag)]
    if parsed.tag not in known:
        tags = ", ".join(dict.fromkeys(known)) or "none"
        raise UnknownModelError(
            f"{parsed.arch} has no weights with tag {parsed.tag!r} (tags: {tags}){suggest(parsed.tag, known)}"
        )


def _only_tag(arch: str) -> str | None:
    """The tag of an architecture's float checkpoint, where it has one and no more."""
    found = [name for name in map(parse_name, hub.checkpoints()) if name.arch == arch and name.scheme is None]
    return found[0].tag if len(found) == 1 else None


def _scheme(parsed: ModelName, quantize: bool | str | Scheme | None, target: str | None) -> Scheme | None:
    """The scheme that name and arguments agree on, for the target."""
    asked = as_scheme(quantize)
    if parsed.scheme is not None:
        named = Scheme.parse(parsed.scheme, asked.target if asked else DEFAULT_TARGET)
        if quantize is False or (quantize not in (None, True) and str(asked) != str(named)):
            raise ArgumentError(
                f"quantize={quantize!r} contradicts the name {str(parsed)!r}; give one of them"
            )
        asked = asked if isinstance(quantize, Scheme) else named  # a Scheme may say more than its name
    if target is not None:
        target_named(target)
        asked = with_target(asked, target) if asked else None
    return asked


def _same_bits(asked: Scheme, made: Scheme) -> bool:
    """Whether two schemes of the same name agree on the first and last layer, and on single layers."""
    edges = [(scheme.edge.weight_bits, scheme.edge.activation_bits) for scheme in (asked, made)]
    return edges[0] == edges[1] and dict(asked.layers) == dict(made.layers)


def _bits(scheme: Scheme) -> str:
    layers = " ".join(f"{name}={bits}" for name, bits in scheme.layers)
    return f"{scheme} with first and last layer w{scheme.edge.weight_bits}a{scheme.edge.activation_bits}" + (
        f" and {layers}" if layers else ""
    )


def _checkpoint_name(parsed: ModelName) -> str:
    """The full name of a checkpoint."""
    if parsed.tag is not None:
        return str(parsed)
    # An architecture without public float weights may still have a checkpoint.
    same = [
        n for n in map(parse_name, hub.checkpoints()) if (n.arch, n.scheme) == (parsed.arch, parsed.scheme)
    ]
    return str(same[0] if same else parsed)


def _new_config(
    parsed: ModelName,
    entry: ModelEntry,
    scheme: Scheme | None,
    num_classes: int | None,
    in_channels: int | None,
) -> Config:
    """The config of a model that is no checkpoint yet."""
    weights = entry.weights.get(parsed.tag) if parsed.tag else None
    own = hub.local_folders(f"{parsed.arch}.{parsed.tag}") if parsed.tag and weights is None else []
    if own and num_classes is None and in_channels is None:  # a tag of the user's own
        return dataclasses.replace(fresh(read_config(own[0]), str(parsed)), scheme=scheme, float_source=None)
    channels = in_channels or (
        weights.preprocessing.input_size[0] if weights else entry.default("in_channels")
    )
    classes = (
        num_classes or (CLASSES.get(weights.labels) if weights else None) or entry.default("num_classes")
    )
    hint = weights or next(iter(entry.weights.values()), None)
    if hint is not None and hint.preprocessing.input_size[0] == channels:
        preprocessing = hint.preprocessing
    else:  # not given: the size of the architecture's own data, scaled to -1..1
        size = hint.preprocessing.input_size[1:] if hint else (32, 32)
        preprocessing = Preprocessing(
            (channels, *size), 1.0, "bilinear", (0.5,) * channels, (0.5,) * channels
        )
    same_classes = hint is not None and CLASSES.get(hint.labels) == classes and weights is not None
    return Config(
        name=str(parsed),
        architecture=entry.name,
        arguments=Arguments(classes, channels),
        scheme=scheme,
        preprocessing=preprocessing,
        labels=hint.labels if same_classes and hint else "",
    )
