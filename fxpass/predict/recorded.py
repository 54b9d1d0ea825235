"""Record what a rank does in a step on a CPU: operators, messages, and what it waits for.

Wraps the channels and the operators of a step's code. All ranks of a machine read its monotonic clock, so that their
records fit together. Messages have the identifiers of `fxpass dump`, operators the names of the plan's nodes.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..inspect.exchanges import message_ids
from ..ir.code import StepCode
from ..ir.exchange import Exchange, Payloads
from ..ir.mesh import Placement
from ..ir.step import ChannelSpec, Mode
from ..passes.lower_comm import StepPrograms
from ..runtime.channels import Channel
from ..runtime.executor import PlanLike
from ..runtime.process_group import GroupChannel
from ..runtime.step_runner import StepRunner, coder, placeholders
from .chrome import AWAITED, COMPUTE, LATE, Timeline

now = time.monotonic
POLL = 2e-5  #: seconds between two looks for a message
PATIENCE = 60.0  #: seconds; the channel itself waits after these, and raises an error if the other rank is gone


@dataclass
class Flight:
    """One message in one step, as the rank that receives it sees it. Times in seconds."""

    node: str  #: `x3` of `fxpass dump`
    role: str
    received: dict[str, int]  #: bytes by exchange, `x3.0`
    senders: Sequence[int]  #: the ranks that it comes from
    began: float  #: start of writing this rank's part
    launched: float  #: end
    path: str = ""  #: the module that needs it
    sent: float | None = None  #: the first sender has begun to write its part
    arrived: float | None = None  #: all parts have arrived
    awaited: float | None = None  #: start of waiting for them
    taken: float | None = None  #: end

    @property
    def bytes(self) -> int:
        return sum(self.received.values())

    @property
    def blocked(self) -> float:
        """Seconds spent waiting; 0 if nothing waited."""
        return 0.0 if self.awaited is None or self.taken is None else self.taken - self.awaited


@dataclass
class Span:
    """An interval of a rank's time."""

    name: str
    category: str  #: "step", "kernel", "exchange" or "wait"
    began: float
    ended: float
    path: str = ""
    role: str = ""  #: of the exchange that it is part of

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass
class Log:
    """The record of one rank."""

    steps: list[Span] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)  #: everything else
    flights: list[Flight] = field(default_factory=list)

    @staticmethod
    def of(data: Mapping[str, Any]) -> Log:
        """The log that `dataclasses.asdict` made plain."""
        steps, spans = ([Span(**each) for each in data[name]] for name in ("steps", "spans"))
        return Log(steps, spans, [Flight(**each) for each in data["flights"]])

    def clear(self) -> None:
        for kind in (self.steps, self.spans, self.flights):
            kind.clear()


class RecordedChannel:
    """A channel that records its uses."""

    def __init__(self, channel: Channel, spec: ChannelSpec, name: str, rank: int, log: Log) -> None:
        self.channel = channel
        self.lends = channel.lends
        self.node = name
        self.path = spec.path
        self.role = spec.exchanges[0].role
        own = spec.place(rank)
        self.received = {f"{name}.{i}": each.received(own) for i, each in enumerate(spec.exchanges)}
        others = (other for other in enumerate(spec.members(rank)) if other[1] != rank)
        self.senders = [other for i, other in others if any(each.numel(i, own) for each in spec.exchanges)]
        self.log = log
        self.last: Flight | None = None
        self.ready, self.close = channel.ready, channel.close

    def put(self, packed: Sequence[Payloads]) -> None:
        began = now()
        self.channel.put(packed)
        flight = Flight(self.node, self.role, self.received, self.senders, began, now(), self.path)
        if isinstance(between := getattr(self.channel, "between", None), GroupChannel):

            def arrived(_: Any) -> None:
                flight.arrived = now()

            between._work.get_future().add_done_callback(arrived)
        self.last = flight
        self.log.flights.append(flight)
        self.log.spans.append(Span(f"put {self.node}", "exchange", began, flight.launched, self.path, self.role))

    def get(self) -> list[Tensor]:
        awaited = now()
        while not self.channel.ready() and now() < awaited + PATIENCE:
            time.sleep(POLL)
        taken = now()
        if self.last is not None:
            self.last.awaited, self.last.taken = awaited, taken
        received = self.channel.get()
        self.log.spans.append(Span(f"wait {self.node}", "wait", awaited, taken, self.path, self.role))
        self.log.spans.append(Span(f"get {self.node}", "exchange", taken, now(), self.path, self.role))
        return received


def recorded_code(code: StepCode, log: Log) -> StepCode:
    """A step whose operators are recorded."""
    table = {name: _recorded(each, code, log) if name.startswith("f") else each for name, each in code.table.items()}
    return replace(code, table=table)


def _recorded(operator: Callable[..., Any], code: StepCode, log: Log) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        began = now()
        result = operator(*args, **kwargs)
        ended = now()
        name, _, path = code.lines[sys._getframe(1).f_lineno - 1].partition(" (")
        role = next((each.role for each in args if isinstance(each, Exchange)), "")
        log.spans.append(Span(name, "kernel", began, ended, path.rstrip(")"), role))
        return result

    return run


def recorded(plan: PlanLike, channels: Sequence[Channel], rank: int, log: Log) -> StepRunner:
    """A runner of a rank's steps on the CPU that records them, in context 0.

    Args:
        channels: the rank's, of a context that nothing else uses.
    """
    programs = StepPrograms(plan.graph, rank)
    write = coder(programs)
    codes: dict[StepCode, StepCode] = {}

    def code(mode: Mode) -> StepCode:
        plain = write(mode)
        if plain not in codes:
            codes[plain] = recorded_code(plain, log)
        return codes[plain]

    ids = message_ids(plan.graph, programs.channels)
    ends = [RecordedChannel(*each, rank, log) for each in zip(channels, programs.channels, ids, strict=True)]
    constants = list(plan.program.constants.values())
    names = placeholders(plan.program)
    cpu = torch.device("cpu")
    runner = StepRunner(names, constants, programs.state, programs.channels, code, cpu, Counter())
    runner.open(0, ends)
    return runner


def complete(logs: Sequence[Log]) -> None:
    """Fill in when messages were sent and, through shared memory, when they had arrived: written by all senders.

    Args:
        logs: of all ranks, in order.
    """
    by_number = [{(flight.node, number): flight for flight, number in _numbered(log)} for log in logs]
    for log in logs:
        for flight, number in _numbered(log):
            parts = [by_number[sender][flight.node, number] for sender in flight.senders]
            if parts:
                flight.sent = min(each.began for each in parts)
                flight.arrived = flight.arrived or max(each.launched for each in parts)


def _numbered(log: Log) -> Iterator[tuple[Flight, int]]:
    """The messages of a rank, each with how often it had one of the same exchange before."""
    seen: Counter[str] = Counter()
    for flight in log.flights:
        yield flight, seen[flight.node]
        seen[flight.node] += 1


def timeline(logs: Sequence[Log]) -> str:
    """The records of all ranks in Chrome's trace format, with the names of the predicted timeline."""
    complete(logs)
    start = min(log.steps[0].began for log in logs)
    found = Timeline(Placement.one_each(len(logs)).names)
    for rank, log in enumerate(logs):
        for each in (*log.steps, *log.spans):
            found.bar(rank, COMPUTE, each.name, each.category, each.began - start, each.ended - start, each.path)
        carried = {AWAITED: 0.0, LATE: 0.0}  # bars of a thread do not overlap
        for each in (flight for flight in log.flights if flight.bytes):
            step = next(step for step in log.steps if each.began <= step.ended)
            thread = AWAITED if each.awaited is not None and each.awaited <= step.ended else LATE
            assert each.sent is not None
            assert each.arrived is not None
            began, ended = max(each.sent - start, carried[thread]), each.arrived - start
            carried[thread] = max(began, ended)
            found.bar(rank, thread, f"{each.node} {each.role}", "message", began, ended, each.path, each.received)
    return found.text()
