"""Connect the ranks: which process groups carry their messages is decided here, for all executors.

On the CPU, and where two ranks share a GPU, it is gloo; else NCCL. GPUs that can map each other's memory exchange
messages through it (`symmetric_memory.py`), for which torch needs a registered process group (`rendezvous.py`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroupGloo

from .board import Board
from .network import Network, gpu_cards, one_gpu_for_two
from .rendezvous import local_group

HOST = "127.0.0.1"
#: threads of a gloo group whose messages are for the next step; each carries one. With gloo's own two, a message of a
#: few bytes waits for large ones, and meanwhile the link is idle.
IN_FLIGHT = 64


def connect(
    board: Board, device: torch.device, *, nccl: bool = False, local: bool = False, registered: Any = None
) -> Network:
    """Connect the ranks of `board`, which all call it. The default process group is left to the user.

    Args:
        device: of this rank's messages.
        nccl: use NCCL between GPUs.
        local: the ranks are processes of this machine that nobody else connects: gloo listens on the loopback interface
            alone, two of them may share a GPU, and they make a process group for the memory that GPUs map.
        registered: that process group otherwise.

    Raises:
        RankError: a rank failed or did not arrive.
        RuntimeError: two ranks have their model on one GPU, which NCCL refuses.
    """
    shared = one_gpu_for_two(gpu_cards(board, device)) if device.type == "cuda" and nccl else ""
    if shared and not local:
        raise RuntimeError(shared)
    blocking = device.type != "cuda" or not nccl or bool(shared)

    def gloo(name: str, ranks: Sequence[int]) -> ProcessGroupGloo:
        return _gloo(board, name, ranks, local, IN_FLIGHT if name == "group" else 2)

    if blocking:
        group, urgent = (gloo(name, range(board.world)) for name in ("group", "urgent"))
    else:
        options: Any = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=board.timeout)
        # one group only: kernels of two communicators can deadlock if ranks launch them in different orders
        group = urgent = dist.ProcessGroupNCCL(PrefixStore("group", board.store), board.rank, board.world, options)
    rendezvous = local_group(board, group) if local else lambda: nullcontext(registered)
    return Network(group, urgent, blocking, board, rendezvous, gloo if blocking else None)


def host_group(board: Board) -> ProcessGroupGloo:
    """A group of all ranks for host memory, whatever device their models are on. All ranks make it."""
    return _gloo(board, "host", range(board.world), local=False)


def _gloo(board: Board, name: str, ranks: Sequence[int], local: bool, threads: int = 2) -> ProcessGroupGloo:
    """A group of some of the ranks, which all of these make.

    Args:
        threads: which carry messages.
    """
    store = PrefixStore(f"{name}/{'.'.join(map(str, ranks))}", board.store)
    options = ProcessGroupGloo._Options()
    options._devices = [ProcessGroupGloo.create_device(hostname=HOST)] if local else _devices()
    options._timeout = timedelta(seconds=board.timeout)
    options._threads = threads
    return board.watched(lambda: ProcessGroupGloo(store, ranks.index(board.rank), len(ranks), options))


def _devices() -> list[Any]:
    """The network interfaces that torch would choose: those that `GLOO_SOCKET_IFNAME` lists, or the default one."""
    names = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if not names:
        return [ProcessGroupGloo.create_default_device()]
    return [ProcessGroupGloo.create_device(interface=each) for each in names.split(",")]
