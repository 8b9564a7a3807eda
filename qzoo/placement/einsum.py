"""Products of two tensors by ``einsum``, as attention is often written, in the form of ``matmul``.

Runtimes have integer kernels for MatMul and none for Einsum.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Product:
    """An equation of two operands that is a product of matrices, many at once.

    Attributes:
        left, right, result: the letters of the operands and of the result, one a dimension.
        batch: the letters that all three have.
        rows, columns: those that the result has of one operand.
        inner: those that are summed over.
    """

    left: str
    right: str
    result: str
    batch: str
    rows: str
    columns: str
    inner: str

    @classmethod
    def of(cls, equation: Any, ranks: list[int]) -> Product | None:
        """Read an equation, such as ``"bhid, bhjd -> bhij"``; None for what is no such product.

        Args:
            ranks: numbers of dimensions of the operands.
        """
        if not isinstance(equation, str) or len(ranks) != 2:
            return None
        sources, arrow, result = equation.replace(" ", "").partition("->")
        operands = sources.split(",")
        if len(operands) != 2:
            return None
        if "..." in sources:
            spare = [letter for letter in string.ascii_letters if letter not in equation]
            counts = {
                rank - len(term) + 3
                for term, rank in zip(operands, ranks, strict=True)
                if "..." in term
            }  # fmt: skip
            if len(counts) != 1 or not arrow:
                return None
            dots = "".join(spare[: counts.pop()])
            operands, result = [term.replace("...", dots) for term in operands], result.replace("...", dots)
        left, right = operands
        if not arrow:
            result = "".join(sorted(set(left) ^ set(right)))
        twice = any(len(set(term)) != len(term) for term in (left, right, result))
        if twice or [len(left), len(right)] != ranks or not set(result) <= set(left + right):
            return None
        if any(
            letter not in other + result for one, other in ((left, right), (right, left)) for letter in one
        ):
            return None  # a sum over one operand alone
        both = [letter for letter in left if letter in right]
        batch = "".join(letter for letter in both if letter in result)
        inner = "".join(letter for letter in both if letter not in result)
        rows, columns = ("".join(letter for letter in term if letter not in both) for term in (left, right))
        return cls(left, right, result, batch, rows, columns, inner) if inner else None

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        """Multiply by ``matmul``."""
        sizes = dict(zip(self.left + self.right, (*left.shape, *right.shape), strict=True))
        first = self._matrix(left, self.left, self.rows, self.inner)
        second = self._matrix(right, self.right, self.inner, self.columns)
        product = first @ second
        for axis, letters in ((-2, self.rows), (-1, self.columns)):
            if not letters:
                product = product.squeeze(axis)
            elif len(letters) > 1:
                product = product.unflatten(axis, [sizes[letter] for letter in letters])
        return _move(product, self.batch + self.rows + self.columns, self.result)

    def _matrix(self, value: Tensor, letters: str, rows: str, columns: str) -> Tensor:
        """The operand with its rows in one dimension and its columns in another, the last two."""
        matrix = _move(value, letters, self.batch + rows + columns)
        start = len(self.batch)
        for axis, group in ((start + len(rows), columns), (start, rows)):
            if not group:
                matrix = matrix.unsqueeze(axis)
            elif len(group) > 1:
                matrix = matrix.flatten(axis, axis + len(group) - 1)
        return matrix


def product_of(equation: Any, values: list[Any]) -> Product | None:
    """Find the matrix product that an ``einsum`` of these tensors computes; None where it is none, or repeats one."""
    if not all(isinstance(value, Tensor) for value in values):
        return None
    product = Product.of(equation, [value.dim() for value in values])
    if product is None:
        return None
    left, right = (
        dict(zip(letters, value.shape, strict=True))
        for letters, value in zip((product.left, product.right), values, strict=True)
    )
    same = all(left[letter] == right[letter] for letter in product.batch + product.inner)
    return product if same else None


def _move(value: Tensor, letters: str, order: str) -> Tensor:
    places = [letters.index(letter) for letter in order]
    return value if places == sorted(places) else value.permute(places)
