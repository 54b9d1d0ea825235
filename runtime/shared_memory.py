"""Messages between ranks on one machine through shared memory: a write, a flag, a read.

gloo takes 0.5 to 1 ms for the smallest message and copies large ones through sockets twice. Here a payload is packed
straight into memory that its readers have mapped, and they unpack it from there.

Each process creates one file per plan and context, which the others map. The file has no name (a memfd, opened through
its owner's /proc entry), so that no file is left behind however the processes end::

    token | per channel: `sent`, `read` | channel 0: two buffers | channel 1: two buffers | …

`sent` is the number of the last message that is complete, `read` that of the last one that this process has used: of
one that runs several ranks, that all of them have put or used. The two buffers alternate, so that a rank may write
message n + 1 while another still reads message n.

The owner holds a lock on its file, which the kernel releases when the process ends: so the others notice that.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import platform
import secrets
import time
import weakref
from collections.abc import Callable, Sequence
from typing import BinaryIO

import torch
from torch import Tensor

from ..ir.exchange import Payloads
from ..ir.mesh import Placement
from ..ir.step import ChannelSpec
from .board import POLL, Board
from .memory import check_available
from .messages import Bundle

TOKEN = 16  #: random bytes that identify a file: another container may have a process and a file of the same numbers
FLAG = 64  #: bytes per flag: a cache line, so that ranks that poll do not slow down those that write
SPINS = 200  #: reads of a flag before a wait yields the processor
YIELDING = 2e-3  #: seconds of yielding before a wait sleeps
SLEEP = 1e-4  #: seconds between two reads of a flag by a wait that sleeps
DISABLE = "FXPASS_SHM_DISABLE"  #: environment variable; set to 1 to use gloo between processes of one machine, too
FileLayout = tuple[int, list[tuple[Bundle, int]]]  #: as `file_layout` returns it
OPENING = "the other ranks to open the same plan"  #: what a rank waits for


def file_layout(specs: Sequence[ChannelSpec], placement: Placement, process: int) -> FileLayout:
    """The size of a process's file in bytes, and by channel what it sends to all others, and where that begins.

    Every process computes it. A message that is the same for all lies there once. A second buffer follows each.
    """
    size = TOKEN + FLAG * (2 * len(specs) + 1)
    size += -size % FLAG
    messages: list[tuple[Bundle, int]] = []
    own = placement.ranks(process)
    others = set(range(placement.world)).difference(own)
    for spec in specs:
        bundle = Bundle(spec, own, others, FLAG)
        messages.append((bundle, size))
        size += 2 * bundle.size
    return size, messages


class MappedFile:
    """The file of a process, mapped into this one's memory.

    Args:
        rank: the number of the process.
    """

    def __init__(self, rank: int, file: BinaryIO, layout: FileLayout) -> None:
        size, self.messages = layout
        self.rank = rank
        self.file = file
        weakref.finalize(self, file.close)
        self.memory = mmap.mmap(file.fileno(), size)
        self.flags = memoryview(self.memory).cast("q")
        self.buffer = torch.frombuffer(self.memory, dtype=torch.uint8)

    def ended(self) -> bool:
        """Whether its owner, another process, has ended. (Shared locks conflict with the owner's only.)"""
        try:
            fcntl.lockf(self.file, fcntl.LOCK_SH | fcntl.LOCK_NB, 1)
        except OSError:
            return False
        return True


def sent_flag(channel: int) -> int:
    return (TOKEN + FLAG - TOKEN % FLAG) // 8 + 2 * channel * FLAG // 8


def read_flag(channel: int) -> int:
    return sent_flag(channel) + FLAG // 8


class MemoryChannel:
    """A channel between processes through shared memory.

    Args:
        index: its number among the channels of the files.
        files: of all processes.
    """

    def __init__(
        self,
        spec: ChannelSpec,
        index: int,
        files: Sequence[MappedFile],
        board: Board,
        placement: Placement,
    ) -> None:
        self.spec = spec
        self.board = board
        self.number = 0  #: of the message that all ranks of this process have put last
        own = placement.ranks(board.rank)
        self.mine = files[board.rank]
        self.sent, self.read = sent_flag(index), read_flag(index)
        self._begun = 0  #: ranks of this process that have put the next message
        self._ranks = len(own)
        nothing: Payloads = [None] * len(spec.exchanges)
        readers: set[int] = set()
        writers: set[int] = set()
        #: by buffer and rank of this process: (where to, exchange, destination)
        self.outgoing: list[dict[int, list[tuple[Tensor, int, int]]]] = [{}, {}]
        self.incoming: list[dict[int, list[Payloads]]] = [{}, {}]  #: by buffer, rank and source
        sent, sent_at = self.mine.messages[index]
        for rank in own:
            for turn in range(2):
                self.outgoing[turn][rank] = [
                    (view, i, spec.place(dst))
                    for dst, message, at in sent.leaving(rank)
                    for i, view in enumerate(message.read(self.mine.buffer, sent_at + turn * sent.size + at))
                    if view is not None
                ]
                self.incoming[turn][rank] = [nothing] * len(spec.members(rank))
            for place, other in enumerate(spec.members(rank)):
                if other in own:
                    continue
                process = placement.process(other)
                if sent.places[rank, other][0].size:
                    readers.add(process)
                bundle, start = files[process].messages[index]
                message, at = bundle.places[other, rank]
                if message.size:
                    writers.add(process)
                for turn in range(2):
                    views = message.read(files[process].buffer, start + turn * bundle.size + at)
                    self.incoming[turn][rank][place] = views
        self.readers = [files[each] for each in sorted(readers)]
        self.writers = [files[each] for each in sorted(writers)]

    def put(self, rank: int, packed: Sequence[Payloads]) -> None:
        number = self.number + 1
        last = self._begun == self._ranks - 1
        if last:
            self.mine.flags[self.read] = self.number  # the last message is not read after this
        if not self._begun:
            for reader in self.readers:  # until it has used the last message in this buffer
                self._wait(reader, self.read, number - 2)
        for view, i, dst in self.outgoing[number % 2][rank]:
            payload = packed[i][dst]
            assert payload is not None
            view.copy_(payload)
        self._begun = 0 if last else self._begun + 1
        if last:
            self.number = self.mine.flags[self.sent] = number

    def ready(self, number: int) -> bool:
        return all(writer.flags[self.sent] >= number for writer in self.writers)

    def get(self, rank: int, number: int) -> list[Payloads]:
        for writer in self.writers:
            self._wait(writer, self.sent, number)
        return list(self.incoming[number % 2][rank])

    def close(self) -> None:
        pass

    def _wait(self, other: MappedFile, flag: int, count: int) -> None:
        """Wait until a flag of another rank reaches `count`."""
        flags = other.flags
        for _ in range(SPINS):
            if flags[flag] >= count:
                return
        began = time.monotonic()
        looked = began
        while flags[flag] < count:
            now = time.monotonic()
            if now - began < YIELDING:
                os.sched_yield()
                continue
            time.sleep(SLEEP)
            if now - looked > POLL / 4:
                looked = now
                self.board.check()
                if other.ended() and flags[flag] < count:
                    raise self.board.lost(f"the process of rank {other.rank} has ended")
                if now - began > self.board.timeout:
                    raise self.board.timed_out(str(self.spec))


def open_channels(
    specs: Sequence[ChannelSpec], board: Board, number: int, placement: Placement
) -> list[MemoryChannel] | None:
    """Open the channels of a context; None if some process cannot map the memory of another. All processes call it.

    Args:
        number: counts these calls, the same in all processes.

    Raises:
        OSError: the machine has not enough memory left for the files of all processes.
        RankError: a rank failed or did not arrive.
    """
    layouts = [file_layout(specs, placement, each) for each in range(board.world)]
    check_available(
        sum(size for size, _ in layouts),
        f"a call (its context is number {number}) with two buffers for each message of {placement.world} ranks",
        "run fewer ranks, smaller inputs or fewer guidance branches",
    )
    token = secrets.token_bytes(TOKEN)
    own = _or_none(lambda: _create(board.rank, layouts[board.rank], token))
    card = {"process": os.getpid(), "file": own.file.fileno(), "token": token.hex()} if own else None
    cards = board.all_gather(f"memory/{number}/card", json.dumps(card), OPENING)
    files = [own if rank == board.rank else _map(rank, layouts[rank], card) for rank, card in enumerate(cards)]
    files = [file for file in files if file is not None]
    seen = board.all_gather(f"memory/{number}/seen", json.dumps(len(files) == board.world), OPENING)
    board.drop(f"memory/{number}/card/{board.rank}")  # all ranks have read it
    if not all(map(json.loads, seen)):
        return None
    with torch.inference_mode(False):  # later calls write to the views, also outside inference mode
        return [MemoryChannel(spec, index, files, board, placement) for index, spec in enumerate(specs)]


def _create(rank: int, layout: FileLayout, token: bytes) -> MappedFile | None:
    # other processors may let another process see the flag before the message
    ordered = platform.machine() in ("x86_64", "AMD64")
    if os.environ.get(DISABLE, "0") != "0" or not ordered or not hasattr(os, "memfd_create"):
        return None
    file = os.fdopen(os.memfd_create("fxpass"), "r+b", buffering=0)
    os.truncate(file.fileno(), layout[0])
    fcntl.lockf(file, fcntl.LOCK_EX, 1)
    made = MappedFile(rank, file, layout)
    made.memory[:TOKEN] = token
    return made


def _map(rank: int, layout: FileLayout, text: str) -> MappedFile | None:
    card = json.loads(text)
    if card is None:
        return None

    def opened() -> MappedFile | None:
        file = open(f"/proc/{card['process']}/fd/{card['file']}", "r+b", buffering=0)  # noqa: SIM115
        seen = MappedFile(rank, file, layout)
        return seen if seen.memory[:TOKEN] == bytes.fromhex(card["token"]) else None

    return _or_none(opened)


def _or_none(make: Callable[[], MappedFile | None]) -> MappedFile | None:
    """The file; None if the system refuses it: another host or container, a process of another user."""
    try:
        return make()
    except (OSError, ValueError):
        return None
