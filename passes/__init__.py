"""The ordered list of passes.

Each pass takes a `Build` and returns a new one; it never changes the graph that it is given. After each pass the
verifier checks the spec of its stage. All passes preserve the numbers up to rounding, but for `displace`, `narrow` and
`stages`, which follow law 4 (docs/design.md).

Where the ranks are a mesh, all passes between `samples` and `join` work on the program of one group of ranks, and those
before `stages` on that of one stage, which runs the whole model.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import fx

from ..ir.garbage import collection_paused
from ..ir.inputs import moving_names
from ..ir.layout import Layout
from ..ir.mesh import Mesh
from ..ir.program import Program, exchanges_of
from ..ir.progress import progress
from ..ir.strategy import Strategy
from ..ir.verify import Stage, verify
from .bucket import bucket
from .cuts import Candidate, Tried, choose_cuts
from .decompose import count_work
from .displace import displace
from .join import join
from .narrow import narrow
from .normalize import normalize
from .partition import partition
from .rules import RULES
from .samples import Samples, SamplesError, copied, divide, undivided
from .schedule import schedule
from .stages import stages
from .targets import Target
from .trim import trim

log = logging.getLogger("fxpass")


@dataclass(frozen=True)
class Build:
    """The state between passes: the program; after `cuts`, its cuts; after `partition`, the partitioned graph."""

    program: Program  #: of all samples
    world: int  #: the number of all ranks
    target: Target
    strategy: Strategy  #: freshness of each kind of exchange, and the windows of attention
    cuts: Mapping[str, Layout] = field(default_factory=dict)  #: by name of input or value
    tried: tuple[Tried, ...] = ()  #: the candidates that the search judged
    best: Candidate | None = None  #: the winner of the search: a cache of `partition` and `trim` for its cuts
    graph: fx.Graph | None = None  #: the partitioned graph
    groups: int = 1  #: asked for; the samples of a batch are divided among them, if they are independent
    copies: int = 1  #: so many groups work on the same samples
    stages: int = 1  #: of ranks, each of which runs a part of the depth
    speeds: tuple[float, ...] = ()  #: of each rank of a stage, in any unit; (): all are the same
    samples: Samples | None = None  #: how they are divided; None if all ranks work on all samples
    joined: bool = False  #: whether the graph is that of all ranks, and not of one stage of one group
    mixed: SamplesError | None = None  #: why they are not divided although that was asked for

    @property
    def current(self) -> fx.Graph:
        """The partitioned graph; before partition, the program's."""
        return self.part.graph if self.graph is None else self.graph

    @property
    def part(self) -> Program:
        """The program of one group's samples; of all where they are not divided."""
        return self.samples.program if self.samples else self.program

    @property
    def ranks(self) -> int:
        """The number of ranks of the present graph."""
        return self.world if self.joined else self.mesh.patches

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the work of the present graph that each of its ranks is to do, 1 on average; (): all the same."""
        if not self.speeds:
            return ()
        speeds = self.speeds * (self.mesh.patches // len(self.speeds))
        return tuple(speed * len(speeds) / sum(speeds) for speed in speeds)

    @property
    def mesh(self) -> Mesh:
        """How the ranks are arranged."""
        groups = self.groups * self.copies if self.samples else 1
        return Mesh(groups, self.world // groups // self.stages, self.stages)


@dataclass(frozen=True)
class Pass:
    """A named pass; `ensures` is the stage whose spec the graph meets afterwards."""

    name: str
    run: Callable[[Build], Build]
    ensures: Stage


def _normalize(build: Build) -> Build:
    program = normalize(build.program)
    count_work(program.graph)
    return replace(build, program=program)


def _samples(build: Build) -> Build:
    if build.groups == build.copies == 1:
        return build
    try:
        samples = divide(build.program, build.groups, RULES) if build.groups > 1 else undivided(build.program)
    except SamplesError as cannot:
        return replace(build, mixed=cannot)
    return replace(build, samples=copied(samples, build.copies))


def _cuts(build: Build) -> Build:
    found = choose_cuts(build.part, build.mesh.patches, build.target, RULES, build.shares)
    return replace(build, cuts=found.cuts, tried=found.tried, best=found.best)


def _partition(build: Build) -> Build:
    if build.best is not None and build.best.cuts == build.cuts:
        return replace(build, graph=build.best.partitioned)
    return replace(build, graph=partition(build.part.graph, build.mesh.patches, build.cuts, RULES))


def _trim(build: Build) -> Build:
    if build.best is not None and build.best.partitioned is build.graph:
        return replace(build, graph=build.best.trimmed, best=None)
    return replace(build, graph=trim(build.current, build.part.graph, build.mesh.patches, RULES))


def _displace(build: Build) -> Build:
    patches = build.mesh.patches
    return replace(build, graph=displace(build.current, build.strategy, moving_names(build.program), patches))


def _narrow(build: Build) -> Build:
    return replace(build, graph=narrow(build.current, build.strategy.windows))


def _bucket(build: Build) -> Build:
    return replace(build, graph=bucket(build.current))


def _join(build: Build) -> Build:
    if build.samples is None:
        return build
    graph = join(build.current, build.program.graph, build.samples, build.mesh)
    return replace(build, graph=graph, joined=True)


def _stages(build: Build) -> Build:
    if build.stages == 1:
        return build
    graph = stages(build.current, build.program, build.mesh, build.target, build.strategy)
    return replace(build, graph=graph, joined=True)


def _schedule(build: Build) -> Build:
    return replace(build, graph=schedule(build.current))


PASSES: tuple[Pass, ...] = (
    Pass("normalize", _normalize, "normal"),
    Pass("samples", _samples, "normal"),
    Pass("cuts", _cuts, "normal"),
    Pass("partition", _partition, "partitioned"),
    Pass("trim", _trim, "partitioned"),
    Pass("displace", _displace, "displaced"),
    Pass("narrow", _narrow, "displaced"),
    Pass("bucket", _bucket, "displaced"),
    Pass("join", _join, "displaced"),
    Pass("stages", _stages, "displaced"),
    Pass("schedule", _schedule, "scheduled"),
)


def build(
    program: Program,
    world: int,
    target: Target,
    strategy: Strategy,
    *,
    groups: int = 1,
    copies: int = 1,
    stages: int = 1,
    speeds: tuple[float, ...] = (),
    after: str | None = None,
    cuts: Mapping[str, Layout] | None = None,
) -> Build:
    """Run the passes, up to and including `after` (all if None) on a captured program.

    The samples of a batch are divided among `groups` groups of ranks, if they are independent; each part is computed by
    `copies` of them, and the results of the first are used. The depth is cut into `stages`. All of them divide `world`.
    The rows of the ranks of a stage are in proportion to their `speeds`.
    With `cuts`, which are known from an earlier search, that search is left out.

    Raises `ValueError` if no pass has the name `after`, `WorldSizeError` if so many ranks cannot share the model.
    """
    names = [each.name for each in PASSES]
    if after is not None and after not in names:
        raise ValueError(f"no pass is called {after!r}; the passes are {', '.join(names)}")
    verify(program.graph, "captured")
    start = Build(program, world, target, strategy, groups=groups, copies=copies, stages=stages, speeds=speeds)
    end = names.index(after) + 1 if after else None
    if cuts is None:
        return _run(start, PASSES[:end])
    search = names.index("cuts")
    found = _run(start, PASSES[:search])
    return _run(replace(found, cuts=cuts), PASSES[search + 1 : end])


def resume(state: Build, *, after: str) -> Build:
    """Run the passes that come after the pass `after`, whose result `state` is."""
    return _run(state, PASSES[[each.name for each in PASSES].index(after) + 1 :])


def _log(name: str, state: Build, seconds: float) -> None:
    operators = Counter(node.op for node in state.current.nodes)["call_function"]
    exchanges = sum(1 for _ in exchanges_of(state.current))
    log.debug("pass %-9s %6d operators, %4d exchanges, %.2f s", name, operators, exchanges, seconds)


@collection_paused()
def _run(state: Build, passes: tuple[Pass, ...]) -> Build:
    seconds = dict(state.program.seconds)
    with progress(f"plan for {state.world} ranks", len(passes)) as task:
        for i, each in enumerate(passes):
            task.say(each.name, i)
            started = time.perf_counter()
            state = each.run(state)
            verify(state.current, each.ensures, state.mesh.patches)
            seconds[each.name] = time.perf_counter() - started
            if log.isEnabledFor(logging.DEBUG):
                _log(each.name, state, seconds[each.name])
    return replace(state, program=replace(state.program, seconds=seconds))
