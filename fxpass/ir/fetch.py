"""The exchange that moves rows along one dim: halos, keys and values, realignment, outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, reduce
from math import prod
from operator import or_

import numpy as np
import torch
from torch import Tensor

from .coding import decode, encode, encoded_size
from .exchange import Exchange, Payloads, dense_strides
from .layout import Rows, owned, routes
from .ops import Index, fill_rows, index_tensor, take


@dataclass(frozen=True)
class Fetch(Exchange):
    """Change the layout of a value along one dim: rank k holds rows `have[k]` and gets rows `want[k]`.

    The result of rank k may be framed by `before[k]` and `after[k]` rows of `fill`. This is the zero padding of a
    convolution at the border of the image, written in the same copy as the halo::

              rank 0            rank 1            rank 2
          0 | a a a | b     a | b b b | c     b | c c c | 0

    Attributes:
        dim: the dim along which rows move.
        have: the rows on each rank before.
        want: the rows on each rank afterwards.
        before: rows of fill in front of each rank's result; () for none.
        after: rows of fill behind each rank's result; () for none.
        fill: the number in these rows.
        owners: the rows that each rank sends, if ranks may hold different copies of a row; () for `have`.
        window: the rows that displaced steps fetch instead of `want`; () for `want`.
        bits: displaced steps send changes since the last step in so many bits per number (`coding.py`), and the sender
            stores the value as the receivers have decoded it; 0: values are sent as they are.
    """

    dim: int = 0
    have: tuple[Rows, ...] = ()
    want: tuple[Rows, ...] = ()
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    fill: float = 0.0
    owners: tuple[Rows, ...] = ()
    window: tuple[Rows, ...] = ()
    bits: int = 0

    @cached_property
    def table(self) -> tuple[tuple[Rows, ...], ...]:
        """The rows that each rank gets from each: `table[destination][source]`."""
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
        """The rows that each rank sends to any other at displaced steps."""
        table, ranks = self.steady.table, range(self.world)
        return tuple(reduce(or_, (table[dst][src] for dst in ranks if dst != src), Rows(())) for src in ranks)

    @property
    def _coded(self) -> int:
        """The dim whose vectors are coded: the last dim that is not split."""
        last = len(self.shape) - 1
        return last - 1 if self.dim == last else last

    def known(self, rank: int, x: Tensor) -> Tensor | None:
        return self._part_sent(rank, x).clone() if self.bits else None

    def outgoing(self, rank: int, x: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if known is None:
            return x, None
        wide = torch.promote_types(x.dtype, torch.float32)
        change = (self._part_sent(rank, x).to(wide) - known.to(wide)).transpose(self._coded, -1)
        codes = encode(change, self.bits).transpose(self._coded, -1)
        return codes, self.incoming(codes, known)

    def incoming(self, payload: Tensor, known: Tensor) -> Tensor:
        if not self.bits:
            return payload
        change = decode(payload.transpose(self._coded, -1), known.shape[self._coded], self.bits)
        most = torch.finfo(known.dtype).max
        return (known + change.transpose(self._coded, -1)).clamp(-most, most).to(known.dtype)

    def _part_sent(self, rank: int, x: Tensor) -> Tensor:
        """The part of the own value that displaced steps send to any other rank."""
        return take(x, self.dim, self.have[rank].locate(self._sent[rank]))

    @cached_property
    def _row(self) -> int:
        """Elements of a row."""
        return prod(self.shape[: self.dim]) * prod(self.shape[self.dim + 1 :])

    def numel(self, src: int, dst: int) -> int:
        return 0 if src == dst else len(self.table[dst][src]) * self._row

    @cached_property
    def _arriving(self) -> tuple[int, ...]:
        """Rows that each rank gets from others."""
        return arriving(self.owners or self.have, self.want)

    def received(self, rank: int) -> int:
        return self._arriving[rank] * self._row * self.dtype.itemsize

    def payload_shape(self, src: int, dst: int) -> tuple[int, ...]:
        return (*self.shape[: self.dim], len(self.table[dst][src]), *self.shape[self.dim + 1 :])

    @cached_property
    def broadcast(self) -> bool:
        table = self.table
        return all(
            table[dst][src] == self.have[src] for dst in range(self.world) for src in range(self.world) if src != dst
        )

    @cached_property
    def gathers(self) -> bool:
        """Whether every rank gets all rows, and nothing beside them."""
        framed = any(self.before) or any(self.after)
        return not framed and all(len(want) == self.shape[self.dim] for want in self.want)

    @cached_property
    def agrees(self) -> bool:
        sources = self.owners or self.have
        return len(set(self.want)) == 1 and owned(sources) == sources

    def pack(self, rank: int, x: Tensor) -> Payloads:
        if self.broadcast:
            return [x if dst != rank and self.have[rank].runs else None for dst in range(self.world)]
        result: Payloads = []
        for dst in range(self.world):
            rows = self.table[dst][rank]
            send = dst != rank and bool(rows.runs)
            result.append(take(x, self.dim, self.have[rank].locate(rows)) if send else None)
        return result

    def framed(self, rank: int) -> tuple[int, int]:
        """The numbers of rows of fill before and after rank `rank`'s result."""
        return (self.before[rank], self.after[rank]) if self.before else (0, 0)

    def witness(self, x: Tensor) -> Tensor:
        """As many rows at each end as a neighbour fetches; all rows if the two parts would meet."""
        rows, own = self._most, x.shape[self.dim]
        if self.dim == 0 or 2 * rows >= own:
            return x
        return torch.cat([x.narrow(self.dim, 0, rows), x.narrow(self.dim, own - rows, rows)], self.dim)

    @cached_property
    def _most(self) -> int:
        """The largest number of rows that one rank sends to another."""
        return max((len(part) for d, row in enumerate(self.table) for s, part in enumerate(row) if s != d), default=0)

    def result_shape(self, rank: int, shape: Sequence[int]) -> tuple[int, ...]:
        return (*shape[: self.dim], len(self.want[rank]) + sum(self.framed(rank)), *shape[self.dim + 1 :])

    def unpack(self, rank: int, x: Tensor, received: Payloads) -> Tensor:
        want = self.want[rank]
        before, after = self.framed(rank)
        complete = not before and not after and want == self.have[rank] and self.table[rank][rank] == want
        if complete and not self.agrees:
            return x
        shape = self.result_shape(rank, x.shape)
        rows = shape[self.dim]
        order = sorted(range(x.ndim), key=x.stride, reverse=True)  # keep the memory format, e.g. channels-last
        if complete and x.stride() == dense_strides(shape, order):
            return x
        # where all ranks get the same rows, in the same strides: kernels round differently for others
        result = torch.empty_permuted(shape, order, dtype=x.dtype, device=x.device)
        if before:
            result.narrow(self.dim, 0, before).fill_(self.fill)
        if after:
            result.narrow(self.dim, rows - after, after).fill_(self.fill)
        inner = result.narrow(self.dim, before, len(want)) if before or after else result
        found, in_turn = places(want, self.table[rank])
        parts: list[Tensor] = []
        for src, where in found:
            payload = received[src]
            if src == rank:
                payload = take(x, self.dim, self.have[rank].locate(self.table[rank][rank]))
            assert payload is not None, f"rank {rank} got nothing from rank {src}"
            assert payload.shape[self.dim] == len(where), f"rank {rank} got {payload.shape} from rank {src}"
            parts.append(payload)
        if in_turn and parts:  # one operator for all parts
            torch.cat(parts, self.dim, out=inner)
            return result
        for (_, where), payload in zip(found, parts, strict=True):
            fill_rows(inner, self.dim, where, payload)
        return result

    def local(self, rank: int, x: Tensor) -> Tensor:
        """The wanted rows; in place of others' rows, the nearest own ones, or zeros if the rank has none."""
        want, have = self.steady.want[rank], self.have[rank]
        if want == have and not any(self.framed(rank)):
            return x
        if not have:
            return x.new_zeros(self.steady.result_shape(rank, x.shape))
        parts = [x.index_select(self.dim, index_tensor(nearest(want, have), x.device))]
        for count, place in zip(self.framed(rank), (0, 1), strict=True):
            if count:
                shape = (*x.shape[: self.dim], count, *x.shape[self.dim + 1 :])
                parts.insert(len(parts) * place, x.new_full(shape, self.fill))
        return torch.cat(parts, self.dim) if len(parts) > 1 else parts[0]

    def __str__(self) -> str:
        have, want = (sorted({len(rows) for rows in side}) for side in (self.have, self.want))
        frame = " framed" if any(self.before) or any(self.after) else ""
        window = f", then {_sizes(sorted({len(rows) for rows in self.window}))}" if self.window else ""
        coded = f", then changes in {self.bits} bits" if self.bits else ""
        moved = f"{_sizes(have)} -> {_sizes(want)}{window}{coded}"
        return f"{self.role}(dim {self.dim}: {moved} of {self.shape[self.dim]} rows{frame})"


@lru_cache(maxsize=4096)
def arriving(have: tuple[Rows, ...], want: tuple[Rows, ...]) -> tuple[int, ...]:
    """Rows that each rank gets from others."""
    table = routes(have, want)
    return tuple(sum(len(part) for src, part in enumerate(row) if src != dst) for dst, row in enumerate(table))


@lru_cache(maxsize=4096)
def places(want: Rows, parts: tuple[Rows, ...]) -> tuple[tuple[tuple[int, Rows], ...], bool]:
    """(source rank, local positions in `want`), sorted by position; and whether all positions are intervals."""
    places = [(src, want.locate(part)) for src, part in enumerate(parts) if part.runs]
    places.sort(key=lambda place: place[1].start)
    return tuple(places), all(where.contiguous for _, where in places)


@lru_cache(maxsize=4096)
def nearest(want: Rows, have: Rows) -> Index:
    """Of each wanted row, the local position of the own row that is nearest: of two, the one before."""
    own, rows = have.array, want.array
    after = np.searchsorted(own, rows).clip(max=len(own) - 1)
    before = (after - 1).clip(min=0)
    return Index(np.where(np.abs(own[before] - rows) <= np.abs(own[after] - rows), before, after))


def _sizes(sizes: Sequence[int]) -> str:
    return str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}..{sizes[-1]}"
