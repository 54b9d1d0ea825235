"""The compiler's story in one ordered list.

Each pass takes a `Build` and returns it further along; after each, the verifier checks the spec of the stage that
was reached. All but `displace` and `narrow` preserve the numbers to rounding; what these do is defined by law 4
(docs/design.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import fx

from ..ir.garbage import collection_paused
from ..ir.inputs import moving_names
from ..ir.layout import Layout
from ..ir.program import Program
from ..ir.verify import Stage, verify
from .bucket import bucket
from .cost import Target
from .displace import Kinds, displace
from .narrow import narrow
from .normalize import normalize
from .rules import RULES
from .schedule import schedule
from .seed import seed


@dataclass(frozen=True)
class Build:
    """What the passes hand on: the program, and from `seed` on how it is cut."""

    program: Program
    world: int
    target: Target
    kinds: Kinds  #: how fresh each kind of exchange is, and how much of each neighbour attention sees
    seeds: Mapping[str, Layout] = field(default_factory=dict)
    attempts: int = 0  #: how many ways to cut were tried
    chosen: fx.Graph | None = None  #: what the search partitioned by these seeds
    graph: fx.Graph | None = None  #: the partitioned graph

    @property
    def current(self) -> fx.Graph:
        """The graph as it is now."""
        return self.program.graph if self.graph is None else self.graph


@dataclass(frozen=True)
class Pass:
    """A named step; `ensures` is the stage whose spec the graph meets afterwards."""

    name: str
    run: Callable[[Build], Build]
    ensures: Stage


def _normalize(build: Build) -> Build:
    return replace(build, program=normalize(build.program))


def _seed(build: Build) -> Build:
    found = seed(build.program.graph, build.program.inputs, build.world, build.target, RULES)
    return replace(build, seeds=found.seeds, attempts=found.attempts, chosen=found.graph)


def _partition(build: Build) -> Build:
    return replace(build, graph=build.chosen)  # the search has done it


def _displace(build: Build) -> Build:
    return replace(build, graph=displace(build.current, build.kinds, moving_names(build.program), build.world))


def _narrow(build: Build) -> Build:
    return replace(build, graph=narrow(build.current, build.kinds.windows))


def _bucket(build: Build) -> Build:
    return replace(build, graph=bucket(build.current))


def _schedule(build: Build) -> Build:
    return replace(build, graph=schedule(build.current))


PASSES: tuple[Pass, ...] = (
    Pass("normalize", _normalize, "normal"),
    Pass("seed", _seed, "normal"),
    Pass("partition", _partition, "partitioned"),
    Pass("displace", _displace, "displaced"),
    Pass("narrow", _narrow, "displaced"),
    Pass("bucket", _bucket, "displaced"),
    Pass("schedule", _schedule, "scheduled"),
)


@collection_paused()
def build(program: Program, world: int, target: Target, kinds: Kinds, *, after: str | None = None) -> Build:
    """Run the passes, up to and including `after` (all if None) on a captured program.

    Raises `ValueError` if no pass is called `after`, `WorldSizeError` if `world` ranks are too many.
    """
    names = [each.name for each in PASSES]
    if after is not None and after not in names:
        raise ValueError(f"no pass is called {after!r}; the passes are {', '.join(names)}")
    verify(program.graph, "captured")
    state = Build(program, world, target, kinds)
    seconds = dict(program.seconds)
    for each in PASSES:
        started = time.perf_counter()
        state = each.run(state)
        verify(state.current, each.ensures, world)
        seconds[each.name] = time.perf_counter() - started
        if each.name == after:
            break
    return replace(state, program=replace(state.program, seconds=seconds))
