"""The exchanges of a partitioned graph, each under the identifier that all outputs share, with its bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from ..ir.exchange import Exchange
from ..ir.program import calls, exchanges_of
from ..ir.step import ChannelSpec
from ..runtime.process_group import padding


@dataclass(frozen=True)
class PlannedExchange:
    """One declared exchange, with the operator and the module that need it."""

    node: str  #: the operator of the captured program that needs it
    path: str  #: the module that operator is in, e.g. "mid_block.attentions.0"
    declared: Exchange
    message: int  #: ordinal of its message among those of the graph, from 0
    value: int  #: place in that message, from 0

    @property
    def id(self) -> str:
        """`x3.1`: message 3, value 1. Dump, JSON, plan, drawing and networkx use it; it holds for one graph."""
        return f"x{self.message}.{self.value}"

    @property
    def role(self) -> str:
        return self.declared.role

    def received(self, rank: int, *, exact: bool = True) -> int:
        """Bytes of payload that `rank` receives in an exact step, or in a displaced one."""
        place = self.declared.place(rank)
        if not self.declared.has(rank):
            return 0
        if exact:
            return self.declared.received(place)
        return self.declared.wire.received(place) if self.declared.repeated else 0

    @property
    def bytes(self) -> int:
        """Bytes received by all ranks together."""
        return self.declared.bytes

    @property
    def messages(self) -> int:
        return self.declared.messages

    @property
    def reason(self) -> str:
        return self.declared.reason

    def __str__(self) -> str:
        return f"{self.declared} {self.bytes} bytes for {self.node} in {self.path or 'the model'}"


@dataclass(frozen=True)
class Gathered:
    """An operator that could not be split: its operands are gathered, and every rank runs it whole."""

    node: str  #: the operator of the captured program
    path: str  #: the module that it is in
    shapes: tuple[tuple[int, ...], ...]  #: of the gathered operands
    bytes: int  #: received by all ranks together in one step
    reason: str
    exchanges: tuple[str, ...]  #: identifiers of those that gather the operands

    def __str__(self) -> str:
        shapes = ", ".join("x".join(map(str, shape)) or "a number" for shape in self.shapes)
        return f"{self.node} in {self.path or 'the model'}: {self.reason}; {shapes} fetched whole, {self.bytes} bytes"


def planned_in(graph: fx.Graph) -> Iterator[PlannedExchange]:
    """The declared exchanges of a partitioned graph, in order."""
    for message, (node, declared) in enumerate(exchanges_of(graph)):
        for value, each in enumerate(declared):
            yield PlannedExchange(node.meta.get("origin", node.name), node.meta.get("path", ""), each, message, value)


def message_ids(graph: fx.Graph, channels: Sequence[ChannelSpec]) -> list[str]:
    """For each channel of the step programs of a scheduled graph: `x3`, the message that travels in it."""
    ordinals = {node.name: i for i, (node, _) in enumerate(exchanges_of(graph))}
    return [f"x{ordinals[each.name.removesuffix('.displaced')]}" for each in channels]


def gathered_in(graph: fx.Graph) -> tuple[Gathered, ...]:
    """The operators of a partitioned graph that could not be split, each listed once."""
    found: dict[tuple[str, str], list[PlannedExchange]] = {}
    for each in planned_in(graph):
        if each.role == "fallback":
            found.setdefault((each.node, each.path), []).append(each)
    return tuple(
        Gathered(
            node,
            path,
            tuple(e.declared.shape for e in some),
            sum(e.bytes for e in some),
            some[0].reason,
            tuple(e.id for e in some),
        )
        for (node, path), some in found.items()
    )


def estimated_in(graph: fx.Graph) -> dict[str, int]:
    """The operators of a normalized graph whose work is estimated, by name, with how many there are."""
    unknown = [node for node in calls(graph) if node.meta.get("estimated")]
    return dict(Counter(str(node.target) for node in unknown if node.meta["flops"] is not None))


def uncounted_in(graph: fx.Graph, gathered: Sequence[Gathered]) -> dict[str, int]:
    """The operators of a normalized graph whose work is unknown, by name, with how many there are."""
    names = {each.node for each in gathered}
    unknown = [node for node in calls(graph) if node.meta.get("flops", 0) is None]
    return dict(
        Counter(str(n.target) for n in unknown if n.name in names or getattr(n.target, "namespace", "") != "aten")
    )


def padding_of(message: Sequence[Exchange], rank: int, *, exact: bool = True) -> int:
    """Bytes of padding that `rank` receives with a message over NCCL, in addition to the payloads."""
    if not message[0].has(rank) or (not exact and not message[0].repeated):
        return 0
    sent = tuple(message) if exact else tuple(each.wire for each in message)
    return padding(sent, message[0].place(rank))
