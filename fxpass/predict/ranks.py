"""Start processes of this machine that measure together."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
from torch.distributed import PrefixStore, Store, TCPStore

from ..runtime.board import Board
from ..runtime.groups import HOST, connect
from ..runtime.network import Network


def run_ranks(
    module: str, arguments: Sequence[str], world: int, timeout: float, variables: Mapping[str, str] | None = None
) -> list[str]:
    """Run `python -m module PORT RANK WORLD *arguments` for each rank; returns what each gives to `leave`.

    Args:
        timeout: in seconds, for all of them together.
        variables: of their environment, beside that of this process.

    Raises:
        RuntimeError: a rank has failed; its error is on standard error.
        TimeoutError: a rank has not ended in time.
    """
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **(variables or {})}
    command = [sys.executable, "-P", "-m", module, str(store.port)]
    ranks: list[subprocess.Popen[bytes]] = []
    end = time.monotonic() + timeout
    try:
        for rank in range(world):
            call = [*command, str(rank), str(world), *arguments]
            ranks.append(subprocess.Popen(call, env=environment, process_group=0))  # Ctrl-C ends them through this one
        while any(each.poll() is None for each in ranks) and not any(each.poll() for each in ranks):
            if time.monotonic() > end:
                raise TimeoutError(f"{module}: the ranks have not ended within {timeout:.0f} s")
            time.sleep(0.02)
        failed = [rank for rank, each in enumerate(ranks) if each.poll()]
    finally:
        for each in ranks:
            each.kill()
            each.wait()
    if failed:
        raise RuntimeError(f"{module}: rank {failed[0]} has failed; its error is above")
    return [store.get(f"result/{rank}").decode() for rank in range(world)]


def join(port: int, rank: int, world: int, timeout: float) -> tuple[Store, Network]:
    """Called by each rank: the channels between all of them."""
    store = TCPStore(HOST, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout))
    board = Board(PrefixStore("ranks", store), rank, world, timeout)
    return store, connect(board, torch.device("cpu"), local=True)


def leave(store: Store, network: Network, result: str) -> None:
    """Called by each rank at its end: hand over the result, and wait until the others need this rank no longer."""
    board = network.board
    store.set(f"result/{board.rank}", result)
    board.set(f"done/{board.rank}", "")
    for other in range(board.world):
        board.read(f"done/{other}", "the other ranks to end")
