"""Law 2: what ranks tell each other, as pure data, with the two local halves of every exchange.

An exchange computes `y_r = f_r(x_0 … x_{n-1})`. It is declared once for all ranks and done in three steps::

    pack(r, x_r)  ->  one payload for each other rank
    (transport: lockstep, gloo, NCCL — knows nothing of layouts)
    unpack(r, x_r, received)  ->  y_r

`unpack` never looks at the own payload, only at the own value: so a stale exchange (law 4) is the same
`unpack` on the fresh own value and last step's `received`. `fresh` says which it is.

    Fetch(have -> want)    halos, keys and values, realignment, the output: rows move along one dim   (fetch.py)
    Moments                (mean, M2) merged by Chan's formula; biased variance, as torch's group norm (merge.py)
    Reduce                 sums, maxima, minima of partial results, in rank order                      (merge.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Literal

import torch
from torch import Tensor

Role = Literal[
    "halo", "keys_values", "moments", "sum", "realign", "rebalance", "small", "fallback", "output", "inputs"
]  #: why an exchange is there; the kinds that may be displaced come first
DISPLACED: tuple[Role, ...] = ("halo", "keys_values", "moments", "sum")
Freshness = Literal["sync", "stale", "predicted", "corrected", "frozen", "local"]
Payloads = list[Tensor | None]


@dataclass(frozen=True)
class Earlier:
    """What a rank has kept of an exchange when a displaced step comes.

    Attributes:
        sent: what it sent at the step that serves, where an estimator needs it.
        received: the payload of each rank at that step.
        before: the payloads of the step before that one; None where they are not kept.
        pace: how long this step is in units of the last one, in timesteps; 0 if that is not known.
        trend: per sample, the share of the last change of the own values that went on in this step [B].
    """

    sent: Tensor | None
    received: Payloads
    before: Payloads | None = None
    pace: float = 0.0
    trend: Tensor | None = None


@dataclass(frozen=True)
class Exchange:
    """One declared exchange. `shape` is the whole operand's (for partial results: every rank's own) shape.

    `may_be_stale` is the word of the rule that declares the exchange: the result stays close where the others' parts
    are those of an earlier step (law 4). `fresh` says what a displaced step uses in place of what the others send now,
    as an exact step does: `stale` what they sent at the last step, `frozen` what they sent at the last exact step,
    `local` nothing; of moments, `corrected` those of the last step and the own change since, `predicted` an estimate of
    their change. What a displaced step sends serves the next; frozen and local ones send nothing.

    Where `forecast` is not 0, a change is expected to go on: what was sent at the last two steps, a and then b, serves
    as b + trend (b - a). The trend is measured on the own values, whose change in this step is known, and is taken from
    0 to `forecast`: where changes turn back, which forecasts would amplify, there is none.

    `order` lists the operand's dims as they lie in memory, the outermost first; () if in turn. Payloads travel so.
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

    @property
    def repeated(self) -> bool:
        """Whether displaced steps send something."""
        return self.fresh not in ("frozen", "local")

    @property
    def steady(self) -> Exchange:
        """What displaced steps exchange."""
        return self

    @property
    def wire(self) -> Exchange:
        """What travels at displaced steps: `steady`, or codes of what has changed in it."""
        return self.steady

    def known(self, rank: int, x: Tensor) -> Tensor | None:
        """What the others know of rank `rank`'s own value after an exact step, if displaced steps tell of changes."""
        return None

    def outgoing(self, rank: int, x: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What `wire` is to send of the own value at a displaced step, and what the others know of it then."""
        return x, known

    def incoming(self, payload: Tensor, known: Tensor) -> Tensor:
        """What the payload of a displaced step stands for, where the one before was `known`."""
        return payload

    def retained(self, rank: int, received: Payloads) -> Payloads:
        """Of what `rank` received at an exact step, that which displaced steps read."""
        return [None] * self.world if self.fresh == "local" else received

    def state_bytes(self, rank: int) -> int:
        """Bytes that `rank` keeps from one step to the next."""
        if self.fresh in ("sync", "local"):
            return 0
        own = self.sent_numel(rank) * self.dtype.itemsize
        if not self.forecast:
            return self.steady.received(rank) + own
        return 2 * self.steady.received(rank) + own

    def sent_numel(self, rank: int) -> int:
        """Elements of its own value that rank `rank` keeps."""
        return prod(self.shape) if self.needs_sent else 0

    @property
    def needs_sent(self) -> bool:
        """Whether a displaced step needs the own value of the step that serves."""
        return self.fresh in ("corrected", "predicted")

    def displaced(self, rank: int, x: Tensor, earlier: Earlier) -> Tensor:
        """Rank `rank`'s result at a displaced step, from its own value now."""
        if earlier.trend is None or earlier.before is None:
            return self.unpack(rank, x, earlier.received)
        weight = 1 + earlier.trend.view(-1, *(1,) * (x.ndim - 1)).to(x.dtype)
        pairs = zip(earlier.before, earlier.received, strict=True)
        return self.unpack(rank, x, [None if a is None or b is None else torch.lerp(a, b, weight) for a, b in pairs])

    def witness(self, x: Tensor) -> Tensor:
        """The part of the own value on which a trend is measured: what is like that which travels."""
        return x

    def trend(self, now: Tensor, old: Tensor, older: Tensor) -> Tensor:
        """Per sample, which share of a witness's last change went on, from 0 to `forecast` [B]."""
        wide = old.dtype if old.dtype == torch.float64 else torch.float32
        last = (old - older).flatten(1).to(wide)
        on = ((now - old).flatten(1).to(wide) * last).sum(1)
        return (on / last.square().sum(1).clamp_min(torch.finfo(last.dtype).tiny)).clamp(0, self.forecast)

    def payload_shape(self, src: int, dst: int) -> tuple[int, ...]:
        """What rank `src` sends to rank `dst`; no elements where nothing is sent."""
        raise NotImplementedError

    def result_shape(self, rank: int, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of rank `rank`'s result, from that of its own value."""
        return tuple(shape)

    def pack(self, rank: int, x: Tensor) -> Payloads:
        """The payload for each rank, from rank `rank`'s own value; None where there is nothing to send."""
        raise NotImplementedError

    def unpack(self, rank: int, x: Tensor, received: Payloads) -> Tensor:
        """Rank `rank`'s result, from its own value and the payload of each other rank."""
        raise NotImplementedError

    @cached_property
    def broadcast(self) -> bool:
        """Whether every rank sends the same payload to all others (an all-gather serves)."""
        raise NotImplementedError

    @cached_property
    def agrees(self) -> bool:
        """Whether an exact step gives every rank the same bits, even where ranks hold differing copies of a row."""
        raise NotImplementedError

    @cached_property
    def _numels(self) -> tuple[tuple[int, ...], ...]:
        ranks = range(self.world)
        return tuple(tuple(0 if src == dst else prod(self.payload_shape(src, dst)) for src in ranks) for dst in ranks)

    def numel(self, src: int, dst: int) -> int:
        """Elements sent from `src` to `dst`."""
        return self._numels[dst][src]

    def received(self, rank: int) -> int:
        """Bytes that `rank` receives."""
        return sum(self._numels[rank]) * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Bytes received by all ranks together."""
        return sum(self.received(rank) for rank in range(self.world))

    @property
    def messages(self) -> int:
        """Ordered pairs of ranks between which something travels."""
        return sum(n > 0 for row in self._numels for n in row)
