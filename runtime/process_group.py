"""Messages through a process group of `torch.distributed`: NCCL between GPUs, gloo between hosts."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from datetime import timedelta
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ir.exchange import Exchange, Payloads
from ..ir.mesh import Placement
from ..ir.step import ChannelSpec
from .board import POLL, Board
from .errors import RankError
from .messages import Bundle, Message, partners

SMALL = 1 << 16  #: bytes; up to here gloo (not NCCL) is faster at an all-to-all than at an all-gather (0.6 and 1.0 ms)


def gathered(spec: ChannelSpec, placement: Placement, process: int = 0) -> int:
    """Bytes of each process's part in an all-gather among the processes that exchange: the largest bundle.

    0 if an all-to-all is used instead: a rank sends different messages, or an all-gather would add more than a quarter
    of padding.

    Args:
        process: one of these.
    """
    if not all(each.broadcast for each in spec.exchanges):
        return 0
    sizes = [_sent_to_all(spec, placement, each).size for each in partners(spec, placement, process)]
    return max(sizes) if 4 * max(sizes) * len(sizes) <= 5 * sum(sizes) else 0


def _sent_to_all(spec: ChannelSpec, placement: Placement, process: int) -> Bundle:
    """What a process sends to all others, on a channel on which ranks send the same to all."""
    own = placement.ranks(process)
    return Bundle(spec, own, set(range(placement.world)).difference(own))


def padding(exchanges: tuple[Exchange, ...], rank: int) -> int:
    """Bytes of padding that a rank, as the exchanges count it, receives of a message through NCCL.

    Each rank has a process of its own.
    """
    world, spec = exchanges[0].world, ChannelSpec("", "", exchanges, late=False)
    blob = gathered(spec, Placement.one_each(world)) if exchanges[0].lines == 1 else 0
    sizes = [blob or Message(exchanges, src, rank).size for src in range(world) if src != rank]
    return sum(sizes) - sum(each.received(rank) for each in exchanges)


def held_bytes(specs: Sequence[ChannelSpec], placement: Placement, process: int, *, blocking: bool) -> int:
    """Bytes of a process's messages in flight from one step to the next, with their padding: sent and received.

    Args:
        blocking: as of `GroupChannel`.
    """
    total = 0
    own = placement.ranks(process)
    for spec in specs:
        if not spec.late:
            continue
        others = partners(spec, placement, process)
        own_group = blocking or len(others) == placement.processes  # gloo's groups are of the ranks of a line
        blob = gathered(spec, placement, process) if own_group else 0
        if blob > (SMALL if blocking else 0):
            total += blob * len(others)
            continue
        for other in others:
            if other != process:
                theirs = placement.ranks(other)
                total += Bundle(spec, own, theirs).size + Bundle(spec, theirs, own).size
    return total


class GroupChannel:
    """A channel between processes through a process group.

    Where only some of the group's processes exchange with this one, all take part in an all-to-all, and send the others
    nothing: every process puts on the same channels in the same order. (Through gloo they wait for each other all the
    same; NCCL launches nothing for parts without bytes.)

    Args:
        group: a `ProcessGroup` or one of its backends.
        members: the processes of the group, in its order: all, or those that exchange with this one.
        device: the device of the payloads.
        blocking: the group moves host memory, and its `wait` blocks the host (gloo) with a timeout, so that the board
            can be checked.
    """

    def __init__(
        self,
        spec: ChannelSpec,
        group: Any,
        members: Sequence[int],
        device: torch.device,
        blocking: bool,
        board: Board,
        placement: Placement,
    ) -> None:
        self.spec = spec
        self.group = group
        self.device = device
        self.host = torch.device("cpu") if blocking else device
        self.blocking = blocking
        self.board = board
        self.placement = placement
        self.members = tuple(members)
        me, own = board.rank, placement.ranks(board.rank)
        others = partners(spec, placement, me)
        self.blob = gathered(spec, placement, me) if self.members == others else 0
        self.gather = self.blob > (SMALL if blocking else 0)
        self.number = 0  #: of the message put last
        nothing = Bundle(spec, (), ())
        if self.gather:
            incoming = {each: _sent_to_all(spec, placement, each) for each in others}
            outgoing = {me: incoming[me]}
        else:
            theirs = [(each, placement.ranks(each)) for each in self.members]
            outgoing = {each: nothing if each == me else Bundle(spec, own, there) for each, there in theirs}
            incoming = {each: nothing if each == me else Bundle(spec, there, own) for each, there in theirs}
        self.incoming = incoming
        self.sends = [bundle.size for bundle in outgoing.values()]
        self.receives = [bundle.size for bundle in incoming.values()]
        lengths = [self.blob] * len(self.members) if self.gather else self.receives
        #: where each process's bundle begins in the receive buffer
        self.starts = dict(zip(self.members, accumulate(lengths[:-1], initial=0), strict=True))
        leaving = list(zip(outgoing.values(), accumulate(self.sends[:-1], initial=0), strict=True))
        #: by rank of this process: one destination of each message, the message, where it begins in the send buffer
        self._messages = {
            rank: [
                (spec.place(dst), message, start + at)
                for bundle, start in leaving
                for dst, message, at in bundle.leaving(rank)
            ]
            for rank in own
        }
        self._laid: tuple[Tensor, Tensor] | None = None  #: the next message: what is sent, and where to it is received
        self._put: set[int] = set()  #: ranks of this process that have put it
        self._got: set[int] = set()  #: those that have got the last one
        self._work: Any = None  #: of the message in flight
        self._arriving: Tensor | None = None  #: the message put last

    def put(self, rank: int, packed: Sequence[Payloads]) -> None:
        if self._laid is None:
            self._laid = self._buffers()
        send, receive = self._laid
        for dst, message, start in self._messages[rank]:
            message.write([payloads[dst] for payloads in packed], send, start)
        self._put.add(rank)
        if len(self._put) < len(self._messages):
            return
        self.close()
        self._laid = None
        self._put.clear()
        self._got.clear()
        if self.gather:
            own = receive.narrow(0, self.starts[self.board.rank], self.blob)
            if send.device != own.device:
                own.copy_(send)
            self._work = self.group._allgather_base(receive, own)
        else:
            self._work = self.group.alltoall_base(receive, send.to(self.host), self.receives, self.sends)
        self._arriving = receive
        self.number += 1

    def _buffers(self) -> tuple[Tensor, Tensor]:
        if self.gather:
            receive = torch.empty(self.blob * len(self.members), dtype=torch.uint8, device=self.host)
            own = receive.narrow(0, self.starts[self.board.rank], self.blob)  # gathered in place: no other buffer
            return (own if self.device == self.host else torch.empty_like(own, device=self.device)), receive
        send = torch.empty(sum(self.sends), dtype=torch.uint8, device=self.device)
        return send, torch.empty(sum(self.receives), dtype=torch.uint8, device=self.host)

    def ready(self, number: int) -> bool:
        return self.number >= number and (self._work is None or self._work.is_completed())

    def get(self, rank: int, number: int) -> list[Payloads]:
        spec = self.spec
        assert self.number == number, f"rank {rank} gets message {number} of {spec.name}, the last one is {self.number}"
        assert self._arriving is not None
        self.close()
        buffer = self._arriving.to(self.device)
        self._got.add(rank)
        if not spec.late and len(self._got) == len(self._messages):
            self._arriving = None
        arrived: list[Payloads] = []
        for src in spec.members(rank):
            arrived.append([None] * len(spec.exchanges))
            process = self.placement.process(src)
            if process != self.board.rank:
                message, at = self.incoming[process].places[src, rank]
                arrived[-1] = message.read(buffer, self.starts[process] + at)
        return arrived

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


def broadcast(group: Any, tensor: Tensor) -> Any:
    """Give all ranks of a group what its first one has, in place. Returns the work, to be waited for."""
    options = dist.BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    return group.broadcast([tensor], options)


def abandon(group: Any, error: BaseException) -> None:
    """Never release a group of gloo if a rank hangs: that waits for the rank, up to the timeout of the group."""
    if isinstance(error, RankError) and error.hangs:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


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
