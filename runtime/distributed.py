"""Every rank runs the user's script (torchrun, or an initialised process group) and its own part of the plan."""

from __future__ import annotations

import os
import threading
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

_made: Counter[tuple[int, ...]] = Counter()  # executors of this process by their ranks; all of these make them in order
_making = threading.Lock()


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
        ranks = (
            tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
            if dist.is_initialized()
            else tuple(range(world_size))
        )
        with _making:
            _made[ranks] += 1
            self._name = f"fxpass/{'.'.join(map(str, ranks))}/{_made[ranks]}"
        self.world_size = world_size
        self.timeout = timeout
        self.compile = compile
        self._group = group
        self._board: Board | None = None
        self._links: Collectives | None = None
        self._plans = 0
        self._calls = 0
        self.ended: str | None = None  #: why this rank can make no further call

    @property
    def traffic(self) -> Counter[str]:
        return self._links.traffic if self._links else Counter()

    def load(self, plan: PlanLike, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> DistributedPlan:
        """Connect at the first plan, compare the ranks at every one."""
        device = device_of(inputs)
        board = self._joined(device)
        self._plans += 1
        agree(board, self._plans, plan, weights, inputs)
        if self._links is None:
            self._links = Collectives(*self._connected(device, board), board)
        code = RankProgram.of(specialize(plan.graph, board.rank), board.rank)
        sessions = Sessions(self._links, code.sites, device)
        watch = Watch(self._links, plan.program.input_paths, inputs, device)
        return DistributedPlan(self, self._links, Bound.of(code, plan.program, device), sessions, watch)

    def begin(self, device: torch.device) -> None:
        """Meet the other ranks at the first call, so that they hear of what fails from here on."""
        if self.ended:
            raise RuntimeError(f"the ranks cannot go on after an earlier call: {self.ended}")
        self._calls += 1
        self._joined(device).call = self._calls

    def failed(self, error: BaseException) -> None:
        """Tell the others, also what this rank heard from another: not every rank waits for the one that is gone."""
        if self._board and not isinstance(error, DisagreementError):
            self._board.publish(error)

    def broke(self, error: BaseException, advice: str = "call fxpass.parallelize again on every rank") -> None:
        """A call failed between its first and its last exchange: what other ranks have in flight is unknown."""
        said = str(error).strip().splitlines() or [type(error).__name__]  # another rank's comes with its traceback
        self.ended = f"{' … '.join([said[0], said[-1]] if len(said) > 1 else said)}; {advice}"

    def close(self) -> None:
        self._links = None
        if self._board:
            self._board.doubt = None
        self.ended = self.ended or "it was closed"

    def _joined(self, device: torch.device) -> Board:
        """The board that all ranks share. Makes the default process group if there is none."""
        if self._board is None:
            if not dist.is_initialized():
                self._initialize("nccl" if device.type == "cuda" else "gloo")
            store = dist.PrefixStore(self._name, dist.distributed_c10d._get_default_store())
            rank = dist.get_rank(self._group)
            self._board = Board(store, rank, self.world_size, self.timeout)
        return self._board

    def _initialize(self, backend: str) -> None:
        """Make the default process group, from torchrun's environment."""
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=self.timeout))
        except dist.DistError as error:
            apart = RankError(
                None,
                f"rank {os.environ['RANK']} did not meet the other processes ({error}); each rank must make its first "
                f"call of a parallel module within {self.timeout:g} s of the others",
            )
            # torch counts attempts: a second one here would not meet the first one of the others
            self.broke(apart, "start all processes again")
            raise apart from error

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
        group, urgent = (
            board.watched(lambda store=store: dist.ProcessGroupGloo(store, board.rank, board.world, timeout))
            for store in stores
        )
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
        if self.executor.ended:
            return
        try:
            self.watch.close()
            self.sessions.close()
        except RankError as error:
            self.executor.broke(error)
