"""Channels carry the messages of exchange nodes between ranks; here among those of one process.

Every rank puts one message after the other on a channel; the message that a rank gets is made of what the others put as
theirs of the same number. A channel holds two messages, so that a rank may put one while another still reads the last:
to put message n says that message n - 1 has been read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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


def in_process_bytes(specs: Sequence[ChannelSpec], rank: int, ranks: range | None = None) -> int:
    """Bytes of messages to a rank that lie between ranks of one process from one step to the next.

    Args:
        ranks: those of the process; None: all.
    """
    late = [spec for spec in specs if spec.late and spec.exchanges[0].has(rank)]
    if ranks is None:
        return sum(each.received(spec.place(rank)) for spec in late for each in spec.exchanges)
    total = 0
    for spec in late:
        sources = [spec.place(src) for src in spec.members(rank) if src in ranks and src != rank]
        for each in spec.exchanges:
            total += each.dtype.itemsize * sum(each.numel(src, spec.place(rank)) for src in sources)
    return total


class ProcessChannel(Protocol):
    """A channel between this process and others. What its ranks send those of another process travels together."""

    def put(self, rank: int, packed: Sequence[Payloads]) -> None:
        """Lay down what a rank of this process sends. It leaves when all of them have put their message.

        Waits at most until the others have put their last message.

        Raises:
            RankError: another rank failed, left, or did not answer in time.
        """
        ...

    def ready(self, number: int) -> bool:
        """Whether the messages of this number have come from all other processes."""
        ...

    def get(self, rank: int, number: int) -> list[Payloads]:
        """What the ranks of other processes have put for a rank as their message of this number, by source.

        Ranks are counted as the exchanges count them. Waits until it has come; all ranks of this process have put their
        message of this number.

        Raises:
            RankError: another rank failed, left, or did not answer in time.
        """
        ...

    def close(self) -> None:
        """Receive what is in flight."""
        ...


class RankChannel:
    """A rank's end of a channel. What ranks of this process send each other stays in it, and is checked.

    Args:
        between: carries what other processes are sent; None if all ranks are in this one.
        tamper: changes payloads on their way between ranks of this process.
    """

    lends = False

    def __init__(
        self,
        spec: ChannelSpec,
        rank: int,
        ends: Mapping[int, RankChannel],
        device: torch.device,
        between: ProcessChannel | None = None,
        tamper: Tamper | None = None,
    ) -> None:
        self._tamper = tamper
        self.spec = spec
        self.rank = rank
        self.place = spec.place(rank)  #: its number, as the exchanges count ranks
        self.count = len(spec.members(rank))
        self.device = device
        self.ends = ends  #: of the ranks of this process that exchange with it, itself among them, by place
        self.between = between
        self.number = 0  #: of the message put last
        self.inbox: dict[tuple[int, int], list[Tensor | None]] = {}  #: (source, number of the message) -> payloads

    @staticmethod
    def of_ranks(
        spec: ChannelSpec,
        ranks: Iterable[int],
        device: torch.device,
        between: ProcessChannel | None = None,
        tamper: Tamper | None = None,
    ) -> list[RankChannel]:
        """The ends of the ranks of this process."""
        lines: dict[tuple[int, ...], dict[int, RankChannel]] = {}
        found: list[RankChannel] = []
        for rank in ranks:
            line = lines.setdefault(spec.members(rank), {})
            found.append(RankChannel(spec, rank, line, device, between, tamper))
            line[spec.place(rank)] = found[-1]
        return found

    def put(self, packed: Sequence[Payloads]) -> None:
        for src in self.ends:
            self.inbox.pop((src, self.number), None)  # the last message is not read after this
        self.number += 1
        for dst, end in self.ends.items():
            if dst == self.place:
                continue
            payloads = [payloads[dst] for payloads in packed]
            for i, each in enumerate(self.spec.exchanges):
                payload = payloads[i]
                if payload is not None and self._tamper:
                    payloads[i] = payload = self._tamper(self.spec.name, each, self.place, dst, payload)
                self._check(each, dst, payload)
            if self.spec.late:  # it would keep alive the activation that it is a view of
                payloads = [None if payload is None else payload.clone() for payload in payloads]
            end.inbox[self.place, self.number] = payloads
        if self.between is not None:
            self.between.put(self.rank, packed)

    def _check(self, exchange: Exchange, dst: int, payload: Tensor | None) -> None:
        src = self.place
        if payload is None:
            assert not exchange.numel(src, dst), f"{self.spec.name}: rank {src} sends nothing to rank {dst}"
            return
        declared = exchange.payload_shape(src, dst)
        assert (tuple(payload.shape), payload.dtype) == (declared, exchange.dtype), (
            f"{self.spec.name}: rank {src} sends {payload.dtype} {tuple(payload.shape)} to rank {dst}, "
            f"{exchange} declares {exchange.dtype} {declared}"
        )

    @property
    def waits_for_others(self) -> bool:
        """Whether nothing but messages of other processes is missing for `get` to return."""
        return self.between is not None and self._put_here()

    def _put_here(self) -> bool:
        return all(end.number >= self.number for end in self.ends.values())

    def ready(self) -> bool:
        return self._put_here() and (self.between is None or not self.number or self.between.ready(self.number))

    def get(self) -> list[Tensor]:
        if not self.number:
            return no_message(self.spec, self.place, self.device)
        nothing: Payloads = [None] * len(self.spec.exchanges)
        arrived = [nothing] * self.count if self.between is None else self.between.get(self.rank, self.number)
        take = self.inbox.__getitem__ if self.spec.late else self.inbox.pop
        for src in self.ends:
            if src != self.place:
                arrived[src] = take((src, self.number))
        return assembled(self.spec, self.place, arrived, self.device)

    def close(self) -> None:
        self.inbox.clear()
        if self.between is not None:
            self.between.close()


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
