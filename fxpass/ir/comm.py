"""The operators that an exchange becomes in a step program: packing, unpacking and estimates, on one receive buffer.

What a rank receives of one exchange lies in *one* buffer, and every operator reads it as a whole:

    Moments, Reduce   [ranks, *shape]           the own place is not written
    Fetch             [..., received rows, ...] the rows of each sender in turn, along the dim of the exchange

So each operator is a few vectorised calls, whatever the number of ranks, and a compiler can fuse them with what makes
their operands and what reads their results. All are functional. `exchange` and `rank` are static.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from .exchange import Earlier, Exchange, Payloads
from .fetch import Fetch
from .merge import Merged, Moments, with_part


def received_shape(exchange: Exchange, rank: int) -> tuple[int, ...]:
    """The shape of the buffer that rank `rank` receives an exchange in."""
    if isinstance(exchange, Merged):
        return (exchange.world, *exchange.shape)
    assert isinstance(exchange, Fetch)
    rows = sum(_received_rows(exchange, rank))
    return (*exchange.shape[: exchange.dim], rows, *exchange.shape[exchange.dim + 1 :])


def payloads(received: Tensor, exchange: Exchange, rank: int) -> Payloads:
    """Views of a receive buffer: what each rank sends, None where it sends nothing."""
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
    """The result of an exchange, from the own value and what the others sent."""
    if isinstance(exchange, Moments):
        return exchange.merged(with_part(received, rank, x))
    return exchange.unpack(rank, x, payloads(received, exchange, rank))


def estimate(
    x: Tensor,
    received: Tensor,
    sent: Tensor,
    before: Tensor,
    ready: Tensor,
    pace: Tensor,
    exchange: Exchange,
    rank: int,
) -> Tensor:
    """Moments of a displaced step, from the own value now and the others' of earlier steps.

    Args:
        sent: the own value of the last step.
        received, before: what the others sent at the last step, and at the one before.
        ready: whether `before` exists, 0-dim bool.
        pace: the length of this step in units of the last one's, 0-dim.
    """
    assert isinstance(exchange, Moments)
    return exchange.estimated(rank, x, sent, received, torch.where(ready, before, received), pace)


def local(x: Tensor, exchange: Exchange, rank: int) -> Tensor:
    """Moments of the own value alone."""
    return exchange.displaced(rank, x, Earlier(None, []))


def witness(x: Tensor, exchange: Exchange) -> Tensor:
    """The part of the own value on which a trend is measured."""
    return exchange.witness(x)


def forecast(
    received: Tensor, before: Tensor, now: Tensor, last: Tensor, older: Tensor, ready: Tensor, exchange: Exchange
) -> Tensor:
    """What the others' rows are expected to be now: their last change goes on as far as that of the own rows does.

    Args:
        received, before: what the others sent at the last step, and at the one before.
        now, last, older: the witnesses of this step and of the two before it.
        ready: whether there were two steps before, 0-dim bool.
    """
    weight = 1 + exchange.trend(now, last, older).view(-1, *(1,) * (received.ndim - 1)).to(received.dtype)
    return torch.where(ready, torch.lerp(before, received, weight), received)


def sent_rows(x: Tensor, exchange: Fetch, rank: int) -> Tensor:
    """The rows of the own value that any other rank is sent at displaced steps."""
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


def windowed(received: Tensor, exchange: Exchange, rank: int) -> Tensor:
    """The part of an exact step's receive buffer that displaced steps receive."""
    kept = [part for part in exchange.retained(rank, payloads(received, exchange, rank)) if part is not None]
    assert isinstance(exchange, Fetch)
    if not kept:
        return received.narrow(exchange.dim, 0, 0)
    return torch.cat(kept, exchange.dim)


def put(packed: tuple[Payloads, ...], channel: int) -> None:
    """Send the payloads of a channel's exchanges; done by the runner, never called."""
    raise RuntimeError("a put was called outside a runner")


def get(channel: int, age: int) -> tuple[Tensor, ...]:
    """The receive buffers of a channel, of this step (`age` 0) or of the last one (1); done by the runner."""
    raise RuntimeError("a get was called outside a runner")
