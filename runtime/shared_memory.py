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
from .messages import Buffer, Message, Route

CPU = torch.device("cpu")
TOKEN = 16  #: random bytes that identify a file: another container may have a process and a file of the same numbers
FLAG = 64  #: bytes per flag: a cache line, so that ranks that poll do not slow down those that write
SPINS = 200  #: reads of a flag before a wait yields the processor
YIELDING = 2e-3  #: seconds of yielding before a wait sleeps
SLEEP = 1e-4  #: seconds between two reads of a flag by a wait that sleeps
DISABLE = "FXPASS_SHM_DISABLE"  #: environment variable; set to 1 to use gloo between processes of one machine, too


class FileLayout:
    """The layout of a rank's file, which every rank computes for every other."""

    def __init__(self, specs: Sequence[ChannelSpec], rank: int, world: int) -> None:
        self.places: list[dict[int, tuple[Message, tuple[int, int]]]] = []  #: by channel and reader: message, 2 offsets
        self.size = TOKEN + FLAG * (2 * len(specs) + 1)
        self.size += -self.size % FLAG
        for spec in specs:
            readers = [r for r in range(world) if r != rank]
            place: dict[int, tuple[Message, tuple[int, int]]] = {}
            if readers and all(exchange.broadcast for exchange in spec.exchanges):
                place = dict.fromkeys(readers, self._room(Message(spec.exchanges, rank, readers[0])))
            else:
                place = {r: self._room(Message(spec.exchanges, rank, r)) for r in readers}
            self.places.append(place)

    def _room(self, message: Message) -> tuple[Message, tuple[int, int]]:
        step = message.size + -message.size % FLAG
        start, self.size = self.size, self.size + 2 * step
        return message, (start, start + step)


class MappedFile:
    """A rank's file, mapped into this process's memory."""

    def __init__(self, rank: int, file: BinaryIO, size: int) -> None:
        self.rank = rank
        self.file = file
        self.memory = mmap.mmap(file.fileno(), size)
        self.flags = memoryview(self.memory).cast("q")
        self.buffer = Buffer(torch.frombuffer(self.memory, dtype=torch.uint8))

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
    """A channel through shared memory."""

    def __init__(
        self, index: int, route: Route, files: Sequence[MappedFile], layouts: Sequence[FileLayout], board: Board
    ) -> None:
        self.route = route
        self.board = board
        self.number = 0  #: of the message put last
        self.mine = files[route.rank]
        self.sent, self.read = sent_flag(index), read_flag(index)
        self.readers = [files[dst] for dst, message in route.outgoing.items() if message.size]
        self.writers = [files[src] for src, message in route.incoming.items() if message.size]
        places = layouts[route.rank].places[index]
        once = {offsets: dst for dst, (_, offsets) in places.items()}  # a broadcast is written once
        nothing: Payloads = [None] * len(route.spec.exchanges)
        self.outgoing: list[list[tuple[Tensor, int, int]]] = []  #: by buffer: (where to, exchange, destination)
        self.incoming: list[list[Payloads]] = []  #: by buffer and source
        for turn in (0, 1):
            self.outgoing.append(
                [
                    (view, i, dst)
                    for offsets, dst in once.items()
                    for i, view in enumerate(places[dst][0].read(self.mine.buffer, offsets[turn]))
                    if view is not None
                ]
            )
            self.incoming.append([nothing] * route.world)
            for src in route.incoming:
                message, offsets = layouts[src].places[index][route.rank]
                self.incoming[turn][src] = message.read(files[src].buffer, offsets[turn])

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
        return assembled(self.route.spec, self.route.rank, self.incoming[self.number % 2], CPU)

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
                    raise self.board.timed_out(str(self.route.spec))


def open_channels(specs: Sequence[ChannelSpec], board: Board, number: int) -> list[MemoryChannel] | None:
    """Open the channels of a context; None if some rank cannot map the memory of another. All ranks call it.

    Args:
        number: counts these calls, the same on all ranks.

    Raises:
        OSError: the machine has not enough memory left for the files of all ranks.
        RankError: a rank failed or did not arrive.
    """
    layouts = [FileLayout(specs, rank, board.world) for rank in range(board.world)]
    check_available(
        sum(layout.size for layout in layouts),
        f"a call (its context is number {number}) with two buffers for each message of {board.world} ranks",
        "run fewer ranks, smaller inputs or fewer guidance branches",
    )
    token = secrets.token_bytes(TOKEN)
    own = _or_none(lambda: _create(board.rank, layouts[board.rank].size, token))
    card = {"process": os.getpid(), "file": own.file.fileno(), "token": token.hex()} if own else None
    cards = _all_gather(board, f"memory/{number}/card", json.dumps(card))
    files = [own if rank == board.rank else _map(rank, layouts[rank].size, card) for rank, card in enumerate(cards)]
    files = [file for file in files if file is not None]
    seen = _all_gather(board, f"memory/{number}/seen", json.dumps(len(files) == board.world))
    board.store.delete_key(f"memory/{number}/card/{board.rank}")  # all ranks have read it
    if not all(map(json.loads, seen)):
        return None
    with torch.inference_mode(False):  # later calls write to the views, also outside inference mode
        routes = [Route(spec, board.rank, board.world) for spec in specs]
        return [MemoryChannel(index, route, files, layouts, board) for index, route in enumerate(routes)]


def _all_gather(board: Board, key: str, text: str) -> list[str]:
    """Set this rank's value of a key, and return those of all ranks."""
    board.store.set(f"{key}/{board.rank}", text)
    what = "the other ranks to open the same plan"
    return [board.read(f"{key}/{rank}", what).decode() for rank in range(board.world)]


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
