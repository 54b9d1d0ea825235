"""The operators that an exchange becomes in a step program: packing, unpacking and estimates, on one receive buffer.

What a rank receives of one exchange lies in *one* buffer, and every operator reads it as a whole::

    Merged (Moments, Reduce)            [ranks, *shape]           the parts of all ranks
    Fetch that gives everyone all rows  [..., all rows, ...]      the result, but for the own rows
    any other Fetch                     [..., received rows, ...] the rows of each sender in turn
    Transfer                            [*local shape]            the result

In the first two the rank's own place is left to it. `unpack` of such a Fetch writes the own rows there and returns the
buffer: keys and values are not copied a second time. Each operator is a few vectorised calls, whatever the number of
ranks, and a compiler can fuse them with what makes their operands and what reads their results. `exchange` and `rank`
are static.
"""

from __future__ import annotations

from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from .exchange import Exchange, Payloads
from .fetch import Fetch, places
from .merge import Merged, Moments, with_part
from .ops import fill_rows, take
from .transfer import Transfer


def in_place(exchange: Exchange) -> bool:
    """Whether the receive buffer of an exchange becomes its result."""
    return isinstance(exchange, Fetch) and exchange.gathers


def received_shape(exchange: Exchange, rank: int) -> tuple[int, ...]:
    """The shape of the buffer that rank `rank` receives an exchange in."""
    if isinstance(exchange, Merged):
        return (exchange.world, *exchange.shape)
    if isinstance(exchange, Transfer):
        return exchange.payload_shape(rank, rank)
    assert isinstance(exchange, Fetch)
    rows = exchange.shape[exchange.dim] if in_place(exchange) else sum(_received_rows(exchange, rank))
    return (*exchange.shape[: exchange.dim], rows, *exchange.shape[exchange.dim + 1 :])


def new_received(exchange: Exchange, rank: int, device: torch.device | None = None) -> Tensor:
    """An empty receive buffer; a Fetch has its dims in the memory order of the operand."""
    shape = received_shape(exchange, rank)
    order = exchange.order or range(len(exchange.shape))
    if isinstance(exchange, Merged):
        order = range(len(shape))
    return torch.empty_permuted(shape, tuple(order), dtype=exchange.dtype, device=device)


def assemble(exchange: Exchange, rank: int, payloads: Payloads, device: torch.device) -> Tensor:
    """A new receive buffer that holds the payloads; what lies in the rank's own place is undefined.

    Args:
        payloads: by source, None where a rank sends nothing.
    """
    buffer = new_received(exchange, rank, device)
    if isinstance(exchange, Merged):
        filler = next(part for part in payloads if part is not None)
        torch.stack([filler if part is None else part for part in payloads], out=buffer)
        return buffer
    if isinstance(exchange, Transfer):
        for payload in payloads:
            if payload is not None:  # else this rank has no rows of the value
                buffer.copy_(payload)
        return buffer
    assert isinstance(exchange, Fetch)
    dim = exchange.dim
    if not in_place(exchange):
        parts = [part for part in payloads if part is not None]
        if parts:
            torch.cat(parts, dim, out=buffer)
        return buffer
    found, in_turn = places(exchange.want[rank], exchange.table[rank])
    others = [(where, payloads[src]) for src, where in found if src != rank]
    if in_turn:
        first = next((i for i, (src, _) in enumerate(found) if src == rank), len(found))
        groups = [others[:first], others[first:]]  # before and after the own rows
        for group in filter(None, groups):
            start, stop = group[0][0].start, group[-1][0].stop
            torch.cat([part for _, part in group if part is not None], dim, out=buffer.narrow(dim, start, stop - start))
        return buffer
    for where, part in others:
        assert part is not None
        fill_rows(buffer, dim, where, part)
    return buffer


def landings(exchange: Exchange, dst: int, src: int, buffer: Tensor) -> list[tuple[tuple[int, int] | None, Tensor]]:
    """Where the payload of rank `src` lies in the receive buffer of rank `dst`: the views that together take it.

    Returns:
        Pairs of (the first of the payload's rows and their number, the view that takes them); None for all rows.
    """
    if src == dst or not exchange.numel(src, dst):
        return []
    if isinstance(exchange, Merged):
        return [(None, buffer[src])]
    if isinstance(exchange, Transfer):
        return [(None, buffer)]
    assert isinstance(exchange, Fetch)
    if not in_place(exchange):
        counts = _received_rows(exchange, dst)
        return [(None, buffer.narrow(exchange.dim, sum(counts[:src]), counts[src]))]
    places = []
    row = 0
    for run in exchange.want[dst].locate(exchange.table[dst][src]).runs:
        for i in range(run.count):
            places.append(((row, run.length), buffer.narrow(exchange.dim, run.start + i * run.stride, run.length)))
            row += run.length
    return [(None, places[0][1])] if len(places) == 1 else places


def kept_shapes(exchange: Exchange, rank: int, one: bool) -> dict[str, tuple[int, ...]]:
    """The shapes of what a rank keeps of an exchange from step to step, beside the message in its channel.

        sent          the own value of the last step
        known         what the others know of the own value, where changes are coded
        last, older   the witnesses of the last two steps
        received      what the others sent at the last step
        before        what they sent at the one before that

    Args:
        one: whether exact and displaced steps send the same, so that the channel holds what an exact step received.
    """
    kept: dict[str, tuple[int, ...]] = {}
    if exchange.fresh in ("sync", "local") or (isinstance(exchange, Transfer) and exchange.sends(rank)):
        return kept
    own = exchange.shape
    if isinstance(exchange, Fetch):
        own = (*own[: exchange.dim], len(exchange.have[rank]), *own[exchange.dim + 1 :])
    there = received_shape(exchange.steady, rank)
    if exchange.fresh == "frozen" or not one:
        kept["received"] = there
    if isinstance(exchange, Fetch) and exchange.bits:
        kept["known"] = (*own[: exchange.dim], len(exchange.wire.have[rank]), *own[exchange.dim + 1 :])
    if exchange.needs_sent:
        kept["sent"] = own
    if exchange.forecast:
        kept["before"] = there
        if not exchange.needs_sent:
            witness = exchange.steady.witness(torch.empty(own, device="meta"))
            kept["last"] = kept["older"] = tuple(witness.shape)
    return kept


def kept_bytes(exchanges: tuple[Exchange, ...], rank: int) -> int:
    """Bytes that a rank of the mesh holds of an exchange node from step to step, with the message in its channel."""
    late = [each.wire for each in exchanges if each.fresh != "sync" and each.repeated and each.has(rank)]
    return state_bytes(exchanges, rank) + sum(wire.received(wire.place(rank)) for wire in late)


def state_bytes(exchanges: tuple[Exchange, ...], rank: int) -> int:
    """Bytes that a rank of the mesh holds of an exchange node from step to step, beside the message in its channel."""
    one = tuple(each.wire for each in exchanges) == exchanges
    return sum(
        prod(shape) * each.dtype.itemsize
        for each in exchanges
        if each.has(rank)
        for shape in kept_shapes(each, each.place(rank), one).values()
    )


def payloads(received: Tensor, exchange: Exchange, rank: int) -> Payloads:
    """Views of a receive buffer: what each rank sends, None where it sends nothing. Not for `in_place` exchanges."""
    if isinstance(exchange, Merged):
        return [None if src == rank else part for src, part in enumerate(received.unbind(0))]
    assert isinstance(exchange, Fetch)
    counts = _received_rows(exchange, rank)
    starts = accumulate(counts[:-1], initial=0)
    return [
        received.narrow(exchange.dim, start, count) if count else None
        for start, count in zip(starts, counts, strict=True)
    ]


def _received_rows(exchange: Fetch, rank: int) -> list[int]:
    """Rows that rank `rank` receives from each other."""
    return [
        0 if src == rank else exchange.payload_shape(src, rank)[exchange.dim] if exchange.numel(src, rank) else 0
        for src in range(exchange.world)
    ]


# -- the operators -------------------------------------------------------------------------------------------------


def pack(x: Tensor, exchange: Exchange, rank: int) -> Payloads:
    """What rank `rank` sends of its value `x`, by destination."""
    return exchange.pack(rank, x)


def unpack(x: Tensor, received: Tensor, exchange: Exchange, rank: int) -> Tensor:
    """The result of an exchange, from the own value and what the others sent.

    The result of an `in_place` exchange is the receive buffer itself.
    """
    if isinstance(exchange, Moments):
        return exchange.merged(with_part(received, rank, x))
    if in_place(exchange):
        assert isinstance(exchange, Fetch)
        own = exchange.table[rank][rank]
        part = take(x, exchange.dim, exchange.have[rank].locate(own))
        return fill_rows(received, exchange.dim, exchange.want[rank].locate(own), part)
    return exchange.unpack(rank, x, payloads(received, exchange, rank))


def estimate(
    x: Tensor, received: Tensor, sent: Tensor, before: Tensor, pace: Tensor | float, exchange: Exchange, rank: int
) -> Tensor:
    """Moments of a displaced step, from the own value now and the others' of earlier steps.

    Args:
        sent: the own value of the last step.
        received, before: what the others sent at the last step, and at the one before.
        pace: the length of this step in units of the last one's, 0-dim; 0 where it or `before` is not known.
    """
    assert isinstance(exchange, Moments)
    return exchange.estimated(rank, x, sent, received, before, pace)


def local(x: Tensor, exchange: Exchange, rank: int) -> Tensor:
    """What an exchange makes of the own value alone."""
    return exchange.local(rank, x)


def witness(x: Tensor, exchange: Exchange) -> Tensor:
    """A copy of the part of the own value on which a trend is measured."""
    part = exchange.witness(x)
    return part.clone() if part is x else part


def forecast(received: Tensor, before: Tensor, now: Tensor, last: Tensor, older: Tensor, exchange: Exchange) -> Tensor:
    """What the others' rows are expected to be now: their last change goes on as far as that of the own rows does.

    Args:
        received, before: what the others sent at the last step, and at the one before.
        now, last, older: the witnesses of this step and of the two before it.
    """
    weight = 1 + exchange.trend(now, last, older).view(-1, *(1,) * (received.ndim - 1)).to(received.dtype)
    return torch.lerp(before, received, weight)


def sent_rows(x: Tensor, exchange: Fetch, rank: int) -> Tensor:
    """A copy of the rows of the own value that any other rank is sent at displaced steps."""
    known = exchange.known(rank, x)
    assert known is not None
    return known


def encode_change(x: Tensor, known: Tensor, exchange: Fetch, rank: int) -> tuple[Tensor, Tensor]:
    """Codes of what has changed since the others knew `known`; and what they know afterwards."""
    codes, after = exchange.outgoing(rank, x, known)
    assert after is not None
    return codes, after


def decode_change(codes: Tensor, known: Tensor, exchange: Fetch) -> Tensor:
    """What the others' rows are, from the codes of their change and what they were."""
    return exchange.incoming(codes, known)


def windowed(received: Tensor, exchange: Fetch, rank: int) -> Tensor:
    """The receive buffer that displaced steps would have, from that of an exact step."""
    steady = exchange.steady
    parts: Payloads = [None] * exchange.world
    for src, (rows, fewer) in enumerate(zip(exchange.table[rank], steady.table[rank], strict=True)):
        if src == rank or not fewer.runs:
            continue
        if in_place(exchange):
            parts[src] = take(received, exchange.dim, exchange.want[rank].locate(fewer))
        else:
            part = payloads(received, exchange, rank)[src]
            assert part is not None
            parts[src] = take(part, exchange.dim, rows.locate(fewer))
    return assemble(steady, rank, parts, received.device)


def put(packed: tuple[Payloads, ...], channel: int) -> None:
    """Send the payloads of a channel's exchanges; done by the runner, never called."""
    raise RuntimeError("a put was called outside a runner")


def get(channel: int) -> tuple[Tensor, ...]:
    """The receive buffers of the message that a channel's ranks have put last; done by the runner, never called."""
    raise RuntimeError("a get was called outside a runner")
