"""Channels carry the messages of exchange nodes between ranks; here those between ranks in one process.

Every rank puts one message after the other on a channel; the message that a rank gets is made of what the others put as
theirs of the same number. A channel holds two messages, so that a rank may put one while another still reads the last:
to put message n says that message n - 1 has been read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..ir import comm
from ..ir.exchange import Exchange, Payloads
from ..ir.step import ChannelSpec

#: (channel, exchange, source rank, destination rank, payload) -> what arrives instead
Tamper = Callable[[str, Exchange, int, int, Tensor], Tensor]


class Channel(Protocol):
    """One rank's end of a channel in one context.

    Attributes:
        lends: `get` returns buffers that the others write to again, two messages later.
    """

    lends: bool

    def put(self, packed: Sequence[Payloads]) -> None:
        """Send a message: for each exchange, a payload to each destination.

        Waits at most until the others have put their last message.

        Raises:
            RankError: another rank failed, left, or did not answer in time.
        """
        ...

    def ready(self) -> bool:
        """Whether `get` would return at once."""
        ...

    def get(self) -> list[Tensor]:
        """The receive buffers of the message put last, one for each exchange; zeros if there is none.

        The caller may write to them. They are its own, unless the channel `lends` them.

        Raises:
            RankError: another rank failed, left, or did not answer in time.
        """
        ...

    def close(self) -> None:
        """Receive what is in flight."""
        ...


def in_process_bytes(specs: Sequence[ChannelSpec], rank: int) -> int:
    """Bytes of a rank's messages that lie between ranks of one process from one step to the next."""
    return sum(each.received(spec.place(rank)) for spec in specs if spec.late for each in spec.exchanges)


class InProcessChannel:
    """A rank's end of a channel between ranks in one process. It checks that payloads are what the plan declares.

    Args:
        tamper: changes payloads on their way.
    """

    lends = False

    def __init__(
        self,
        spec: ChannelSpec,
        rank: int,
        ends: list[InProcessChannel],
        device: torch.device,
        tamper: Tamper | None = None,
    ) -> None:
        self._tamper = tamper
        self.spec = spec
        self.rank = rank  #: as the exchanges count it
        self.device = device
        self.ends = ends  #: of all ranks that exchange with it
        self.number = 0  #: of the message put last
        self.inbox: dict[tuple[int, int], list[Tensor | None]] = {}  #: (source, number of the message) -> payloads

    @staticmethod
    def of_all_ranks(
        spec: ChannelSpec, world: int, device: torch.device, tamper: Tamper | None = None
    ) -> list[InProcessChannel]:
        ends: dict[int, InProcessChannel] = {}
        for members in dict.fromkeys(spec.members(rank) for rank in range(world)):
            line: list[InProcessChannel] = []
            line += [InProcessChannel(spec, place, line, device, tamper) for place in range(len(members))]
            ends |= zip(members, line, strict=True)
        return [ends[rank] for rank in range(world)]

    def put(self, packed: Sequence[Payloads]) -> None:
        for src in range(len(self.ends)):
            self.inbox.pop((src, self.number), None)  # the last message is not read after this
        self.number += 1
        for dst, end in enumerate(self.ends):
            if dst == self.rank:
                continue
            payloads = [payloads[dst] for payloads in packed]
            for i, each in enumerate(self.spec.exchanges):
                payload = payloads[i]
                if payload is not None and self._tamper:
                    payloads[i] = payload = self._tamper(self.spec.name, each, self.rank, dst, payload)
                self._check(each, dst, payload)
            if self.spec.late:  # it would keep alive the activation that it is a view of
                payloads = [None if payload is None else payload.clone() for payload in payloads]
            end.inbox[self.rank, self.number] = payloads

    def _check(self, exchange: Exchange, dst: int, payload: Tensor | None) -> None:
        if payload is None:
            assert not exchange.numel(self.rank, dst), f"{self.spec.name}: rank {self.rank} sends nothing to rank {dst}"
            return
        declared = exchange.payload_shape(self.rank, dst)
        assert (tuple(payload.shape), payload.dtype) == (declared, exchange.dtype), (
            f"{self.spec.name}: rank {self.rank} sends {payload.dtype} {tuple(payload.shape)} to rank {dst}, "
            f"{exchange} declares {exchange.dtype} {declared}"
        )

    def ready(self) -> bool:
        return all(src == self.rank or end.number >= self.number for src, end in enumerate(self.ends))

    def get(self) -> list[Tensor]:
        nothing: list[Tensor | None] = [None] * len(self.spec.exchanges)
        if not self.number:
            return no_message(self.spec, self.rank, self.device)
        take = self.inbox.__getitem__ if self.spec.late else self.inbox.pop
        arrived = [nothing if s == self.rank else take((s, self.number)) for s in range(len(self.ends))]
        return assembled(self.spec, self.rank, arrived, self.device)

    def close(self) -> None:
        self.inbox.clear()


def assembled(
    spec: ChannelSpec, rank: int, arrived: Sequence[Sequence[Tensor | None]], device: torch.device
) -> list[Tensor]:
    """The receive buffers of a message, from what came from each source."""
    return [
        comm.assemble(each, rank, [payloads[i] for payloads in arrived], device)
        for i, each in enumerate(spec.exchanges)
    ]


def no_message(spec: ChannelSpec, rank: int, device: torch.device) -> list[Tensor]:
    """Receive buffers before the first message."""
    return [comm.new_received(each, rank, device).zero_() for each in spec.exchanges]
