"""A mesh of ranks: groups that run different samples of a batch, each of stages that run parts of the model one after
the other, each of ranks that run patches of these samples.

Ranks are counted by group, then by stage, then by patch::

                         patch 0   patch 1
    group 0   stage 0       0         1        lines of the axis "patches": (0 1), (2 3), (4 5), (6 7)
              stage 1       2         3        lines of the axis "samples": (0 4), (1 5), (2 6), (3 7)
    group 1   stage 0       4         5
              stage 1       6         7

An exchange takes place along one axis: the ranks of each line exchange among themselves, and the exchange counts them
from 0 by their place in the line.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate


@dataclass(frozen=True)
class Axis:
    """An axis of a mesh, or a part of it.

    Attributes:
        lines: sets of ranks of equal size; those of each exchange among themselves, and are counted in this order. A
            rank that is in none of them is alone.
        world: the number of ranks of the mesh.
    """

    name: str
    lines: tuple[tuple[int, ...], ...]
    world: int

    @property
    def size(self) -> int:
        """The number of ranks in a line."""
        return len(self.lines[0])

    @property
    def of_all(self) -> bool:
        """Whether each rank of the mesh is in a line."""
        return len(self._places) == self.world

    def has(self, rank: int) -> bool:
        """Whether a rank is in one of the lines."""
        return rank in self._places

    def place(self, rank: int) -> int:
        """The place of a rank in its line."""
        return self._places[rank][0] if rank in self._places else 0

    def members(self, rank: int) -> tuple[int, ...]:
        """The ranks of the line in which a rank is, by their places."""
        return self._places[rank][1] if rank in self._places else (rank,)

    def among(self, ranks: Collection[int]) -> Axis:
        """The lines of these ranks alone."""
        return Axis(self.name, tuple(line for line in self.lines if all(rank in ranks for rank in line)), self.world)

    @cached_property
    def _places(self) -> dict[int, tuple[int, tuple[int, ...]]]:
        return {rank: (place, line) for line in self.lines for place, rank in enumerate(line)}

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.name, self.lines, self.world))

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Mesh:
    """`groups` groups of `stages` stages of `patches` ranks."""

    groups: int
    patches: int
    stages: int = 1

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self.groups * self.stages * self.patches

    @property
    def along_samples(self) -> Axis:
        """The axis on which ranks hold the same patch of different samples."""
        each = range(self.world // self.groups)
        return Axis("samples", tuple(tuple(range(first, self.world, len(each))) for first in each), self.world)

    @property
    def along_patches(self) -> Axis:
        """The axis on which ranks hold different patches of the same samples."""
        firsts = range(0, self.world, self.patches)
        return Axis("patches", tuple(tuple(range(first, first + self.patches)) for first in firsts), self.world)

    def across(self, stages: Sequence[int]) -> Axis:
        """The axis on which ranks run these stages of the same samples: all patches of one stage, then of the next."""
        firsts = range(0, self.world, self.stages * self.patches)
        each = [range(stage * self.patches, (stage + 1) * self.patches) for stage in stages]
        lines = tuple(tuple(first + rank for ranks in each for rank in ranks) for first in firsts)
        return Axis("stages", lines, self.world)

    def stage(self, rank: int) -> int:
        """The stage that a rank runs."""
        return rank // self.patches % self.stages

    def ranks_of(self, stages: Collection[int]) -> tuple[int, ...]:
        """The ranks that run one of these stages, ascending."""
        return tuple(rank for rank in range(self.world) if self.stage(rank) in stages)

    def __str__(self) -> str:
        stages = f" x {self.stages} stages" if self.stages > 1 else ""
        return f"{self.groups}{stages} x {self.patches}"


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
