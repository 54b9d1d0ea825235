"""What ranks send each other at an exchange node, laid out in bytes.

All payloads that one rank sends to another at a node travel as one message, whatever their number and dtype: a buffer
of bytes, each payload on a multiple of 16. Sizes follow from the declarations and are never sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from ..ir.exchange import Exchange, Payloads
from .interpreter import Site

ALIGNMENT = 16  #: bytes


@dataclass(frozen=True)
class Slot:
    """Where a payload lies in a buffer."""

    offset: int  #: bytes
    shape: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...]  #: dims as they lie in the buffer; () if in turn

    def of(self, buffer: Tensor) -> Tensor:
        """The payload as a view of `buffer` (bytes)."""
        end = self.offset + prod(self.shape) * self.dtype.itemsize
        flat = buffer[self.offset : end].view(self.dtype)
        if not self.order:
            return flat.view(self.shape)
        places = [self.order.index(dim) for dim in range(len(self.shape))]
        return flat.view([self.shape[dim] for dim in self.order]).permute(places)


class Message:
    """What rank `src` sends to rank `dst` at a node."""

    def __init__(self, exchanges: tuple[Exchange, ...], src: int, dst: int) -> None:
        self.slots: list[Slot | None] = []
        self.size = 0  #: bytes
        for exchange in exchanges:
            count = exchange.numel(src, dst)
            slot = Slot(self.size, exchange.payload_shape(src, dst), exchange.dtype, exchange.order)
            self.slots.append(slot if count else None)
            self.size += -(-count * exchange.dtype.itemsize // ALIGNMENT) * ALIGNMENT

    def write(self, payloads: Payloads, buffer: Tensor) -> None:
        for slot, payload in zip(self.slots, payloads, strict=True):
            if slot is not None:
                assert payload is not None
                slot.of(buffer).copy_(payload)

    def read(self, buffer: Tensor) -> Payloads:
        return [None if slot is None else slot.of(buffer) for slot in self.slots]


class Route:
    """The messages of one exchange node, as one rank sees them."""

    def __init__(self, site: Site, rank: int, world: int) -> None:
        self.site = site
        self.rank = rank
        self.world = world
        others = [r for r in range(world) if r != rank]
        self.outgoing = {dst: Message(site.exchanges, rank, dst) for dst in others}
        self.incoming = {src: Message(site.exchanges, src, rank) for src in others}
        self.received = [(exchange.role, exchange.received(rank)) for exchange in site.exchanges]
        ranks = range(world)
        self.silent = not any(e.numel(src, dst) for e in site.exchanges for src in ranks for dst in ranks)

    def __str__(self) -> str:
        return f"exchange {self.site.name} ({', '.join(map(str, self.site.exchanges))})"


class Lane(Protocol):
    """One exchange node's way to the other ranks. Each run is one `send`, one `receive` and one `done`."""

    def send(self, packed: list[Payloads]) -> None:
        """Launch; waits at most for readers of the run before the last. `packed`: of each exchange, by destination."""
        ...

    def arrived(self) -> bool:
        """Whether `receive` would return at once."""
        ...

    def receive(self) -> list[Payloads]:
        """By source, the payload of each exchange (nothing from the own rank); good until `done`.

        Raises:
            RankError: another rank failed, left, or did not answer in time.
        """
        ...

    def done(self) -> None:
        """What was received has been used."""
        ...
