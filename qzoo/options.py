"""How a checkpoint is made, as values: a :class:`Plan` with its :class:`Recipe`, and :class:`TrainOptions`.

A field says what its flag on the command line is: the commands declare it from here, and a card writes its command from
here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypedDict

from qzoo.errors import ArgumentError
from qzoo.scheme import DEFAULT_TARGET, TARGETS, LayerBits, Scheme

METHODS = ("ste", "lsq", "pact")
RANGES = ("max", "percentile", "mse", "entropy")
BATCHNORM, PROCEDURAL = "batchnorm", "procedural"
DATA_FREE = (PROCEDURAL, BATCHNORM)
ROUNDINGS = ("nearest", "learned", "sequential")
CORRECTIONS = ("none", "analytic", "empirical")
WITH_PERCENTILE = ("percentile", "auto")
AUTO = "auto"
PERCENTILE = 99.99


def _flag(
    default: Any,
    text: str,
    *,
    choices: tuple[str, ...] = (),
    always: bool = False,
    kind: Callable[[str], Any] | None = None,
    name: str = "",
    metavar: str | None = None,
) -> Any:
    """A field that is a flag of a command too, see :func:`flags_of`.

    Args:
        text: for ``--help``.
        always: a card's command names it even where it has its default.
        kind: of its value, where the default has another.
        name: of the flag, where it is not the field's.
        metavar: what ``--help`` calls its value.
    """
    metadata = {"help": text, "choices": choices, "always": always, "flag": name, "metavar": metavar}
    return field(default=default, metadata={**metadata, "kind": kind or type(default)})


def number_or_auto(text: str) -> float | str:
    """Read the value of ``--alpha``: a number, or ``auto``."""
    return text if text == AUTO else float(text)


def _check_kinds(options: Any, owner: str = "") -> None:
    """Raise ArgumentError where a field holds no number, or none of its choices."""
    numbers = {int: (Integral, "a whole number"), float: (Real, "a number")}
    for f in fields(options):
        value, choices = getattr(options, f.name), f.metadata["choices"]
        if choices and value not in choices:
            raise ArgumentError(f"{owner}{f.name} must be one of {', '.join(choices)}, not {value!r}")
        kind, what = numbers.get(f.metadata["kind"], (object, ""))
        if not isinstance(value, kind) and not (value is None and f.default is None):
            raise ArgumentError(f"{owner}{f.name} must be {what}, not {value!r}")


@dataclass(frozen=True)
class TrainOptions:
    """SGD with Nesterov momentum, a linear warm-up and a cosine to zero.

    Attributes:
        epochs: passes over the data.
        lr: peak learning rate.
        momentum: of SGD.
        weight_decay: on weights of two or more dimensions; biases and BatchNorm have none.
        warmup: share of all steps in which the rate rises from 0.
        label_smoothing: of the cross entropy.
        seed: of torch's global generator at the start; the loader has its own.
        bf16: forward in bfloat16 autocast (about twice as fast on a CPU with AVX512-BF16).
        fp16: forward in float16 autocast with a scaled loss, on a GPU; a CPU refuses it.
        method: of the ranges of a quantized model: "ste" keeps them as calibrated (straight-through estimator,
            Bengio et al. 2013, arXiv:1308.3432); "lsq" and "pact" train them, see :mod:`qzoo.qat`.
        range_lr: learning rate of trained ranges, as a multiple of ``lr``.
        range_decay: weight decay of trained ranges: PACT's regularization.
        distill: weight of the distillation loss, that of the labels is 1 - distill; needs a teacher.
        temperature: of the distillation.
        freeze_bn: share of the epochs, at the end, in which BatchNorm uses and keeps its running statistics
            (Krishnamoorthi 2018, arXiv:1806.08342, section 5.2).
        ema: decay of an exponential moving average of weights and statistics, which is the result; 0 is none.
        accumulate: batches a step; their gradients are averaged.
    """

    epochs: int = _flag(40, "passes over the data", always=True)
    lr: float = _flag(0.1, "peak learning rate", always=True)
    momentum: float = _flag(0.9, "of SGD")
    weight_decay: float = _flag(5e-4, "on weights", always=True)
    warmup: float = _flag(0.05, "share of rising rate")
    label_smoothing: float = _flag(0.0, "of the cross entropy", always=True)
    seed: int = _flag(0, "of shuffling and augmentation", always=True)
    bf16: bool = _flag(False, "bfloat16 autocast")
    method: str = _flag("ste", "ranges", choices=METHODS)
    range_lr: float = _flag(1.0, "of learned ranges, times lr")
    range_decay: float = _flag(0.0, "weight decay of learned ranges")
    distill: float = _flag(0.0, "weight of the float model's probabilities")
    temperature: float = _flag(4.0, "of the distillation")
    freeze_bn: float = _flag(0.0, "last share of epochs with fixed BatchNorm")
    ema: float = _flag(0.0, "decay of averaged weights; 0: none")
    accumulate: int = _flag(1, "batches a step")
    fp16: bool = _flag(False, "float16 autocast and a scaled loss, on a GPU")

    def __post_init__(self) -> None:
        _check_kinds(self, "TrainOptions.")
        for name in ("momentum", "warmup", "label_smoothing", "distill", "freeze_bn", "ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise ArgumentError(f"TrainOptions.{name} must be 0 to 1, not {getattr(self, name)}")
        for name in ("lr", "weight_decay", "range_lr", "range_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ArgumentError(f"TrainOptions.{name} must be 0 or more, not {getattr(self, name)}")
        for name in ("epochs", "accumulate"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"TrainOptions.{name} must be 1 or more, not {getattr(self, name)}")
        if not 0 < self.temperature < math.inf:
            raise ArgumentError(f"TrainOptions.temperature must be above 0, not {self.temperature}")
        if not -(2**63) <= self.seed < 2**63:
            raise ArgumentError(f"TrainOptions.seed must fit in 64 bits, not be {self.seed}")
        if self.bf16 and self.fp16:
            raise ArgumentError("TrainOptions.bf16 and fp16 exclude each other; choose one")

    def rate(self, step: int, steps: int) -> float:
        """Compute the learning rate of one of ``steps`` steps, counted from 0."""
        rise = max(1, round(self.warmup * steps))
        if step < rise:
            return self.lr * (step + 1) / rise
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


TRAINING = TrainOptions(epochs=36)
FINE_TUNING = TrainOptions(epochs=10, lr=0.01)
TUNING = TrainOptions(epochs=4, lr=0.001)
"""Defaults of ``qzoo train``: from random weights, from float weights, and of a quantized model."""


@dataclass(frozen=True)
class Recipe:
    """Combination of post-training methods, applied in the order of the attributes.

    ``str()`` gives ``"equalize + mse + learned"``.

    Attributes:
        equalize: cross-layer equalization first, with a ReLU in place of every ReLU6 (:func:`qzoo.ptq.without_relu6`).
        method: of the activations' ranges: one of :func:`qzoo.calibrate`'s, or without data: "procedural"
            (:mod:`qzoo.ptq.procedural`) or "batchnorm" (:mod:`qzoo.ptq.data_free`).
        rounding: of the weights: "nearest", "learned" (:func:`qzoo.ptq.adaround`) or "sequential"
            (:func:`qzoo.ptq.adaround_sequential`).
        smooth: SmoothQuant first (:func:`qzoo.ptq.smooth`), for transformers.
        bias_correction: "none", "analytic" or "empirical". Learned rounding corrects the biases already.
        percentile: of the method "percentile", chosen or tried by "auto"; None is 99.99.
        alpha: of SmoothQuant; None is 0.5, "auto" the best of several, and of none, on images held back
            (:func:`qzoo.ptq.best_alpha`).

    Raises:
        ValueError: an unknown value, one of a method that is not used, or images needed by one method and refused by
            another.

    Example:
        >>> from qzoo.ptq import Recipe
        >>> str(Recipe(equalize=True, method="mse", rounding="learned"))
        'equalize + mse + learned'
    """

    equalize: bool = _flag(
        False,
        "cross-layer equalization before the ranges; a ReLU takes the place of every ReLU6 if the images allow it",
    )
    method: str = _flag(
        "auto",
        "of the ranges; procedural and batchnorm need no data",
        choices=(*RANGES, "auto", *DATA_FREE),
    )
    rounding: str = _flag("nearest", "of weights", choices=ROUNDINGS)
    bias_correction: str = _flag("none", "of what rounding to nearest shifts", choices=CORRECTIONS)
    smooth: bool = _flag(False, "SmoothQuant before the ranges")
    percentile: float | None = _flag(
        None, "of the methods percentile and auto (default: 99.99)", kind=float, metavar="P"
    )
    alpha: float | str | None = _flag(
        None,
        "of SmoothQuant, 0 to 1 (default: 0.5); auto: what is best on images held back",
        kind=number_or_auto,
        metavar="A",
    )

    def __post_init__(self) -> None:
        _check_kinds(self)
        self._check_numbers()
        if self.rounding != "nearest" and self.bias_correction == "analytic":
            raise ArgumentError(
                f"rounding={self.rounding!r} corrects biases itself; leave bias_correction at 'none'"
            )
        if self.method == BATCHNORM and (
            self.smooth or self.rounding != "nearest" or self.bias_correction == "empirical"
        ):
            raise ArgumentError(
                f"method {BATCHNORM!r} uses no images; {self} would need some, or method {PROCEDURAL!r}"
            )

    def _check_numbers(self) -> None:
        if self.percentile is not None:
            if self.method not in WITH_PERCENTILE:
                raise ArgumentError(
                    f"a percentile is for method percentile or auto, not {self.method!r}; leave it out"
                )
            if not 0 < self.percentile <= 100:
                raise ArgumentError(f"percentile must be above 0 and at most 100, not {self.percentile}")
        if self.alpha is not None:
            if not self.smooth:
                raise ArgumentError("alpha is SmoothQuant's; give smooth, too, or leave it out")
            if self.alpha == AUTO:
                known = (*RANGES, PROCEDURAL)
                if self.method not in known:
                    raise ArgumentError(
                        f"alpha 'auto' needs one of the methods {', '.join(known)}, not {self.method!r}"
                    )
            elif not (isinstance(self.alpha, Real) and 0 <= self.alpha <= 1):
                raise ArgumentError(f"alpha must be between 0 and 1, or 'auto', not {self.alpha!r}")

    def changed(self, given: Mapping[str, Any]) -> Recipe:
        """Copy the recipe with other values. A percentile or an alpha goes with the method that it belongs to."""
        values = {**asdict(self), **given}
        if values["method"] not in WITH_PERCENTILE:
            values["percentile"] = given.get("percentile")
        if not values["smooth"]:
            values["alpha"] = given.get("alpha")
        return Recipe(**values)

    @property
    def data_free(self) -> bool:
        """Whether the recipe needs no data."""
        return self.method in DATA_FREE

    def __str__(self) -> str:
        parts = [
            _with("smooth", self.alpha) if self.smooth else "",
            "equalize" if self.equalize else "",
            _with(self.method, self.percentile),
            "" if self.rounding == "nearest" else self.rounding,
            "" if self.bias_correction == "none" else f"{self.bias_correction} bias correction",
        ]
        return " + ".join(part for part in parts if part)


def _with(method: str, number: float | str | None) -> str:
    return method if number is None else f"{method} {plain(number)}"


class BuildOptions(TypedDict, total=False):
    """Changes to a :class:`Plan`: values of its fields and of its recipe's, by name, in the order of a command.

    ``recipe="best"`` is ``Plan.best``. What is left out, or None, stays as it is: see :meth:`Plan.changed`.
    """

    calibration_subset: str | None
    evaluation_subset: str | None
    recipe: str | None
    method: str | None
    percentile: float | None
    smooth: bool | None
    alpha: float | str | None
    equalize: bool | None
    rounding: str | None
    bias_correction: str | None
    edge_bits: int | None
    affine: bool | None
    drop: float | None
    layer_bits: LayerBits | None
    target: str | None
    float_weights: str | Path | None


@dataclass(frozen=True)
class Plan:
    """How ``qzoo build`` makes a checkpoint; ``config.json`` records it (:attr:`qzoo.config.Config.plan`).

    Attributes:
        recipe: post-training methods.
        best: they are still to be found: the best of :data:`qzoo.ptq.RECIPES` on the calibration images is taken.
            ``recipe`` is then what it came to before.
        calibration_subset, evaluation_subset: ``"start:stop"``; the defaults are in :mod:`qzoo.pipeline.parts`.
        edge_bits: of the first and the last layer, see :class:`qzoo.scheme.Scheme`; 0 is the scheme's.
        affine: activations with a zero point where the target has them, see :class:`qzoo.scheme.Scheme`; None is
            what the network's family has.
        drop: mixed precision: at most this share of held-back calibration images, in percent, changes its top-1; see
            :func:`qzoo.ptq.mix_precision`. 0 is without it.
        layer_bits: bits of single layers, by name: ``(("fc", 4), ("conv1", "float"))``; with ``drop`` what it came to
            before.
        target: the runtime whose quantizers the methods see.
        float_weights: a folder with float weights of your own; what the name's tag means if None.

    Raises:
        ValueError: mixed precision, and a recipe without images.

    Example:
        >>> from qzoo.options import Plan
        >>> plan = Plan().changed({"method": "mse", "rounding": "learned", "edge_bits": 8})
        >>> str(plan.recipe), plan.flags()
        ('mse + learned', {'--method': ['mse'], '--rounding': ['learned'], '--edge-bits': [8]})
    """

    recipe: Recipe = Recipe()
    best: bool = _flag(
        False,
        "try all recipes on the calibration images, part of them held back, and take the best",
        choices=("best",),
        kind=str,
    )
    calibration_subset: str | None = _flag(None, "images to calibrate on", kind=str, metavar="START:STOP")
    evaluation_subset: str | None = _flag(None, "images to evaluate on", kind=str, metavar="START:STOP")
    edge_bits: int = _flag(0, "bits of the first and the last layer (default: the scheme's)")
    affine: bool | None = _flag(
        None,
        "activations with a zero point, where the runtime has them (default: as the network's family)",
        kind=bool,
    )
    drop: float = _flag(
        0.0,
        "8 bits for the layers that need them, until at most DROP %% of held-back images change top-1",
        name="--mixed-precision",
        metavar="DROP",
    )
    layer_bits: LayerBits = _flag(  # noqa: RUF009 - makes a field
        (), "bits of single layers, such as fc=4; fc=float keeps one in float", metavar="LAYER=BITS"
    )
    target: str = _flag(DEFAULT_TARGET, "runtime whose quantizers the methods see", choices=tuple(TARGETS))
    float_weights: str | Path | None = _flag(  # noqa: RUF009 - makes a field
        None, "folder or name of your own float checkpoint", kind=str, name="--float"
    )

    def __post_init__(self) -> None:
        if self.drop and not self.needs_images:
            raise ArgumentError(
                f"mixed precision chooses layers on images; choose another method than {self.recipe.method}"
            )

    @property
    def needs_images(self) -> bool:
        """Whether the methods look at calibration images."""
        return self.best or not self.recipe.data_free

    def scheme(self, base: Scheme) -> Scheme:
        """Give the scheme of a name (:meth:`qzoo.registry.ModelEntry.scheme`) the plan's bits of layers and target."""
        layers = () if self.drop else self.layer_bits
        affine = base.affine if self.affine is None else self.affine
        return replace(base, target=self.target, edge_bits=self.edge_bits, affine=affine, layers=layers)

    def changed(self, options: Mapping[str, Any]) -> Plan:
        """Copy the plan with other values, see :class:`BuildOptions`.

        Raises:
            ValueError: an unknown name or value, or two that contradict each other.
        """
        values = {name: value for name, value in options.items() if value is not None}
        unknown = values.keys() - build_options().keys()
        if unknown:
            known = ", ".join(build_options())
            raise ArgumentError(f"{min(unknown)!r} is no option of a build; known are {known}")
        best = values.pop("recipe", None)
        methods = {f.name: values.pop(f.name) for f in fields(Recipe) if f.name in values}
        if best not in (None, "best"):
            raise ArgumentError(f"recipe must be 'best', not {best!r}")
        if best and methods:
            raise ArgumentError(f"recipe='best' chooses {', '.join(methods)} itself; leave them out")
        if values.get("layer_bits") and values.setdefault("drop", 0.0):
            raise ArgumentError("drop chooses the bits of layers itself; leave layer_bits out")
        recipe = self.recipe.changed(methods)
        return replace(self, recipe=recipe, best=bool(best) or (self.best and not methods), **values)

    def flags(self) -> dict[str, list[Any]]:
        """List the flags of ``qzoo build`` that give this plan, each with its values."""
        values = {"recipe": "best"} if self.best else asdict(self.recipe)
        values |= {f.name: getattr(self, f.name) for f in fields(self) if f.name != "recipe"}
        if self.drop:
            del values["layer_bits"]
        return flags_of(build_options(), values)


def _fields(*kinds: type) -> dict[str, Field[Any]]:
    return {f.name: f for kind in kinds for f in fields(kind) if "help" in f.metadata}


# ---- flags ----


def build_options() -> dict[str, Field[Any]]:
    """List the fields behind :class:`BuildOptions`, in its order."""
    known = _fields(Recipe, Plan)
    return {name: known["best" if name == "recipe" else name] for name in BuildOptions.__annotations__}


def train_options() -> dict[str, Field[Any]]:
    """List the fields of :class:`TrainOptions`: those that a card always shows first, switches last."""
    known = _fields(TrainOptions).items()
    return dict(
        sorted(known, key=lambda item: (item[1].metadata["kind"] is bool, not item[1].metadata["always"]))
    )


def flag(name: str, value: Any = None) -> str:
    """Name the flag of a field, ``--weight-decay`` of ``weight_decay``; with the value False ``--no-weight-decay``."""
    return ("--no-" if value is False else "--") + name.replace("_", "-")


def flags_of(options: Mapping[str, Field[Any]], recorded: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Write the flags of a command that give the recorded options: those that differ from their defaults.

    Args:
        options: fields by name, in the order of the command.

    Returns:
        Flags with their values; a switch has none.
    """
    return {
        f.metadata["flag"] or flag(name, recorded[name]): _values(f, recorded[name])
        for name, f in options.items()
        if name in recorded and (f.metadata["always"] or recorded[name] != f.default)
    }


def _values(option: Field[Any], value: Any) -> list[Any]:
    if option.metadata["kind"] is tuple:
        return [f"{name}={bits}" for name, bits in value]
    return [] if option.metadata["kind"] is bool else [value]


def plain(value: object) -> str:
    """Write 0.01 as such, without the digits that float adds."""
    return f"{value:g}" if isinstance(value, float) else str(value)
