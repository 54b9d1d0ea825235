"""Messages between the GPUs of one machine: each rank writes into memory of the others, also within CUDA graphs.

Every rank holds one allocation per context, which all ranks map (`torch.distributed._symmetric_memory`)::

    flags     int32 [ranks, channels]    the number of the last step whose message has come, by sender and channel
    messages  [channels, 2, ranks]       bytes, by channel, parity of the step, and sender

A step counts itself on the device. It puts at most one message on each of its channels; the message lies in the buffer
of the step's parity. `get` waits for the message of this step or of the step before. Nothing is ever in flight that a
later step would have to receive: a message that nobody reads is overwritten two steps later.

Two buffers are enough because each step ends with the closing channel (`ChannelSpec.closing`). A rank that begins step
t + 1 has then seen all others put their closing message of step t. So none of them still reads what it sent in step
t - 1: displaced steps read such messages before they put their last one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..ir.exchange import Payloads
from ..ir.step import ChannelSpec
from .board import Board
from .channels import assembled
from .errors import RankError
from .memory import check_gpu
from .messages import Message

ALIGNMENT = 256  #: bytes
PARITIES = 2


def message_places(specs: Sequence[ChannelSpec], world: int) -> tuple[int, list[list[list[int]]]]:
    """The size of a rank's memory, and where its messages begin, by channel, parity and sender: bytes.

    Every rank lays out its memory for the largest receiver, so that the places are the same everywhere.
    """
    total = _aligned(4 * world * len(specs))
    places: list[list[list[int]]] = []
    for spec in specs:
        others = [[dst for dst in range(world) if dst != src] for src in range(world)]
        sizes = [max(_aligned(Message(spec.exchanges, src, dst).size) for dst in others[src]) for src in range(world)]
        places.append([])
        for _ in range(PARITIES):
            places[-1].append([total + sum(sizes[:src]) for src in range(world)])
            total += sum(sizes)
    return total, places


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
        _, self.places = message_places(specs, self.world)
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
            readers = [dst for dst in others if Message(spec.exchanges, self.rank, dst).size]
            senders = [src for src in others if Message(spec.exchanges, src, self.rank).size]
            theirs = [flags[dst][self.rank, index].data_ptr() for dst in readers]
            mine = [self.flags[src, index].data_ptr() for src in senders]
            self._theirs.append(torch.tensor(theirs, dtype=torch.int64, device=self.device))
            self._mine.append(torch.tensor(mine, dtype=torch.int64, device=self.device))
        self._stream = torch.cuda.Stream(self.device, priority=-1)  #: carries messages beside the computation
        self._stopped = torch.zeros((), dtype=torch.int32, device=self.device)
        self._words = torch.zeros(2, dtype=torch.int32, pin_memory=True)  #: abort, timed out

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

    def signal(self, channel: int) -> None:
        """Tell the readers of a channel that this step's message has come."""
        flags = self._theirs[channel]
        if len(flags):
            self._kernels.signal[(len(flags),)](flags, self.step, self._stopped, num_warps=1)
        if channel in self._travels:
            self._travels[channel] = self._stream.record_event()

    def wait(self, channel: int, age: int) -> None:
        """Wait for the messages of this step (`age` 0) or of the step before (1)."""
        flags = self._mine[channel]
        if age == 0 and channel in self._travels:  # a device that runs one stream at a time would wait for ever
            torch.cuda.current_stream(self.device).wait_event(self._travels[channel])
        if len(flags):
            abort, timed_out = (self._words.data_ptr() + 4 * i for i in range(2))
            limit = int(self.timeout * 1e9)
            arguments = (flags, self.step, age, self._stopped, abort, timed_out, limit)
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

    def arrived(self, channel: int, age: int) -> bool:
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

    def __init__(self, memory: SymmetricMemory, index: int, spec: ChannelSpec) -> None:
        self.memory = memory
        self.index = index
        self.spec = spec
        rank, world, places = memory.rank, memory.world, memory.places[index]
        nothing: Payloads = [None] * len(spec.exchanges)
        self._outgoing: list[list[tuple[int, int, Tensor]]] = []  #: by parity: (exchange, destination, where to)
        self._incoming: list[list[Payloads]] = []  #: by parity and source
        for starts in places:
            self._outgoing.append(
                [
                    (i, dst, view)
                    for dst in range(world)
                    if dst != rank
                    for i, view in enumerate(Message(spec.exchanges, rank, dst).read(memory.peers[dst], starts[rank]))
                    if view is not None
                ]
            )
            own = memory.peers[rank]
            self._incoming.append(
                [
                    nothing if src == rank else Message(spec.exchanges, src, rank).read(own, starts[src])
                    for src in range(world)
                ]
            )

    def put(self, packed: Sequence[Payloads]) -> None:
        memory = self.memory
        memory.sent.add(self.index)
        outgoing = self._outgoing[memory.number % PARITIES]
        with memory.sending(self.index, packed, last=self.spec.closing):
            if outgoing:
                payloads = [packed[i][dst] for i, dst, _ in outgoing]
                torch._foreach_copy_([view for _, _, view in outgoing], payloads)  # type: ignore[arg-type]
            memory.signal(self.index)

    def ready(self) -> bool:
        return self.memory.arrived(self.index, self._age())

    def get(self) -> list[Tensor]:
        memory, age = self.memory, self._age()
        memory.wait(self.index, age)
        incoming = self._incoming[(memory.number - age) % PARITIES]
        received = assembled(self.spec, memory.rank, incoming, memory.device)
        if self.spec.closing:
            memory.advance()
        return received

    def _age(self) -> int:
        """How many steps ago the message that a `get` returns was put."""
        return 0 if self.index in self.memory.sent else 1

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

    size, _ = message_places(specs, board.world)
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
