"""What ranks send each other on a channel, laid out in bytes.

All payloads that one rank sends to another travel as one message, whatever their number and dtype: a buffer of bytes,
each payload on a multiple of 16. Sizes follow from the declarations and are never sent. What the ranks of one process
send those of another travels as one bundle of these messages.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch
from torch import Tensor

from ..ir.exchange import Exchange, Payloads, dense_strides
from ..ir.mesh import Placement
from ..ir.step import ChannelSpec

ALIGNMENT = 16  #: bytes


class Message:
    """What rank `src` sends to rank `dst` on a channel."""

    def __init__(self, exchanges: tuple[Exchange, ...], src: int, dst: int) -> None:
        #: of each exchange: dtype, where the payload begins in bytes, shape, strides in elements; None if it is empty
        self.places: list[tuple[torch.dtype, int, tuple[int, ...], tuple[int, ...]] | None] = []
        self.size = 0  #: bytes
        for exchange in exchanges:
            count = exchange.numel(src, dst)
            shape = exchange.payload_shape(src, dst)
            place = exchange.dtype, self.size, shape, dense_strides(shape, exchange.order)
            self.places.append(place if count else None)
            self.size += -(-count * exchange.dtype.itemsize // ALIGNMENT) * ALIGNMENT

    def write(self, payloads: Payloads, buffer: Tensor, start: int) -> None:
        """Lay the message down in `buffer` from byte `start` on, a multiple of `ALIGNMENT`."""
        for view, payload in zip(self.read(buffer, start), payloads, strict=True):
            if view is not None:
                assert payload is not None
                view.copy_(payload)

    def read(self, buffer: Tensor, start: int) -> Payloads:
        """The payloads of the message that begins at byte `start`, as views of `buffer`.

        Args:
            buffer: bytes (uint8).
        """
        # views are bounded by memory alone: a wrong one would be another message's
        assert start % ALIGNMENT == 0, f"a message begins at byte {start}"
        assert start + self.size <= buffer.numel(), f"{self.size} bytes from {start} on in {buffer.numel()}"
        typed: dict[torch.dtype, Tensor] = {}  # one operator more for each dtype, not for each payload
        views: Payloads = []
        for place in self.places:
            if place is None:
                views.append(None)
                continue
            dtype, offset, shape, strides = place
            if dtype not in typed:
                typed[dtype] = buffer.view(dtype)
            first = typed[dtype].storage_offset() + (start + offset) // dtype.itemsize
            views.append(typed[dtype].as_strided(shape, strides, first))
        return views


class Bundle:
    """What the ranks of one process send those of another on a channel. What is the same for all is there once.

    Args:
        sources, destinations: these ranks.
        unit: messages begin at multiples of so many bytes.
    """

    def __init__(
        self, spec: ChannelSpec, sources: Iterable[int], destinations: Container[int], unit: int = ALIGNMENT
    ) -> None:
        self.size = 0  #: bytes
        self.places: dict[tuple[int, int], tuple[Message, int]] = {}  #: by both ranks: where the message begins
        broadcast = all(exchange.broadcast for exchange in spec.exchanges)
        for src in sources:
            first: tuple[Message, int] | None = None
            for dst in spec.members(src):
                if dst == src or dst not in destinations:
                    continue
                if first is None or not broadcast:
                    first = Message(spec.exchanges, spec.place(src), spec.place(dst)), self.size
                    self.size += -(-first[0].size // unit) * unit
                self.places[src, dst] = first

    def leaving(self, src: int) -> list[tuple[int, Message, int]]:
        """The messages of a rank, each once: one of the ranks that it goes to, the message, and where it begins."""
        found = {start: (dst, message, start) for (rank, dst), (message, start) in self.places.items() if rank == src}
        return list(found.values())


def partners(spec: ChannelSpec, placement: Placement, process: int) -> tuple[int, ...]:
    """The processes whose ranks exchange with those of a process, itself among them."""
    ranks = {member for rank in placement.ranks(process) for member in spec.members(rank)}
    return tuple(sorted({placement.process(rank) for rank in ranks}))
