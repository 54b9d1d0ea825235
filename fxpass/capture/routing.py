"""Record routing by activations: answer questions of the model about numbers of rows that depend on activations.

In the main recording, every question "are there any rows?" is answered with yes, as if each expert had tokens. Two
more recordings answer every second question with no. `capture` checks that their programs equal the main program
without those rows.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._mode_utils import no_dispatch

from .concrete import memory_of
from .count_rules import RULES, array
from .counts import Atom, Count, aten, ops
from .errors import CaptureError

_MOVED = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.clone.default, aten._to_copy.default}
_MOVED |= {aten.detach.default, aten.alias.default, aten.unsqueeze.default, aten.permute.default, aten.transpose.int}
_MOVED |= {aten.squeeze.dim, aten.select.int, aten.slice.Tensor, aten.t.default, aten.expand.default}
_AS_LONG = {aten._to_copy.default, aten.clone.default, aten.alias.default, aten.view.default, aten.cumsum.default}
#: operators whose second result holds positions -> the place of the argument `dim`
_DIMS = {aten.topk.default: 2, aten.sort.default: 1, aten.sort.stable: 2, aten.max.dim: 1}
_SPLITS = {torch.split, Tensor.split, torch.split_with_sizes, Tensor.split_with_sizes}
_NARROWS = {Tensor.narrow, torch.narrow}
_CUTS = _SPLITS | _NARROWS
_SIZES = {Tensor.view, Tensor.reshape, Tensor.expand, torch.reshape}

#: operators that write rows back: the result has as many rows as the tensor that is written to
RETURNS = {
    *(aten.index_add.default, aten.index_add_.default, aten.scatter_add.default, aten.scatter_add_.default),
    *(aten.scatter_reduce.two, aten.scatter_reduce_.two, aten.index_put.default, aten.index_put_.default),
}


class Routing:
    """Answers questions about counts and records cuts by counts."""

    def __init__(self, recorder: Any, reader: Any, empty: int | None = None) -> None:
        """
        Args:
            empty: 0 or 1: answer the questions with an even or an odd number with "no rows"; None: none of them.
        """
        self._recorder = recorder
        self._reader = reader
        self._pattern = empty
        self.questions: list[str] = []  #: the line of each
        self._answers: dict[frozenset[Atom], bool] = {}
        self._none: set[Atom] = set()
        self._members: dict[fx.Node, tuple[int, int]] = {}  #: key -> its number of members and of elements
        self.used: list[fx.Node] = []  #: values that answers depend on; nothing may write to them

    # ---------------------------------------------------------------------------- arithmetic and comparisons

    def total(self, atoms: dict[Atom, int], number: int) -> Any:
        return self._sum(atoms, number, set())

    def _sum(self, atoms: dict[Atom, int], number: int, empty: set[Atom]) -> Any:
        """The sum without `empty` atoms; a number if every other member of a key has the same factor."""
        atoms = {atom: times for atom, times in atoms.items() if times and atom not in empty}
        for key in {atom.node for atom in atoms if atom.member is not None}:
            members, size = self._members[key]
            wanted = {Atom(key, i) for i in range(members)} - empty
            found = {atoms.get(atom, 0) for atom in wanted}
            if len(found) == 1 and 0 not in found:
                number += size * found.pop()
                atoms = {atom: times for atom, times in atoms.items() if atom not in wanted}
        return Count(atoms, number, self) if atoms else number

    def holds(self, difference: Count, relation: str) -> bool:
        atoms = self._without_number(difference)
        signs = {times > 0 for times in atoms.values()}
        if len(set(atoms.values())) != 1:
            return self.refuse("more than whether there are any rows")
        empty = self._is_empty(frozenset(atoms))
        return empty if relation == "==" else not empty and signs.pop() == (relation == ">")

    def _without_number(self, count: Count) -> dict[Atom, int]:
        """The atoms of a count, its number replaced by the counts of all members; empty if that is impossible."""
        if not count.number:
            return count.atoms
        key = next(iter(count.atoms)).node
        members, size = self._members.get(key, (0, 1))
        if not members or not size or count.number % size:
            return {}
        every = dict.fromkeys((Atom(key, i) for i in range(members)), count.number // size)
        every |= {atom: times + every.get(atom, 0) for atom, times in count.atoms.items()}
        return {atom: times for atom, times in every.items() if times}

    def refuse(self, what: str) -> Any:
        line = self._recorder.current_line()
        raise CaptureError(
            f"the model at {line} needs the value of an activation, {what}, which no fixed graph can follow; keep "
            "it a tensor (torch.where) or pass the decision in as an argument"
        )

    def _is_empty(self, atoms: frozenset[Atom]) -> bool:
        if atoms not in self._answers:
            number = len(self.questions)
            self.questions.append(self._recorder.current_line())
            self._answers[atoms] = empty = self._pattern is not None and number % 2 == self._pattern
            if empty:
                self._none |= atoms
            of = {atom.node for atom in atoms}
            if len(of) > 1:
                self.refuse("the number of rows of several selections")
            node = of.pop()
            members = sorted(atom.member for atom in atoms if atom.member is not None)
            with self._recorder:
                ops.asked.default(node.meta["val"], members, number)
        return self._answers[atoms]

    def check(self) -> None:
        """Raises `CaptureError` if the model wrote to a tensor that an answer depends on."""
        written = {m for node in self._recorder.writes for m in memory_of(node.meta["val"])}
        node = next((n for n in self.used if written & set(memory_of(n.meta["val"]))), None)
        if node is not None:
            raise CaptureError(
                f"the model decides by an activation, {node.target} at {node.meta['trace']}, and also writes to it in "
                "place; write to a copy"
            )

    # --------------------------------------------------------------------------------- values that are counts

    def is_activation(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and self._reader.is_activation(self._recorder.node(tensor))

    def numbers(self, tensor: Tensor, form: str) -> Any:
        """What `numpy`, `item` or `bool` return for an activation; None if unknown."""
        values = self._values(self._recorder.node(self._recorder.fake(tensor)))
        if values is None or (form != "array" and values.size != 1):
            return None
        value = values.item() if form != "array" or not values.ndim else values
        return bool(value) if form == "bool" else value

    def _values(self, node: fx.Node) -> Any:
        """The elements of an integer or boolean tensor, each a number or a `Count`; None if unknown."""
        self.used.append(node)
        op: Any = node.target
        args: Any = node.args
        if (dtype := node.meta.get("dtype")) is not None and (dtype.is_floating_point or dtype.is_complex):
            return None
        if op is ops.counts.default:
            return self._counts(args[0], args[1])
        if op is aten.sum.default and args[0].meta["dtype"] is torch.bool:
            return array(self.total({Atom(args[0]): 1}, 0))
        if op is aten.sum.dim_IntList and (key := self._one_hot(args[0])) is not None:
            return self._counts(*key) if tuple(node.meta["shape"]) == key[1:] else None
        if op is aten.any.default and args[0].meta["dtype"] is torch.bool:
            return array(bool(self.total({Atom(args[0]): 1}, 0) != 0))
        if self._reader.is_constant(node):
            with no_dispatch():
                return array(self._reader(node, shape_only=False).numpy())
        if op not in RULES:
            return None
        operands: dict[fx.Node, Any] = {}
        for each in node.all_input_nodes:
            operands[each] = self._values(each)
            if operands[each] is None:
                return None
        args, kwargs = fx.node.map_arg((args, node.kwargs), operands.__getitem__)
        return RULES[op](node, *args, **kwargs)

    def _counts(self, key: fx.Node, members: int) -> np.ndarray:
        """How many elements of `key` are each of its `members`."""
        self._members[key] = (members, key.meta["val"].numel())
        return array([self.total({Atom(key, i): 1}, 0) for i in range(members)])

    def _one_hot(self, node: fx.Node) -> tuple[fx.Node, int] | None:
        """The key and the number of members of a one-hot tensor whose last dim holds the members."""
        if node.target is aten.one_hot.default:
            key, size = node.args
            return (key, size) if self._bound(key) == size else None  # type: ignore[arg-type, return-value]
        if node.target in (aten._to_copy.default, aten.view.default, aten._unsafe_view.default, aten.clone.default):
            same_last = node.meta["shape"][-1:] == node.args[0].meta["shape"][-1:]
            return self._one_hot(node.args[0]) if same_last else None  # type: ignore[arg-type]
        return None

    def _bound(self, node: fx.Node) -> int | None:
        """An upper bound, exclusive, of the elements of an integer tensor without negative elements; None: unknown."""
        self.used.append(node)
        if node.target in _MOVED:
            return self._bound(node.args[0])  # type: ignore[arg-type]
        source: Any = node.args[0] if node.args else None
        if node.target is operator.getitem and node.args[1] == 1 and source.target in _DIMS:
            place = _DIMS[source.target]
            dim = source.args[place] if len(source.args) > place else source.kwargs.get("dim", -1)
            return source.args[0].meta["shape"][dim]
        if node.target is aten.argmax.default and len(node.args) > 1:
            return source.meta["shape"][node.args[1]]
        return None

    # ------------------------------------------------------------------------- operators with unknown sizes

    def dynamic(self, op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Record an operator whose result's size depends on activations, on all rows; None if it has no such form."""
        if op not in (aten.nonzero.default, aten.bincount.default) or not self.is_activation(args[0]):
            return None
        with self._recorder:
            if op is aten.nonzero.default:
                return ops.positions.default(args[0])
            weights, least, *_ = (*args[1:], *(None, 0)[len(args) - 1 :])
            bound = self._bound(self._recorder.node(args[0]))
            if bound is None or weights is not None or "weights" in kwargs:
                return None
            least = kwargs.get("minlength", least)
            return ops.counts.default(args[0], max(bound, least), least < bound)

    def _sources(self, tensor: Tensor) -> Iterator[fx.Node]:
        """The node of a value, and its ancestors of the same length."""
        node: Any = self._recorder.find(tensor)
        while isinstance(node, fx.Node):
            yield node
            node = node.args[0] if node.args and node.target in _AS_LONG else None

    def rows(self, tensor: Tensor) -> tuple[Any, int] | None:
        """The real number of rows of a value (a `Count`) and the recorded one; None if they are equal."""
        node = self._recorder.find(tensor)
        return None if node is None else node.meta.get("rows")

    def mark(self, node: fx.Node) -> None:
        """Note on a new node whether its number of rows is unknown."""
        op: Any = node.target
        if op is ops.positions.default:
            mask: Any = node.args[0]
            node.meta["rows"] = (self.total({Atom(mask): 1}, 0), mask.meta["val"].numel())
        elif op in RETURNS:
            known = node.args[0].meta.get("rows")
            node.meta |= {"rows": known} if known else {}
        elif op is not ops.joined.default and op is not ops.segment.default:
            marked = next((n.meta["rows"] for n in node.all_input_nodes if "rows" in n.meta), None)
            node.meta |= {"rows": marked} if marked else {}

    def mark_written(self, write: fx.Node) -> None:
        """Note the same on the tensor that an in-place operator writes to."""
        self.mark(write)
        target: Any = write.kwargs.get("out", write.args[0])
        if "rows" in write.meta:
            target.meta["rows"] = write.meta["rows"]

    def segment(self, x: Tensor, dim: int, start: Any, stop: Any) -> Tensor:
        """Record `x[start:stop]` along `dim`, where a bound is a count."""
        size = x.shape[dim]
        keys = {atom.node for bound in (start, stop) if isinstance(bound, Count) for atom in bound.atoms}
        key = keys.pop()
        if keys or key not in self._members or self._members[key][1] != size:
            self.refuse("a cut by the sizes of several selections")
        members, _ = self._members[key]
        every = [i for i in range(members) if Atom(key, i) not in self._none]
        first, last = (self._below(bound, size, every) for bound in (start, stop))
        inside = every[first:last]
        if not inside:
            self.refuse("a cut that is not where one member ends")
        with self._recorder:
            result = ops.segment.default(x, dim % x.ndim, key.meta["val"], inside)
        count = self.total({Atom(key, i): 1 for i in inside}, 0)
        self._recorder.node(result).meta["rows"] = (count, size)
        return result

    def _below(self, bound: Any, size: int, members: list[int]) -> int:
        """How many of the `members` lie before a bound."""
        if not isinstance(bound, Count):
            found = {0: 0, size: len(members)}.get(bound, -1)
        else:
            before = {atom.member for atom in bound.atoms}.intersection(members)
            plain = not bound.number and set(bound.atoms.values()) == {1}
            found = len(before) if plain and before == set(members[: len(before)]) else -1
        return self.refuse("a cut that is not where one member ends") if found < 0 else found

    def cat(self, tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
        """Join segments; None if no tensor is a segment, or they are joined along another dim."""
        counts = [self.rows(t) for t in tensors]
        dim = dim % tensors[0].ndim
        if not any(known and t.shape[dim] == known[1] for t, known in zip(tensors, counts, strict=True)):
            return None
        parts = [t for t in tensors if t.shape[dim]]
        total = sum((known[0] if known else t.shape[dim]) for t, known in zip(tensors, counts, strict=True))
        if isinstance(total, Count):
            total = self._sum(total.atoms, total.number, self._none)
        if isinstance(total, Count):
            self.refuse("a concatenation of rows whose number is unknown")
        with self._recorder:
            return ops.joined.default(parts, dim, total)

    # ------------------------------------------------------------------------------ functions given counts

    def with_counts(self, func: Any, args: Any) -> Any:
        """The arguments of a function that cuts; numbers of rows in 0-dim tensors are replaced by the numbers."""
        if func is Tensor.__getitem__:
            x, index = args
            if isinstance(index, tuple):  # a tensor among the indices is a look-up, in a slice it is a bound
                return x, tuple(self._resolved(part) if isinstance(part, slice) else part for part in index)
            return x, self._resolved(index) if isinstance(index, slice) else index
        return (args[0], *map(self._resolved, args[1:])) if func in _CUTS else args

    def _resolved(self, value: Any) -> Any:
        if isinstance(value, slice):
            return slice(*map(self._resolved, (value.start, value.stop, value.step)))
        if type(value) in (tuple, list):
            return type(value)(map(self._resolved, value))
        if isinstance(value, Tensor) and not value.ndim and self.is_activation(value):
            number = self.numbers(value, "item")
            return value if number is None else number
        return value

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Call a function that has counts among its arguments."""
        if func is Tensor.__getitem__:
            x, index = args
            first, *rest = index if isinstance(index, tuple) else (index,)
            if isinstance(first, slice) and first.step is None:
                start, stop = (first.start, 0), (first.stop, x.shape[0])
                part = self.segment(x, 0, *(end if bound is None else bound for bound, end in (start, stop)))
                return part[(slice(None), *rest)] if rest else part
        if func in _SPLITS:
            x, sizes, *dim = args
            at = dim[0] if dim else kwargs.get("dim", 0)
            bounds = [0, *np.cumsum(np.array(sizes, dtype=object))]
            return tuple(self.segment(x, at, a, b) for a, b in pairwise(bounds))
        if func in _NARROWS:
            x, at, start, length = args
            return self.segment(x, at, start, start + length)
        if func in _SIZES:
            known = self.rows(args[0])
            if known is not None:
                sizes = [known[1] if isinstance(v, Count) and v.atoms == known[0].atoms else v for v in _flat(args[1:])]
                if not any(isinstance(v, Count) for v in sizes):
                    return func(args[0], sizes)
        return self.refuse("a number of rows")

    def shape(self, tensor: Tensor) -> tuple[Any, ...] | None:
        """The shape of a tensor whose number of rows is unknown; None for other tensors."""
        if any(node.target is ops.counts.default and node.args[2] for node in self._sources(tensor)):
            self.refuse("the largest value that is counted (pass bincount a minlength)")
        known = self.rows(tensor)
        return known and tuple(known[0] if size == known[1] else size for size in torch.Tensor.size(tensor))


def has_counts(value: Any) -> bool:
    """Whether the arguments of a function contain a count."""
    if isinstance(value, (tuple, list)):
        return any(map(has_counts, value))
    if isinstance(value, dict):
        return any(map(has_counts, value.values()))
    if isinstance(value, slice):
        return isinstance(value.start, Count) or isinstance(value.stop, Count)
    return isinstance(value, Count)


def _flat(args: Any) -> list[Any]:
    return list(args[0]) if len(args) == 1 and isinstance(args[0], (tuple, list)) else list(args)
