"""Law 1: a value is whole on every rank, or split along one dim, where rank k holds `whole.index_select(dim, rows[k])`.

`Rows` is an ascending set of positions, stored as a few runs, not as a large array::

    Run(start=4, length=2, stride=8, count=3)   ->   4 5 . . . . . . 12 13 . . . . . . 20 21

These are the tokens of the middle rows of three frames, after frames x rows x columns are flattened.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, reduce
from itertools import accumulate, pairwise
from operator import or_
from typing import Any

import numpy as np

from .mesh import Axis


@dataclass(frozen=True, order=True)
class Run:
    """`count` blocks of `length` consecutive positions; the first starts at `start`, each next one `stride` later."""

    start: int
    length: int
    stride: int = 0
    count: int = 1

    @property
    def size(self) -> int:
        return self.length * self.count

    def __str__(self) -> str:
        block = f"{self.start}:{self.start + self.length}"
        return block if self.count == 1 else f"{self.count}x({block})+{self.stride}"


@dataclass(frozen=True)
class Rows:
    """An ascending set of global positions along one dim."""

    runs: tuple[Run, ...]

    @staticmethod
    def interval(start: int, stop: int) -> Rows:
        """The positions start, start+1, …, stop-1."""
        return Rows((Run(start, stop - start),)) if stop > start else Rows(())

    @staticmethod
    def of(positions: Iterable[int] | np.ndarray) -> Rows:
        """`Rows` from positions in any order; equal sets give equal `Rows`."""
        array = np.asarray(positions, dtype=np.int64)
        if array.size == 0:
            return Rows(())
        if (np.diff(array) <= 0).any():
            array = np.unique(array)
        breaks = np.flatnonzero(np.diff(array) != 1)
        return Rows.blocks(
            array[np.concatenate(([0], breaks + 1))], array[np.concatenate((breaks, [array.size - 1]))] + 1
        )

    @staticmethod
    def blocks(starts: np.ndarray, stops: np.ndarray) -> Rows:
        """The union of ascending, disjoint intervals [start, stop); adjacent ones are joined."""
        apart = np.flatnonzero(starts[1:] != stops[:-1])
        first = starts[np.concatenate(([0], apart + 1))].tolist() if len(starts) else []
        last = stops[np.concatenate((apart, [len(stops) - 1]))].tolist() if len(starts) else []
        runs: list[Run] = []
        i = 0
        while i < len(first):
            length, j = last[i] - first[i], i + 1
            stride = first[j] - first[i] if j < len(first) and last[j] - first[j] == length else 0
            while stride and j < len(first) and last[j] - first[j] == length and first[j] - first[j - 1] == stride:
                j += 1
            runs.append(Run(first[i], length, stride, j - i))
            i = j
        return Rows(tuple(runs))

    def __len__(self) -> int:
        return self._size

    @cached_property
    def _size(self) -> int:
        return sum(run.size for run in self.runs)

    @cached_property
    def _hash(self) -> int:
        return hash(self.runs)

    def __hash__(self) -> int:
        return self._hash

    @property
    def array(self) -> np.ndarray:
        """The positions, ascending, `int64`."""
        return _positions(self)

    @property
    def start(self) -> int:
        """The first position."""
        return self.runs[0].start

    @property
    def stop(self) -> int:
        """One past the last position."""
        last = self.runs[-1]
        return last.start + last.stride * (last.count - 1) + last.length

    @property
    def contiguous(self) -> bool:
        """Whether the set is one interval."""
        return len(self.runs) == 1 and self.runs[0].count == 1

    def apart(self, other: Rows) -> bool:
        """Whether all positions of one set come before those of the other, or one of them is empty."""
        return not self.runs or not other.runs or self.stop <= other.start or other.stop <= self.start

    def shift(self, offset: int) -> Rows:
        return Rows(tuple(Run(r.start + offset, r.length, r.stride, r.count) for r in self.runs))

    def __and__(self, other: Rows) -> Rows:
        if self.apart(other):
            return _EMPTY
        if self.contiguous and other.contiguous:
            return Rows.interval(max(self.start, other.start), min(self.stop, other.stop))
        return _combine("and", self, other)

    def __or__(self, other: Rows) -> Rows:
        return _combine("or", self, other)

    def __sub__(self, other: Rows) -> Rows:
        return _combine("sub", self, other)

    def __le__(self, other: Rows) -> bool:
        return len(self & other) == len(self)

    def index(self, subset: Rows) -> np.ndarray:
        """The index of each position of `subset` in this set."""
        return _index(self, subset)

    def locate(self, subset: Rows) -> Rows:
        """The local positions of `subset`: `index` as `Rows`."""
        return _locate(self, subset)

    def __str__(self) -> str:
        return "{" + ", ".join(map(str, self.runs)) + "}"


_EMPTY = Rows(())


@lru_cache(maxsize=4096)
def _bounds(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Starts and stops of the intervals of the set."""
    starts = [r.start + r.stride * np.arange(r.count, dtype=np.int64) for r in rows.runs]
    stops = [first + r.length for first, r in zip(starts, rows.runs, strict=True)]
    return (np.concatenate(starts), np.concatenate(stops)) if starts else (_NOTHING, _NOTHING)


_NOTHING = np.zeros(0, dtype=np.int64)


@lru_cache(maxsize=4096)
def _positions(rows: Rows) -> np.ndarray:
    starts, stops = _bounds(rows)
    lengths = stops - starts
    shift = np.repeat(starts - np.concatenate(([0], np.cumsum(lengths)[:-1])), lengths) if len(starts) else _NOTHING
    array = np.arange(len(rows)) + shift
    array.setflags(write=False)
    return array


def _inside(points: np.ndarray, rows: Rows) -> np.ndarray:
    """For each point, whether it is in the set."""
    starts, stops = _bounds(rows)
    block = np.searchsorted(starts, points, side="right") - 1
    return (block >= 0) & (points < stops[block])


@lru_cache(maxsize=1 << 16)
def _combine(how: str, a: Rows, b: Rows) -> Rows:
    if a == b:
        return Rows(()) if how == "sub" else a
    if not a.runs or not b.runs:
        return {"and": Rows(()), "or": a if a.runs else b, "sub": a}[how]
    if how == "sub" and a.apart(b):
        return a
    # membership is constant between neighbouring bounds of the two sets
    bounds = np.unique(np.concatenate((*_bounds(a), *_bounds(b))))
    points = bounds[:-1]
    in_a, in_b = _inside(points, a), _inside(points, b)
    chosen = {"and": in_a & in_b, "or": in_a | in_b, "sub": in_a & ~in_b}[how]
    return Rows.blocks(points[chosen], bounds[1:][chosen])


@lru_cache(maxsize=1 << 16)
def _index(rows: Rows, subset: Rows) -> np.ndarray:
    if rows.contiguous:
        array = subset.array - rows.start
    else:
        array = np.searchsorted(rows.array, subset.array)
    array.setflags(write=False)
    return array


@lru_cache(maxsize=1 << 16)
def _locate(rows: Rows, subset: Rows) -> Rows:
    if rows.contiguous:
        return subset.shift(-rows.start)
    if not subset.runs:
        return subset
    starts, stops = _bounds(rows)
    before = np.concatenate(([0], np.cumsum(stops - starts)[:-1]))
    first, last = _bounds(subset)
    block = np.searchsorted(starts, first, side="right") - 1
    shift = before[block] - starts[block]
    return Rows.blocks(first + shift, last + shift)


@dataclass(frozen=True)
class Layout:
    """Whole on every rank (`dim` is None), or split along `dim` with `rows[k]` on rank k.

    The ranks' sets cover the dim. They may overlap and differ in size.
    """

    dim: int | None = None
    rows: tuple[Rows, ...] = ()

    @property
    def split(self) -> bool:
        return self.dim is not None

    @property
    def axis(self) -> int:
        """The split dim; raises `ValueError` for a whole value."""
        if self.dim is None:
            raise ValueError("a whole value has no split dim")
        return self.dim

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The number of rows on each rank."""
        return tuple(len(rows) for rows in self.rows)

    @property
    def uniform(self) -> bool:
        """Whether all ranks hold the same number of rows."""
        return len(set(self.sizes)) <= 1

    def covers(self, size: int) -> bool:
        """Whether the ranks' rows together are 0 … size-1."""
        return self.dim is None or reduce(or_, self.rows, Rows(())) == Rows.interval(0, size)

    def at(self, dim: int) -> Layout:
        """The same rows along another dim."""
        return Layout(dim, self.rows)

    def local_shape(self, shape: Sequence[int], rank: int) -> tuple[int, ...]:
        """The shape of rank `rank`'s part of a value whose whole shape is `shape`.

        In a mesh the groups of ranks are laid out alike, one after the other.
        """
        if self.dim is None:
            return tuple(shape)
        return (*shape[: self.dim], self.sizes[rank % len(self.rows)], *shape[self.dim + 1 :])

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.dim, self.rows))

    def __str__(self) -> str:
        return "whole" if self.dim is None else f"dim {self.dim}: " + " ".join(map(str, self.rows))


WHOLE = Layout()


def full(size: int, world: int) -> tuple[Rows, ...]:
    """All rows on every rank."""
    return (Rows.interval(0, size),) * world


@lru_cache(maxsize=4096)
def even(size: int, world: int, grain: int = 1) -> tuple[Rows, ...]:
    """One interval per rank, as equal as cuts at multiples of `grain` allow; the last rank takes the remainder."""
    units = size // grain
    cuts = [round(k * units / world) * grain for k in range(world)] + [size]
    return tuple(Rows.interval(a, b) for a, b in pairwise(cuts))


def shared(size: int, shares: Sequence[float], grain: int = 1) -> tuple[Rows, ...]:
    """One interval per rank, in proportion to `shares` as far as cuts at multiples of `grain` allow.

    No rank is empty where there are as many multiples as ranks.
    """
    world, units, total = len(shares), size // grain, sum(shares)
    cuts = [0]
    for k, before in enumerate(accumulate(shares[:-1]), 1):
        cut = round(units * before / total)
        cuts.append(min(max(cut, cuts[-1] + 1), units - (world - k)) if units >= world else cut)
    return tuple(Rows.interval(a, b) for a, b in pairwise([cut * grain for cut in cuts] + [size]))


@lru_cache(maxsize=4096)
def owned(rows: tuple[Rows, ...]) -> tuple[Rows, ...]:
    """Disjoint sets with the same union: the first rank that holds a row owns it."""
    seen = Rows(())
    result = []
    for part in rows:
        result.append(part - seen)
        seen = seen | part
    return tuple(result)


@lru_cache(maxsize=4096)
def routes(have: tuple[Rows, ...], want: tuple[Rows, ...]) -> tuple[tuple[Rows, ...], ...]:
    """`routes[dst][src]`: the rows that rank dst gets from rank src: the nearest rank that holds a row, itself first.

    Raises `ValueError` if no rank holds a wanted row.
    """
    held = reduce(or_, have)
    one_holder = sum(map(len, have)) == len(held)
    table = []
    for dst, rows in enumerate(want):
        if not rows <= held:
            raise ValueError(f"rank {dst} wants rows {rows - held} that no rank holds")
        table.append(tuple(rows & each for each in have) if one_holder else _nearest(rows, dst, have))
    return tuple(table)


def _nearest(rows: Rows, dst: int, have: tuple[Rows, ...]) -> tuple[Rows, ...]:
    """From which rank `dst` gets each of `rows`: the nearest that holds it."""
    sources = [Rows(())] * len(have)
    for src in sorted(range(len(have)), key=lambda s: (abs(s - dst), s)):
        if not rows.apart(have[src]):
            sources[src] = rows & have[src]
            rows = rows - sources[src]
    return tuple(sources)


@dataclass(frozen=True)
class PerRank:
    """An argument of a partitioned graph with one value per rank: of each patch, the same in all groups of a mesh.

    Attributes:
        axis: another axis, along which the values are.
    """

    values: tuple[Any, ...]
    axis: Axis | None = None

    def of(self, rank: int) -> Any:
        """The value of a rank."""
        return self.values[rank % len(self.values) if self.axis is None else self.axis.place(rank)]

    def __repr__(self) -> str:
        return "⟨" + ", ".join(map(str, self.values)) + "⟩" + (f" along {self.axis}" if self.axis else "")


def per_rank(values: Sequence[Any]) -> Any:
    """`PerRank(values)`, or the value itself if it is the same on all ranks."""
    return values[0] if all(v == values[0] for v in values[1:]) else PerRank(tuple(values))
