"""``QuantDescriptor``: what one quantizer does, as an immutable value, and the predefined ones.

Public home: :mod:`qzoo.quant.tensor_quant`, which re-exports everything here.
"""

from __future__ import annotations

import builtins
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from qzoo.errors import ArgumentError

logger = logging.getLogger(__name__)

Bits = int | tuple[int, int]
Axis = int | tuple[int, ...] | None

FLOAT_FORMATS: dict[tuple[int, int], str] = {(4, 3): "e4m3", (5, 2): "e5m2"}
"""Exponent and mantissa bits of the 8-bit floating point formats, and their names."""

CALIB_METHODS = ("max", "histogram")


@dataclass(frozen=True, init=False, eq=False, repr=False)
class QuantDescriptor:
    """Description of one quantizer: bits, granularity and range.

    Args:
        num_bits: integer bits, or ``(4, 3)`` for 8-bit floating point E4M3. 0 is allowed for debugging
            (everything quantizes to zero) and logged as an error.
        name: shown in place of the class name by ``str``.
        fake_quant: True returns floating point values on the integer grid, False the integers and a scale.
        axis: the axes that keep a range of their own, None for one range per tensor.
            With a weight ``[O, I, 3, 3]``: None gives a 0-d range, 0 gives ``[O, 1, 1, 1]``,
            ``(0, 1)`` gives ``[O, I, 1, 1]``.
        amax: a fixed range: float, list or numpy array, kept as float32. A one-dimensional range together
            with an ``axis`` lies along that axis.
        learn_amax: learn the range as a clip (per tensor only).
        scale_amax: factor on the range wherever it is used.
        calib_method: ``"max"`` or ``"histogram"``.
        unsigned: use the range ``0 .. 2**bits - 1``.
        narrow_range: leave out the lowest integer of the signed range.
        float_format: ``"e4m3"`` or ``"e5m2"`` chooses an 8-bit floating point format; ``"e4m3"`` is the same
            as ``num_bits=(4, 3)``. None derives it from ``num_bits``.
        affine: a range of two ends, ``limits``, and a zero point, as ONNX QuantizeLinear has it; one range per tensor
            of integers. The range in ``amax`` is kept beside it, for runtimes without zero points.
        block: ``(axis, size)``: one range for every ``size`` neighbours along that axis, on top of ``axis``.
            With a weight ``[O, I]``, ``axis=0, block=(1, 32)`` gives ``[O, I / 32]``.

    Raises:
        TypeError: wrong types, ``learn_amax`` together with an axis, ``affine`` together with what it excludes, unknown
            keywords.
        ValueError: negative bits, an unknown ``calib_method`` or ``float_format``, a block size below 1.

    Example:
        >>> QuantDescriptor(num_bits=8, axis=0, amax=[1.0, 2.0])
        QuantDescriptor(...)
    """

    num_bits: Bits
    name: str | None
    amax: np.ndarray | None
    fake_quant: bool = True
    axis: Axis = None
    scale_amax: float | None = None
    learn_amax: bool = False
    calib_method: str = "max"
    unsigned: bool = False
    narrow_range: bool = False
    block: tuple[int, int] | None = None
    affine: bool = False
    float_format: str | None = None

    def __init__(
        self,
        num_bits: Bits = 8,
        name: str | None = None,
        *,
        fake_quant: bool = True,
        axis: Axis = None,
        amax: float | Sequence[Any] | np.ndarray | None = None,
        learn_amax: bool = False,
        scale_amax: float | None = None,
        calib_method: str = "max",
        unsigned: bool = False,
        narrow_range: bool = False,
        float_format: str | None = None,
        block: tuple[int, int] | None = None,
        affine: bool = False,
        **unused: object,
    ) -> None:
        if unused:
            raise TypeError(f"Unused keys: {', '.join(sorted(unused))} (QuantDescriptor doesn't know them)")
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name must be a string or None, not {type(name).__name__}")
        if not isinstance(learn_amax, bool):
            raise TypeError(f"learn_amax must be a bool, not {type(learn_amax).__name__}")
        if learn_amax and (axis is not None or block is not None):
            raise TypeError("axis is ignored and must be None (and block too) when learn_amax is True")
        if calib_method not in CALIB_METHODS:
            raise ArgumentError(
                f"calib_method must be one of {', '.join(CALIB_METHODS)}, not {calib_method!r}"
            )
        values = vars(self)  # past the frozen fields
        values["num_bits"], values["float_format"] = _check_bits(num_bits, float_format)
        values["name"] = name
        values["amax"] = _check_amax(amax)
        values["fake_quant"] = fake_quant
        values["axis"] = _check_axis(axis)
        values["scale_amax"] = scale_amax
        values["learn_amax"] = learn_amax
        values["calib_method"] = calib_method
        values["unsigned"] = unsigned
        values["narrow_range"] = narrow_range
        values["block"] = _check_block(block)
        values["affine"] = affine
        if affine:
            self._require_one_range_of_integers()

    def _require_one_range_of_integers(self) -> None:
        excluded = {
            "float_format": self.float_format is not None,
            "axis": self.axis is not None,
            "block": self.block is not None,
            "amax": self.amax is not None,
            "learn_amax": self.learn_amax,
            "scale_amax": self.scale_amax is not None,
            "unsigned": self.unsigned,
            "narrow_range": self.narrow_range,
            "fake_quant=False": not self.fake_quant,
        }
        given = [name for name, is_given in excluded.items() if is_given]
        if given:
            raise TypeError(
                f"affine is for one range per tensor of fake-quantized integers, whose two ends are set or calibrated; "
                f"leave out {', '.join(given)}"
            )

    def dict(self) -> builtins.dict[str, Any]:
        """Give the fields as plain values; ``QuantDescriptor(**d)`` makes an equal descriptor.

        ``num_bits`` and ``name`` are always there, the others only when they differ from the default.
        """
        values: builtins.dict[str, Any] = {"num_bits": self.num_bits, "name": self.name}
        if self.amax is not None:
            values["amax"] = self.amax.tolist()
        for field in fields(self)[3:]:
            value = getattr(self, field.name)
            if value != field.default and not (field.name == "float_format" and self.num_bits == (4, 3)):
                values[field.name] = value
        return values

    def to_yaml(self) -> str:
        """Write the fields as YAML; tuples are written as lists."""
        import yaml  # keep `import qzoo.quant` light

        values = {key: list(v) if isinstance(v, tuple) else v for key, v in self.dict().items()}
        return yaml.safe_dump(values, sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> QuantDescriptor:
        """Read what :meth:`to_yaml` wrote. Raises ValueError when the text isn't a mapping."""
        import yaml

        try:
            if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
                raise ArgumentError(
                    "YAML aliases (*name) have no place in a QuantDescriptor; write the values out"
                )
            values = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError) as error:
            raise ArgumentError(f"this is no YAML of a QuantDescriptor: {error}") from error
        if not isinstance(values, dict):
            raise ArgumentError(
                f"expected a YAML mapping of QuantDescriptor fields, got {type(values).__name__}"
            )
        for key in ("num_bits", "axis", "block"):
            if isinstance(values.get(key), list):
                values[key] = tuple(values[key])
        return cls(**values)

    def _key(self) -> tuple[Any, ...]:
        amax = None if self.amax is None else (self.amax.shape, self.amax.tobytes())
        rest = tuple(sorted((k, v) for k, v in self.dict().items() if k not in ("amax", "num_bits", "name")))
        return (self.num_bits, self.name, amax, *rest)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantDescriptor):
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __str__(self) -> str:
        parts = [
            f"{'unsigned ' if self.unsigned else ''}{self.num_bits}bit",
            "fake" if self.fake_quant else "real",
            f"axis={self.axis}" if self.axis is not None else "axis= per-tensor",
        ]
        if self.block is not None:
            parts.append(f"block={self.block}")
        if self.affine:
            parts.append("affine")
        if self.amax is not None:
            parts.append(f"amax={self.amax.tolist()}")
            parts.append("narrow_range" if self.narrow_range else "full_range")
        if self.learn_amax:
            parts.append("learn_amax")
        if self.scale_amax is not None:
            parts.append(f"scale_amax={self.scale_amax}")
        head = "QuantDescriptor" if self.name is None else f"{self.name}: "
        return f"{head}({' '.join(parts)})"

    __repr__ = __str__


ScaledQuantDescriptor = QuantDescriptor


def _check_bits(num_bits: object, float_format: str | None) -> tuple[Bits, str | None]:
    """Bring the two ways to say the number format into one."""
    if float_format is not None:
        by_name = {name: bits for bits, name in FLOAT_FORMATS.items()}
        if float_format not in by_name:
            raise ArgumentError(f"float_format must be one of {', '.join(by_name)}, not {float_format!r}")
        if num_bits not in (8, by_name[float_format]):
            raise TypeError(f"float_format={float_format!r} has 8 bits; num_bits={num_bits!r} contradicts it")
        return by_name[float_format], float_format
    if isinstance(num_bits, tuple):
        if num_bits != (4, 3):
            raise TypeError(
                f"num_bits={num_bits} isn't supported; use (4, 3), or float_format='e5m2' for E5M2"
            )
        return num_bits, FLOAT_FORMATS[num_bits]
    if not isinstance(num_bits, int) or isinstance(num_bits, bool):
        raise TypeError(f"num_bits must be an int or the tuple (4, 3), not {type(num_bits).__name__}")
    if num_bits < 0:
        raise ArgumentError(f"num_bits must be >= 0, not {num_bits}")
    if num_bits == 0:
        logger.error("num_bits is 0: everything quantizes to zero; meant for debugging only")
    return num_bits, None


def _check_axis(axis: object) -> Axis:
    if axis is None or (isinstance(axis, int) and not isinstance(axis, bool)):
        return axis
    if isinstance(axis, (tuple, list)) and all(isinstance(a, int) for a in axis):
        return tuple(axis)
    raise TypeError(f"axis must be None, an int or a tuple of ints, not {axis!r}")


def _check_amax(amax: object) -> np.ndarray | None:
    if amax is None:
        return None
    # numpy.float64 is a float to isinstance; the contract counts it as a numpy scalar and refuses it.
    if isinstance(amax, (float, list, np.ndarray)) and not isinstance(amax, np.generic):
        stored = np.array(amax, dtype=np.float32)
        stored.setflags(write=False)  # the descriptor is hashable
        return stored
    raise TypeError(f"amax must be float, list or ndarray, not {type(amax).__name__}")


def _check_block(block: object) -> tuple[int, int] | None:
    if block is None:
        return None
    if not (isinstance(block, (tuple, list)) and len(block) == 2 and all(isinstance(b, int) for b in block)):
        raise TypeError(f"block must be (axis, size), two ints, not {block!r}")
    if block[1] < 1:
        raise ArgumentError(f"block size must be >= 1, not {block[1]}")
    return (block[0], block[1])


QUANT_DESC_8BIT_PER_TENSOR = QuantDescriptor(num_bits=8)
QUANT_DESC_UNSIGNED_8BIT_PER_TENSOR = QuantDescriptor(num_bits=8, unsigned=True)
QUANT_DESC_8BIT_CONV1D_WEIGHT_PER_CHANNEL = QuantDescriptor(num_bits=8, axis=0)
QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL = QuantDescriptor(num_bits=8, axis=0)
QUANT_DESC_8BIT_CONV3D_WEIGHT_PER_CHANNEL = QuantDescriptor(num_bits=8, axis=0)
QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW = QuantDescriptor(num_bits=8, axis=0)
# The weight of a transposed convolution is laid out (in, out / groups, k...): its output channels are axis 1.
QUANT_DESC_8BIT_CONVTRANSPOSE1D_WEIGHT_PER_CHANNEL = QuantDescriptor(num_bits=8, axis=1)
QUANT_DESC_8BIT_CONVTRANSPOSE2D_WEIGHT_PER_CHANNEL = QuantDescriptor(num_bits=8, axis=1)
QUANT_DESC_8BIT_CONVTRANSPOSE3D_WEIGHT_PER_CHANNEL = QuantDescriptor(num_bits=8, axis=1)
