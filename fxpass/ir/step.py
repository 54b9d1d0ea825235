"""A step program: what one rank does in one step of one mode, as a graph in which only `put` and `get` communicate.

    (weights, constants, inputs, pace, state)  ->  (outputs, new state)

Between steps the state is a set of tensors whose shapes are known beforehand. A step counts as

    exact    every `get` returns what was put in this step
    first    displaced, after an exact step: reads what the exact step has left
    steady   displaced, after a displaced step: reads what that step has put

All modes of a rank have one state schema and one list of channels, so that any mode can follow any other as the names
say. A message that a step has put and that no later step gets is dropped by its channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import fx

from .comm import get, put, received_shape
from .exchange import Exchange
from .program import calls

Mode = Literal["exact", "first", "steady"]
MODES: tuple[Mode, ...] = ("exact", "first", "steady")


@dataclass(frozen=True)
class StateSpec:
    """A tensor that a rank keeps from one step to the next; zeros before the first step."""

    name: str  #: the placeholder
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ChannelSpec:
    """A way that messages go in every step that puts them, the same on all ranks."""

    name: str  #: the exchange node of the plan, and how its messages are coded
    exchanges: tuple[Exchange, ...]  #: what travels together
    late: bool  #: whether a `get` may ask for the message of the last step

    def received_shapes(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of the receive buffers of rank `rank`, one for each exchange."""
        return tuple(received_shape(each, rank) for each in self.exchanges)

    def bytes(self, rank: int) -> int:
        """Bytes of the receive buffers of one step."""
        shapes = zip(self.exchanges, self.received_shapes(rank), strict=True)
        return sum(prod(shape) * each.dtype.itemsize for each, shape in shapes)


@dataclass(frozen=True, eq=False)
class StepProgram:
    """One rank's step. The graph returns (outputs, the new value of each entry of `state`)."""

    rank: int
    mode: Mode
    graph: fx.Graph
    channels: tuple[ChannelSpec, ...]
    state: tuple[StateSpec, ...]

    @property
    def kept(self) -> tuple[bool, ...]:
        """For each entry of the state, whether this step leaves it as it is."""
        (output,) = self.graph.find_nodes(op="output")
        return tuple(
            node.op == "placeholder" and str(node.target) == spec.name
            for node, spec in zip(output.args[0][1], self.state, strict=True)
        )


def verify_step(programs: Mapping[Mode, StepProgram]) -> None:
    """Check what the step programs of a rank promise each other.

    Raises:
        AssertionError: modes have unlike channels or states; a message of this step is awaited before it is put; a
            channel is used twice in one way; a message of the last step is asked for where there is none.
    """
    first = next(iter(programs.values()))
    for mode, program in programs.items():
        assert (program.channels, program.state) == (first.channels, first.state), f"{mode} steps have another schema"
        used: set[tuple[str, int]] = set()
        for node in calls(program.graph):
            if node.target not in (put, get):
                continue
            channel, age = (node.args[1], "put") if node.target is put else node.args
            name = program.channels[channel].name  # type: ignore[index]
            where = f"{mode} step of rank {program.rank}, {name}"
            assert (channel, age) not in used, f"{where}: twice {'put' if age == 'put' else 'awaited'}"
            assert age != 0 or (channel, "put") in used, f"{where}: awaited before it is put"
            assert age != 1 or program.channels[channel].late, f"{where}: nothing is left from the last step"  # type: ignore[index]
            used.add((channel, age))  # type: ignore[arg-type]
