"""A step program as a list of calls and messages on tensors of known shapes, in functional form.

Calls of one operator with the same static arguments on operands of the same shapes have one `Form`, so that each is
translated once: repeated blocks consist of the same forms.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from ..ir import comm
from ..ir.comm import in_place, received_shape
from ..ir.exchange import Exchange, Payloads
from ..ir.fetch import Fetch, places
from ..ir.merge import Merged
from ..ir.nodes import call_key
from ..ir.ops import Table, fill_rows, index_tensors_from
from ..ir.step import StepProgram


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the program."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Operand:
    """Stands for operand number `place` among the arguments of a form."""

    place: int


@dataclass(frozen=True, eq=False)
class Form:
    """An operator with its static arguments, and what its operands are like."""

    target: Callable[..., Any]
    arguments: Any  #: (positional, by name), each operand as an `Operand`
    operands: tuple[Value, ...]
    tables: tuple[Table, ...]  #: index tables that it reads
    results: Any  #: `Value`s as the operator returns tensors

    def run(self, operands: Sequence[Tensor], tables: Sequence[Tensor]) -> Any:
        """Call the operator."""
        args, kwargs = pytree.tree_map_only(Operand, lambda each: operands[each.place], self.arguments)
        place = {table: i for i, table in enumerate(self.tables)}
        with index_tensors_from(lambda table, device: tables[place[table]]):
            return self.target(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class Call:
    """A call; `results` in the order of the tensors that the operator returns."""

    node: fx.Node
    form: Form
    operands: tuple[Value, ...]
    results: tuple[Value, ...]


@dataclass(frozen=True)
class Payload:
    """What one rank sends to another of one exchange."""

    value: Value
    place: int  #: of the exchange in its message
    role: str
    sender: int
    receiver: int

    @property
    def bytes(self) -> int:
        return self.value.dtype.itemsize * torch.Size(self.value.shape).numel()


@dataclass(frozen=True, eq=False)
class Message:
    """A put or a get of a channel."""

    node: fx.Node
    put: bool
    channel: int
    payloads: tuple[Payload, ...]
    last: bool = False  #: of a get: of the last step's message


@dataclass(frozen=True)
class Lines:
    """A step program in order."""

    inputs: dict[str, Value]  #: by placeholder
    lines: list[Call | Message]
    outputs: list[Value]
    state: list[Value]  #: the new values


@dataclass(eq=False)
class _Arrived:
    """What a rank gets of one exchange; the receive buffer is made when something reads it as a whole."""

    node: fx.Node
    exchange: Exchange
    payloads: tuple[Payload, ...]
    buffer: Value | None = None

    @property
    def senders(self) -> list[int]:
        """Of the payloads, as the exchange counts ranks."""
        return [self.exchange.place(each.sender) for each in self.payloads]


def lines_of(program: StepProgram, forms: dict[Any, Form]) -> Lines:
    """The calls and messages of a step program.

    Args:
        forms: those that are known; new ones are added.
    """
    return _Lister(program, forms).run()


class _Lister:
    def __init__(self, program: StepProgram, forms: dict[Any, Form]) -> None:
        self.program = program
        self.rank = program.rank
        self.env: dict[fx.Node, Any] = {}  #: trees of values
        self.lines: list[Call | Message] = []
        self.forms = forms
        self.fake = FakeTensorMode()
        self.put: set[int] = set()

    def run(self) -> Lines:
        inputs: dict[str, Value] = {}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                shape = node.meta.get("local_shape", node.meta["shape"])
                self.env[node] = inputs[str(node.target)] = Value(tuple(shape), node.meta["dtype"])
            elif node.op == "output":
                outputs, state = ([self.whole(self.env[each]) for each in some] for some in node.args[0])
                return Lines(inputs, self.lines, outputs, state)
            elif node.target is comm.put:
                packed, channel = node.args
                self.env[node] = self.sent(node, [self.env[each] for each in packed], channel)
            elif node.target is comm.get:
                self.env[node] = self.arrived(node, node.args[0])
            elif node.target is operator.getitem:
                self.env[node] = self.env[node.args[0]][node.args[1]]
            else:
                self.env[node] = self.called(node)
        raise AssertionError("a step program has an output")

    def sent(self, node: fx.Node, packed: Sequence[Sequence[Value | None]], channel: int) -> None:
        exchanges = self.program.channels[channel].exchanges
        payloads = tuple(
            Payload(value, place, each.role, self.rank, receiver)
            for place, (each, values) in enumerate(zip(exchanges, packed, strict=True))
            for receiver, value in zip(each.members(self.rank), values, strict=True)
            if value is not None
        )
        self.put.add(channel)
        self.lines.append(Message(node, True, channel, payloads))

    def arrived(self, node: fx.Node, channel: int) -> list[_Arrived]:
        found = [
            _Arrived(node, each, tuple(self.received(each, place)))
            for place, each in enumerate(self.program.channels[channel].exchanges)
        ]
        payloads = tuple(payload for each in found for payload in each.payloads)
        self.lines.append(Message(node, False, channel, payloads, last=channel not in self.put))
        return found

    def received(self, exchange: Exchange, place: int) -> Iterator[Payload]:
        """What the others send of the exchange in this place of a message."""
        own = exchange.place(self.rank)
        for source, sender in enumerate(exchange.members(self.rank)):
            if sender != self.rank and exchange.numel(source, own):
                value = Value(tuple(exchange.payload_shape(source, own)), exchange.dtype)
                yield Payload(value, place, exchange.role, sender, self.rank)

    def whole(self, value: Any) -> Any:
        """A value; of what has arrived, its receive buffer."""
        if not isinstance(value, _Arrived):
            return value
        if value.buffer is None:
            senders, rank = value.senders, value.exchange.place(self.rank)
            parts = [each.value for each in value.payloads]
            value.buffer = self.call(value.node, receive_buffer, (value.exchange, rank, senders, parts))
        return value.buffer

    def called(self, node: fx.Node) -> Any:
        target: Any = node.target
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.env.__getitem__)
        if target is comm.unpack:
            x, received, exchange, rank = args
            if isinstance(received, _Arrived) and received.exchange == exchange and received.buffer is None:
                parts = [each.value for each in received.payloads]
                return self.call(node, unpack_parts, (x, exchange, rank, received.senders, parts))
        target = OTHER_FORMS.get(target, target)
        args, kwargs = pytree.tree_map_only(_Arrived, self.whole, (args, kwargs))
        return self.call(node, target, args, kwargs)

    def call(self, node: fx.Node, target: Any, args: Any, kwargs: Any = None) -> Any:
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs or {})))
        operands = tuple(leaf for leaf in leaves if isinstance(leaf, Value))
        key = (call_key(target, [_like(leaf) for leaf in leaves], {}), spec)
        if key not in self.forms:
            self.forms[key] = self.form(target, leaves, spec, operands)
        form = self.forms[key]
        results = pytree.tree_map_only(Value, lambda each: Value(each.shape, each.dtype), form.results)
        flat = tuple(each for each in pytree.tree_leaves(results) if isinstance(each, Value))
        self.lines.append(Call(node, form, operands, flat))
        return results

    def form(self, target: Any, leaves: list[Any], spec: pytree.TreeSpec, operands: tuple[Value, ...]) -> Form:
        supply = iter(range(len(operands)))
        static = [Operand(next(supply)) if isinstance(leaf, Value) else _on_cpu(leaf) for leaf in leaves]
        arguments = pytree.tree_unflatten(static, spec)
        tables: dict[Table, Tensor] = {}

        def noted(table: Table, device: torch.device) -> Tensor:
            if table not in tables:
                tables[table] = torch.from_numpy(table.array.copy())
            return tables[table]

        with self.fake, torch.no_grad(), index_tensors_from(noted):
            tensors = [torch.empty(each.shape, dtype=each.dtype) for each in operands]
            args, kwargs = pytree.tree_map_only(Operand, lambda each: tensors[each.place], arguments)
            found = target(*args, **kwargs)
        results = pytree.tree_map_only(Tensor, lambda each: Value(tuple(each.shape), each.dtype), found)
        return Form(target, arguments, operands, tuple(tables), results)


def _like(leaf: Any) -> Any:
    """A hashable object that tells arguments apart; of operands, by shape and dtype."""
    return (leaf.shape, leaf.dtype) if isinstance(leaf, Value) else _on_cpu(leaf)


def _on_cpu(leaf: Any) -> Any:
    return torch.device("cpu") if isinstance(leaf, torch.device) else leaf


# -- other forms of operators: functional ones, and those that torch's exporter translates --------------------------


def unpack(x: Tensor, received: Tensor, exchange: Exchange, rank: int) -> Tensor:
    """`comm.unpack` that does not write to the receive buffer."""
    return comm.unpack(x, received.clone(), exchange, rank)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """Attention of tensors [..., L, E] with any number of dims, as one of [B, heads, L, E]."""
    if mask is None:
        mask = kwargs.pop("attn_mask", None)
    parts = [x if x is None else _four_dims(x, q.shape[:-3]) for x in (q, k, v, mask)]
    result = torch.nn.functional.scaled_dot_product_attention(*parts, *args, **kwargs)  # type: ignore[arg-type]
    return result.reshape(*q.shape[:-1], v.shape[-1])


def _four_dims(x: Tensor, lead: Sequence[int]) -> Tensor:
    """`x` with four dims; what it has before the last three broadcasts to `lead`, which becomes one dim."""
    x = x.reshape((1,) * (4 - x.ndim) + x.shape)
    return x.expand(*lead, *x.shape[-3:]).flatten(0, len(lead) - 1) if len(lead) > 1 else x


OTHER_FORMS: dict[Any, Callable[..., Tensor]] = {
    comm.unpack: unpack,
    torch.ops.aten.scaled_dot_product_attention.default: attention,
}


def unpack_parts(x: Tensor, exchange: Exchange, rank: int, senders: Sequence[int], parts: Sequence[Tensor]) -> Tensor:
    """`comm.unpack` of what has arrived from `senders`."""
    return exchange.unpack(rank, x, _by_source(exchange, senders, parts))


def receive_buffer(exchange: Exchange, rank: int, senders: Sequence[int], parts: Sequence[Tensor]) -> Tensor:
    """The receive buffer of what has arrived from `senders`; the own place, which nothing reads, is filled."""
    payloads = _by_source(exchange, senders, parts)
    if isinstance(exchange, Merged):
        return torch.stack([parts[0] if part is None else part for part in payloads])
    assert isinstance(exchange, Fetch)
    shape, dim = received_shape(exchange, rank), exchange.dim
    if not in_place(exchange):
        return torch.cat(list(parts), dim) if parts else torch.zeros(shape, dtype=exchange.dtype)
    own = exchange.table[rank][rank]
    payloads[rank] = torch.zeros([*exchange.shape[:dim], len(own), *exchange.shape[dim + 1 :]], dtype=exchange.dtype)
    found, in_turn = places(exchange.want[rank], exchange.table[rank])
    rows = [payloads[src] for src, _ in found]
    if in_turn:
        return torch.cat([each for each in rows if each is not None], dim)
    buffer = torch.zeros(shape, dtype=exchange.dtype)
    for (_, where), part in zip(found, rows, strict=True):
        assert part is not None
        fill_rows(buffer, dim, where, part)
    return buffer


def _by_source(exchange: Exchange, senders: Iterable[int], parts: Iterable[Tensor]) -> Payloads:
    payloads: Payloads = [None] * exchange.world
    for sender, part in zip(senders, parts, strict=True):
        payloads[sender] = part
    return payloads
