"""Messages through a process group of `torch.distributed`: NCCL between GPUs, gloo between hosts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..ir.exchange import Exchange, Payloads
from ..ir.step import ChannelSpec
from .board import POLL, Board
from .channels import assembled, no_message
from .messages import Message

SMALL = 1 << 16  #: bytes; up to here gloo (not NCCL) is faster at an all-to-all than at an all-gather (0.6 and 1.0 ms)


def gathered(exchanges: tuple[Exchange, ...]) -> int:
    """Bytes of each rank's part in an all-gather among the ranks that exchange: the largest message.

    0 if an all-to-all is used instead: a rank sends different messages, or an all-gather would add more than a quarter
    of padding.
    """
    world = exchanges[0].world
    if not all(each.broadcast for each in exchanges):
        return 0
    sizes = [Message(exchanges, rank, (rank + 1) % world).size for rank in range(world)]
    return max(sizes) if 4 * max(sizes) * world <= 5 * sum(sizes) else 0


def padding(exchanges: tuple[Exchange, ...], rank: int) -> int:
    """Bytes of padding that a rank, as the exchanges count it, receives of a message through NCCL."""
    blob = gathered(exchanges) if exchanges[0].lines == 1 else 0
    sizes = [blob or Message(exchanges, src, rank).size for src in range(exchanges[0].world) if src != rank]
    return sum(sizes) - sum(each.received(rank) for each in exchanges)


def held_bytes(specs: Sequence[ChannelSpec], rank: int, *, blocking: bool) -> int:
    """Bytes of a rank's messages in flight from one step to the next, with their padding: what it sends and receives.

    Args:
        blocking: as of `GroupChannel`.
    """
    total = 0
    for spec in specs:
        if not spec.late:
            continue
        place, world = spec.place(rank), len(spec.members(rank))
        own_group = blocking or spec.exchanges[0].lines == 1  # gloo's groups are of the ranks of a line
        blob = gathered(spec.exchanges) if own_group else 0
        if blob > (SMALL if blocking else 0):
            total += blob * world
            continue
        ends = [end for other in range(world) if other != place for end in ((place, other), (other, place))]
        total += sum(Message(spec.exchanges, *end).size for end in ends)
    return total


class GroupChannel:
    """A channel through a process group.

    Where only some of the group's ranks exchange with this one, all take part in an all-to-all, and send the others
    nothing: every rank puts on the same channels in the same order. (Through gloo they wait for each other all the
    same; NCCL launches nothing for parts without bytes.)

    Args:
        group: a `ProcessGroup` or one of its backends.
        ranks: the ranks of the group, in its order: all ranks, or those that exchange with this one.
        device: the device of the payloads.
        blocking: the group moves host memory, and its `wait` blocks the host (gloo) with a timeout, so that the board
            can be checked.
    """

    lends = False

    def __init__(
        self,
        spec: ChannelSpec,
        group: Any,
        ranks: Sequence[int],
        device: torch.device,
        blocking: bool,
        board: Board,
    ) -> None:
        self.spec = spec
        self.group = group
        self.device = device
        self.host = torch.device("cpu") if blocking else device
        self.blocking = blocking
        self.board = board
        rank = board.rank
        self.ranks = tuple(ranks)
        self.place = place = spec.place(rank)
        self.members = spec.members(rank)
        self.blob = gathered(spec.exchanges) if self.ranks == self.members else 0
        self.gather = self.blob > (SMALL if blocking else 0)
        others = {r: i for i, r in enumerate(self.members) if r != rank}  #: their places
        self.outgoing = {dst: Message(spec.exchanges, place, i) for dst, i in others.items()}
        self.incoming = {src: Message(spec.exchanges, i, place) for src, i in others.items()}
        self.sends = [self.outgoing[r].size if r in others else 0 for r in self.ranks]
        self.receives = [self.incoming[r].size if r in others else 0 for r in self.ranks]
        lengths = [self.blob] * len(self.ranks) if self.gather else self.receives
        #: where each rank's message begins in the receive buffer
        self.starts = dict(zip(self.ranks, accumulate(lengths[:-1], initial=0), strict=True))
        self._work: Any = None  #: of the message in flight
        self._arriving: Tensor | None = None  #: the message put last

    def put(self, packed: Sequence[Payloads]) -> None:
        self.close()
        if self.gather:
            other = (self.place + 1) % len(self.members)
            receive = torch.empty(self.blob * len(self.ranks), dtype=torch.uint8, device=self.host)
            own = receive.narrow(0, self.starts[self.board.rank], self.blob)  # gathered in place: no other buffer
            send = own if self.device == self.host else torch.empty_like(own, device=self.device)
            self.outgoing[self.members[other]].write([payloads[other] for payloads in packed], send, 0)
            if send is not own:
                own.copy_(send)
            self._work = self.group._allgather_base(receive, own)
        else:
            send = torch.empty(sum(self.sends), dtype=torch.uint8, device=self.device)
            starts = dict(zip(self.ranks, accumulate(self.sends[:-1], initial=0), strict=True))
            for i, dst in enumerate(self.members):
                if i != self.place:
                    self.outgoing[dst].write([payloads[i] for payloads in packed], send, starts[dst])
            receive = torch.empty(sum(self.receives), dtype=torch.uint8, device=self.host)
            self._work = self.group.alltoall_base(receive, send.to(self.host), self.receives, self.sends)
        self._arriving = receive

    def ready(self) -> bool:
        return self._work is None or self._work.is_completed()

    def get(self) -> list[Tensor]:
        spec, rank = self.spec, self.board.rank
        if self._arriving is None:
            return no_message(spec, self.place, self.device)
        self.close()
        buffer = self._arriving.to(self.device)
        if not spec.late:
            self._arriving = None
        nothing: Payloads = [None] * len(spec.exchanges)
        arrived = [
            nothing if src == rank else self.incoming[src].read(buffer, self.starts[src]) for src in self.members
        ]
        return assembled(spec, self.place, arrived, self.device)

    def close(self) -> None:
        """Wait for the message in flight."""
        if self._work is None:
            return
        if not self.blocking:
            self._work.wait()  # orders the streams; the group's own timeout applies
            self._work = None
            return
        finish(self._work, self.board, str(self.spec))
        self._work = None


def finish(work: Any, board: Board, what: str) -> None:
    """Wait for a message of gloo, and look at the board meanwhile.

    Raises:
        RankError: a rank failed, or did not come in time.
    """
    deadline = time.monotonic() + board.timeout
    while True:
        try:
            work.wait(timedelta(seconds=POLL))
            return
        except RuntimeError as error:
            if work.is_completed():
                raise board.lost(error) from error
        board.check()
        if time.monotonic() > deadline:
            raise board.timed_out(what)
