"""Messages between ranks on one machine through shared memory: a write, a flag, a read.

gloo takes 0.5 to 1 ms for the smallest message and copies large ones through sockets twice. Here a payload is packed
straight into memory that its readers have mapped, and they unpack it from there.

Each rank creates one file per plan and context, which the others map. The file has no name (a memfd, opened through
its owner's /proc entry), so that no file is left behind however the processes end::

    token | per channel: `sent`, `read` | channel 0: two buffers | channel 1: two buffers | …

`sent` is the number of the last message that is complete, `read` that of the last one that this rank has used. The two
buffers alternate, so that a rank may write message n + 1 while another still reads message n.

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
from collections.abc import Callable, Sequence
from typing import BinaryIO

import torch
from torch import Tensor

from ..ir.exchange import Payloads
from ..ir.step import ChannelSpec
from .board import POLL, Board
from .channels import assembled
from .memory import check_available
from .messages import Message

CPU = torch.device("cpu")
TOKEN = 16  #: random bytes that identify a file: another container may have a process and a file of the same numbers
FLAG = 64  #: bytes per flag: a cache line, so that ranks that poll do not slow down those that write
SPINS = 200  #: reads of a flag before a wait yields the processor
YIELDING = 2e-3  #: seconds of yielding before a wait sleeps
SLEEP = 1e-4  #: seconds between two reads of a flag by a wait that sleeps
DISABLE = "FXPASS_SHM_DISABLE"  #: environment variable; set to 1 to use gloo between processes of one machine, too
OPENING = "the other ranks to open the same plan"  #: what a rank waits for


#: where a message lies in its sender's file, in both buffers: bytes from the beginning
Offsets = tuple[int, int]


def file_layout(specs: Sequence[ChannelSpec], rank: int) -> tuple[int, list[dict[int, Offsets]]]:
    """The size of a rank's file in bytes, and by channel and reader where its messages lie. Every rank computes it.

    Readers are counted as the channel's exchanges count them. A message that is the same for all lies there once.
    """
    size = TOKEN + FLAG * (2 * len(specs) + 1)
    size += -size % FLAG
    places: list[dict[int, Offsets]] = []
    for spec in specs:
        place: dict[int, Offsets] = {}
        broadcast = all(exchange.broadcast for exchange in spec.exchanges)
        own = spec.place(rank)
        for reader in range(len(spec.members(rank))):
            if reader == own:
                continue
            if place and broadcast:
                place[reader] = next(iter(place.values()))
                continue
            step = Message(spec.exchanges, own, reader).size
            step += -step % FLAG
            place[reader] = size, size + step
            size += 2 * step
        places.append(place)
    return size, places


class MappedFile:
    """A rank's file, mapped into this process's memory."""

    def __init__(self, rank: int, file: BinaryIO, size: int) -> None:
        self.rank = rank
        self.file = file
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
    """A channel through shared memory.

    Args:
        index: its number among the channels of the files.
        files: of all ranks.
        places: where the messages of each rank lie in its file, by reader.
    """

    lends = False

    def __init__(
        self,
        spec: ChannelSpec,
        index: int,
        files: Sequence[MappedFile],
        places: Sequence[dict[int, Offsets]],
        board: Board,
    ) -> None:
        self.spec = spec
        self.board = board
        self.number = 0  #: of the message put last
        members, rank = spec.members(board.rank), spec.place(board.rank)
        files, places = [files[each] for each in members], [places[each] for each in members]
        world = len(members)
        self.rank = rank  #: as the exchanges count it
        self.mine = files[rank]
        self.sent, self.read = sent_flag(index), read_flag(index)
        outgoing = {dst: Message(spec.exchanges, rank, dst) for dst in places[rank]}
        incoming = {src: Message(spec.exchanges, src, rank) for src in range(world) if src != rank}
        self.readers = [files[dst] for dst, message in outgoing.items() if message.size]
        self.writers = [files[src] for src, message in incoming.items() if message.size]
        once = {offsets: dst for dst, offsets in places[rank].items()}  # a broadcast is written once
        nothing: Payloads = [None] * len(spec.exchanges)
        self.outgoing: list[list[tuple[Tensor, int, int]]] = []  #: by buffer: (where to, exchange, destination)
        self.incoming: list[list[Payloads]] = []  #: by buffer and source
        for turn in (0, 1):
            self.outgoing.append(
                [
                    (view, i, dst)
                    for offsets, dst in once.items()
                    for i, view in enumerate(outgoing[dst].read(self.mine.buffer, offsets[turn]))
                    if view is not None
                ]
            )
            self.incoming.append([nothing] * world)
            for src, message in incoming.items():
                self.incoming[turn][src] = message.read(files[src].buffer, places[src][rank][turn])

    def put(self, packed: Sequence[Payloads]) -> None:
        self.mine.flags[self.read] = self.number  # the last message is not read after this
        self.number += 1
        for reader in self.readers:  # until it has used the last message in this buffer
            self._wait(reader, self.read, self.number - 2)
        for view, i, dst in self.outgoing[self.number % 2]:
            payload = packed[i][dst]
            assert payload is not None
            view.copy_(payload)
        self.mine.flags[self.sent] = self.number

    def ready(self) -> bool:
        return all(writer.flags[self.sent] >= self.number for writer in self.writers)

    def get(self) -> list[Tensor]:
        for writer in self.writers:
            self._wait(writer, self.sent, self.number)
        return assembled(self.spec, self.rank, self.incoming[self.number % 2], CPU)

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


def open_channels(specs: Sequence[ChannelSpec], board: Board, number: int) -> list[MemoryChannel] | None:
    """Open the channels of a context; None if some rank cannot map the memory of another. All ranks call it.

    Args:
        number: counts these calls, the same on all ranks.

    Raises:
        OSError: the machine has not enough memory left for the files of all ranks.
        RankError: a rank failed or did not arrive.
    """
    sizes, places = zip(*(file_layout(specs, rank) for rank in range(board.world)), strict=True)
    check_available(
        sum(sizes),
        f"a call (its context is number {number}) with two buffers for each message of {board.world} ranks",
        "run fewer ranks, smaller inputs or fewer guidance branches",
    )
    token = secrets.token_bytes(TOKEN)
    own = _or_none(lambda: _create(board.rank, sizes[board.rank], token))
    card = {"process": os.getpid(), "file": own.file.fileno(), "token": token.hex()} if own else None
    cards = board.all_gather(f"memory/{number}/card", json.dumps(card), OPENING)
    files = [own if rank == board.rank else _map(rank, sizes[rank], card) for rank, card in enumerate(cards)]
    files = [file for file in files if file is not None]
    seen = board.all_gather(f"memory/{number}/seen", json.dumps(len(files) == board.world), OPENING)
    board.store.delete_key(f"memory/{number}/card/{board.rank}")  # all ranks have read it
    if not all(map(json.loads, seen)):
        return None
    with torch.inference_mode(False):  # later calls write to the views, also outside inference mode
        return [
            MemoryChannel(spec, index, files, [of_channel[index] for of_channel in places], board)
            for index, spec in enumerate(specs)
        ]


def _create(rank: int, size: int, token: bytes) -> MappedFile | None:
    # other processors may let another process see the flag before the message
    ordered = platform.machine() in ("x86_64", "AMD64")
    if os.environ.get(DISABLE, "0") != "0" or not ordered or not hasattr(os, "memfd_create"):
        return None
    file = os.fdopen(os.memfd_create("fxpass"), "r+b", buffering=0)
    os.truncate(file.fileno(), size)
    fcntl.lockf(file, fcntl.LOCK_EX, 1)
    made = MappedFile(rank, file, size)
    made.memory[:TOKEN] = token
    return made


def _map(rank: int, size: int, text: str) -> MappedFile | None:
    card = json.loads(text)
    if card is None:
        return None

    def opened() -> MappedFile | None:
        file = open(f"/proc/{card['process']}/fd/{card['file']}", "r+b", buffering=0)  # noqa: SIM115
        seen = MappedFile(rank, file, size)
        return seen if seen.memory[:TOKEN] == bytes.fromhex(card["token"]) else None

    return _or_none(opened)


def _or_none(make: Callable[[], MappedFile | None]) -> MappedFile | None:
    """The file; None if the system refuses it: another host or container, a process of another user."""
    try:
        return make()
    except (OSError, ValueError):
        return None
