"""Law 2: communication between ranks, declared as data, with the local work before and after it.

An exchange computes `y_r = f_r(x_0 … x_{n-1})` on rank r. It is declared once for all ranks and has three steps::

    pack(r, x_r)  ->  one payload for each other rank
    (transport: lockstep, shared memory, gloo, NCCL; does not know layouts)
    unpack(r, x_r, received)  ->  y_r

`unpack` reads the rank's own value, never its own payload. So a stale exchange (law 4) is the same `unpack` with the
own value of this step and the payloads received in an earlier one.

    Fetch(have -> want)    moves rows along one dim: halos, keys and values, realignment, outputs      (fetch.py)
    Moments                merges (mean, M2) by Chan's formula; biased variance, as torch's group norm (merge.py)
    Reduce                 sums, products, maxima, minima of partial results, in rank order            (merge.py)
    Transfer               gives a value to the ranks of other stages                                  (transfer.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from .mesh import Axis

Role = Literal[
    "halo", "keys_values", "moments", "sum", "realign", "rebalance", "small", "fallback", "output", "inputs", "transfer"
]  #: what an exchange is for
#: roles that may be stale
DISPLACED: tuple[Role, ...] = ("halo", "keys_values", "moments", "sum", "transfer")
Freshness = Literal["sync", "stale", "predicted", "corrected", "frozen", "local"]
Payloads = list[Tensor | None]


@dataclass(frozen=True)
class Exchange:
    """One declared exchange.

    Attributes:
        role: what it is for.
        shape: the shape of the whole operand; of partial results, the shape on each rank.
        dtype: the dtype of the operand, the payloads and the result.
        world: the number of ranks that take part: those of one line of `axis`.
        reason: why it is needed, for reports.
        may_be_stale: set by the rule that declares the exchange, if the result stays close to the exact one when the
            other ranks' parts are those of an earlier step (law 4).
        fresh: which parts of the other ranks a displaced step uses. `sync`: those of this step. `stale`: those of the
            last step. `frozen`: those of the last exact step. `local`: none (`Exchange.local`). For moments also
            `corrected`: those of the last step plus the own change since then; and `predicted`: an estimate of those of
            this step. A displaced step sends its part for the next step; frozen and local exchanges send nothing.
        forecast: the largest trend; 0 for no extrapolation. With a and b received in the last two steps, a displaced
            step uses b + trend (b - a). Each rank measures the trend on its own value, whose change in this step it
            knows, and clamps it to 0 … `forecast`: a change that reverses is not extrapolated.
        order: the operand's dims in memory order, outermost first; () for the usual order. Payloads have this order.
        axis: the axis of the mesh along which it takes place; None: all ranks take part. Everywhere in an exchange,
            ranks are counted by their place in a line of the axis.
    """

    role: Role
    shape: tuple[int, ...]
    dtype: torch.dtype
    world: int
    reason: str = ""
    may_be_stale: bool = field(default=False, kw_only=True)
    fresh: Freshness = field(default="sync", kw_only=True)
    forecast: float = field(default=0.0, kw_only=True)
    order: tuple[int, ...] = field(default=(), kw_only=True)
    axis: Axis | None = field(default=None, kw_only=True)

    def place(self, rank: int) -> int:
        """The number by which the exchange counts a rank of the mesh."""
        return rank if self.axis is None else self.axis.place(rank)

    def members(self, rank: int) -> tuple[int, ...]:
        """The ranks of the mesh that exchange with a rank, itself among them, as the exchange counts them."""
        return tuple(range(self.world)) if self.axis is None else self.axis.members(rank)

    @property
    def lines(self) -> int:
        """How many sets of ranks do this exchange, each among themselves."""
        return 1 if self.axis is None else len(self.axis.lines)

    def has(self, rank: int) -> bool:
        """Whether a rank of the mesh takes part."""
        return self.axis is None or self.axis.has(rank)

    @property
    def repeated(self) -> bool:
        """Whether displaced steps send payloads."""
        return self.fresh not in ("frozen", "local")

    @property
    def steady(self) -> Exchange:
        """The exchange of displaced steps: fewer rows, if it has a window."""
        return self

    @property
    def wire(self) -> Exchange:
        """The exchange of the bytes that displaced steps send: `steady`, or coded changes of its values."""
        return self.steady

    def known(self, rank: int, x: Tensor) -> Tensor | None:
        """The part of rank `rank`'s value that the others have after an exact step; None if changes are not coded."""
        return None

    def outgoing(self, rank: int, x: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The operand of `wire` at a displaced step, and the part of the value that the others have afterwards."""
        return x, known

    def incoming(self, payload: Tensor, known: Tensor) -> Tensor:
        """Decode a payload of a displaced step; `known` is the decoded payload of the step before."""
        return payload

    @property
    def needs_sent(self) -> bool:
        """Whether a displaced step reads what the rank itself sent in the last step."""
        return self.fresh in ("corrected", "predicted")

    def witness(self, x: Tensor) -> Tensor:
        """The part of the own value on which the trend is measured: rows like those that are sent."""
        return x

    def trend(self, now: Tensor, old: Tensor, older: Tensor) -> Tensor:
        """The share of a witness's last change that continued, per sample, clamped to 0 … `forecast` [B]."""
        wide = old.dtype if old.dtype == torch.float64 else torch.float32
        last = (old - older).flatten(1).to(wide)
        continued = ((now - old).flatten(1).to(wide) * last).sum(1)
        return (continued / last.square().sum(1).clamp_min(torch.finfo(last.dtype).tiny)).clamp(0, self.forecast)

    def payload_shape(self, src: int, dst: int) -> tuple[int, ...]:
        """The shape of the payload from `src` to `dst`; it has no elements if nothing is sent."""
        raise NotImplementedError

    def result_shape(self, rank: int, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of rank `rank`'s result, given the shape of its own value."""
        return tuple(shape)

    def pack(self, rank: int, x: Tensor) -> Payloads:
        """The payload for each rank, from rank `rank`'s own value; None if there is nothing to send."""
        raise NotImplementedError

    def unpack(self, rank: int, x: Tensor, received: Payloads) -> Tensor:
        """Rank `rank`'s result, from its own value and the payload of each other rank."""
        raise NotImplementedError

    def local(self, rank: int, x: Tensor) -> Tensor:
        """Rank `rank`'s result, of its own value alone."""
        raise NotImplementedError

    @cached_property
    def broadcast(self) -> bool:
        """Whether every rank sends the same payload to all others, so that an all-gather can do it."""
        raise NotImplementedError

    @cached_property
    def agrees(self) -> bool:
        """Whether an exact step gives every rank the same bits, even if the ranks' copies of a row differ."""
        raise NotImplementedError

    def numel(self, src: int, dst: int) -> int:
        """Elements sent from `src` to `dst`."""
        raise NotImplementedError

    def received(self, rank: int) -> int:
        """Bytes that `rank` receives."""
        raise NotImplementedError

    @property
    def bytes(self) -> int:
        """Bytes received by all ranks together."""
        return self.lines * sum(self.received(rank) for rank in range(self.world))

    @property
    def messages(self) -> int:
        """Number of ordered pairs of ranks with a payload."""
        pairs = sum(self.numel(src, dst) > 0 for src in range(self.world) for dst in range(self.world))
        return self.lines * pairs


def dense_strides(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """The strides of a dense tensor whose dims lie in memory in `order`, the outermost first; () is their own order."""
    strides = [1] * len(shape)
    count = 1
    for dim in reversed(order or range(len(shape))):
        strides[dim] = count
        count *= shape[dim]
    return tuple(strides)
