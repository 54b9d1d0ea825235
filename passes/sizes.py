"""Estimate how a model would be shared at other sizes of its input, from its partitioned graph at one size.

Where the input has `size` rows, a value inside the model has fewer rows after down-sampling. If the input grows, both
grow in proportion. So the graph tells which share of each operator's work the slowest rank would have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil, lcm

from torch import fx

from ..ir import ops
from ..ir.layout import Rows, even
from ..ir.program import calls, fetched, layout_of, shape_of
from .cost import node_flops
from .rules import windows

FARTHEST = 64  #: inputs up to so many times the present size, or the number of ranks, are considered
CUT_INSIDE = 4  #: a value inside the model may be cut if it has so many rows for each rank


@dataclass(frozen=True)
class Level:
    """Operators that are shared alike.

    Attributes:
        rows: of the shortest value that theirs are computed from; 0 if every rank runs them whole at any size.
        length: of their own values, along the dim that is split: the number of tokens, say; 0 if it is the batch.
        power: of the input's size, with which their work grows: 0 if it does not, 2 for attention among all rows.
    """

    rows: int
    length: int
    power: int


@dataclass(frozen=True, eq=False)
class Sizes:
    """The work of a model by level, at one size of the input that is cut.

    Attributes:
        input: its name.
        dim: the dim along which it is cut.
        size: its rows along that dim.
        others: the most rows that it has along another dim that may be cut.
        work: floating-point operations of all ranks together, each counted once.
    """

    input: str
    dim: int
    size: int
    others: int
    work: Mapping[Level, int]

    def smallest(self, world: int, least: float, grains: Collection[int]) -> int | None:
        """The smallest size that lets `world` ranks reach the speed-up `least`; None if none does.

        Every level has a whole number of rows there.
        """
        rows = {each.rows for each in self.work if each.power and each.rows and self.size % each.rows == 0}
        step = lcm(*(self.size // each for each in rows))
        sizes = range(step, FARTHEST * max(self.size, world) + 1, step)
        return next((size for size in sizes if self.bound(size, world, grains) >= least), None)

    def bound(self, size: int, world: int, grains: Collection[int]) -> float:
        """The speed-up that the division of work allows if the input has `size` rows: all work over the slowest rank's.

        Args:
            grains: the ranks' parts of the input begin at multiples of one of these.
        """
        bounds = [1.0]
        if size >= world:
            bounds += [self._bound(size, even(size, world, grain)) for grain in grains if size >= world * grain]
        if max(size, self.others) >= world:
            bounds.append(self._bound(size, even(max(size, self.others), world), self._inside(size, world)))
        return max(bounds)

    def _inside(self, size: int, world: int) -> int:
        """The length of the values with most of the work, if they may be cut again inside the model; else 0."""
        if not self.work:
            return 0
        lengths: Counter[int] = Counter()
        for level, count in self.work.items():
            lengths[level.length] += count
        length, count = lengths.most_common(1)[0]
        long_enough = length * size >= CUT_INSIDE * world * self.size
        return length if long_enough and 2 * count > sum(lengths.values()) else 0

    def _bound(self, size: int, cuts: tuple[Rows, ...], inside: int = 0) -> float:
        """As `bound`, where the input is cut so, and values of the length `inside` are cut evenly."""
        scale, world = size / self.size, len(cuts)
        total, own = 0.0, [0.0] * world
        for level, count in self.work.items():
            work = count * scale**level.power
            rows = level.rows * size // self.size if level.power else level.rows
            if inside and inside <= level.length < 2 * inside:
                rows = level.length * size // self.size
            begins = [ceil(each.start * rows / cuts[-1].stop) for each in cuts] + [rows]
            shares = [stop - start for start, stop in pairwise(begins)]
            if min(shares) == 0:
                shares = [len(each) for each in even(rows, world)] if rows >= world else [rows or 1] * world
            total += work
            own = [before + work * share / (rows or 1) for before, share in zip(own, shares, strict=True)]
        return total / max(own) if total else 1.0


@dataclass(frozen=True)
class _Narrowest:
    """Of a value that depends on rows that are cut: its dims, the one that is cut, its length, and `Level.rows`.

    It is `shared` if it is split, or would be if it had more rows.
    """

    dims: int
    dim: int
    length: int
    rows: int
    shared: bool


def sizes_of(graph: fx.Graph, best: fx.Graph, input: str, dim: int, others: int) -> Sizes:  # noqa: A002
    """How the work of `graph` is shared in its partitioned form `best`, which cuts `input` along `dim`.

    Args:
        others: the most rows that the input has along another dim that may be cut.
    """
    uncounted = {node.name: count for node in calls(graph) if (count := node_flops(node))}
    work: Counter[Level] = Counter()
    first = next(node for node in best.nodes if node.name == input)
    depends = {first}  #: on the input
    keys: set[fx.Node] = set()  #: keys and values of all ranks, and views of them
    known: dict[fx.Node, _Narrowest] = {}
    for node in calls(best):
        operands = node.all_input_nodes
        if depends.intersection(operands):
            depends.add(node)
        grown = depends.intersection(operands) or operands  # a mask that is cut alike has other rows
        if (value := _narrowest(node, [known[each] for each in grown if each in known])) is not None:
            known[node] = value
        arrived = fetched(node)
        count = uncounted.pop(node.meta.get("origin", node.name), 0) if node_flops(node) else 0
        if count:
            power = (node in depends) * (2 if keys.intersection(operands) else 1)
            rows, length = (value.rows, value.length * (value.dim > 0)) if value and value.shared else (0, 0)
            work[Level(rows, length, power)] += count
        elif keys.intersection(operands) or (arrived is not None and arrived[1].role == "keys_values"):
            keys.add(node)
    return Sizes(input, dim, shape_of(first)[dim], others, work)


def _narrowest(node: fx.Node, operands: Collection[_Narrowest]) -> _Narrowest | None:
    """What is known of a node's value; None if it does not depend on rows that are cut."""
    above = max(operands, key=lambda each: each.rows, default=None)  # of a skip connection: the rows come from there
    layout, arrived = layout_of(node), fetched(node)
    if layout.split:
        length = shape_of(node)[layout.axis]
        rows = min(length, above.rows if above else length)
        return _Narrowest(len(shape_of(node)), layout.axis, length, rows, shared=True)
    if above is None or node.target is ops.exchange:
        return above
    if arrived is not None:
        return replace(above, shared=arrived[1].role == "small")
    if node.target in windows.TABLE and len(shape_of(node)) == above.dims:  # it changes the number of rows
        length = shape_of(node)[above.dim]
        return replace(above, length=length, rows=min(length, above.rows))
    return above
