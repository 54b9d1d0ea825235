"""A step as a list of events, the same on all ranks: work, puts and gets, with their figures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from torch import fx

from ..inspect.exchanges import message_ids
from ..ir import comm
from ..ir.exchange import Exchange
from ..ir.program import calls
from ..ir.step import ChannelSpec, StepProgram
from ..passes.targets import Link
from .count import write
from .price import Figures, Prices


@dataclass(frozen=True, eq=False)
class Work:
    """Kernels one after the other.

    Attributes:
        host: seconds in which the hosts launch them.
        seconds: on the device.
        lag: seconds after the host has begun to launch them until they are done, if nothing runs before.
    """

    name: str
    path: str
    host: Figures
    seconds: Figures
    lag: Figures

    def then(self, other: Work) -> Work:
        lag = np.maximum(self.lag + other.seconds, self.host + other.lag)
        return Work(self.name, self.path, self.host + other.host, self.seconds + other.seconds, lag)


@dataclass(frozen=True, eq=False)
class Message:
    """What the ranks send each other in one channel.

    Attributes:
        id: `x3`, the message's ordinal in the plan; its exchanges are `x3.0`, `x3.1`, …
        late: whether it is for the next step, and on its way while that step computes.
    """

    id: str
    spec: ChannelSpec
    late: bool

    @cached_property
    def bytes(self) -> np.ndarray:
        """Bytes from each rank to each: [source, destination]."""
        return sum((bytes_of(each) for each in self.spec.exchanges), np.zeros(1))

    @cached_property
    def sent(self) -> Figures:
        return self.bytes.sum(1)

    @cached_property
    def received(self) -> Figures:
        return self.bytes.sum(0)

    @cached_property
    def written(self) -> Figures:
        """Bytes that each rank writes to a memory that all share: what all others get once."""
        return self.bytes.max(1) if self.broadcast else self.sent

    @cached_property
    def broadcast(self) -> bool:
        return all(each.broadcast for each in self.spec.exchanges)

    @cached_property
    def partners(self) -> np.ndarray:
        """Whether two ranks take part together: [rank, rank]. In an all-gather all do."""
        if self.broadcast:
            one = self.spec.exchanges[0]
            together = _of_all_lines(one, np.ones((one.world, one.world))) > 0
            return together | np.eye(len(together), dtype=bool)
        return (self.bytes + self.bytes.T > 0) | np.eye(len(self.bytes), dtype=bool)

    def received_of(self, rank: int) -> dict[str, int]:
        """Bytes that a rank receives, by exchange."""
        return {f"{self.id}.{i}": each.received(each.place(rank)) for i, each in enumerate(self.spec.exchanges)}


@lru_cache(maxsize=4096)
def bytes_of(exchange: Exchange) -> np.ndarray:
    """Bytes from each rank of the mesh to each in one exchange: [source, destination]."""
    ranks = range(exchange.world)
    size = exchange.dtype.itemsize
    found = np.array([[exchange.numel(src, dst) * size for dst in ranks] for src in ranks], dtype=float)
    return _of_all_lines(exchange, found)


def _of_all_lines(exchange: Exchange, figures: np.ndarray) -> np.ndarray:
    """Figures of pairs of ranks, as an exchange counts them, for all pairs of ranks of the mesh; others have 0."""
    world = exchange.axis.world if exchange.axis else exchange.world
    found = np.zeros((world, world))
    for members in {exchange.members(rank) for rank in range(world) if exchange.has(rank)}:
        found[np.ix_(members, members)] = figures
    return found


@dataclass(frozen=True, eq=False)
class Put:
    message: Message
    writing: Work  #: the copy into the message


@dataclass(frozen=True, eq=False)
class Get:
    message: Message
    reading: Work  #: the copy into the receive buffers


Event = Work | Put | Get


@dataclass(frozen=True, eq=False)
class Step:
    """The events of one mode."""

    events: tuple[Event, ...]

    @cached_property
    def merged(self) -> Step:
        """The same with one `Work` between puts and gets."""
        found: list[Event] = []
        for event in self.events:
            if isinstance(event, Work) and found and isinstance(found[-1], Work):
                found[-1] = found[-1].then(event)
            else:
                found.append(event)
        return Step(tuple(found))

    @property
    def messages(self) -> list[Message]:
        return [event.message for event in self.events if isinstance(event, Put)]


def step_of(program: StepProgram, plan: fx.Graph, prices: Prices, link: Link, launch: float) -> Step:
    """The events of a step program.

    Args:
        plan: the scheduled graph, whose exchanges give the messages their ordinals.
        launch: seconds in which the host launches a kernel.
    """
    messages = [
        Message(name, each, program.mode != "exact" and each.exchanges[0].fresh != "sync")
        for name, each in zip(message_ids(plan, program.channels), program.channels, strict=True)
    ]
    events: list[Event] = []
    for node in calls(program.graph):
        if node.target is comm.put:
            message = messages[node.args[1]]  # type: ignore[index]
            events.append(Put(message, _copied(message, write, prices, link, launch)))
        elif node.target is comm.get:
            message = messages[node.args[0]]  # type: ignore[index]
            events.append(Get(message, _copied(message, comm.assemble, prices, link, launch)))
        else:
            price = prices.of(node)
            if price.kernels.any():
                events.append(_work(node.name, node.meta.get("path", ""), price.kernels, price.seconds, launch))
    return Step(tuple(events))


def _work(name: str, path: str, kernels: Figures, seconds: Figures, launch: float) -> Work:
    return Work(name, path, launch * kernels, seconds, seconds + launch * kernels)


def _copied(message: Message, target: object, prices: Prices, link: Link, launch: float) -> Work:
    """Writing or reading a message. Where the ranks copy it themselves, this is what the link does."""
    reads = target is comm.assemble
    path = message.spec.path
    name = f"{'get' if reads else 'put'} {message.id}"
    if link.medium == "memory":
        moved = message.received if reads else message.written
        takes_part = np.array([float(message.spec.exchanges[0].has(rank)) for rank in range(prices.world)])
        return _work(name, path, takes_part, moved / link.bandwidth, launch)
    found = [prices.communication(target, each) for each in message.spec.exchanges]  # type: ignore[arg-type]
    seconds = sum((each.seconds for each in found), np.zeros(1))
    kernels = sum((each.kernels for each in found), np.zeros(1))
    if not reads:
        kernels = kernels + (kernels > 0)  # a put also launches the transfer
    return _work(name, path, kernels, seconds, launch)
