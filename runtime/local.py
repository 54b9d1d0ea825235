"""The process groups of processes on one machine that belong together."""

from __future__ import annotations

from datetime import timedelta

from torch.distributed import PrefixStore, ProcessGroupGloo, Store

from .board import Board
from .network import Network

HOST = "127.0.0.1"


def connect(store: Store, board: Board) -> Network:
    """Make gloo groups between the ranks of `board` on this machine. The default process group is left to the user.

    Raises:
        RankError: a rank failed or did not come.
    """
    options = ProcessGroupGloo._Options()
    options._devices = [ProcessGroupGloo.create_device(hostname=HOST)]
    options._timeout = timedelta(seconds=board.timeout)

    def group(name: str) -> ProcessGroupGloo:
        return board.watched(lambda: ProcessGroupGloo(PrefixStore(name, store), board.rank, board.world, options))

    return Network(group("group"), group("urgent"), True, board)
