"""The process groups of processes on one machine that belong together."""

from __future__ import annotations

from datetime import timedelta

from torch.distributed import PrefixStore, ProcessGroupGloo, Store

from .board import Board
from .collectives import Collectives

HOST = "127.0.0.1"


def connect(store: Store, rank: int, world: int, timeout: float) -> Collectives:
    """Gloo groups of their own on this machine; the default process group is left to the user."""
    options = ProcessGroupGloo._Options()
    options._devices = [ProcessGroupGloo.create_device(hostname=HOST)]
    options._timeout = timedelta(seconds=timeout)
    group, urgent = (ProcessGroupGloo(PrefixStore(name, store), rank, world, options) for name in ("group", "urgent"))
    return Collectives(group, urgent, True, Board(PrefixStore("board", store), rank, world, timeout))
