"""Say what is quantized, to how many bits, and for which runtime: ``Scheme`` and ``Target``, values without torch.

Every quantizer of a zoo model has a *role*, given by the model's author. A *target* decides which roles are
on and whether non-negative activations use the unsigned range. All quantizers are calibrated in one pass
whatever the target, so one checkpoint serves all runtimes.

| role | sits on | for |
|---|---|---|
| ``input`` | the input of a convolution or linear layer | all targets |
| ``weight`` | its weight | all targets |
| ``residual`` | the skip input of an add | all targets |
| ``branch`` | the other input of an add | ONNX Runtime; TensorRT and OpenVINO fuse convolution and add |
| ``pool`` | the input of an average pooling, or of a BatchNorm beside layers that read the same | CPU runtimes |
| ``activation`` | what is read in float, behind an int8 kernel | ONNX Runtime, whose kernels need a Q right behind |
| ``output`` | the classifier's output | ONNX Runtime; the kernels of the others write float |
| ``norm`` | the input of a LayerNorm behind a convolution | ONNX Runtime, TensorRT: the convolution writes int8 |
| ``product`` | an operand of a product of two activations | all targets |
| ``stream`` | either input of an add between LayerNorms | no target: the adds of a transformer stay in float |
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from qzoo.errors import ArgumentError, shown

DEFAULT_TARGET = "onnxruntime"
"""The target where nothing else is said: of schemes, loaded checkpoints, exports and commands."""

FLOAT = "float"
"""In place of bits: a layer that is not quantized."""

LayerBits = tuple[tuple[str, int | str], ...]
"""Bits of single layers, by name: ``(("conv1", "float"), ("fc", 4))``."""

# Of a dataclass field: config.json leaves it out where it has its default.
OPTIONAL = {"optional": True}
ROLES = ("input", "weight", "residual", "branch", "pool", "output", "activation", "norm", "product", "stream")
# As str(Scheme) writes it: no leading zeros, no digits of other scripts, so that a scheme has one name.
SCHEME_PATTERN = r"w([1-9][0-9]{0,4})(e4m3|e5m2)?(?:g([1-9][0-9]{0,4}))?a([1-9][0-9]{0,4})"
_SCHEME = re.compile(SCHEME_PATTERN)


@dataclass(frozen=True)
class Target:
    """Placement of quantizers for a runtime: the roles that are quantized, and the type of non-negative activations.

    Attributes:
        roles: quantizers with another role are off.
        unsigned: non-negative activations are uint8 with zero point 0 (ONNX Runtime drops a ReLU only then);
            False keeps them int8, as TensorRT demands.
        affine: activations may have a zero point; of a scheme with ``affine`` the other activations then do. TensorRT
            demands zero points of 0.

    Example:
        >>> from qzoo.scheme import TARGETS
        >>> TARGETS["tensorrt"].unsigned
        False
    """

    name: str
    roles: frozenset[str]
    unsigned: bool
    affine: bool


TARGETS = {
    target.name: target
    for target in (
        Target(
            "tensorrt",
            frozenset({"input", "weight", "residual", "norm", "product"}),
            unsigned=False,
            affine=False,
        ),
        Target("onnxruntime", frozenset(ROLES) - {"stream"}, unsigned=True, affine=True),
        Target(
            "openvino",
            frozenset(ROLES) - {"branch", "output", "activation", "norm", "stream"},
            unsigned=True,
            affine=True,
        ),
    )
}


@dataclass(frozen=True)
class Scheme:
    """Bits of weights and activations, and the target whose placement is simulated.

    Weights have one symmetric narrow range (-127..127 at 8 bits) per output channel, so that BatchNorm folds
    exactly; activations one range per tensor, symmetric around zero if not ``affine``. ``str(Scheme(8, 8)) == "w8a8"``.

    Attributes:
        weight_format: "int", or "e4m3" or "e5m2": 8-bit floats, ``"w8e4m3a8"``.
        group: weights have a range for every so many input channels, ``"w4g32a8"``; 0 is one range for all. A
            layer whose input channels don't divide into groups has one range per output channel.
        edge_bits: bits of the first and the last layer, and of what only adds or averages (skips, pooling,
            logits); 0 is 8 where activations have fewer than 8, else the bits of the other layers.
        layers: mixed precision: ``(name, bits)`` of single layers, such as ``("layer1.0.conv1", 8)``. Their weights
            have these bits, their inputs at least as many (:func:`qzoo.quantizers.set_layer_bits`). ``"float"`` in
            place of bits keeps a layer in float (:func:`qzoo.placement.float_layers.keep_in_float`).
        affine: activations that may be negative have a range of two ends and a zero point, at targets that have
            zero points; the symmetric range is kept beside it for the others. For networks with SiLU, hard-swish or
            GELU, of whose outputs few are below zero.

    Example:
        >>> qzoo.Scheme.parse("w4a8").weight_bits
        4
        >>> str(qzoo.Scheme(weight_bits=8, activation_bits=8, target="openvino"))
        'w8a8'
    """

    weight_bits: int = 8
    activation_bits: int = 8
    target: str = DEFAULT_TARGET
    weight_format: str = field(default="int", metadata=OPTIONAL)
    group: int = field(default=0, metadata=OPTIONAL)
    edge_bits: int = field(default=0, metadata=OPTIONAL)
    layers: LayerBits = field(default=(), metadata=OPTIONAL)
    affine: bool = field(default=False, metadata=OPTIONAL)

    def __post_init__(self) -> None:
        if self.activation_bits == 16:
            raise ArgumentError(
                "Scheme.activation_bits is 16, for which no runtime here has kernels: ONNX Runtime and OpenVINO "
                "compute such a file in float (docs/export.md); keep the layers that lose most in float, "
                "Scheme(layers=((NAME, 'float'),))"
            )
        for name, bits in (("weight_bits", self.weight_bits), ("activation_bits", self.activation_bits)):
            if not 2 <= bits <= 8:
                raise ArgumentError(f"Scheme.{name} must be 2 to 8, not {bits}")
        if self.weight_format not in ("int", "e4m3", "e5m2"):
            raise ArgumentError(f"Scheme.weight_format must be int, e4m3 or e5m2, not {self.weight_format!r}")
        if self.weight_format != "int" and self.weight_bits != 8:
            raise ArgumentError(
                f"Scheme.weight_bits must be 8 for {self.weight_format}, not {self.weight_bits}"
            )
        if self.edge_bits != 0 and not 2 <= self.edge_bits <= 8:
            raise ArgumentError(f"Scheme.edge_bits must be 0 or 2 to 8, not {self.edge_bits}")
        if not 0 <= self.group <= 1 << 16:
            raise ArgumentError(f"Scheme.group must be 0 to 65536, not {self.group}")
        self._check_layers()
        target_named(self.target)

    def _check_layers(self) -> None:
        if not _are_pairs(self.layers):
            given = str(self.layers)
            raise ArgumentError(
                "Scheme.layers takes pairs of a layer's name and its bits, such as layers=(('conv1', 'float'),), not "
                f"{given if len(given) <= 60 else given[:60] + '...'}"
            )
        if self.weight_format != "int" and any(bits != FLOAT for _, bits in self.layers):
            raise ArgumentError(f"Scheme.layers needs integer weights, not {self.weight_format}")
        if len({name for name, _ in self.layers}) != len(self.layers):
            raise ArgumentError("Scheme.layers names a layer twice")
        for name, bits in self.layers:
            if bits != FLOAT and not (isinstance(bits, int) and 2 <= bits <= 8):
                raise ArgumentError(
                    f"Scheme.layers: the bits of {name!r} must be 2 to 8, or 'float', not {bits!r}"
                )

    @classmethod
    def parse(cls, text: str, target: str = DEFAULT_TARGET) -> Scheme:
        """Read ``"w8a8"``. Raises ValueError when the text has another form."""
        match = _SCHEME.fullmatch(text)
        if match is None:
            plain = re.sub(r"(?<=[wga])0+(?=[0-9])", "", unicodedata.normalize("NFKC", text[:40]).lower())
            hint = f"; did you mean {plain!r}?" if _SCHEME.fullmatch(plain) else ""
            raise ArgumentError(
                f"{shown(text)} is not a scheme; expected w<bits>a<bits>, such as 'w8a8' or 'w4a8'{hint}"
            )
        return cls(int(match[1]), int(match[4]), target, match[2] or "int", int(match[3] or 0))

    def __str__(self) -> str:
        weights = self.weight_format if self.weight_format != "int" else ""
        group = f"g{self.group}" if self.group else ""
        return f"w{self.weight_bits}{weights}{group}a{self.activation_bits}"

    @property
    def float_layers(self) -> tuple[str, ...]:
        """Names of the layers that stay in float."""
        return tuple(name for name, bits in self.layers if bits == FLOAT)

    @property
    def can_round(self) -> bool:
        """Whether the rounding of weights can be learned: of integers with one range per output channel."""
        return self.weight_format == "int" and not self.group

    @property
    def edge(self) -> Scheme:
        """The scheme of the first and the last layer."""
        bits = self.edge_bits or (8 if self.activation_bits < 8 else 0)
        if bits == 0:
            return self
        return replace(self, weight_bits=8 if self.weight_format != "int" else bits, activation_bits=bits)


def _are_pairs(layers: object) -> bool:
    """Whether these are pairs that begin with a text, and not a dict of them."""
    return (
        isinstance(layers, Collection)
        and not isinstance(layers, (str, Mapping))
        and all(
            isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str) for pair in layers
        )
    )


def as_scheme(quantize: bool | str | Scheme | None) -> Scheme | None:
    """Convert what users pass as ``quantize=`` to a scheme.

    Args:
        quantize: True is W8A8, a text is parsed; False and None mean a float model.

    Returns:
        The scheme, or None for a float model.

    Raises:
        ValueError: a text of another form.
        TypeError: something else.

    Example:
        >>> str(as_scheme(True)), as_scheme("w4a8").weight_bits, as_scheme(None)
        ('w8a8', 4, None)
    """
    if isinstance(quantize, Scheme):
        return quantize
    if isinstance(quantize, str):
        return Scheme.parse(quantize)
    if quantize is None or isinstance(quantize, bool):
        return Scheme() if quantize else None
    raise TypeError(
        f"quantize must be a bool, a text such as 'w8a8' or a Scheme, not {type(quantize).__name__}"
    )


def target_named(name: str) -> Target:
    """Look up a target by its name.

    Args:
        name: ``"onnxruntime"``, ``"openvino"`` or ``"tensorrt"``.

    Returns:
        The target.

    Raises:
        ValueError: an unknown name; the message lists the known ones.

    Example:
        >>> target_named("openvino").unsigned
        True
    """
    if name not in TARGETS:
        raise ArgumentError(f"no target {name!r}; expected one of {', '.join(TARGETS)}")
    return TARGETS[name]


def with_target(scheme: Scheme, target: str) -> Scheme:
    """Copy a scheme for another target.

    Args:
        scheme: bits and target.
        target: the name of the other target.

    Returns:
        The copy.

    Raises:
        ValueError: an unknown target.

    Example:
        >>> with_target(qzoo.Scheme(), "tensorrt").target
        'tensorrt'
    """
    return replace(scheme, target=target)
