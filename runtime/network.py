"""One process's connection to the others: opens channels, through memory that all ranks map, else by a group."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..ir.mesh import Placement
from ..ir.step import ChannelSpec
from . import processes, symmetric_memory
from .board import POLL, Board
from .channels import Channel, ProcessChannel, RankChannel
from .errors import RankError
from .messages import partners
from .process_group import GroupChannel, abandon, broadcast, finish
from .shared_memory import DISABLE, OPENING, open_channels
from .symmetric_memory import SymmetricChannel, SymmetricMemory

SPIN = 2e-4  #: seconds for which the end of a step on the device is polled without a pause
PAUSE = 5e-5  #: seconds between two looks after that
OVERLAP = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"  #: environment variable of torch: several ranks on one GPU


class Network:
    """One rank's connection to the others.

    Args:
        group: a `ProcessGroup` of `torch.distributed`, or one of its backends.
        urgent: another one, for what a step awaits. A group works off its messages in turn: in one group, the output of
            a step would wait for all that only the next step needs.
        blocking: the groups move host memory and their `wait` blocks the host (gloo).
        connect: makes a group of some of the ranks, which all of these call, in one order; its name is "group" or
            "urgent". None: channels of some of the ranks go through a group of all.
        rendezvous: gives a process group of the same ranks that torch knows while its context lasts: GPUs of one
            machine map each other's memory through it.
    """

    def __init__(
        self,
        group: Any,
        urgent: Any,
        blocking: bool,
        board: Board,
        rendezvous: Callable[[], AbstractContextManager[Any]] | None = None,
        connect: Callable[[str, Sequence[int]], Any] | None = None,
    ) -> None:
        self.group = group
        self.urgent = urgent
        self.blocking = blocking
        self.board = board
        self._rendezvous = rendezvous
        self._connect = connect
        self._parts: dict[tuple[str, tuple[int, ...]], Any] = {}  #: groups of some of the ranks, by name and ranks
        self._opened = 0
        self._maps: bool | None = None  #: whether all GPUs can map each other's memory; None if nobody has looked
        self._memories: list[SymmetricMemory] = []

    def open(
        self, specs: Sequence[ChannelSpec], device: torch.device, placement: Placement | None = None
    ) -> list[Sequence[Channel]]:
        """Open channels for values on `device`. All processes call it, for the same channels in the same order.

        Args:
            placement: which process runs which ranks; None: each runs one.

        Returns:
            The ends of each rank of this process.

        Raises:
            OSError: the machine has too little memory left for the messages.
            RankError: a rank failed or did not come.
            RuntimeError: the messages of stages would have to go from GPU to GPU.
        """
        if not self.blocking and any(each.axis and not each.axis.of_all for spec in specs for each in spec.exchanges):
            raise RuntimeError(
                "stages exchange messages through the memory of the host only, not from GPU to GPU yet: run the model "
                "on the CPU, or give patches instead of stages"
            )
        self._opened += 1
        board = self.board
        placement = placement or Placement.one_each(board.world)
        between: Sequence[ProcessChannel | None] | None = None
        if device.type == "cpu":
            between = open_channels(specs, board, self._opened, placement)
        if between is None and self.maps(specs, device, placement):
            assert self._rendezvous is not None
            # later calls write to it, also outside inference mode
            with torch.inference_mode(False), self._rendezvous() as group:
                memory = symmetric_memory.allocated(specs, group, board, device, self._opened)
            self._memories = [each for each in self._memories if not each.closed] + [memory]
            return [[SymmetricChannel(memory, i, spec) for i, spec in enumerate(specs)]]
        if between is None:
            between = [
                GroupChannel(spec, *self._group_of(spec, placement), device, self.blocking, board, placement)
                if len(partners(spec, placement, board.rank)) > 1
                else None
                for spec in specs
            ]
        own = placement.ranks(board.rank)
        ends = [RankChannel.of_ranks(spec, own, device, each) for spec, each in zip(specs, between, strict=True)]
        return [[of_ranks[i] for of_ranks in ends] for i in range(len(own))]

    def maps(self, specs: Sequence[ChannelSpec], device: torch.device, placement: Placement) -> bool:
        """Whether these channels go through memory that all GPUs map. All ranks call it in the same order."""
        if device.type != "cuda" or self._rendezvous is None or not any(spec.closing for spec in specs):
            return False
        if placement.several:  # a process would have to tell ranks of its own from others
            return False
        if self._maps is None:
            cards = gpu_cards(self.board, device)
            votes = self.board.all_gather("gpus/vote", json.dumps(_can_map(cards, device)), OPENING)
            self._maps = all(map(json.loads, votes))
        return self._maps

    def broadcast(self, tensor: Tensor, device: torch.device, what: str) -> None:
        """Give all ranks the bytes [n] that rank 0 has, in place. They may lie on the host or on `device`.

        Raises:
            RankError: a rank failed or did not come.
        """
        if not tensor.numel():
            return
        there = torch.device("cpu") if self.blocking else device
        moved = tensor.to(there)
        work = broadcast(self.urgent, moved)
        if self.blocking:
            finish(work, self.board, what)
        else:
            work.wait()  # orders the streams
        if moved is not tensor:
            tensor.copy_(moved)

    def settle(self, device: torch.device) -> None:
        """Wait until the device has done all that it was given, and look at the board meanwhile.

        Raises:
            RankError: another rank failed, or the device waited too long for one.
        """
        if device.type != "cuda":
            return
        ended = torch.cuda.Event()
        ended.record(torch.cuda.current_stream(device))
        began = looked = time.monotonic()
        while not ended.query():
            now = time.monotonic()
            if now - began > SPIN:
                time.sleep(PAUSE)
            if now - looked > POLL:
                looked = now
                try:
                    self.board.check()
                except RankError as error:
                    self.abort(error)
                    raise
        for memory in self._memories:
            memory.check()

    def abort(self, error: BaseException) -> None:
        """End all waits for other ranks. Gloo cannot."""
        for memory in self._memories:
            memory.abort()
        for group in {self.group, self.urgent, *self._parts.values()}:
            if not self.blocking:
                group.abort()
            else:
                abandon(group, error)

    def _group_of(self, spec: ChannelSpec, placement: Placement) -> tuple[Any, Sequence[int]]:
        """The group of a channel and its members: an urgent one for what is never stale, also in displaced steps."""
        name = "urgent" if spec.exchanges[0].fresh == "sync" else "group"
        members = partners(spec, placement, self.board.rank)
        if self._connect is None or len(members) == self.board.world:
            return (self.urgent if name == "urgent" else self.group), range(self.board.world)
        # no rank waits for another one in vain: where one needs a new group of its line, so do all ranks of theirs
        if (name, members) not in self._parts:
            self._parts[name, members] = self._connect(name, members)
        return self._parts[name, members], members


def gpu_cards(board: Board, device: torch.device) -> list[tuple[str, int, str]]:
    """Of each rank: its machine, empty if it is not known; the number that it gives its GPU, and the GPU's identity.

    All ranks call it.
    """
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    card = json.dumps([processes.card().partition("|")[0], device.index or 0, uuid])
    return [tuple(json.loads(each)) for each in board.all_gather("gpus/card", card, OPENING)]


def one_gpu_for_two(cards: Sequence[tuple[str, int, str]]) -> str:
    """Which ranks share a GPU, and what to do; empty if none do."""
    first: dict[str, int] = {}
    for rank, (_, number, uuid) in enumerate(cards):
        other = first.setdefault(uuid, rank)
        if other != rank:
            return (
                f"ranks {other} and {rank} both have their model on one GPU (cuda:{number}); give each process one of "
                'its own before the model is made: torch.cuda.set_device(int(os.environ["LOCAL_RANK"])), .to("cuda")'
            )
    return ""


def _can_map(cards: Sequence[tuple[str, int, str]], device: torch.device) -> bool:
    """Whether this rank's GPU can map the memory of all others.

    Args:
        cards: as `gpu_cards` returns them. Ranks must number their GPUs apart: torch refuses equal numbers.
    """
    machines, devices, _ = zip(*cards, strict=True)
    if os.environ.get(DISABLE, "0") != "0" or not machines[0] or len(set(machines)) > 1:
        return False
    if len(set(devices)) < len(devices):
        return os.environ.get(OVERLAP) == "1"
    own = device.index or 0
    return all(torch.cuda.can_device_access_peer(own, other) for other in devices if other != own)
