"""Replace classes of ``torch.nn`` by quantized ones while a model is built, and the ONNX export switch.

::

    with quant_modules.initialize():
        model = torchvision.models.resnet50()     # QuantConv2d, QuantLinear, ...

``initialize()`` without ``with`` stays in force until ``deactivate()``. To quantize a model that exists
already, use :func:`qzoo.quant.quantize_`, which replaces nothing outside the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

import torch

from qzoo.quant import nn as quant_nn
from qzoo.quant.nn.modules._quantizer_export import NotExportableError, UncalibratedExportError, refusals
from qzoo.quant.nn.modules.tensor_quantizer import TensorQuantizer

__all__ = ["QuantModuleReplacementHelper", "deactivate", "enable_onnx_export", "initialize"]


class Entry(NamedTuple):
    """One replacement: the attribute ``mod_name`` of ``orig_mod`` becomes ``replace_mod``."""

    orig_mod: Any
    mod_name: str
    replace_mod: Any


LAYERS = (
    *("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Linear"),
    *("AvgPool1d", "AvgPool2d", "AvgPool3d", "AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d"),
)
"""Classes of ``torch.nn`` that have a quantized form under the name with ``Quant`` before it."""

_DEFAULT_QUANT_MAP = [
    Entry(torch.nn, name, getattr(quant_nn, f"Quant{name}")) for name in (*LAYERS, "LSTM", "LSTMCell")
]

# What stood at (namespace, name) before anybody replaced it; only the first is ever remembered.
_originals: dict[tuple[int, str], Entry] = {}


class QuantModuleReplacementHelper:
    """Helper that prepares, applies and takes back a set of replacements; several may overlap, in any order.

    Attributes:
        default_quant_map: the entries replaced by default.
        quant_map: the entries that :meth:`apply_quant_modules` will replace.
        orginal_func_map: what they replaced (the spelling is the old toolkit's).

    Example:
        >>> helper = QuantModuleReplacementHelper()
        >>> helper.prepare_state()
        >>> helper.apply_quant_modules()
        >>> helper.restore_float_modules()
    """

    def __init__(self) -> None:
        self.default_quant_map: list[Entry] = list(_DEFAULT_QUANT_MAP)
        self.quant_map: set[Entry] = set()
        self.orginal_func_map: set[Entry] = set()

    def prepare_state(
        self,
        float_module_list: Iterable[str] | None = None,
        custom_map: Iterable[tuple[Any, str, Any]] | None = None,
    ) -> None:
        """Choose the replacements, afresh.

        Args:
            float_module_list: names of ``torch.nn`` to leave alone.
            custom_map: ``(namespace, name, replacement)``; wins over the defaults and over the float list.
        """
        left = set(float_module_list or ())
        chosen = {(id(e.orig_mod), e.mod_name): e for e in self.default_quant_map if e.mod_name not in left}
        for item in custom_map or ():
            entry = Entry(*item)
            chosen[id(entry.orig_mod), entry.mod_name] = entry
        self.quant_map = set(chosen.values())

    def apply_quant_modules(self) -> None:
        """Put the quantized classes in place of torch's. Doing it again changes nothing.

        Raises:
            AttributeError: a name that its namespace doesn't have; nothing is replaced then.
        """
        for entry in self.quant_map:
            if not hasattr(entry.orig_mod, entry.mod_name):
                where = entry.orig_mod.__name__ if isinstance(entry.orig_mod, ModuleType) else entry.orig_mod
                raise AttributeError(f"{where} has no {entry.mod_name} to replace")
        for entry in self.quant_map:
            key = (id(entry.orig_mod), entry.mod_name)
            current = getattr(entry.orig_mod, entry.mod_name)
            original = _originals.setdefault(key, Entry(entry.orig_mod, entry.mod_name, current))
            self.orginal_func_map.add(original)
            setattr(entry.orig_mod, entry.mod_name, entry.replace_mod)

    def restore_float_modules(self) -> None:
        """Put back what stood there before the first replacement."""
        for original in self.orginal_func_map:
            setattr(*original)
            _originals.pop((id(original.orig_mod), original.mod_name), None)
        self.orginal_func_map = set()


_active: QuantModuleReplacementHelper | None = None


class _Session:
    """What ``initialize`` returns: leaving it as a context manager restores the state before."""

    def __init__(self, before: set[Entry] | None) -> None:
        self._before = before

    def __enter__(self) -> _Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        deactivate()
        if self._before is not None:
            _install(self._before)


def initialize(
    float_module_list: Iterable[str] | None = None,
    custom_quant_modules: Iterable[tuple[Any, str, Any]] | None = None,
) -> _Session:
    """Replace classes of ``torch.nn`` by their quantized forms, for models that are built from now on.

    Only these layers are quantized; :func:`qzoo.quantize` places what runtimes need between them too.

    Each call starts afresh: an earlier one is taken back first, with its arguments.

    Args:
        float_module_list: names to leave alone, such as ``["Linear"]``.
        custom_quant_modules: ``(namespace, "Name", replacement)``; wins over the float list.

    Returns:
        A context manager that restores the state before this call, whatever happens inside.

    Example:
        >>> from qzoo.quant import quant_modules
        >>> with quant_modules.initialize():
        ...     layer = torch.nn.Linear(8, 4)
        >>> type(layer).__name__
        'QuantLinear'
    """
    before = None if _active is None else set(_active.quant_map)
    helper = QuantModuleReplacementHelper()
    helper.prepare_state(float_module_list, custom_quant_modules)
    deactivate()
    _install(helper.quant_map)
    return _Session(before)


def deactivate() -> None:
    """Restore the float classes of ``torch.nn``; does nothing when none is replaced.

    Example:
        >>> from qzoo.quant import quant_modules
        >>> quant_modules.deactivate()
    """
    global _active
    if _active is not None:
        _active.restore_float_modules()
        _active = None


def _install(entries: set[Entry]) -> None:
    global _active
    helper = QuantModuleReplacementHelper()
    helper.quant_map = set(entries)
    helper.apply_quant_modules()
    _active = helper


@contextmanager
def enable_onnx_export() -> Iterator[None]:
    """Enable ONNX export in a ``with`` block: ``torch.onnx.export`` writes quantizers as Q/DQ pairs.

    Quantizers check that they are ready. May be nested; the switch is put back whatever happens. What a quantizer
    refuses is raised as it is, also where the exporter has wrapped it in an error of its own.

    Raises:
        AssertionError: a quantizer without a range, or a format that ONNX can't express.

    Example:
        >>> with enable_onnx_export():
        ...     exported = torch.export.export(model, (images,))
    """
    before = TensorQuantizer._enable_onnx_export
    TensorQuantizer._enable_onnx_export = True
    refusals.clear()
    try:
        yield
    except (UncalibratedExportError, NotExportableError):
        raise
    except Exception as error:
        cause = _refusal(error)
        if cause is not None:
            raise cause from error
        raise
    finally:
        TensorQuantizer._enable_onnx_export = before
        refusals.clear()


def _refusal(error: BaseException) -> BaseException | None:
    """The quantizer's own error within an exporter's."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        if isinstance(current, (UncalibratedExportError, NotExportableError)):
            return current
        seen.add(id(current))
        current = current.__cause__ or current.__context__
    return refusals[0] if refusals else None
