"""Law 2: what ranks tell each other, as pure data, with the two local halves of every exchange.

An exchange computes `y_r = f_r(x_0 … x_{n-1})`. It is declared once for all ranks and done in three steps::

    pack(r, x_r)  ->  one payload for each other rank
    (transport: lockstep, gloo, NCCL — knows nothing of layouts)
    unpack(r, x_r, received)  ->  y_r

`unpack` never looks at the own payload, only at the own value: so a stale exchange (law 4) is the same
`unpack` on the fresh own value and last step's `received`. `fresh` says which it is.

    Fetch(have -> want)    halos, keys and values, realignment, the output: rows move along one dim
    Moments                (mean, M2) merged by Chan's formula; biased variance, as torch's group norm
    Reduce                 sums, maxima, minima of partial results, in rank order
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from math import prod
from operator import or_
from typing import Literal

import torch
from torch import Tensor

from .coding import decode, encode, encoded_size
from .layout import Rows, routes
from .ops import index_tensor, take

Role = Literal[
    "halo", "keys_values", "moments", "sum", "realign", "rebalance", "small", "fallback", "output", "inputs"
]  #: why an exchange is there; the kinds that may be displaced come first
DISPLACED: tuple[Role, ...] = ("halo", "keys_values", "moments", "sum")
Freshness = Literal["sync", "stale", "predicted", "corrected", "frozen", "local"]
Payloads = list[Tensor | None]
HALF = 0.5  #: share of a change that predicted moments expect of others, or to come again


@dataclass(frozen=True)
class Earlier:
    """What a rank has kept of an exchange when a displaced step comes.

    Attributes:
        own: its own value at the step that serves, where an estimator needs it.
        received: the payload of each rank at that step.
        before: the payloads of the step before that one; None where they are not kept.
        pace: how long this step is in units of the last one, in timesteps; 0 if that is not known.
        trend: per sample, the share of the last change of the own values that went on in this step [B].
    """

    own: Tensor | None
    received: Payloads
    before: Payloads | None = None
    pace: float = 0.0
    trend: Tensor | None = None


@dataclass(frozen=True)
class Exchange:
    """One declared exchange. `shape` is the whole operand's (for partial results: every rank's own) shape.

    `fresh` says what a displaced step uses in place of what the others send now, as an exact step does: `stale` what
    they sent at the last step, `frozen` what they sent at the last exact step, `local` nothing; of moments,
    `corrected` those of the last step and the own change since, `predicted` an estimate of their change. What a
    displaced step sends serves the next; frozen and local ones send nothing.

    Where `forecast` is not 0, a change is expected to go on: what was sent at the last two steps, a and then b, serves
    as b + trend (b - a). The trend is measured on the own values, whose change in this step is known, and is taken from
    0 to `forecast`: where changes turn back, which forecasts would amplify, there is none.

    Where `bits` is not 0, displaced steps send what has changed, in so many bits per number (see `coding`), and the
    sender keeps what the others have made of it so far.
    """

    role: Role
    shape: tuple[int, ...]
    dtype: torch.dtype
    world: int
    reason: str = ""
    fresh: Freshness = field(default="sync", kw_only=True)
    forecast: float = field(default=0.0, kw_only=True)
    bits: int = field(default=0, kw_only=True)

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

    def told(self, rank: int, x: Tensor) -> Tensor:
        """What others are sent of rank `rank`'s own value at displaced steps."""
        raise NotImplementedError

    def encoded(self, x: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of what changed from what the others know to `x`, and what they know then; all as `told`."""
        raise NotImplementedError

    def decoded(self, codes: Tensor, known: Tensor) -> Tensor:
        """A payload that was `known`, with the changes that `codes` stand for."""
        raise NotImplementedError

    def keep(self, rank: int, received: Payloads) -> Payloads:
        """Of what `rank` received at an exact step, that which displaced steps read."""
        return [None] * self.world if self.fresh == "local" else received

    def kept(self, rank: int) -> int:
        """Bytes that `rank` keeps from one step to the next."""
        if self.fresh in ("sync", "local"):
            return 0
        own = self.own_numel(rank) * self.dtype.itemsize
        if not self.forecast:
            return self.steady.received(rank) + own
        return 2 * self.steady.received(rank) + own

    def own_numel(self, rank: int) -> int:
        """Elements of its own value that rank `rank` keeps."""
        return prod(self.shape) if self.needs_own else 0

    @property
    def needs_own(self) -> bool:
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


@dataclass(frozen=True)
class Fetch(Exchange):
    """Turn a value laid out by `have` along `dim` into one laid out by `want`.

    Rank k's result may be framed by `before[k]` and `after[k]` rows of `fill`: the zero padding of a convolution
    at the border of the picture, made in the same copy as the halo::

              rank 0            rank 1            rank 2
          0 | a a a | b     a | b b b | c     b | c c c | 0
    """

    dim: int = 0
    have: tuple[Rows, ...] = ()
    want: tuple[Rows, ...] = ()
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    fill: float = 0.0
    owners: tuple[Rows, ...] = ()  #: who sends which rows, where ranks may hold unlike copies of one; default: `have`
    window: tuple[Rows, ...] = ()  #: what displaced steps fetch in place of `want`: fewer rows; default: the same

    @cached_property
    def _routes(self) -> tuple[tuple[Rows, ...], ...]:
        return routes(self.owners or self.have, self.want)

    @cached_property
    def steady(self) -> Fetch:
        return replace(self, want=self.window, window=()) if self.window else self

    @cached_property
    def wire(self) -> Fetch:
        if not self.bits:
            return self.steady
        size = encoded_size(self.shape[self._coded], self.bits)
        shape = (*self.shape[: self._coded], size, *self.shape[self._coded + 1 :])
        return replace(
            self.steady,
            shape=shape,
            dtype=torch.uint8,
            have=self._sent,
            owners=self.owners or self.have,
            forecast=0.0,
            bits=0,
        )

    @cached_property
    def _sent(self) -> tuple[Rows, ...]:
        """By rank, the rows that any other is sent at displaced steps."""
        table, ranks = self.steady._routes, range(self.world)
        return tuple(reduce(or_, (table[dst][src] for dst in ranks if dst != src), Rows(())) for src in ranks)

    @property
    def _coded(self) -> int:
        """The dim whose vectors are coded: the last one that is not split."""
        last = len(self.shape) - 1
        return last - 1 if self.dim == last else last

    def told(self, rank: int, x: Tensor) -> Tensor:
        return take(x, self.dim, self.have[rank].locate(self._sent[rank]))

    def encoded(self, x: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        change = (x.to(wide) - known.to(wide)).transpose(self._coded, -1)
        codes = encode(change, self.bits).transpose(self._coded, -1)
        return codes, self.decoded(codes, known)

    def decoded(self, codes: Tensor, known: Tensor) -> Tensor:
        change = decode(codes.transpose(self._coded, -1), known.shape[self._coded], self.bits)
        most = torch.finfo(known.dtype).max
        return (known + change.transpose(self._coded, -1)).clamp(-most, most).to(known.dtype)

    def own_numel(self, rank: int) -> int:
        return prod(self.shape) // self.shape[self.dim] * len(self._sent[rank]) if self.bits else 0

    def keep(self, rank: int, received: Payloads) -> Payloads:
        if not self.window:
            return received
        result: Payloads = []
        for part, fewer, payload in zip(self._routes[rank], self.steady._routes[rank], received, strict=True):
            if payload is None or not fewer.runs:
                result.append(None)
            else:
                result.append(take(payload, self.dim, part.locate(fewer)).clone())
        return result

    def payload_shape(self, src: int, dst: int) -> tuple[int, ...]:
        return (*self.shape[: self.dim], len(self._routes[dst][src]), *self.shape[self.dim + 1 :])

    @cached_property
    def broadcast(self) -> bool:
        table = self._routes
        return all(
            table[dst][src] == self.have[src] for dst in range(self.world) for src in range(self.world) if src != dst
        )

    def pack(self, rank: int, x: Tensor) -> Payloads:
        result: Payloads = []
        for dst in range(self.world):
            rows = self._routes[dst][rank]
            send = dst != rank and bool(rows.runs)
            result.append(take(x, self.dim, self.have[rank].locate(rows)) if send else None)
        return result

    def framed(self, rank: int) -> tuple[int, int]:
        """Rows of fill before and after rank `rank`'s result."""
        return (self.before[rank], self.after[rank]) if self.before else (0, 0)

    def witness(self, x: Tensor) -> Tensor:
        """The rows at both ends, as many as are fetched from a neighbour; all where these meet."""
        rows = max((len(part) for d, row in enumerate(self._routes) for s, part in enumerate(row) if s != d), default=0)
        own = x.shape[self.dim]
        if self.dim == 0 or 2 * rows >= own:
            return x
        return torch.cat([x.narrow(self.dim, 0, rows), x.narrow(self.dim, own - rows, rows)], self.dim)

    def result_shape(self, rank: int, shape: Sequence[int]) -> tuple[int, ...]:
        return (*shape[: self.dim], len(self.want[rank]) + sum(self.framed(rank)), *shape[self.dim + 1 :])

    def unpack(self, rank: int, x: Tensor, received: Payloads) -> Tensor:
        want = self.want[rank]
        before, after = self.framed(rank)
        if not before and not after and want == self.have[rank] and self._routes[rank][rank] == want:
            return x
        shape = self.result_shape(rank, x.shape)
        rows = shape[self.dim]
        order = sorted(range(x.ndim), key=x.stride, reverse=True)  # as in memory: channels-last stays so
        result = torch.empty_permuted(shape, order, dtype=x.dtype, device=x.device)
        if before:
            result.narrow(self.dim, 0, before).fill_(self.fill)
        if after:
            result.narrow(self.dim, rows - after, after).fill_(self.fill)
        for src, part in enumerate(self._routes[rank]):
            if not part.runs:
                continue
            if src == rank:
                payload = take(x, self.dim, self.have[rank].locate(part))
            else:
                sent = received[src]
                assert sent is not None, f"rank {rank} got nothing from rank {src}"
                payload = sent
            where = want.locate(part).shift(before)
            if where.contiguous:
                result.narrow(self.dim, where.start, len(where)).copy_(payload)
            else:
                result.index_copy_(self.dim, index_tensor(where, x.device), payload)
        return result

    def __str__(self) -> str:
        have, want = (sorted({len(rows) for rows in side}) for side in (self.have, self.want))
        frame = " framed" if any(self.before) or any(self.after) else ""
        window = f", then {_sizes(sorted({len(rows) for rows in self.window}))}" if self.window else ""
        coded = f", then changes in {self.bits} bits" if self.bits else ""
        moved = f"{_sizes(have)} -> {_sizes(want)}{window}{coded}"
        return f"{self.role}(dim {self.dim}: {moved} of {self.shape[self.dim]} rows{frame})"


@dataclass(frozen=True)
class Merged(Exchange):
    """Every rank has a small result of its own, sends it to all others, and merges all of them in rank order."""

    def payload_shape(self, src: int, dst: int) -> tuple[int, ...]:
        return self.shape

    @cached_property
    def broadcast(self) -> bool:
        return True

    def pack(self, rank: int, x: Tensor) -> Payloads:
        return [None if dst == rank else x for dst in range(self.world)]


@dataclass(frozen=True)
class Moments(Merged):
    """Merge `stack([mean, M2])` of each rank's `counts[k]` elements into `stack([mean, biased variance])` of all.

    Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979);
    merged in rank order on every rank, so that all ranks get the same bits.
    """

    counts: tuple[int, ...] = ()

    def unpack(self, rank: int, x: Tensor, received: Payloads) -> Tensor:
        total = 0
        mean = m2 = torch.zeros_like(x[0])
        for part, count in zip(in_rank_order(rank, x, received), self.counts, strict=True):
            if count == 0:
                continue
            delta = part[0] - mean
            mean = mean + delta * (count / (total + count))
            m2 = m2 + part[1] + delta * delta * (total * count / (total + count))
            total += count
        return torch.stack([mean, m2 / total])

    def displaced(self, rank: int, x: Tensor, earlier: Earlier) -> Tensor:
        if self.fresh in ("stale", "frozen") or not self.counts[rank]:
            return super().displaced(rank, x, earlier)
        if self.fresh == "local":
            return torch.stack([x[0], x[1] / self.counts[rank]])
        assert earlier.own is not None
        estimate = self._corrected if self.fresh == "corrected" else self._predicted
        return estimate(rank, x, earlier.own, earlier)

    def _corrected(self, rank: int, x: Tensor, own: Tensor, earlier: Earlier) -> Tensor:
        """The old mean of x and of x² over all ranks, plus the full change of the own ones since.

        That is DistriFusion's estimator (Li et al., 2024), written so that nothing cancels. It can give a negative
        variance: then the own one is taken.
        """
        variance = x[1] / self.counts[rank]
        mean, whole = self.unpack(rank, own, earlier.received)
        shift = x[0] - own[0]
        moved = whole + variance - own[1] / self.counts[rank] + 2 * shift * (own[0] - mean)
        return torch.stack([mean + shift, torch.where(moved < 0, variance, moved)])

    def _predicted(self, rank: int, x: Tensor, own: Tensor, earlier: Earlier) -> Tensor:
        """Merge the own part with an estimate of each other: moved by half the own change and half of its last one.

        Means move by differences and squared deviations by ratios, so that no variance can become negative; a ratio
        counts from 1/2 to 2. Small patches differ much from each other, and one's change says little of another's:
        where `corrected` takes all of it for the whole, this takes half of it, for the others alone.
        """
        shift, growth = x[0] - own[0], _ratio(x[1], own[1])
        expected: Payloads = []
        for src, now in enumerate(earlier.received):
            if now is None:
                expected.append(None)
                continue
            mean, m2 = now[0] + HALF * shift, now[1] * growth**HALF
            then = earlier.before[src] if earlier.before and earlier.pace else None
            if then is not None:
                share = HALF * earlier.pace
                mean, m2 = mean + share * (now[0] - then[0]), m2 * _ratio(now[1], then[1]) ** share
            expected.append(torch.stack([mean, m2]))
        return self.unpack(rank, x, expected)

    def __str__(self) -> str:
        return f"moments({'x'.join(map(str, self.shape[1:]))} of {sum(self.counts)} elements)"


@dataclass(frozen=True)
class Reduce(Merged):
    """Partial results of the ranks, reduced in rank order (sums in float32 at least)."""

    op: Literal["sum", "amax", "amin"] = "sum"

    def unpack(self, rank: int, x: Tensor, received: Payloads) -> Tensor:
        parts = in_rank_order(rank, x, received)
        if self.op == "sum":
            wide = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
            total = parts[0].to(wide)
            for part in parts[1:]:
                total = total + part.to(wide)
            return total.to(x.dtype)
        reduce = torch.maximum if self.op == "amax" else torch.minimum
        result = parts[0]
        for part in parts[1:]:
            result = reduce(result, part)
        return result

    def __str__(self) -> str:
        return f"{self.op}({'x'.join(map(str, self.shape))})"


def in_rank_order(rank: int, x: Tensor, received: Payloads) -> list[Tensor]:
    """The parts of all ranks, the own one in its place."""
    parts: list[Tensor] = []
    for src, payload in enumerate(received):
        part = x if src == rank else payload
        assert part is not None, f"rank {rank} got nothing from rank {src}"
        parts.append(part)
    return parts


def _ratio(now: Tensor, then: Tensor) -> Tensor:
    """`now / then`, between 1/2 and 2; 1 where both are 0."""
    least = torch.finfo(now.dtype).tiny
    return ((now + least) / (then + least)).clamp(0.5, 2)


def _sizes(sizes: Sequence[int]) -> str:
    return str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}..{sizes[-1]}"
