"""A step program: what one rank does in one step of one mode, as a graph in which only `put` and `get` communicate.

    (weights, constants, inputs, pace, state)  ->  (outputs, new state)

Between steps the state is a set of tensors whose shapes are known beforehand. A step counts as

    exact    each `get` returns what the ranks put in this step
    first    displaced, after an exact step: reads what the exact step has left
    steady   displaced, after a displaced step: reads what that step has put

and displaced ones as *unpaced* if nothing can be forecast: one of the two steps before, or its length, is not known.
All modes of a rank have one state schema and one list of channels, so that any mode can follow any other as the names
say. A message that a step has put and that no later step gets is dropped by its channel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import fx
from torch._ops import OpOverload

from .comm import get, put
from .exchange import Exchange
from .operators import aliases
from .program import calls

Mode = Literal["exact", "first", "steady", "first unpaced", "steady unpaced"]
PACE = "pace"  #: the placeholder of the step's length in units of the last one's, 0-dim float64
MODES: tuple[Mode, ...] = ("exact", "first", "steady", "first unpaced", "steady unpaced")


@dataclass(frozen=True)
class Step:
    """How to run a call; the same on all ranks."""

    context: int = 0  #: which stale state it reads and writes: one number per guidance branch
    exact: bool = True  #: use what the other ranks send in this step, also in exchanges declared stale
    pace: float = 0.0  #: timesteps of this step over those of the last; 0 if either is unknown


EXACT = Step()


@dataclass(frozen=True)
class StateSpec:
    """A tensor that a rank keeps from one step to the next; zeros before the first step."""

    name: str  #: the placeholder
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class ChannelSpec:
    """A way that messages go in every step that puts them, the same on all ranks."""

    name: str  #: the exchange node of the plan; another one where displaced steps send something else
    path: str  #: the module that it belongs to
    exchanges: tuple[Exchange, ...]  #: what travels together
    late: bool  #: whether the message of one step is read in the next
    #: whether it ends every step: each rank sends each other rank something, after all that it puts otherwise and all
    #: that it gets of earlier steps, and gets it last
    closing: bool = False

    def place(self, rank: int) -> int:
        """The number by which the exchanges count a rank."""
        return self.exchanges[0].place(rank)

    def members(self, rank: int) -> tuple[int, ...]:
        """The ranks that exchange with a rank, itself among them, as the exchanges count them."""
        return self.exchanges[0].members(rank)

    def __str__(self) -> str:
        where = f" in {self.path}" if self.path else ""
        return f"{self.name}{where} ({', '.join(map(str, self.exchanges))})"


@dataclass(frozen=True, eq=False)
class StepProgram:
    """One rank's step. The graph returns (outputs, the new value of each entry of `state`)."""

    rank: int
    mode: Mode
    graph: fx.Graph
    channels: tuple[ChannelSpec, ...]
    state: tuple[StateSpec, ...]

    def received(self, here: Sequence[int] = ()) -> dict[str, int]:
        """Bytes that the rank receives in a step, by role.

        Args:
            here: the ranks of its process. What comes from them does not count, and what comes for several of them at
                once counts for the first.
        """
        total: Counter[str] = Counter()
        for node in self.graph.find_nodes(op="call_function", target=put):
            spec = self.channels[node.args[1]]
            own, members = spec.place(self.rank), spec.members(self.rank)
            before = any(rank in here for rank in members[:own])
            for each in spec.exchanges:
                if not here:
                    total[each.role] += each.received(own)
                elif not (before and each.broadcast):
                    elements = sum(each.numel(src, own) for src, rank in enumerate(members) if rank not in here)
                    total[each.role] += elements * each.dtype.itemsize
        return dict(total)


def verify_step(program: StepProgram) -> None:
    """Check what a step program promises.

    Raises:
        AssertionError: the new state has other entries than the old one; a message of this step is awaited before it is
            put, or one of the last step after that; a channel is used twice in one way; or what follows the put of the
            closing message reads state or a receive buffer of another message, which others may write to by then.
    """
    (output,) = program.graph.find_nodes(op="output")
    _, after = output.args[0]
    assert len(after) == len(program.state), f"{len(after)} values for {len(program.state)} entries of the state"
    put_already: set[int] = set()
    got: set[tuple[int, bool]] = set()
    closing = {i for i, spec in enumerate(program.channels) if spec.closing}
    for node in calls(program.graph):
        if node.target not in (put, get):
            continue
        channel: int = node.args[1] if node.target is put else node.args[0]  # type: ignore[assignment]
        spec = program.channels[channel]
        where = f"{program.mode} step of rank {program.rank}, {spec.name}"
        assert not closing & {each for each, _ in got}, f"{where}: after the end of the step"
        assert not closing & put_already or channel in closing, f"{where}: used after the closing message is put"
        if node.target is put:
            assert channel not in put_already, f"{where}: put twice"
            put_already.add(channel)
            continue
        now = channel in put_already
        assert now or spec.late, f"{where}: awaited before it is put"
        assert not now or program.mode == "exact" or not spec.late, f"{where}: the last message is read after the put"
        assert (channel, now) not in got, f"{where}: got twice"
        got.add((channel, now))
    if closing & put_already:
        kept = {spec.name for spec in program.state}
        after = list(_read_after(program, closing))
        read = kept.intersection(str(node.target) for node in after if node.op == "placeholder")
        shared = shared_buffers(program.graph)
        read |= {program.channels[i].name for node in after for i in shared.get(node, ())} - {
            program.channels[i].name for i in closing
        }
        assert not read, f"{program.mode} step of rank {program.rank} reads {read} after the closing message is put"


def shared_buffers(graph: fx.Graph) -> dict[fx.Node, frozenset[int]]:
    """The channels with whose receive buffers each value may share memory."""
    found: dict[fx.Node, frozenset[int]] = {}
    for node in calls(graph):
        if node.target is get:
            found[node] = frozenset([node.args[0]])  # type: ignore[list-item]
        elif isinstance(node.target, OpOverload) and not aliases(node.target):
            found[node] = frozenset()
        else:
            found[node] = frozenset().union(*(found.get(each, ()) for each in node.all_input_nodes))
    return found


def _read_after(program: StepProgram, closing: set[int]) -> Iterator[fx.Node]:
    """What the operators after the put of the closing message read."""
    nodes = iter(calls(program.graph))
    for node in nodes:
        if node.target is put and node.args[1] in closing:
            break
    for node in nodes:
        yield from node.all_input_nodes
