"""Messages between the GPUs of one machine: each rank writes into memory of the others, also within CUDA graphs.

Every rank holds one allocation that all ranks map (`torch.distributed._symmetric_memory`)::

    flags     int32 [ranks, channels]    the number of the last step whose message has come, by sender and channel
    messages  [channels, 2, ranks]       bytes, by channel, parity of the step, and sender

A step counts itself on the device. It puts one message on each of its channels; the message lies in the buffer of the
step's parity. `get` waits for the message of this step (exact) or of the step before (displaced) and returns it in
place. Nothing is ever in flight that a later step would have to receive: a message that nobody reads is overwritten two
steps later.

Two buffers are enough if each step ends with a channel that every rank puts and gets (the outputs). A rank that begins
step t + 1 has then seen all others end step t, so that none of them still reads what it sent in step t - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import RankError

ALIGNMENT = 256  #: bytes
PARITIES = 2


class SymmetricMemory:
    """One rank's end of all channels.

    Args:
        sizes: for each channel, the bytes that rank `src` sends to rank `dst`: `sizes[channel][dst][src]`.
        group: the name of a process group, or the group; used to exchange the addresses.
        timeout: seconds that a wait may take on the device.

    All methods but the constructor, `check`, `abort` and `close` can be captured in a CUDA graph.
    """

    def __init__(
        self, sizes: Sequence[Sequence[Sequence[int]]], group: Any, rank: int, device: torch.device, timeout: float
    ) -> None:
        import torch.distributed._symmetric_memory as symmetric

        from . import symmetric_kernels

        self.rank = rank
        self.world = len(sizes[0]) if sizes else 1
        self.timeout = timeout
        self._sizes = sizes
        self._kernels: Any = symmetric_kernels
        flags = self.world * len(sizes) * 4
        starts, total = [], _aligned(flags)
        for channel in sizes:  # every rank lays out its own memory for the largest receiver, so that offsets agree
            largest = [_aligned(max(row[src] for row in channel)) for src in range(self.world)]
            offsets = [[total + p * sum(largest) + sum(largest[:src]) for src in range(self.world)] for p in (0, 1)]
            starts.append(offsets)
            total += PARITIES * sum(largest)
        self._starts: list[list[list[int]]] = starts
        self.bytes = total  #: that each rank allocates
        self._own = symmetric.empty(total, dtype=torch.uint8, device=device)
        self._own.zero_()
        torch.cuda.synchronize(device)
        self._handle = symmetric.rendezvous(self._own, group)
        self._peers = [self._handle.get_buffer(dst, (total,), torch.uint8) for dst in range(self.world)]
        self._flags = self._own[:flags].view(torch.int32)
        row = rank * len(sizes) * 4
        addresses = [peer.data_ptr() + row for peer in self._peers]
        self._rows = torch.tensor(addresses, dtype=torch.int64, device=device)
        self.step = torch.zeros((), dtype=torch.int32, device=device)
        self._stopped = torch.zeros((), dtype=torch.int32, device=device)
        self._words = torch.zeros(2, dtype=torch.int32, pin_memory=True)  #: abort, timed out
        self._handle.barrier()  # nobody writes before all have cleared their memory

    def begin(self) -> None:
        """Begin the next step."""
        self.step += 1

    def put(self, channel: int, parity: int, messages: Sequence[Tensor | None]) -> None:
        """Send this step's message to each rank: bytes (uint8), by destination; None where there is nothing to send.

        Args:
            parity: of the number of this step.
        """
        start = self._starts[channel][parity][self.rank]
        for dst, message in enumerate(messages):
            if message is not None and dst != self.rank:
                self._peers[dst][start : start + message.numel()].copy_(message)
        self._kernels.signal[(self.world,)](self._rows, channel, self.step, num_warps=1)

    def get(self, channel: int, parity: int, age: int = 0) -> list[Tensor | None]:
        """Wait for the messages of this step (`age` 0) or of the step before (1): bytes, by sender, in place.

        They stay as they are until this rank has ended the step after the one that they belong to.
        """
        abort, timed_out = (self._words.data_ptr() + 4 * i for i in range(2))
        self._kernels.wait[(self.world,)](
            self._flags,
            channel,
            len(self._sizes),
            self.step,
            age,
            self._stopped,
            abort,
            timed_out,
            int(self.timeout * 1e9),
            num_warps=1,
        )
        sizes, starts = self._sizes[channel][self.rank], self._starts[channel][(parity + age) % PARITIES]
        return [
            self._own[starts[src] : starts[src] + sizes[src]] if src != self.rank and sizes[src] else None
            for src in range(self.world)
        ]

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

    def close(self) -> None:
        """Give the memory back. CUDA graphs that use it must be gone."""
        self._peers, self._handle = [], None


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
