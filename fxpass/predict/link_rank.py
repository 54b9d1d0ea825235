"""One rank of the measurement of a link: `python -m fxpass.predict.link_rank PORT RANK WORLD`.

The ranks exchange small and large values through the runtime's own channels: the messages, copies and waits are those
of a step. Messages that a step awaits go one by one. The ranks compute before each, as in a step: that fills the caches
and lets the threads that carry messages sleep, after which a small message takes several times as long as one that
follows another. Messages for the next step go several at a time, and can fill a link that one alone does not fill;
what a step awaits meanwhile takes longer.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch

from ..ir.fetch import Fetch
from ..ir.layout import even, full
from ..ir.step import ChannelSpec
from ..runtime.channels import Channel
from ..runtime.network import Network
from ..runtime.shared_memory import MemoryChannel
from .ranks import join, leave

SIZES = (1 << 10, 1 << 24)  #: bytes of each rank's part
TURNS = (200, 12)  #: exchanges of each size that are timed
UNTIMED = 3  #: exchanges before these
LATE_SIZES = (1 << 10, 1 << 22)  #: bytes of each rank's part in messages for the next step: keys and values of a layer
LATE_TURNS = (100, 6)  #: how many times such a message is put on each channel
BUSY_TURNS = 3  #: how many times such a message is put on each channel while small ones are awaited
BUSY_EXCHANGES = 6  #: small ones each time
LATE_CHANNELS = 6  #: channels that have a message on its way at the same time
WORK = 512  #: rows and columns of the matrices that are multiplied before each exchange
TIMEOUT = 60.0  #: seconds


@dataclass(frozen=True)
class Measured:
    """What exchanges of `SIZES` took on one rank.

    Attributes:
        shared: whether the ranks share memory.
        seconds: of a put and its get, for each size: the mean, for a step has slow ones as well.
        late: seconds in which one message for the next step follows another, for each of `LATE_SIZES`.
        busy: as `seconds`, of the smaller size, while messages for the next step are on their way.
        cores: processor seconds of this process's other threads in one exchange, for each size: the mean.
    """

    shared: bool
    seconds: tuple[float, float]
    late: tuple[float, float]
    busy: float
    cores: tuple[float, float]


def main(port: int, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    store, network = join(port, rank, world, TIMEOUT)
    leave(store, network, json.dumps(asdict(measured(network))))


def measured(network: Network) -> Measured:
    """Called by each rank: exchange values with all others."""
    rank, world = network.board.rank, network.board.world
    exchanges = [_gather(world, size) for size in SIZES]
    late = [_late(world, size) for size in LATE_SIZES for _ in range(LATE_CHANNELS)]
    specs = [ChannelSpec(f"exchange_{i}", "", (each,), False) for i, each in enumerate(exchanges)]
    specs += [ChannelSpec(f"late_{i}", "", (each,), True) for i, each in enumerate(late)]
    (channels,) = network.open(specs, torch.device("cpu"))
    found = [
        _exchange(channel, exchange, rank, turns)
        for channel, exchange, turns in zip(channels[: len(SIZES)], exchanges, TURNS, strict=True)
    ]
    (small, small_cores), (large, large_cores) = found
    between = getattr(channels[0], "between", None)
    apart = len(SIZES) + LATE_CHANNELS
    several = channels[len(SIZES) : apart], channels[apart:]
    little, much = (
        _follow(each, _late(world, size), rank, turns)
        for each, size, turns in zip(several, LATE_SIZES, LATE_TURNS, strict=True)
    )
    busy = _meanwhile(channels[0], exchanges[0], channels[apart:], late[-1], rank)
    shared = isinstance(between, MemoryChannel)
    return Measured(shared, (small, large), (little, much), busy or small, (small_cores, large_cores))


def _late(world: int, size: int) -> Fetch:
    return replace(_gather(world, size), fresh="stale")


def _gather(world: int, size: int) -> Fetch:
    rows, width = 16 * world, size // 64
    return Fetch(
        "output", (1, rows, width), torch.float32, world, dim=1, have=even(rows, world), want=full(rows, world)
    )


def _exchange(channel: Channel, exchange: Fetch, rank: int, turns: int) -> tuple[float, float]:
    """The seconds of a put and its get, and the processor seconds of other threads meanwhile."""
    matrix = torch.ones(WORK, WORK)
    x = torch.ones(1, len(exchange.have[rank]), exchange.shape[2])
    packed = exchange.pack(rank, x)
    taken = []
    cores = 0.0
    for turn in range(turns + UNTIMED):
        if turn == UNTIMED:
            cores = _other_threads()
        torch.mm(matrix, matrix)
        began = time.perf_counter()
        channel.put([packed])
        channel.get()
        taken.append(time.perf_counter() - began)
    return statistics.mean(taken[UNTIMED:]), (_other_threads() - cores) / turns


def _follow(channels: Sequence[Channel], exchange: Fetch, rank: int, turns: int) -> float:
    """The seconds in which one message follows another, while all channels have one on its way."""
    packed = exchange.pack(rank, torch.ones(1, len(exchange.have[rank]), exchange.shape[2]))
    for turn in range(turns + 1):
        if turn == 1:
            began = time.perf_counter()
        for channel in channels:
            channel.put([packed])  # waits for the message before
    taken = time.perf_counter() - began
    for channel in channels:
        channel.close()
    return taken / (turns * len(channels))


def _meanwhile(channel: Channel, exchange: Fetch, others: Sequence[Channel], late: Fetch, rank: int) -> float:
    """The seconds of a put and its get while other channels have a message on its way; 0 if it never ended earlier."""
    matrix = torch.ones(WORK, WORK)
    packed, large = (each.pack(rank, torch.ones(1, len(each.have[rank]), each.shape[2])) for each in (exchange, late))
    taken = []
    for _ in range(BUSY_TURNS):
        for each in others:
            each.put([large])
        for _ in range(BUSY_EXCHANGES):
            torch.mm(matrix, matrix)
            began = time.perf_counter()
            channel.put([packed])
            channel.get()
            ended = time.perf_counter()
            if not all(each.ready() for each in others):
                taken.append(ended - began)
        for each in others:
            each.close()
    return statistics.mean(taken) if taken else 0.0


def _other_threads() -> float:
    """Processor seconds of this process so far, but for the calling thread."""
    return time.process_time() - time.thread_time()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
