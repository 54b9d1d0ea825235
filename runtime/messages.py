"""What ranks send each other at an exchange node, laid out in bytes.

All payloads that one rank sends to another at a node travel as one message, whatever their number and dtype: a buffer
of bytes, each payload on a multiple of 16. Sizes follow from the declarations and are never sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..ir.exchange import Exchange, Payloads, dense_strides
from .interpreter import Site

ALIGNMENT = 16  #: bytes


class Buffer:
    """Bytes that hold messages."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self._typed: dict[torch.dtype, Tensor] = {}

    def view(self, slot: Slot, start: int) -> Tensor:
        """The payload in `slot` of the message that begins at byte `start`, by one operator: each has its cost."""
        typed = self._typed.get(slot.dtype)
        if typed is None:
            typed = self._typed[slot.dtype] = self.data.view(slot.dtype)
        place = typed.storage_offset() + (start + slot.offset) // slot.dtype.itemsize
        return typed.as_strided(slot.shape, slot.strides, place)


@dataclass(frozen=True)
class Slot:
    """Where a payload lies in a message."""

    offset: int  #: bytes
    shape: tuple[int, ...]
    strides: tuple[int, ...]  #: elements
    dtype: torch.dtype


class Message:
    """What rank `src` sends to rank `dst` at a node."""

    def __init__(self, exchanges: tuple[Exchange, ...], src: int, dst: int) -> None:
        self.slots: list[Slot | None] = []
        self.size = 0  #: bytes
        for exchange in exchanges:
            count = exchange.numel(src, dst)
            shape = exchange.payload_shape(src, dst)
            slot = Slot(self.size, shape, dense_strides(shape, exchange.order), exchange.dtype)
            self.slots.append(slot if count else None)
            self.size += -(-count * exchange.dtype.itemsize // ALIGNMENT) * ALIGNMENT

    def write(self, payloads: Payloads, buffer: Buffer, start: int) -> None:
        """Lay the message down in `buffer` from byte `start` on, a multiple of `ALIGNMENT`."""
        self._check(buffer, start)
        for slot, payload in zip(self.slots, payloads, strict=True):
            if slot is not None:
                assert payload is not None
                buffer.view(slot, start).copy_(payload)

    def read(self, buffer: Buffer, start: int) -> Payloads:
        """The payloads of the message that begins at byte `start`, as views of `buffer`."""
        self._check(buffer, start)
        return [None if slot is None else buffer.view(slot, start) for slot in self.slots]

    def _check(self, buffer: Buffer, start: int) -> None:
        """Views are bounded by memory alone: a wrong one would be another message's."""
        assert start % ALIGNMENT == 0, f"a message begins at byte {start}"
        assert start + self.size <= buffer.data.numel(), f"{self.size} bytes from {start} on in {buffer.data.numel()}"


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
        where = f" in {self.site.path}" if self.site.path else ""
        return f"{self.site.name}{where} ({', '.join(map(str, self.site.exchanges))})"


class Lane(Protocol):
    """One exchange node's way to the other ranks. Each run is one `send`, one `receive` and one `done`."""

    @property
    def lasting(self) -> bool:
        """Whether what was received stays as it is after `done`; it keeps the memory of all that came with it."""
        ...

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
