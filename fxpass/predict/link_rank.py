"""One rank of the measurement of a link: `python -m fxpass.predict.link_rank PORT RANK WORLD`.

The ranks exchange a small and a large value through the runtime's own channels: the messages, copies and waits are
those of a step.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch

from ..ir.fetch import Fetch
from ..ir.layout import even, full
from ..ir.step import ChannelSpec
from ..runtime.channels import Channel
from ..runtime.shared_memory import MemoryChannel
from .ranks import join, leave

SIZES = (1 << 10, 1 << 24)  #: bytes of each rank's part
TURNS = (200, 12)  #: exchanges of each size that are timed
TIMEOUT = 60.0  #: seconds


def main(port: int, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    store, network = join(port, rank, world, TIMEOUT)
    exchanges = [_gather(world, size) for size in SIZES]
    specs = [ChannelSpec(f"exchange_{i}", "", (each,), False) for i, each in enumerate(exchanges)]
    channels = network.open(specs, torch.device("cpu"))
    found = [
        _seconds(channel, exchange, rank, turns)
        for channel, exchange, turns in zip(channels, exchanges, TURNS, strict=True)
    ]
    leave(store, network, json.dumps({"shared": isinstance(channels[0], MemoryChannel), "seconds": found}))


def _gather(world: int, size: int) -> Fetch:
    rows, width = 16 * world, size // 64
    return Fetch(
        "output", (1, rows, width), torch.float32, world, dim=1, have=even(rows, world), want=full(rows, world)
    )


def _seconds(channel: Channel, exchange: Fetch, rank: int, turns: int) -> float:
    """The median time of a put and its get."""
    x = torch.ones(1, len(exchange.have[rank]), exchange.shape[2])
    packed = exchange.pack(rank, x)
    taken = []
    for turn in range(turns + 3):
        began = time.perf_counter()
        channel.put([packed])
        channel.get()
        if turn >= 3:
            taken.append(time.perf_counter() - began)
    return statistics.median(taken)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
