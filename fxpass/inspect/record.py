"""What a dump holds: one rank's graph after a pass, and every exchange with the bytes of all ranks, as frozen data.

Text, JSON, drawings and networkx graphs are made of a `Snapshot`, so that they agree. A `Snapshot` refers to no tensor
and no graph.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Literal

from ..ir.layout import Layout
from .exchanges import Gathered

Kind = Literal["input", "weight", "constant", "operator", "exchange", "wait", "result", "output"]


@dataclass(frozen=True)
class Node:
    """A node of the graph.

    An `exchange` launches a message, a `wait` awaits it, and each `result` is one of its values. Operators with several
    results have no shape; their `getitem` nodes have.
    """

    name: str
    kind: Kind
    operator: str  #: "conv2d", "exchange", "wait", "getitem"; of a placeholder, what the caller or the model calls it
    arguments: str  #: of the rank: "%0, %1, alpha=2", with the places of `operands`
    operands: tuple[str, ...]  #: names of nodes
    path: str  #: the module, "mid_block.attentions.0"
    origin: str  #: the operator of the captured program that it comes from
    shape: tuple[int, ...] | None  #: of the whole value
    local: tuple[int, ...] | None  #: of the rank's part, in exact steps
    dtype: str  #: "float32"
    layout: Layout | None  #: the rows on each rank
    flops: int  #: of the rank; 0 where they are unknown
    bytes: int  #: that the rank writes
    seconds: float  #: on the target, by the cost model; of an exchange, for all ranks
    exchanges: tuple[str, ...] = ()  #: identifiers: all of an `exchange` or a `wait`, one of a `result`


@dataclass(frozen=True)
class ExchangeRecord:
    """One value of a message. Bytes are of payload, for each receiving rank."""

    id: str  #: "x3.1": message 3, value 1
    node: str  #: the exchange node
    operand: str  #: the node whose value is exchanged
    result: str  #: the node of the result; "" if nothing reads it
    origin: str  #: the operator of the captured program that needs it
    path: str
    role: str
    fresh: str  #: how fresh the others' parts are in displaced steps
    may_be_stale: bool  #: whether the rule that declared it allows that
    reason: str
    shape: tuple[int, ...]
    dtype: str
    text: str  #: what the rank receives: "halo(H: 1 up, 1 down)"
    bits: int  #: of coded changes in displaced steps; 0: values are sent
    exact: tuple[int, ...]
    steady: tuple[int, ...]  #: in displaced steps


@dataclass(frozen=True)
class MessageRecord:
    """What one exchange node sends: several values in one message."""

    node: str
    exchanges: tuple[str, ...]
    padding: tuple[int, ...]  #: bytes over NCCL beside the payload, for each receiving rank
    padding_steady: tuple[int, ...]


@dataclass(frozen=True)
class CutRecord:
    """A value that is cut."""

    node: str
    label: str  #: what the caller calls it, or where it is
    shape: tuple[int, ...]
    layout: Layout


@dataclass(frozen=True)
class Snapshot:
    """The graph of one rank after a pass."""

    model: str
    stage: str  #: the last pass that ran
    rank: int
    world: int
    strategy: str
    target: str
    fingerprint: str
    cuts: tuple[CutRecord, ...]
    nodes: tuple[Node, ...]
    exchanges: tuple[ExchangeRecord, ...]
    messages: tuple[MessageRecord, ...]
    fallbacks: tuple[Gathered, ...]
    estimated: dict[str, int]  #: operators that count as matrix products, with how many there are
    uncounted: dict[str, int]  #: operators of unknown work, with how many there are
    modules: dict[str, str] = field(default_factory=dict)  #: path -> class

    @cached_property
    def by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

    @cached_property
    def by_id(self) -> dict[str, ExchangeRecord]:
        return {each.id: each for each in self.exchanges}

    @cached_property
    def message_of(self) -> dict[str, MessageRecord]:
        """Messages by the name of their exchange node."""
        return {each.node: each for each in self.messages}

    def received(self, *, exact: bool = True) -> int:
        """Bytes of payload that the rank receives in one step."""
        return sum((each.exact if exact else each.steady)[self.rank] for each in self.exchanges)

    def only(self, *, module: str | None = None, operator: str | None = None, exchanges: bool = False) -> Snapshot:
        """The part that is asked for. Exchanges and fallbacks of other nodes are left out, too.

        Args:
            module: a pattern of module paths, `down_blocks.1.*`; the modules inside those that match belong to them.
            operator: the name of an operator; an exchange also has that of its role.
            exchanges: exchanges, waits and results only.

        Raises:
            ValueError: nothing matches; the message suggests near names.
        """
        selected = [node for node in self.nodes if not exchanges or node.kind in ("exchange", "wait", "result")]
        if module is not None:
            inside = {path for path in self._paths() if _matches(path, module)}
            if not inside:
                raise ValueError(f"no module matches {module!r}{_near(module, self._paths(), 'modules')}")
            selected = [node for node in selected if node.path in inside]
        if operator is not None:
            names = {name for node in self.nodes for name in self._names(node)}
            if operator not in names:
                raise ValueError(f"no operator is called {operator!r}{_near(operator, names, 'operators')}")
            selected = [node for node in selected if operator in self._names(node)]
        shown = {node.name for node in selected}
        ids = {each.id for each in self.exchanges if each.node in shown}
        return replace(
            self,
            nodes=tuple(selected),
            exchanges=tuple(each for each in self.exchanges if each.id in ids),
            messages=tuple(each for each in self.messages if each.node in shown),
            fallbacks=tuple(each for each in self.fallbacks if ids.intersection(each.exchanges)),
        )

    def _paths(self) -> set[str]:
        """The paths of all modules that hold nodes, and of the modules around them."""
        parts = [node.path.split(".") for node in self.nodes if node.path]
        return {".".join(each[:n]) for each in parts for n in range(1, len(each) + 1)}

    def _names(self, node: Node) -> set[str]:
        if node.kind in ("exchange", "wait", "result"):
            return {node.kind, *(self.by_id[each].role for each in node.exchanges)}
        return {node.operator} if node.kind == "operator" else set()


def _matches(path: str, pattern: str) -> bool:
    """Whether a module or one around it has a path of this pattern; the path itself may begin with `pattern` + dot."""
    parts = path.split(".")
    return any(fnmatchcase(".".join(parts[:n]), pattern) for n in range(1, len(parts) + 1))


def _near(wanted: str, known: Iterable[str], what: str) -> str:
    near = difflib.get_close_matches(wanted, sorted(known), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else f"; `fxpass dump MODEL --unfold` shows the {what}"
