"""Classes of values that have one range: what is moved, picked or joined, with what it is made of."""

from __future__ import annotations

from qzoo.placement.trace import Trace, Value
from qzoo.placement.wants import Wants, is_nonnegative, operator_of


class Classes:
    """Values by class: two that an operation between quantizers hands on or joins are of one.

    Where the parts of a concatenation differ in sign, each keeps its own range, for a type of its own.
    """

    def __init__(self, trace: Trace, wants: Wants) -> None:
        self._parent: dict[Value, Value] = {}
        self.signs: dict[Value, bool] = {}
        for operation in trace.operations:
            parts = [value for value in operation.operands if value is not None]
            if not operator_of(operation).keeps_range or not parts:
                continue
            if not any((operation, place) in wants.edges for place in range(len(operation.operands))):
                read = any(
                    value in wants.integers or any(edge in wants.edges for edge in value.readers)
                    for value in parts
                )
                if operator_of(operation).kind == "join" or not read:
                    continue
            together = [*parts, *operation.outputs]
            if len({is_nonnegative(value, self.signs) for value in together}) == 1:
                for value in together[1:]:
                    self._join(together[0], value)

    def of(self, value: Value) -> Value:
        """Return what stands for the class of a value."""
        while (parent := self._parent.get(value, value)) is not value:
            value = parent
        return value

    def is_nonnegative(self, value: Value) -> bool:
        """Check whether a value is never below zero."""
        return is_nonnegative(value, self.signs)

    def _join(self, one: Value, other: Value) -> None:
        self._parent[self.of(other)] = self.of(one)
