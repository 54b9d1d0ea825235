"""The one layer that moves payloads between processes.

All payloads that one rank sends to another at an exchange node travel as one message, whatever their number and
dtype: a buffer of bytes, each payload on a multiple of 16. Sizes follow from the declarations and are never sent.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..ir.exchange import Exchange, Payloads
from .board import POLL, Board
from .interpreter import Site

ALIGNMENT = 16  #: bytes
SMALL = 1 << 16  #: bytes; up to here gloo is faster at an all-to-all than at an all-gather (0.6 ms against 1.0 ms)


@dataclass(frozen=True)
class Slot:
    """Where a payload lies in a buffer."""

    offset: int  #: bytes
    shape: tuple[int, ...]
    dtype: torch.dtype

    def of(self, buffer: Tensor) -> Tensor:
        """The payload as a view of `buffer` (bytes)."""
        end = self.offset + prod(self.shape) * self.dtype.itemsize
        return buffer[self.offset : end].view(self.dtype).view(self.shape)


class Message:
    """What rank `src` sends to rank `dst` at a node."""

    def __init__(self, exchanges: tuple[Exchange, ...], src: int, dst: int) -> None:
        self.slots: list[Slot | None] = []
        self.size = 0  #: bytes
        for exchange in exchanges:
            count = exchange.numel(src, dst)
            self.slots.append(Slot(self.size, exchange.payload_shape(src, dst), exchange.dtype) if count else None)
            self.size += -(-count * exchange.dtype.itemsize // ALIGNMENT) * ALIGNMENT

    def write(self, payloads: list[Tensor | None], buffer: Tensor) -> None:
        for slot, payload in zip(self.slots, payloads, strict=True):
            if slot is not None:
                assert payload is not None
                slot.of(buffer).copy_(payload)

    def read(self, buffer: Tensor) -> list[Tensor | None]:
        return [None if slot is None else slot.of(buffer) for slot in self.slots]


class Route:
    """The messages of one exchange node, as one rank sees them."""

    def __init__(self, site: Site, rank: int, world: int) -> None:
        exchanges = site.exchanges
        others = [r for r in range(world) if r != rank]
        self.outgoing = {dst: Message(exchanges, rank, dst) for dst in others}
        self.incoming = {src: Message(exchanges, src, rank) for src in others}
        self.sends = [self.outgoing[r].size if r != rank else 0 for r in range(world)]
        self.receives = [self.incoming[r].size if r != rank else 0 for r in range(world)]
        self.received = [(exchange.role, exchange.received(rank)) for exchange in exchanges]
        # The same large blob to all: an all-gather, padded to the largest, unless that pads by more than a quarter.
        blobs = [Message(exchanges, r, (r + 1) % world).size for r in range(world)]
        self.blob = max(blobs)
        even = 4 * self.blob * world <= 5 * sum(blobs)
        self.gather = all(e.broadcast for e in exchanges) and even and self.blob > SMALL
        self.silent = not any(e.numel(src, dst) for e in exchanges for src in range(world) for dst in range(world))

    @cached_property
    def starts(self) -> list[int]:
        """Where each rank's message begins in the receive buffer."""
        sizes = self.receives
        return [sum(sizes[:r]) for r in range(len(sizes) + 1)]

    @cached_property
    def send_starts(self) -> list[int]:
        return [sum(self.sends[:r]) for r in range(len(self.sends) + 1)]


class Collectives:
    """The exchanges of one rank over a process group of `torch.distributed`.

    Args:
        group: a `ProcessGroup` or one of its backends.
        blocking: the group's `wait` blocks the host (gloo), so that it can be interrupted to look at the board.
    """

    def __init__(self, group: Any, blocking: bool, board: Board) -> None:
        self.group = group
        self.blocking = blocking
        self.board = board
        self.rank = board.rank
        self.world = board.world
        self.traffic: Counter[str] = Counter()
        self._routes: dict[Site, Route] = {}

    def exchange(self, site: Site, values: list[Tensor]) -> None:
        """Replace the content of `values` by the results of the exchanges of `site`.

        Raises:
            RankError: another rank failed, left, or did not answer in time.
        """
        route = self._routes.get(site)
        if route is None:
            route = self._routes[site] = Route(site, self.rank, self.world)
        received = self._transport(site, route, values)
        for i, exchange in enumerate(site.exchanges):
            values[i] = exchange.unpack(self.rank, values[i], [part[i] for part in received])
        for role, count in route.received:
            self.traffic[role] += count

    def forget(self, sites: tuple[Site, ...]) -> None:
        """Drop what is kept for the sites of a plan that is released."""
        for site in sites:
            self._routes.pop(site, None)

    def _transport(self, site: Site, route: Route, values: list[Tensor]) -> list[Payloads]:
        nothing: Payloads = [None] * len(values)
        if route.silent:
            return [nothing] * self.world
        device = values[0].device
        packed = [e.pack(self.rank, x) for e, x in zip(site.exchanges, values, strict=True)]
        # gloo moves host memory only
        host = torch.device("cpu") if self.blocking else device
        if route.gather:
            other = (self.rank + 1) % self.world
            send = torch.empty(route.blob, dtype=torch.uint8, device=device)
            route.outgoing[other].write([payloads[other] for payloads in packed], send)
            receive = torch.empty(route.blob * self.world, dtype=torch.uint8, device=host)
            starts = [route.blob * r for r in range(self.world + 1)]
            work = self.group._allgather_base(receive, send.to(host))
        else:
            send = torch.empty(route.send_starts[-1], dtype=torch.uint8, device=device)
            for dst, message in route.outgoing.items():
                message.write([p[dst] for p in packed], send[route.send_starts[dst] : route.send_starts[dst + 1]])
            receive = torch.empty(route.starts[-1], dtype=torch.uint8, device=host)
            starts = route.starts
            work = self.group.alltoall_base(receive, send.to(host), route.receives, route.sends)
        self._wait(work, site)
        receive = receive.to(device)
        return [
            nothing if src == self.rank else route.incoming[src].read(receive[start:stop])
            for src, (start, stop) in enumerate(pairwise(starts))
        ]

    def _wait(self, work: Any, site: Site) -> None:
        if not self.blocking:
            work.wait()  # orders the streams; the group's own timeout watches over it
            return
        deadline = time.monotonic() + self.board.timeout
        while True:
            try:
                work.wait(timedelta(seconds=POLL))
                return
            except RuntimeError as error:
                if work.is_completed():
                    raise self.board.lost(error) from error
            self.board.check()
            if time.monotonic() > deadline:
                raise self.board.overdue(f"exchange {site.name} ({', '.join(map(str, site.exchanges))})")
