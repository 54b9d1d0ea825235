"""Trace two consecutive displaced steps, message by message: launched in one step, awaited in the next.

Wraps the channels, and the operators that pack, unpack and estimate, to record each use. All ranks read the machine's
monotonic clock, so that their records fit together.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from inspect import isfunction
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fxpass
from benchmarks.harness import DISPLACED, Stepper
from fxpass.inspect.exchanges import message_ids
from fxpass.ir import comm
from fxpass.ir.code import StepCode
from fxpass.ir.exchange import Exchange, Payloads
from fxpass.ir.step import EXACT, ChannelSpec, Mode, Step
from fxpass.passes.lower_comm import StepPrograms
from fxpass.runtime.channels import Channel
from fxpass.runtime.process_group import GroupChannel
from fxpass.runtime.step_runner import StepRunner, coder, placeholders

now = time.monotonic
CONTEXT = 2  #: the context whose channels are traced; other steps use others
POLL = 2e-5  #: seconds between two looks for a message
OPERATORS = [value for value in vars(comm).values() if isfunction(value) and value.__module__ == comm.__name__]
PATIENCE = 60.0  #: seconds; the channel itself waits after these, and raises an error if the other rank is gone


@dataclass
class Flight:
    """The messages `node` (`x3` of `fxpass dump`) in one step, as one rank sees them. Times in seconds."""

    node: str
    role: str
    received: int  #: bytes
    began: float  #: start of writing this rank's part
    launched: float  #: end
    arrived: float | None = None  #: all other parts have arrived
    awaited: float | None = None  #: start of waiting for them
    taken: float | None = None  #: end

    @property
    def blocked(self) -> float:
        """Seconds spent waiting; 0 if nothing waited."""
        return 0.0 if self.awaited is None or self.taken is None else self.taken - self.awaited


@dataclass
class Span:
    """An interval of a rank's time."""

    name: str
    began: float
    ended: float
    role: str = ""  #: role of the exchange

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass
class Log:
    """The record of one rank."""

    steps: list[Span] = field(default_factory=list)
    exchanges: list[Span] = field(default_factory=list)  #: waiting, unpacking, packing, launching
    flights: list[Flight] = field(default_factory=list)

    def clear(self) -> None:
        for kind in (self.steps, self.exchanges, self.flights):
            kind.clear()


class WatchedChannel:
    """A channel that records its uses."""

    def __init__(self, channel: Channel, spec: ChannelSpec, name: str, rank: int, log: Log) -> None:
        self.channel = channel
        self.node = name
        self.role = spec.exchanges[0].role
        self.size = sum(exchange.received(rank) for exchange in spec.exchanges)
        self.log = log
        self.last: Flight | None = None
        self.ready, self.close = channel.ready, channel.close

    def put(self, packed: Sequence[Payloads]) -> None:
        began = now()
        self.channel.put(packed)
        flight = Flight(self.node, self.role, self.size, began, now())
        if isinstance(self.channel, GroupChannel):

            def arrived(_: Any) -> None:
                flight.arrived = now()

            self.channel._work.get_future().add_done_callback(arrived)
        self.last = flight
        self.log.flights.append(flight)
        self.log.exchanges.append(Span(f"put {self.node}", began, flight.launched, self.role))

    def get(self) -> list[Tensor]:
        awaited = now()
        while not self.channel.ready() and now() < awaited + PATIENCE:
            time.sleep(POLL)
        if self.last is not None:
            self.last.awaited, self.last.taken = awaited, now()
        received = self.channel.get()
        self.log.exchanges.append(Span(f"get {self.node}", awaited, now(), self.role))
        return received


@dataclass(frozen=True)
class Trace:
    """The records of all ranks."""

    logs: list[Log]

    def __post_init__(self) -> None:
        """With shared memory a message has arrived when its sender has written it."""
        for log in self.logs:
            for i, flight in enumerate(log.flights):
                others = [other.flights[i].launched for other in self.logs if other is not log]
                if flight.arrived is None:
                    flight.arrived = max(others)

    def written(self, file: Path, what: str) -> str:
        """Write `chrome()` next to `file`, with `what` added to its name; returns `table()`."""
        place = file.with_stem(f"{file.stem}-{what}")
        place.write_text(self.chrome())
        return f"{place}\n{self.table()}"

    def table(self) -> str:
        """Rank 0's messages of the first step, in ms since its start."""
        log = self.logs[0]
        first, second = log.steps

        def ms(moment: float | None) -> str:
            return f"{'':>10}" if moment is None else f"{1e3 * (moment - first.began):10.1f}"

        flights = [flight for flight in log.flights if flight.began < first.ended]
        names = f"{'launched':>10} {'arrived':>10} {'awaited':>10} {'blocked':>9}"
        lines = [f"  {'message':<16} {'role':<12} {'KB':>8} {names}   (ms)"]
        lines += [
            f"  {f.node:<16} {f.role:<12} {f.received / 1e3:8.1f} {ms(f.launched)} {ms(f.arrived)} {ms(f.awaited)}"
            f" {1e3 * f.blocked:9.2f}"
            for f in flights
        ]
        stale = [f for f in flights if f.awaited is not None and f.awaited > first.ended]
        early = sum(f.arrived is not None and f.awaited is not None and f.arrived <= f.awaited for f in stale)
        lines += [
            f"  steps of {1e3 * first.seconds:.0f} and {1e3 * second.seconds:.0f} ms;"
            f" {len(stale)} messages are awaited a step later, {early} of them had arrived by then",
            f"  {'in the second step, ms':<29} {'blocked':>10} {'launches':>10} {'all':>10}   (of its exchanges)",
        ]
        spans = [span for span in log.exchanges if span.began >= second.began]
        for role in dict.fromkeys(span.role for span in spans):
            used = [f for f in log.flights if f.role == role]
            blocked = sum(f.blocked for f in used if f.awaited is not None and f.awaited >= second.began)
            launches = sum(f.launched - f.began for f in used if f.began >= second.began)
            whole = sum(span.seconds for span in spans if span.role == role)
            lines.append(f"    {role:<27} {1e3 * blocked:10.1f} {1e3 * launches:10.1f} {1e3 * whole:10.1f}")
        return "\n".join(lines)

    def chrome(self) -> str:
        """JSON in Chrome's trace format, for https://ui.perfetto.dev: a process per rank, a bar per message."""
        start = min(log.steps[0].began for log in self.logs)
        events: list[dict[str, Any]] = []

        def at(moment: float) -> float:
            return round(1e6 * (moment - start), 1)  # microseconds

        for rank, log in enumerate(self.logs):

            def span(name: str, category: str, began: float, ended: float, rank: int = rank) -> dict[str, Any]:
                times = {"ts": at(began), "dur": round(1e6 * (ended - began), 1)}
                return {"name": name, "cat": category, "ph": "X", "pid": rank, "tid": 0, **times}

            events.append({"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}})
            events += [span(each.name, "step", each.began, each.ended) for each in log.steps]
            events += [span(each.name, "exchange", each.began, each.ended) for each in log.exchanges]
            for i, flight in enumerate(log.flights):
                events.append(span("launch", flight.role, flight.began, flight.launched))
                if flight.awaited is not None and flight.taken is not None:
                    events.append(span("wait", flight.role, flight.awaited, flight.taken))
                if flight.arrived is not None:
                    bar = {"name": flight.node, "cat": "message", "id": f"{rank}.{i}", "pid": rank, "tid": 0}
                    events.append({**bar, "ph": "b", "ts": at(flight.began), "args": {"bytes": flight.received}})
                    events.append({**bar, "ph": "e", "ts": at(max(flight.arrived, flight.began))})
        return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def watched_code(code: StepCode, log: Log) -> StepCode:
    """A step whose packs, unpacks, estimates and codes are recorded."""
    table = {
        name: _watched(each, log) if isfunction(each) and each in OPERATORS else each
        for name, each in code.table.items()
    }
    return replace(code, table=table)


def _watched(operator: Callable[..., Any], log: Log) -> Callable[..., Any]:
    @wraps(operator)
    def recorded(*args: Any) -> Any:
        (exchange,) = (each for each in args if isinstance(each, Exchange))
        began = now()
        result = operator(*args)
        log.exchanges.append(Span(f"{operator.__name__} {exchange}", began, now(), exchange.role))
        return result

    return recorded


@torch.no_grad()
def trace(stepper: Stepper) -> Trace | None:
    """Run one exact and three displaced steps, and record the last two. Returns None on ranks other than 0."""
    log, rank = Log(), dist.get_rank()
    runner = watched(stepper.plan, stepper.loaded.runner.channels(CONTEXT), rank, log)

    def run(step: Step) -> None:
        runner.run(stepper.weights, stepper.tensors(), 0, runner.mode(step), step.pace)

    run(EXACT)
    run(DISPLACED)
    log.clear()
    for name in ("displaced step", "displaced step, the next"):
        began = now()
        run(DISPLACED)
        log.steps.append(Span(name, began, now()))
    written = Log(log.steps, list(log.exchanges), list(log.flights))
    run(EXACT)  # receive messages in flight
    for flight in written.flights:
        if flight.awaited is not None and flight.awaited > log.steps[-1].ended:
            flight.awaited = flight.taken = None
    logs: list[Any] | None = [None] * dist.get_world_size() if rank == 0 else None
    dist.gather_object(written, logs)
    return Trace(logs) if logs else None


def watched(plan: fxpass.Plan, channels: Sequence[Channel], rank: int, log: Log) -> StepRunner:
    """A runner of a rank's steps on the CPU that records their exchanges, in context 0.

    Args:
        channels: the rank's, of a context that nothing else uses.
    """
    programs = StepPrograms(plan.graph, rank)
    write = coder(programs)
    codes: dict[StepCode, StepCode] = {}

    def code(mode: Mode) -> StepCode:
        plain = write(mode)
        if plain not in codes:
            codes[plain] = watched_code(plain, log)
        return codes[plain]

    names = message_ids(plan.graph, programs.channels)
    ends = [WatchedChannel(*each, rank, log) for each in zip(channels, programs.channels, names, strict=True)]
    constants = list(plan.program.constants.values())
    names = placeholders(plan.program)
    cpu = torch.device("cpu")
    return StepRunner(names, constants, programs.state, programs.channels, code, lambda _: ends, cpu, Counter())
