"""Make sense of what a model is asked for by: its name, the scheme of its quantizers, its sizes."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qzoo.config import Arguments, Config, fresh, read_config
from qzoo.data.sets import DATA_SETS
from qzoo.errors import ArgumentError, CheckpointError, UnknownModelError
from qzoo.preprocessing import Preprocessing
from qzoo.registry import FloatWeights, ModelEntry, ModelName, architecture, parse_name, suggest
from qzoo.scheme import Scheme, as_scheme, target_named, with_target
from qzoo.zoo import hub

_VARIABLE = "QZOO_CALIBRATE"
_CLASSES = {name: known.classes for name, known in DATA_SETS.items() if known.classes is not None}


@dataclass(frozen=True)
class Request:
    """Checked arguments of :func:`qzoo.create_model`; what can't be had is refused here.

    Attributes:
        name: with its scheme, and where weights are wanted with its tag.
        entry: of its architecture.
        scheme: of the quantizers, for the target; None for a float model.
        exact: the Scheme that was passed, whose bits a checkpoint must have; None where a text or name was.
        target: that was asked for; None leaves it to the checkpoint.
        num_classes, in_channels: that were asked for.
        calibrate: whether a missing checkpoint is to be calibrated; None leaves it to the environment.
    """

    name: ModelName
    entry: ModelEntry
    scheme: Scheme | None = None
    exact: Scheme | None = None
    target: str | None = None
    num_classes: int | None = None
    in_channels: int | None = None
    calibrate: str | None = None

    @classmethod
    def parse(
        cls,
        name: str,
        pretrained: bool | Literal["float"] = False,
        quantize: bool | str | Scheme | None = None,
        target: str | None = None,
        num_classes: int | None = None,
        in_channels: int | None = None,
        calibrate: str | None = None,
    ) -> Request:
        """Make sense of the arguments of :func:`qzoo.create_model`; raises what that raises."""
        if calibrate is not None:
            _may_calibrate(calibrate)
        if pretrained not in (True, False, "float"):
            raise ArgumentError(f"pretrained must be True, False or 'float', not {pretrained!r}")
        # Whether 0 classes can be had is looked at below, with the architecture.
        for argument, value, least in (("num_classes", num_classes, 0), ("in_channels", in_channels, 1)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ArgumentError(f"{argument} must be a whole number of 1 or more, not {value!r}")
        if not isinstance(name, str):
            raise ArgumentError(f"name must be a text such as 'resnet50', not {type(name).__name__}")
        if "/" in name:
            raise UnknownModelError(
                f"{name!r} is no name of the zoo; qzoo.load_pretrained loads folders and repositories of the Hub"
            )
        parsed = parse_name(name)
        entry = architecture(parsed.arch)
        if num_classes == 0 and not entry.is_encoder:
            raise ArgumentError(
                f"num_classes must be a whole number of 1 or more, not 0: {parsed.arch} is a classifier; 0 is for "
                "image encoders, such as 'vit_small_patch14_dinov2'"
            )
        _check_tag(parsed, entry)
        scheme = _scheme(parsed, entry, quantize, target)
        tag = parsed.tag or (entry.default_tag or _only_tag(parsed.arch) if pretrained else None)
        parsed = dataclasses.replace(parsed, tag=tag, scheme=str(scheme) if scheme else None)
        exact = quantize if isinstance(quantize, Scheme) else None
        target = target or (exact.target if exact else None)
        return cls(parsed, entry, scheme, exact, target, num_classes, in_channels, calibrate)

    @property
    def float_name(self) -> str:
        """``arch.tag``."""
        return str(dataclasses.replace(self.name, scheme=None, qat=False))

    def config(self) -> Config:
        """Make the config of a model without weights, of the sizes asked for."""
        return _new_config(self.name, self.entry, self.scheme, self.num_classes, self.in_channels)

    def published_config(self) -> Config:
        """Make the config of a model with the tag's weights, whose sizes are those of their data."""
        return _new_config(self.name, self.entry, self.scheme, None, None)

    def public_weights(self) -> FloatWeights:
        """Look up the public float weights of the tag. Raises UnknownModelError where there are none."""
        name = self.name
        if name.tag is None or name.tag not in self.entry.weights:
            checkpoints = [other for other in hub.checkpoints() if parse_name(other).arch == name.arch]
            here = f" (checkpoints: {', '.join(checkpoints)})" if checkpoints else ""
            raise UnknownModelError(
                f"{name.arch} has no public float weights{here}; `qzoo train {name.arch}.mine` makes some, or build it "
                "with pretrained=False and load your own state dict"
            )
        return self.entry.weights[name.tag]

    @property
    def is_to_calibrate(self) -> bool:
        """Whether the quantized checkpoint is nowhere, and may and can be made of float weights without training."""
        if not _may_calibrate(self.calibrate) or self.name.qat or self.name.tag is None:
            return False
        known = hub.checkpoints()
        weights = self.entry.weights.get(self.name.tag)
        public = weights is not None and any(not source.startswith("qzoo:") for source in weights.sources)
        return _checkpoint_name(self.name) not in known and (public or self.float_name in known)

    def checkpoint(self) -> Path:
        """Find the folder of the quantized checkpoint.

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
        """Raise CheckpointError where a quantized model of other sizes than its checkpoint's was asked for."""
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
        """Raise CheckpointError where weights for another number of channels were asked for."""
        has = config.arguments.in_channels
        if self.in_channels not in (None, has):
            raise CheckpointError(
                f"in_channels={self.in_channels}, but the weights {config.name} have in_channels={has}; leave it out "
                f"and pass images of {has} channel{'s' if has > 1 else ''}, or build with pretrained=False"
            )


def new_config(name: str) -> Config:
    """Make the config of ``arch.tag-scheme`` before anything is built.

    Raises:
        UnknownModelError: no such architecture, or no weights of it with the tag.
    """
    parsed = parse_name(name)
    entry = architecture(parsed.arch)
    _check_tag(parsed, entry)
    return _new_config(parsed, entry, _scheme(parsed, entry, None, None), None, None)


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
    matches = [
        name for name in map(parse_name, hub.checkpoints()) if name.arch == arch and name.scheme is None
    ]
    return matches[0].tag if len(matches) == 1 else None


def _scheme(
    parsed: ModelName, entry: ModelEntry, quantize: bool | str | Scheme | None, target: str | None
) -> Scheme | None:
    """The scheme that name and arguments agree on, for the target; a Scheme stays as it is given."""
    asked = as_scheme(quantize)
    if parsed.scheme is not None:
        if quantize is False or (quantize not in (None, True) and str(asked) != parsed.scheme):
            raise ArgumentError(
                f"quantize={quantize!r} contradicts the name {str(parsed)!r}; give one of them"
            )
        if not isinstance(quantize, Scheme):
            asked = entry.scheme(parsed.scheme)
    elif asked is not None and not isinstance(quantize, Scheme):
        asked = entry.scheme(str(asked))
    if target is not None:
        target_named(target)
        asked = with_target(asked, target) if asked else None
    return asked


def _same_bits(first: Scheme, second: Scheme) -> bool:
    """Whether two schemes of the same name agree on the first and last layer, and on single layers."""
    edges = [(scheme.edge.weight_bits, scheme.edge.activation_bits) for scheme in (first, second)]
    return edges[0] == edges[1] and dict(first.layers) == dict(second.layers)


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
    classes = num_classes
    if classes is None:
        classes = (_CLASSES.get(weights.labels) if weights else None) or entry.default("num_classes")
    hint = weights or next(iter(entry.weights.values()), None)
    if hint is not None and hint.preprocessing.input_size[0] == channels:
        preprocessing = hint.preprocessing
    else:  # not given: the size of the architecture's own data, scaled to -1..1
        size = hint.preprocessing.input_size[1:] if hint else (entry.image_size,) * 2
        preprocessing = Preprocessing(
            (channels, *size), 1.0, "bilinear", (0.5,) * channels, (0.5,) * channels
        )
    same_classes = hint is not None and _CLASSES.get(hint.labels) == classes and weights is not None
    return Config(
        name=str(parsed),
        architecture=entry.name,
        arguments=Arguments(classes, channels),
        scheme=scheme,
        preprocessing=preprocessing,
        labels=hint.labels if same_classes and hint else "",
    )


def _may_calibrate(asked: str | None) -> bool:
    """Check whether a missing checkpoint is to be made: ``"auto"``, not ``"never"``; None: what the environment says.

    Raises:
        ArgumentError: something else is asked for.
    """
    value = asked or os.environ.get(_VARIABLE) or "auto"
    if value not in ("auto", "never"):
        where = "calibrate" if asked else _VARIABLE
        raise ArgumentError(f"{where} must be 'auto' or 'never', not {value!r}")
    return value == "auto"
