"""Every rank runs the user's script (torchrun, or an initialised process group) and its own part of the plan."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ir.program import specialize
from .agreement import Watch, agree
from .board import Board
from .collectives import Collectives, Sessions
from .errors import DisagreementError, RankError
from .executor import Bound, PlanLike, Report, Step, device_of
from .interpreter import RankProgram
from .runner import Runner

_created = 0  # executors made by this process; all ranks make theirs in the same order


def inside() -> bool:
    """Whether this process is one of several: an initialised process group, or torchrun's environment."""
    return dist.is_available() and (dist.is_initialized() or {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys())


def size_of_world(group: Any = None) -> int:
    """How many ranks there are, given `inside()`."""
    return dist.get_world_size(group) if dist.is_initialized() else int(os.environ["WORLD_SIZE"])


class DistributedExecutor:
    """One rank of `group` (default: all processes).

    Initialises the default process group from torchrun's environment if nobody has: gloo for models on the CPU, NCCL
    on CUDA. The exchanges have a group of their own, whose timeout is `timeout` seconds.

    Raises:
        ValueError: the group has another size than the plan.
    """

    def __init__(
        self,
        world_size: int,
        *,
        group: Any = None,
        timeout: float = 600.0,
        compile: bool = False,  # noqa: A002
    ) -> None:
        if not inside():
            raise RuntimeError(
                "executor='distributed' needs torchrun or an initialised process group; "
                f"start the script with `torchrun --nproc-per-node {world_size} …`, or use executor='spawn'"
            )
        if size_of_world(group) != world_size:
            raise ValueError(
                f"world_size is {world_size}, but the process group has {size_of_world(group)} ranks; "
                "leave world_size out, or start as many processes"
            )
        global _created
        _created += 1
        self.world_size = world_size
        self.timeout = timeout
        self.compile = compile
        self._number = _created
        self._group = group
        self._board: Board | None = None
        self._links: Collectives | None = None
        self._plans = 0
        self._calls = 0
        self._broken: str | None = None

    @property
    def traffic(self) -> Counter[str]:
        return self._links.traffic if self._links else Counter()

    def load(self, plan: PlanLike, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> DistributedPlan:
        """Connect at the first plan, compare the ranks at every one."""
        device = device_of(inputs)
        board = self._met(device)
        self._plans += 1
        agree(board, self._plans, plan, weights, inputs)
        if self._links is None:
            self._links = Collectives(*self._connected(device, board), board)
        code = RankProgram.of(specialize(plan.graph, board.rank), board.rank)
        sessions = Sessions(self._links, code.sites, device)
        watch = Watch(self._links, plan.program.input_paths, inputs, device)
        return DistributedPlan(self, self._links, Bound.of(code, plan.program, device), sessions, watch)

    def begin(self) -> None:
        self._calls += 1
        if self._board:
            self._board.call = self._calls
        if self._broken:
            raise RuntimeError(f"the ranks lost step in an earlier call and cannot go on: {self._broken}")

    def failed(self, error: BaseException) -> None:
        """Also what this rank learned of another is told: not every rank waits for the one that is gone."""
        if self._board and not isinstance(error, DisagreementError):
            self._board.publish(error)

    @property
    def broken(self) -> bool:
        """Whether other ranks may be in the middle of a call."""
        return self._broken is not None

    def broke(self, error: BaseException) -> None:
        """A call failed between its first and its last exchange: what other ranks have in flight is unknown."""
        said = str(error).strip().splitlines() or [type(error).__name__]  # another rank's comes with its traceback
        self._broken = " … ".join([said[0], said[-1]] if len(said) > 1 else said)

    def close(self) -> None:
        self._links = None
        if self._board:
            self._board.doubt = None
        self._broken = self._broken or "it was closed"

    def _met(self, device: torch.device) -> Board:
        """The board that all ranks share, once there is a process group."""
        if self._board is None:
            if not dist.is_initialized():
                backend = "nccl" if device.type == "cuda" else "gloo"
                dist.init_process_group(backend, timeout=timedelta(seconds=self.timeout))
            ranks = dist.get_process_group_ranks(self._group or dist.group.WORLD)
            store = dist.distributed_c10d._get_default_store()
            name = f"fxpass/{self._number}/{'.'.join(map(str, ranks))}"
            rank = dist.get_rank(self._group)
            self._board = Board(dist.PrefixStore(name, store), rank, self.world_size, self.timeout)
            self._board.call = self._calls
        return self._board

    def _connected(self, device: torch.device, board: Board) -> tuple[Any, Any, bool]:
        """Process groups of our own, made when all ranks are known to be there: for what the next step needs, and for
        what every step awaits; whether their waits block the host.

        They are not registered with `torch.distributed`, whose group names count what each process has made.
        """
        timeout = timedelta(seconds=self.timeout)
        stores = [dist.PrefixStore(name, board.store) for name in ("group", "urgent")]
        if device.type == "cuda" and "nccl" in str(dist.get_backend_config(self._group)):
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            # one alone: kernels of two communicators may wait for each other where their order differs between ranks
            group = dist.ProcessGroupNCCL(stores[0], board.rank, board.world, options)
            return group, group, False
        group, urgent = (dist.ProcessGroupGloo(store, board.rank, board.world, timeout) for store in stores)
        return group, urgent, True


class DistributedPlan:
    """This rank's program of a plan."""

    def __init__(
        self, executor: DistributedExecutor, links: Collectives, bound: Bound, sessions: Sessions, watch: Watch
    ) -> None:
        self.watch = watch
        self.executor = executor
        self.links = links
        self.bound = bound
        self.sessions = sessions
        self.runner = Runner(bound.code, executor.compile)

    def run(self, weights: Sequence[Tensor], inputs: Sequence[Tensor], step: Step) -> list[Tensor]:
        """The flat outputs, the same on every rank.

        Raises:
            RankError: another rank failed, left, or did not answer in time.
            DisagreementError: at the last call, or at this one, some rank was given other inputs than the others.
        """
        try:
            self.watch.call(inputs, step)
        except DisagreementError:  # nothing of this call is under way
            raise
        except BaseException as error:
            self.executor.broke(error)
            raise
        try:
            return self.runner.run(self.bound.values(weights, inputs), self.sessions.at(step), step)
        except BaseException as error:
            self.executor.broke(error)
            raise

    @property
    def compiled(self) -> Sequence[Report]:
        return self.runner.reports

    def release(self) -> None:
        if self.executor.broken:
            return
        try:
            self.watch.close()
            self.sessions.close()
        except RankError as error:
            self.executor.broke(error)
