"""What a report shows, collected from a plan and from a simulation of its steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from ..inspect.record import Snapshot
from ..inspect.words import count_text
from ..ir.comm import kept_bytes
from ..ir.program import exchanges_of
from ..ir.strategy import Strategy
from ..plan import Plan
from ..predict.compare import Impossible, advice, compared
from ..predict.events import Event
from ..predict.parts import Parts
from ..predict.prediction import Prediction
from ..predict.price import Figures
from ..predict.simulate import Simulation

WORLDS = (1, 2, 4, 8)  #: numbers of ranks that a report compares
PROCESSES = 8  #: processes that a timeline shows
BARS = 4000  #: of a timeline, about: bars closer than it can show become one


@dataclass(frozen=True)
class Part:
    """A module, with what it and all modules inside need on the report's rank."""

    path: str
    name: str  #: the path from the module around it on
    kind: str  #: class; "" if the program does not know it
    depth: int  #: 0 for the model
    start: float  #: where it begins on the map, from 0 to 1; its width is its share of the seconds
    end: float
    seconds: float  #: of its operators, by the cost model
    flops: int
    received: int  #: bytes in an exact step
    state: int  #: bytes that it keeps from step to step


@dataclass(frozen=True)
class Bar:
    """Something that a process does for a while in a simulated step."""

    process: int
    lane: str  #: "compute" or "messages"
    what: str  #: a kind: "computing", "waiting", "message", "message for next step"
    name: str  #: the module, or the message
    began: float  #: seconds since the step began
    ended: float

    def within(self, began: float, ended: float) -> Bar:
        """The part of it that lies in a step, timed from the step's begin."""
        return replace(self, began=max(self.began, began) - began, ended=min(self.ended, ended) - began)


@dataclass
class Facts:
    """Everything that a report shows.

    Args:
        model: what the user calls it.
        steps: of a generation.
        graphs: kernels are launched together, as CUDA graphs do.
        compare: also predict other numbers of ranks, and exact and displaced steps.
        beside: the parts of the pipeline beside its denoiser; their memory counts, too.
    """

    model: str
    plan: Plan
    steps: int = 50
    graphs: bool = False
    compare: bool = True
    beside: Parts | None = None
    timelines: dict[str, list[Bar]] = field(init=False)  #: by kind of step: "exact step", "displaced step"

    def __post_init__(self) -> None:
        plan = self.plan
        self.priced = plan.priced(graphs=self.graphs)
        made = self.priced.predict(plan.strategy, plan.target, graphs=self.graphs)
        self.prediction = made if self.beside is None else self.beside.with_memory(made)
        self.timelines = dict(self._timelines())

    @property
    def rank(self) -> int:
        """The rank whose graph is shown: the first one of the process that needs most memory."""
        return self.plan.placement.ranks(self.priced.process)[0]

    @property
    def process(self) -> str:
        """The process that needs most memory, in words."""
        return self.plan.placement.names[self.priced.process]

    @cached_property
    def snapshot(self) -> Snapshot:
        return self.plan.snapshot(self.rank, self.model)

    @cached_property
    def alternatives(self) -> list[Prediction | Impossible]:
        """Other numbers of ranks and strategies, with patches alone; one rank comes first."""
        plan = self.plan
        usual = (Strategy.of("sync"), Strategy.of("displaced")) if self.compare else ()
        own_strategy = Strategy.of("sync") if plan.strategy.overlaps else plan.strategy  # patches alone have no stages
        strategies = list(dict.fromkeys((*usual, own_strategy)))
        found: list[Prediction | Impossible] = []
        processes = plan.placement.processes
        for world in sorted({*WORLDS, processes}) if self.compare else [1]:
            own = world == plan.world_size and self.plain
            others = [] if own and world == 1 else [each for each in strategies if not own or each != plan.strategy]
            known = {world: plan.cuts} if own else None
            if others:
                found += compared(
                    plan.program, [world], others, plan.target, graphs=self.graphs, parts=self.beside, cuts=known
                )
        return found

    def ranks(self, prediction: Prediction) -> str:
        """The ranks of a choice in words."""
        return self.plan.arrangement if prediction is self.prediction else count_text(prediction.world, "rank")

    @property
    def by_host(self) -> bool:
        """Whether the host launches kernels one by one."""
        return bool(self.plan.target.device.launch) and not self.graphs

    @property
    def plain(self) -> bool:
        """Whether all ranks work on patches of the whole model and all samples, each in a process of its own, as in the
        alternatives."""
        return self.plan.groups == self.plan.stages == 1 and not self.plan.placement.several

    @property
    def predictions(self) -> list[Prediction]:
        """That of the plan and those of the alternatives, by number of ranks."""
        found = [each for each in self.alternatives if isinstance(each, Prediction)]
        return sorted([*found, self.prediction], key=lambda each: (each.world, not each.strategy.exact))

    @property
    def alone(self) -> Prediction | None:
        """The prediction of one rank."""
        if self.plan.world_size == 1:
            return self.prediction
        return next((e for e in self.alternatives if isinstance(e, Prediction) and e.world == 1), None)

    @property
    def advice(self) -> str | None:
        """What would be faster, in one sentence; None if nothing is."""
        return advice(self.prediction, [e for e in self.alternatives if isinstance(e, Prediction)], self.steps)

    @cached_property
    def parts(self) -> list[Part]:
        """The modules of the model, as a map: each lies below the one around it."""
        return list(_parts(self.snapshot, self._state()))

    def _state(self) -> Counter[str]:
        """Bytes that the rank keeps between steps, by module."""
        found: Counter[str] = Counter()
        for node, declared in exchanges_of(self.plan.graph):
            found[node.meta.get("path", "")] += kept_bytes(declared, self.rank)
        return found

    def memory(self, points: int = 300) -> list[tuple[float, int]]:
        """(share of the step's operators that have run, bytes of activations), in the step that needs most.

        Args:
            points: at most so many; each is the largest of those that it stands for.
        """
        course = max(self.priced.alive.values(), key=lambda each: each.max())
        pieces = np.array_split(course, min(points, len(course)))
        ends = np.cumsum([len(piece) for piece in pieces]) / len(course)
        return [(round(float(end), 4), int(piece.max())) for end, piece in zip(ends, pieces, strict=True)]

    def _timelines(self) -> Iterator[tuple[str, list[Bar]]]:
        """The first exact step, and a displaced one after which each takes as long."""
        world = self.plan.placement.processes
        count = min(world, PROCESSES)
        shown = sorted({round(i * (world - 1) / max(1, count - 1)) for i in range(count)})
        recorder = _Recorder(shown)
        simulation = Simulation(world, self.plan.target.link, recorder)
        for mode, step in self.priced.modes.items():
            if mode != "exact":
                simulation.settle(step)
            recorder.bars.clear()
            ends = [float(simulation.stream.max())]
            for _ in range(1 if mode == "exact" else 2):  # what a displaced step sends arrives in the next one
                simulation.step(step)
                ends.append(float(simulation.stream.max()))
            began, ended = ends[:2]
            bars = [bar.within(began, ended) for bar in recorder.bars if bar.began < ended and bar.ended > began]
            yield "exact step" if mode == "exact" else "displaced step", list(_merged(bars, BARS))


class _Recorder:
    """Turns what a simulation reports into bars of some processes."""

    def __init__(self, processes: Sequence[int]) -> None:
        self.processes = processes
        self.bars: list[Bar] = []  #: timed from the begin of the first step

    def __call__(self, what: str, event: Event, began: Figures, ended: Figures) -> None:
        message = getattr(event, "message", None)
        if what == "message":
            lane = "messages"
            kind = "message for next step" if message.late else "message"
        else:
            lane, kind = "compute", "waiting" if what == "wait" else "computing"
        name = f"{message.id} {message.spec.exchanges[0].role}" if message is not None else getattr(event, "path", "")
        for process in self.processes:
            if ended[process] > began[process]:
                self.bars.append(Bar(process, lane, kind, name, float(began[process]), float(ended[process])))


def _merged(bars: Sequence[Bar], limit: int) -> Iterator[Bar]:
    """The bars, with neighbours of one kind as one where the gap between them cannot be seen."""
    width = max((bar.ended for bar in bars), default=0.0) / limit * max(1, len({bar.process for bar in bars}))
    lanes: dict[tuple[int, str], list[Bar]] = {}
    for bar in sorted(bars, key=lambda bar: bar.began):
        lanes.setdefault((bar.process, bar.lane), []).append(bar)
    for lane in lanes.values():
        last = lane[0]
        for bar in lane[1:]:
            if bar.what == last.what and bar.began - last.ended < width:
                name = last.name if last.name == bar.name else _common(last.name, bar.name)
                last = Bar(bar.process, bar.lane, bar.what, name, last.began, max(last.ended, bar.ended))
            else:
                yield last
                last = bar
        yield last


def _common(first: str, second: str) -> str:
    """`x3 … x5` for messages; the module around both for modules."""
    if first.startswith("x") and second.startswith("x") and " " in first:
        return f"{first.split()[0]} … {second.split()[-1] if '…' in second else second.split()[0]}"
    parts = []
    for a, b in zip(first.split("."), second.split("."), strict=False):
        if a != b:
            break
        parts.append(a)
    return ".".join(parts)


def _parts(snapshot: Snapshot, state: Counter[str]) -> Iterator[Part]:
    received = {each.id: each.exact[snapshot.rank] for each in snapshot.exchanges}
    sums: dict[str, list[float]] = {"": [0.0, 0, 0, 0]}  #: seconds, flops, received, state
    inside: dict[str, list[str]] = {"": []}

    def at(path: str) -> None:
        if path not in sums:
            around = path.rpartition(".")[0]
            at(around)
            sums[path], inside[path] = [0.0, 0, 0, 0], []
            inside[around].append(path)

    running = {node.path for node in snapshot.nodes if node.kind in ("operator", "exchange")}
    for node in snapshot.nodes:
        if node.kind not in ("operator", "exchange"):
            continue
        at(node.path)
        took = node.seconds if node.kind == "operator" else 0.0
        sent = sum(received[each] for each in node.exchanges)
        for path in _around(node.path):
            for i, count in enumerate((took, node.flops, sent)):
                sums[path][i] += count
    for path, kept in state.items():
        at(path)
        for each in _around(path):
            sums[each][3] += kept
    total = sums[""][0] or 1.0

    def placed(path: str, around: str, depth: int, start: float) -> Iterator[Part]:
        seconds, *others = sums[path]
        kind = snapshot.modules.get(path, "")
        name = path.removeprefix(around).lstrip(".")
        yield Part(path, name, kind, depth, start, start + seconds / total, seconds, *map(int, others))
        for each in _unnested(inside[path]):
            yield from placed(each, path, depth + 1, start)
            start += sums[each][0] / total

    def _unnested(paths: Sequence[str]) -> Iterator[str]:
        """Those modules, or what they hold if they run nothing themselves, as lists of blocks."""
        for path in paths:
            if path in running or not inside[path]:
                yield path
            else:
                yield from _unnested(inside[path])

    yield from placed("", "", 0, 0.0)


def _around(path: str) -> Iterator[str]:
    """The module itself, and all modules around it, up to the model."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""
