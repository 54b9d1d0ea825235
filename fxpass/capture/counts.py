"""Numbers that depend on activations: how many rows a router gives to an expert.

A model with experts reads such numbers to slice its tokens. It gets a `Count`, which says what it counts and has no
value. A slice by counts is recorded as a special operator on *all* rows; `rows` rewrites that into operators that are
exact for all decisions of the router.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

aten = torch.ops.aten

_library = torch.library.Library("fxpass_rows", "DEF")
_library.define("positions(Tensor mask) -> Tensor")
_library.define("counts(Tensor key, int size, bool upto) -> Tensor")
_library.define("segment(Tensor x, int dim, Tensor key, int[] members) -> Tensor")
_library.define("joined(Tensor[] parts, int dim, int size) -> Tensor")
_library.define("asked(Tensor of, int[] members, int number) -> Tensor")
_kind = "CompositeExplicitAutograd"
_library.impl("positions", lambda mask: mask.new_empty((mask.numel(), mask.ndim), dtype=torch.int64), _kind)
_library.impl("counts", lambda key, size, upto: key.new_empty((size,), dtype=torch.int64), _kind)
_library.impl("segment", lambda x, dim, key, members: x.new_empty(x.shape), _kind)
_library.impl("asked", lambda of, members, number: of.new_empty(()), _kind)


def _joined(parts: Sequence[Tensor], dim: int, size: int) -> Tensor:
    shape = list(parts[0].shape)
    shape[dim] = size
    return parts[0].new_empty(shape)


_library.impl("joined", _joined, _kind)

#: `positions(mask)`: nonzero, with a row for every position.
#: `counts(key, size, upto)`: bincount of `size` members; with `upto`, its real length is the largest key + 1, at most
#: `size`.
#: `segment(x, dim, key, members)`: of the rows of `x`, sorted by `key`, those whose key is one of `members`.
#: `joined(parts, dim, size)`: the concatenation of segments, `size` rows in all.
#: `asked(of, members, number)`: question `number`: are there any rows of `members`?
ops = torch.ops.fxpass_rows


@dataclass(frozen=True)
class Atom:
    """The number of elements of `node` that have the value `member`; None: that are true."""

    node: fx.Node
    member: int | None = None


class Context(Protocol):
    """The methods of `Routing` that a `Count` calls."""

    def total(self, atoms: dict[Atom, int], number: int) -> Any:
        """The sum of `times * atom` and a number; a plain number if every member of a key has the same factor."""
        ...

    def holds(self, difference: Count, relation: str) -> bool:
        """Whether the difference equals ("=="), exceeds (">") or is below ("<") zero."""
        ...

    def refuse(self, what: str) -> Any:
        """Raises a `CaptureError`."""
        ...


class Count(torch.SymInt):
    """The sum of `times * atom` over `atoms`, and of a number. It has no value.

    A `SymInt` only in that torch's argument parsers take it for a size, and leave it to the recorder.
    """

    def __init__(self, atoms: dict[Atom, int], number: int, context: Context) -> None:
        self.atoms = atoms
        self.number = number
        self._context = context

    def _plus(self, other: Any, sign: int) -> Any:
        atoms, number = dict(self.atoms), self.number
        if isinstance(other, Count):
            for atom, times in other.atoms.items():
                atoms[atom] = atoms.get(atom, 0) + sign * times
            number += sign * other.number
        elif isinstance(other, int):
            number += sign * int(other)
        else:
            return self._refuse()
        return self._context.total(atoms, number)

    def __add__(self, other: Any) -> Any:
        return self._plus(other, 1)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self._plus(other, -1)

    def __rsub__(self, other: Any) -> Any:
        return (self - other) * -1

    def __mul__(self, other: Any) -> Any:
        if not isinstance(other, int):
            return self._refuse()
        return self._context.total({a: n * other for a, n in self.atoms.items()}, self.number * other)

    __rmul__ = __mul__

    def __neg__(self) -> Any:
        return self * -1

    def _compare(self, other: Any, relation: str) -> bool:
        difference = self - other
        if not isinstance(difference, Count):
            return {"==": difference == 0, ">": difference > 0, "<": difference < 0}[relation]
        return self._context.holds(difference, relation)

    def __eq__(self, other: object) -> bool:
        return self._compare(other, "==")

    def __ne__(self, other: object) -> bool:
        return not self._compare(other, "==")

    def __gt__(self, other: Any) -> bool:
        return self._compare(other, ">")

    def __lt__(self, other: Any) -> bool:
        return self._compare(other, "<")

    def __ge__(self, other: Any) -> bool:
        return not self._compare(other, "<")

    def __le__(self, other: Any) -> bool:
        return not self._compare(other, ">")

    def __bool__(self) -> bool:
        return not self._compare(0, "==")

    def __hash__(self) -> int:
        return self._refuse()

    def _refuse(self, *_: Any) -> Any:
        return self._context.refuse("a number")

    __float__ = _refuse
    __str__ = __repr__ = __format__ = _refuse  # a text could be turned into anything


for _name in vars(torch.SymInt).keys() - vars(Count).keys() - {"__module__", "__dict__", "__weakref__", "__doc__"}:
    setattr(Count, _name, Count._refuse)
