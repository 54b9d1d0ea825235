"""Messages between the GPUs of one machine: each rank writes into memory of the others, also within CUDA graphs.

Every rank holds one allocation per context, which all ranks map (`torch.distributed._symmetric_memory`)::

    flags     int32 [ranks, channels]    the number of the last step whose message has come, by sender and channel
    buffers   [channels, 2, exchanges]   the receive buffers, by channel, parity of the step, and exchange

A step counts itself on the device. It puts at most one message on each of its channels, in the buffers of the step's
parity: every rank writes its part to where the others read it, and `get` returns the buffers themselves. Nothing is
ever in flight that a later step would have to receive: a message that nobody reads is overwritten two steps later.

Each step ends with the closing channel (`ChannelSpec.closing`), on which a rank puts when its other messages have left.
A rank that begins step t + 1 has seen all others put their closing message of step t. So

- all messages of step t have come, and a `get` of one in step t + 1 waits for nothing;
- none of the others still reads what it was sent in step t, except messages that it reads a step later, and the closing
  one. Two buffers are enough for these, one for all others. The runner copies what a step keeps of its receive buffers
  before the closing message is put.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..ir import comm
from ..ir.exchange import Exchange, Payloads
from ..ir.fetch import Fetch
from ..ir.step import ChannelSpec
from .board import Board
from .errors import RankError
from .memory import check_gpu
from .pieces import MOST, pieces

ALIGNMENT = 256  #: bytes
PARITIES = 2


def buffer_places(specs: Sequence[ChannelSpec], world: int) -> tuple[int, list[list[list[list[int]]]]]:
    """The size of a rank's memory, and where the receive buffers of each rank begin in its memory.

    Returns:
        Bytes; and in bytes, by channel, parity, rank and exchange.
    """
    flags = _aligned(4 * world * len(specs))
    totals = [flags] * world
    places: list[list[list[list[int]]]] = []
    for spec in specs:
        places.append([])
        for parity in range(PARITIES):
            if parity and not (spec.late or spec.closing):
                places[-1].append(places[-1][0])  # read in the step in which it is put
                continue
            places[-1].append([])
            for rank in range(world):
                starts: list[int] = []
                for each in spec.exchanges:
                    starts.append(totals[rank])
                    shape = comm.received_shape(each, each.place(rank))
                    totals[rank] += _aligned(prod(shape) * each.dtype.itemsize)
                places[-1][-1].append(starts)
    return max(totals), places


def receive_buffer(exchange: Exchange, rank: int, memory: Tensor, start: int) -> Tensor:
    """The receive buffer of a rank's exchange that begins at byte `start` of its memory (uint8)."""
    assert start % ALIGNMENT == 0, f"a receive buffer begins at byte {start}"
    form = comm.new_received(exchange, rank, torch.device("meta"))
    assert start + form.numel() * form.element_size() <= memory.numel(), f"{form.shape} from byte {start} on"
    first = memory.storage_offset() + start
    # no view: a compiler would take all buffers for views of one tensor
    buffer = torch.empty(0, dtype=form.dtype, device=memory.device)
    return buffer.set_(memory.untyped_storage(), first // form.element_size(), form.shape, form.stride())


class SymmetricMemory:
    """One rank's view of the memory of all ranks, and the number of the step.

    Args:
        specs: the channels, one of them closing.
        peers: the memory of each rank, bytes (uint8), zeros at first.
        timeout: seconds that a wait may take on the device.

    `signal`, `wait` and `advance` can be captured in a CUDA graph.
    """

    def __init__(self, specs: Sequence[ChannelSpec], peers: Sequence[Tensor], rank: int, timeout: float) -> None:
        self.rank = rank
        self.world = len(peers)
        self.peers = peers
        self.timeout = timeout
        self.device = peers[rank].device
        _, self.places = buffer_places(specs, self.world)
        self.handle: Any = None  #: keeps the mappings
        self.closed = False
        self._held: list[Any] = []  #: what is being sent
        self._travels: dict[int, Any] = {}  #: by channel, of this step's messages on their own stream: when they left
        self.number = 1  #: of the step, as the host counts; `step` is what the device counts
        self.sent: set[int] = set()  #: the channels that have a message of this step
        self.step = torch.ones((), dtype=torch.int32, device=self.device)
        flags = [peer[: 4 * self.world * len(specs)].view(torch.int32).view(self.world, -1) for peer in peers]
        self.flags = flags[rank]
        self._prepare(specs, flags)

    def _prepare(self, specs: Sequence[ChannelSpec], flags: Sequence[Tensor]) -> None:
        """What the kernels need: the addresses of flags, and words by which the host and the device talk."""
        from . import symmetric_kernels

        self._kernels: Any = symmetric_kernels
        self._theirs, self._mine = [], []  # by channel: this rank's flags at its readers; its senders' flags here
        for index, spec in enumerate(specs):
            others = [r for r in range(self.world) if r != self.rank]
            readers = [dst for dst in others if any(each.numel(self.rank, dst) for each in spec.exchanges)]
            senders = [src for src in others if any(each.numel(src, self.rank) for each in spec.exchanges)]
            theirs = [flags[dst][self.rank, index].data_ptr() for dst in readers]
            mine = [self.flags[src, index].data_ptr() for src in senders]
            self._theirs.append(torch.tensor(theirs, dtype=torch.int64, device=self.device))
            self._mine.append(torch.tensor(mine, dtype=torch.int64, device=self.device))
        self._stream = torch.cuda.Stream(self.device, priority=-1)  #: carries messages beside the computation
        self._stopped = torch.zeros((), dtype=torch.int32, device=self.device)
        self._words = torch.zeros(2, dtype=torch.int32, pin_memory=True)  #: abort, timed out
        self._tables: dict[Any, list[tuple[list[Any], list[int]]]] = {}  #: by what is copied from where, and parity

    @contextmanager
    def sending(self, channel: int, packed: Sequence[Payloads], *, last: bool) -> Iterator[None]:
        """The body sends payloads: on a stream of its own, unless it is the last message of the step.

        That one waits for all others, so that nothing is under way on this rank when the step ends.
        """
        here = torch.cuda.current_stream(self.device)
        if last:
            if self._held:
                here.wait_stream(self._stream)
            self._held.clear()
            yield
            return
        self._held.append(packed)  # else its memory would be used again, for the allocator sees one stream only
        self._stream.wait_stream(here)
        self._travels[channel] = None
        with torch.cuda.stream(self._stream):
            yield

    def copy(self, channel: int, parity: int, sources: Sequence[Tensor], targets: Sequence[Sequence[Tensor]]) -> None:
        """Copy to other ranks.

        Args:
            targets: by parity, where each of the sources goes to; the same at each call for a channel.
        """
        storages = {each.untyped_storage().data_ptr(): i for i, each in enumerate(sources)}
        forms = [
            (storages[x.untyped_storage().data_ptr()], x.storage_offset(), x.stride(), x.is_conj(), x.is_neg())
            for x in sources
        ]
        key = channel, tuple(forms)
        if key not in self._tables:  # for both parities at once: nothing can be copied from the host while recording
            self._tables[key] = [self._table(sources, each) for each in targets]
        tables, rest = self._tables[key][parity]
        for first, table in tables:
            start = sources[first].untyped_storage().data_ptr()
            self._kernels.copy[(len(table),)](start, table, words=MOST // 4, num_warps=4)
        for i in rest:
            targets[parity][i].copy_(sources[i])

    def _table(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> tuple[list[Any], list[int]]:
        """For each storage one of its tensors and the table of its pieces; and the tensors that have no pieces."""
        found: dict[int, list[Any]] = {}
        first: dict[int, int] = {}
        rest = []
        for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
            storage = source.untyped_storage().data_ptr()
            table = None if storage % 16 else pieces(source, target)
            if table is None:
                rest.append(i)
                continue
            table[:, 1] += target.untyped_storage().data_ptr()
            first.setdefault(storage, i)
            found.setdefault(storage, []).append(torch.from_numpy(table))
        return [(first[storage], torch.cat(found[storage]).to(self.device)) for storage in found], rest

    def signal(self, channel: int) -> None:
        """Tell the readers of a channel that this step's message has come."""
        flags = self._theirs[channel]
        if len(flags):
            self._kernels.signal[(len(flags),)](flags, self.step, self._stopped, num_warps=1)
        if channel in self._travels:
            self._travels[channel] = self._stream.record_event()

    def wait(self, channel: int) -> None:
        """Wait for the messages of this step."""
        flags = self._mine[channel]
        if channel in self._travels:  # a device that runs one stream at a time would wait for ever
            torch.cuda.current_stream(self.device).wait_event(self._travels[channel])
        if len(flags):
            abort, timed_out = (self._words.data_ptr() + 4 * i for i in range(2))
            limit = int(self.timeout * 1e9)
            arguments = (flags, self.step, self._stopped, abort, timed_out, limit)
            self._kernels.wait[(len(flags),)](*arguments, num_warps=1)

    def advance(self) -> None:
        """The step has ended: the next one begins."""
        self.step += 1
        self.begin(self.number + 1)

    def begin(self, number: int) -> None:
        """Let a step have this number on the host. Where a graph is replayed, the device counts by itself."""
        self.number = number
        self.sent.clear()
        self._travels.clear()
        self._held.clear()

    def arrived(self, channel: int) -> bool:
        """Whether `wait` would return at once. The host does not know: the device waits."""
        return True

    def abort(self) -> None:
        """End all waits on the device, now and later; may be called from any thread."""
        self._words[0] = 1

    def check(self) -> None:
        """Raise if a wait has ended without its message; call it once the step has ended on the device.

        Raises:
            RankError: a rank did not answer in time, or `abort` was called. The memory cannot be used any more.
        """
        if self._words[1]:
            raise RankError(
                None, f"rank {self.rank} waited {self.timeout:g} s on its GPU: another rank hangs or has ended"
            )
        if self._words[0]:
            raise RankError(None, f"rank {self.rank} was told to stop waiting")


class SymmetricChannel:
    """A channel through symmetric memory."""

    lends = True

    def __init__(self, memory: SymmetricMemory, index: int, spec: ChannelSpec) -> None:
        self.memory = memory
        self.index = index
        self.spec = spec
        rank, members, peers = spec.place(memory.rank), spec.members(memory.rank), memory.peers
        self._incoming: list[list[Tensor]] = []  #: by parity: the receive buffers
        self._parts: list[tuple[int, int, tuple[int, int] | None]] = []  #: exchange, destination, rows: what is sent
        self._targets: list[list[Tensor]] = []  #: by parity: where each part goes to
        for places in memory.places[index]:
            buffers = [
                [
                    receive_buffer(each, i, peers[r], start)
                    for each, start in zip(spec.exchanges, places[r], strict=True)
                ]
                for i, r in enumerate(members)
            ]
            landings = [
                (i, dst, rows, view)
                for dst, there in enumerate(buffers)
                for i, (each, buffer) in enumerate(zip(spec.exchanges, there, strict=True))
                for rows, view in comm.landings(each, dst, rank, buffer)
            ]
            self._incoming.append(buffers[rank])
            self._parts = [(i, dst, rows) for i, dst, rows, _ in landings]
            self._targets.append([view for *_, view in landings])

    def put(self, packed: Sequence[Payloads]) -> None:
        memory = self.memory
        memory.sent.add(self.index)
        with memory.sending(self.index, packed, last=self.spec.closing):
            if self._parts:
                memory.copy(self.index, memory.number % PARITIES, self._sources(packed), self._targets)
            memory.signal(self.index)

    def _sources(self, packed: Sequence[Payloads]) -> list[Tensor]:
        sources = []
        for i, dst, rows in self._parts:
            payload = packed[i][dst]
            assert payload is not None
            sources.append(payload if rows is None else payload.narrow(self._dim(i), *rows))
        return sources

    def _dim(self, i: int) -> int:
        exchange = self.spec.exchanges[i]
        assert isinstance(exchange, Fetch)
        return exchange.dim

    def ready(self) -> bool:
        return self.index not in self.memory.sent or self.memory.arrived(self.index)

    def get(self) -> list[Tensor]:
        memory = self.memory
        number = memory.number
        if self.index in memory.sent:
            memory.wait(self.index)
        else:  # it came before the last step ended
            number -= 1
        if self.spec.closing:
            memory.advance()
        return list(self._incoming[number % PARITIES])

    def close(self) -> None:
        self.memory.closed = True


def allocated(
    specs: Sequence[ChannelSpec], group: Any, board: Board, device: torch.device, number: int
) -> SymmetricMemory:
    """Allocate the memory of all ranks, which all call it.

    Args:
        group: a registered process group, or its name; used to exchange the addresses.
        number: counts these calls, the same on all ranks.

    Raises:
        OSError: the GPU of some rank has too little memory left.
        RankError: a rank failed or did not arrive.
        RuntimeError: a rank cannot map the memory of another.
    """
    import torch.distributed._symmetric_memory as symmetric

    size, _ = buffer_places(specs, board.world)
    advice = "run smaller inputs, more ranks or fewer guidance branches"
    problem = ""
    try:
        check_gpu(size, device, f"a context's messages of {board.world} ranks, with two places for each", advice)
        own = symmetric.empty(size, dtype=torch.uint8, device=device)
        own.zero_()
        torch.cuda.synchronize(device)
    except (OSError, RuntimeError) as error:  # the others would wait for this rank where nothing reads the board
        problem = str(error)
    for rank, text in enumerate(board.all_gather(f"symmetric/{number}", problem, "the other ranks to open a context")):
        if text:
            raise OSError(f"rank {rank}: {text}")
    handle = symmetric.rendezvous(own, group)
    peers = [own if r == board.rank else handle.get_buffer(r, (size,), torch.uint8) for r in range(board.world)]
    memory = SymmetricMemory(specs, peers, board.rank, board.timeout)
    memory.handle = handle
    handle.barrier()  # nobody writes before all have cleared their memory
    return memory


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
