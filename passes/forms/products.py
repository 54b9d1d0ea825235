"""The normal form of einsum: every dim has a letter, and the equation names the result."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ...ir.program import shape_of
from ..builder import Builder

aten = torch.ops.aten


def einsum(b: Builder, node: fx.Node, equation: str, operands: Sequence[fx.Node], **_: Any) -> fx.Node:
    words, result = letters(equation, [len(shape_of(x)) for x in operands])
    if len(operands) == 1 and sorted(words[0]) == sorted(result) and len(set(result)) == len(result):
        return b.permute(operands[0], [words[0].index(letter) for letter in result])
    return b.emit(aten.einsum.default, f"{','.join(words)}->{result}", list(operands))


def letters(equation: str, ndims: Sequence[int]) -> tuple[list[str], str]:
    """The letters of each operand (with `ndims` dims) and of the result, without `...`, and with a result.

    `...` stands for dims aligned on the right; a result that is not given has them, then every letter that occurs
    once, in alphabetical order.
    """
    source, arrow, result = equation.replace(" ", "").partition("->")
    words = source.split(",")
    counts = [ndim - len(word) + 3 if "..." in word else 0 for word, ndim in zip(words, ndims, strict=True)]
    unused = [letter for letter in string.ascii_letters if letter not in equation]
    dots = "".join(unused[: max(counts)])
    if not arrow:
        named = source.replace(",", "").replace(".", "")
        result = "..." + "".join(sorted(letter for letter in set(named) if named.count(letter) == 1))
    words = [word.replace("...", dots[len(dots) - n :]) for word, n in zip(words, counts, strict=True)]
    return words, result.replace("...", dots)
