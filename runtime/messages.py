"""What ranks send each other on a channel, laid out in bytes.

All payloads that one rank sends to another travel as one message, whatever their number and dtype: a buffer of bytes,
each payload on a multiple of 16. Sizes follow from the declarations and are never sent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir.exchange import Exchange, Payloads, dense_strides
from ..ir.step import ChannelSpec

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
    """What rank `src` sends to rank `dst` on a channel."""

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
    """The messages of one channel, as one rank sees them."""

    def __init__(self, spec: ChannelSpec, rank: int, world: int) -> None:
        self.spec = spec
        self.rank = rank
        self.world = world
        others = [r for r in range(world) if r != rank]
        self.outgoing = {dst: Message(spec.exchanges, rank, dst) for dst in others}
        self.incoming = {src: Message(spec.exchanges, src, rank) for src in others}
