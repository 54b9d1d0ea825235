"""Runs a rank's step programs: which one a step needs, and what is kept from one step to the next."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from ..ir import comm
from ..ir.exchange import Payloads
from ..ir.step import Mode, StateSpec, StepProgram
from .executor import Step


@dataclass(frozen=True)
class Put:
    """A step program sends: by exchange and destination."""

    channel: int
    packed: Sequence[Payloads]


@dataclass(frozen=True)
class Get:
    """A step program asks for the receive buffers of a channel: the runner is sent them."""

    channel: int
    age: int  #: 0: of this step, 1: of the last one


#: yields what is to be done, and returns (outputs, new state)
StepRun = Generator["Put | Get", "Sequence[Tensor]", "tuple[list[Tensor], list[Tensor]]"]


def run(program: StepProgram, values: Mapping[str, Tensor]) -> StepRun:
    """Run a step program operator by operator.

    Args:
        values: one for each placeholder of the graph.
    """
    last = _last_uses(program.graph)
    env: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
        if node.op == "placeholder":
            env[node] = values[str(node.target)]
        elif node.op == "output":
            outputs, state = args[0]
            return list(outputs), list(state)
        elif node.target is comm.put:
            yield Put(args[1], args[0])
            env[node] = None
        elif node.target is comm.get:
            env[node] = yield Get(*args)
        else:
            env[node] = node.target(*args, **kwargs)
        for dead in last.get(node, ()):
            del env[dead]
    raise ValueError("the graph has no output")


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """What is not needed any more after each node."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        last[node] = node
        for used in node.all_input_nodes:
            last[used] = node
    dead: dict[fx.Node, list[fx.Node]] = {}
    for node, user in last.items():
        dead.setdefault(user, []).append(node)
    return dead


class StateStore:
    """What one rank keeps in one context, and which mode the next step has."""

    def __init__(self, state: Sequence[StateSpec], device: torch.device) -> None:
        self.specs = state
        self.values = [torch.zeros(spec.shape, dtype=spec.dtype, device=device) for spec in state]
        self.last: Mode | None = None  #: of the last step

    def mode(self, step: Step) -> Mode:
        """The mode of a step that follows the last one."""
        if step.exact:
            return "exact"
        if self.last is None:
            raise ValueError("the first step of a context is exact")
        return "first" if self.last == "exact" else "steady"

    def replace(self, values: Sequence[Tensor], mode: Mode) -> None:
        """Write what a step of `mode` has left to its fixed places."""
        for spec, new in zip(self.specs, values, strict=True):
            found = tuple(new.shape), new.dtype
            assert found == (spec.shape, spec.dtype), f"{spec.name} becomes {found}, declared {spec.shape, spec.dtype}"
        held = {id(place) for place in self.values}
        pairs = [(place, new) for place, new in zip(self.values, values, strict=True) if new is not place]
        # an entry may move to the place of another: read all of these before any is written
        pairs = [(place, new.clone() if id(new) in held else new) for place, new in pairs]
        for place, new in pairs:
            place.copy_(new)
        self.last = mode

    @property
    def bytes(self) -> int:
        return sum(spec.bytes for spec in self.specs)


class StepRunner:
    """One rank's step programs with its state in one context."""

    def __init__(self, programs: Mapping[Mode, StepProgram], device: torch.device) -> None:
        self.programs = programs
        self.store = StateStore(programs["exact"].state, device)

    def start(self, values: Mapping[str, Tensor], step: Step) -> StepRun:
        """Run a step; whoever drives the generator does what it yields.

        Args:
            values: weights, constants and inputs by placeholder.
        """
        mode = self.store.mode(step)
        held = {spec.name: value for spec, value in zip(self.store.specs, self.store.values, strict=True)}
        pace = torch.tensor(step.pace, dtype=torch.float64)
        outputs, state = yield from run(self.programs[mode], {**values, **held, "pace": pace})
        self.store.replace(state, mode)
        return outputs, state


Tamper = Callable[[int, int, int, int, Tensor], Tensor]  #: (channel, exchange, source, destination, payload) -> payload


class InProcessChannels:
    """The channels of all ranks of one context in one process: two receive buffers per channel and rank."""

    def __init__(self, runners: Sequence[StepRunner], tamper: Tamper | None = None) -> None:
        self.ranks = range(len(runners))
        self.channels = runners[0].programs["exact"].channels
        self.tamper = tamper
        self._steps = [0] * len(runners)  #: that each rank has begun
        self._sent: dict[tuple[int, int], int] = {}  #: (channel, source) -> the last step that put
        self._buffers: dict[tuple[int, int, int], list[Tensor]] = {}  #: (channel, destination, parity)

    def begin(self, rank: int) -> None:
        self._steps[rank] += 1

    def put(self, rank: int, action: Put) -> None:
        """Write the payloads into the receive buffers of the other ranks."""
        step, spec = self._steps[rank], self.channels[action.channel]
        for i, (exchange, packed) in enumerate(zip(spec.exchanges, action.packed, strict=True)):
            for dst, payload in enumerate(packed):
                if dst == rank:
                    continue
                expected = exchange.payload_shape(rank, dst)
                if payload is None:
                    assert exchange.numel(rank, dst) == 0, f"{spec.name}: rank {rank} sends nothing to rank {dst}"
                    continue
                assert (tuple(payload.shape), payload.dtype) == (expected, exchange.dtype), (
                    f"{spec.name}: rank {rank} sends {payload.dtype} {tuple(payload.shape)} to rank {dst}, "
                    f"{exchange} declares {exchange.dtype} {expected}"
                )
                if self.tamper is not None:
                    payload = self.tamper(action.channel, i, rank, dst, payload)
                place = comm.payloads(self._at(action.channel, dst, step % 2, payload.device)[i], exchange, dst)[rank]
                assert place is not None, f"{spec.name}: rank {dst} has no room for what rank {rank} sends"
                place.copy_(payload)
        self._sent[action.channel, rank] = step

    def ready(self, rank: int, action: Get) -> bool:
        """Whether all ranks have put the messages that a get asks for."""
        wanted = self._steps[rank] - action.age
        return all(self._sent.get((action.channel, src), 0) >= wanted for src in self.ranks if src != rank)

    def get(self, rank: int, action: Get, device: torch.device) -> list[Tensor]:
        return self._at(action.channel, rank, (self._steps[rank] - action.age) % 2, device)

    def _at(self, channel: int, dst: int, parity: int, device: torch.device) -> list[Tensor]:
        key = channel, dst, parity
        if key not in self._buffers:
            spec = self.channels[channel]
            self._buffers[key] = [
                torch.zeros(shape, dtype=each.dtype, device=device)
                for each, shape in zip(spec.exchanges, spec.received_shapes(dst), strict=True)
            ]
        return self._buffers[key]


def run_in_turns(
    runners: Sequence[StepRunner], channels: InProcessChannels, values: Sequence[Mapping[str, Tensor]], step: Step
) -> list[list[Tensor]]:
    """One step of all ranks in this process: each runs until it needs what another has not put yet.

    Raises:
        AssertionError: every rank waits for another one, or a payload has not the declared shape.
    """
    device = next(iter(values[0].values())).device
    runs = [runner.start(given, step) for runner, given in zip(runners, values, strict=True)]
    waiting: list[Put | Get | None] = []
    outputs: dict[int, list[Tensor]] = {}
    for rank, each in enumerate(runs):
        channels.begin(rank)
        waiting.append(_advance(each, None, rank, outputs))
    while len(outputs) < len(runs):
        moved = False
        for rank, each in enumerate(runs):
            while (action := waiting[rank]) is not None:
                if isinstance(action, Put):
                    channels.put(rank, action)
                    waiting[rank] = _advance(each, None, rank, outputs)
                elif channels.ready(rank, action):
                    waiting[rank] = _advance(each, channels.get(rank, action, device), rank, outputs)
                else:
                    break
                moved = True
        if not moved:
            stuck = [channels.channels[a.channel].name for a in waiting if a is not None]
            raise AssertionError(f"every rank waits for another one, at {', '.join(stuck)}")
    return [outputs[rank] for rank in range(len(runs))]


def _advance(each: StepRun, sent: Any, rank: int, outputs: dict[int, list[Tensor]]) -> Put | Get | None:
    try:
        return each.send(sent)
    except StopIteration as stop:
        outputs[rank] = stop.value[0]
        return None
