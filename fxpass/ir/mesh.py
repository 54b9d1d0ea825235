"""A mesh of ranks: groups that run different samples of a batch, each of ranks that run patches of these samples.

Ranks are counted by group, then by patch::

                 patch 0   patch 1   patch 2
    group 0         0         1         2        lines of the axis "patches": (0 1 2), (3 4 5)
    group 1         3         4         5        lines of the axis "samples": (0 3), (1 4), (2 5)

An exchange takes place along one axis: the ranks of each line exchange among themselves, and the exchange counts them
from 0 by their place in the line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate


@dataclass(frozen=True)
class Axis:
    """An axis of a mesh.

    Attributes:
        size: ranks in a line.
        stride: from one rank of a line to the next.
        lines: the number of lines.
    """

    name: str
    size: int
    stride: int
    lines: int

    def place(self, rank: int) -> int:
        """The place of a rank in its line."""
        return rank // self.stride % self.size

    def members(self, rank: int) -> tuple[int, ...]:
        """The ranks of the line in which a rank is, by their places."""
        first = rank - self.place(rank) * self.stride
        return tuple(first + i * self.stride for i in range(self.size))

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Mesh:
    """`groups` groups of `patches` ranks."""

    groups: int
    patches: int

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self.groups * self.patches

    @property
    def along_samples(self) -> Axis:
        """The axis on which ranks hold the same patch of different samples."""
        return Axis("samples", self.groups, self.patches, self.patches)

    @property
    def along_patches(self) -> Axis:
        """The axis on which ranks hold different patches of the same samples."""
        return Axis("patches", self.patches, 1, self.groups)

    def __str__(self) -> str:
        return f"{self.groups} x {self.patches}"


@dataclass(frozen=True)
class Placement:
    """Which process runs which ranks of a mesh: each runs one or more ranks, which follow each other.

    Attributes:
        counts: how many ranks each process runs.
    """

    counts: tuple[int, ...]

    @staticmethod
    def one_each(world: int) -> Placement:
        """Every rank has a process of its own."""
        return Placement((1,) * world)

    @property
    def processes(self) -> int:
        return len(self.counts)

    @property
    def world(self) -> int:
        """The number of ranks."""
        return sum(self.counts)

    @property
    def several(self) -> bool:
        """Whether some process runs several ranks."""
        return max(self.counts) > 1

    @property
    def names(self) -> list[str]:
        """What processes are called in texts: after their rank, if each has one."""
        if not self.several:
            return [f"rank {rank}" for rank in range(self.world)]
        own = [f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" for ranks in self]
        return [f"process {i} ({each})" for i, each in enumerate(own)]

    def ranks(self, process: int) -> range:
        """The ranks of a process."""
        return self._ranks[process]

    def process(self, rank: int) -> int:
        """The process that runs a rank."""
        return self._processes[rank]

    def __iter__(self) -> Iterator[range]:
        """The ranks of each process."""
        return iter(self._ranks)

    def sums(self, figures: Sequence[float]) -> list[float]:
        """For each process, the sum of what its ranks have."""
        return [sum(figures[rank] for rank in ranks) for ranks in self]

    @cached_property
    def _ranks(self) -> list[range]:
        starts = accumulate(self.counts, initial=0)
        return [range(start, start + count) for start, count in zip(starts, self.counts, strict=False)]

    @cached_property
    def _processes(self) -> list[int]:
        return [process for process, count in enumerate(self.counts) for _ in range(count)]
