"""The executor of one rank: every rank runs the user's script (torchrun or an initialised process group)."""

from __future__ import annotations

import copy
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ir.advice import TORCHRUN, joined
from ..ir.step import Step
from .agreement import CallCheck, agree
from .board import Board
from .errors import DisagreementError, RankError
from .executor import Compile, PlanLike, Question, Report, compilers, device_of
from .first_rank import FirstRank
from .groups import connect
from .held import NOTHING, Held, Holding
from .network import Network
from .rank_steps import RankSteps, on_device, steps_of
from .sent_weights import difference, listed, send, slots_of

#: executors made by this process, by their member ranks; all members make them in the same order
_counts: Counter[tuple[int, ...]] = Counter()
_counting = threading.Lock()


def inside() -> bool:
    """Whether this process is one of several: a process group is initialised, or torchrun's environment is set."""
    return dist.is_available() and (dist.is_initialized() or os.environ.keys() >= TORCHRUN)


def size_of_world(group: Any = None) -> int:
    """The number of ranks, if `inside()`."""
    return dist.get_world_size(group) if dist.is_initialized() else int(os.environ["WORLD_SIZE"])


@dataclass
class _Ranks:
    """What the executors of several modules share: the ranks meet, and connect, once for all of them."""

    users: int = 1
    board: Board | None = None
    network: Network | None = None
    first: FirstRank | None = None
    plans: int = 0
    ended: str | None = None  #: why this rank can make no further call


class DistributedExecutor:
    """Runs this process's rank of `group` (default: all processes).

    Initialises the default process group from torchrun's environment if needed: gloo for models on the CPU, NCCL on
    CUDA. The exchanges use process groups of their own, with a timeout of `timeout` seconds.

    Raises:
        RuntimeError: the process is not one of several.
        ValueError: the group has another size than `world_size`.
    """

    def __init__(
        self,
        world_size: int,
        *,
        group: Any = None,
        timeout: float = 600.0,
        compile: Compile = False,  # noqa: A002
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
        #: whether this process is rank 0
        self.first = ranks[0] == (dist.get_rank() if dist.is_initialized() else int(os.environ["RANK"]))
        joined(first=self.first)
        with _counting:
            _counts[ranks] += 1
            self._name = f"fxpass/{'.'.join(map(str, ranks))}/{_counts[ranks]}"
        self.world_size = world_size
        self.timeout = timeout
        self.compile: Compile = compile
        self._group = group
        self._ranks = _Ranks()
        self._closed = False
        self.traffic: Counter[str] = Counter()
        self.held = Held()

    def share(self) -> DistributedExecutor:
        """Another executor with the same connections."""
        other = copy.copy(self)
        other.traffic, other.held = Counter(), Held()
        self._ranks.users += 1
        return other

    @property
    def ended(self) -> str | None:
        """Why this rank can make no further call."""
        return self._ranks.ended or ("it was closed" if self._closed else None)

    def load(self, plan: PlanLike, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> DistributedPlan:
        """Load a plan; compare it with the other ranks first. The first plan connects the ranks."""
        device = device_of(inputs)
        inductor, graph = compilers(self.compile, device)
        board = self._join(device)
        self._ranks.plans += 1
        number, paths = self._ranks.plans, plan.program.input_paths
        options = {"exact steps": str(plan.exact_steps), "way to compile": str(self.compile)}
        with self._breaking(_is_of_one_call):
            agree(board, number, plan, weights, inputs, options)
        network = self._connected(board, device)
        check = CallCheck(network, number, paths, device, self.traffic)
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        steps = steps_of(plan, network, device, self.traffic, compile=inductor, graph=graph, sharing=sharing)
        return DistributedPlan(self, steps, check)

    def forget(self, numbers: Sequence[int]) -> None:
        self.held.forget(numbers)

    def begin(self, device: torch.device) -> None:
        """Begin a call. The first one meets the other ranks, so that they hear of any later failure."""
        self._refuse_ended()
        self._join(device).call += 1

    def on_first(
        self, what: str, arguments: Mapping[str, Any], compute: Callable[[], Any], device: torch.device
    ) -> Any:
        """What `compute` returns on rank 0, on every rank: a call that the others do not make.

        Args:
            what: the part that is called, and
            arguments: with which values: they are compared.
            device: where this rank wants tensors that rank 0 has on a GPU.

        Raises:
            DisagreementError: on every rank, if one calls another part or with other values.
            RankError: rank 0 failed; or another rank did, or did not come.
            TypeError: on rank 0, if the result cannot be sent.
        """
        self._refuse_ended()
        board = self._join(device, mixed=True)
        board.call += 1
        self._ranks.first = first = self._ranks.first or FirstRank(board)
        with self._breaking():
            first.meet(what, arguments)
        if board.rank == 0:
            value = compute()
            with self._breaking(lambda error: isinstance(error, TypeError)):
                first.send(what, value)
            return value
        with self._breaking(lambda error: isinstance(error, RankError) and error.rank == 0):
            receive = first.awaited(what)
        with self._breaking():
            return receive(device)

    def send_weights(self, models: Mapping[str, nn.Module]) -> None:
        """Give all ranks the weights that rank 0 has, in place of theirs.

        Raises:
            DisagreementError: on every rank, if one has other weights, or they are not plain tensors.
            RankError: a rank failed, or did not come.
        """
        here = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        try:
            board = self._join(here, mixed=True)
            board.call += 1
            slots = slots_of(models)
            with self._breaking():
                texts = board.all_gather("weights", json.dumps(listed(slots)), "the other ranks to call parallelize")
                listings = [json.loads(text) for text in texts]
                if why := difference(listings):
                    raise DisagreementError(why)
                what = "the weights of rank 0"
                if all(kind[2] == "cpu" for kind in listings[0].values()):
                    # later calls may be on GPUs: how ranks connect is left to the first of them
                    self._ranks.first = first = self._ranks.first or FirstRank(board)
                    with torch.no_grad():
                        send(slots, listings, board.rank, here, lambda tensor: first.broadcast(tensor, what))
                    return
                network = self._connected(board, here)
                with torch.no_grad(), on_device(here):
                    send(slots, listings, board.rank, here, lambda tensor: network.broadcast(tensor, here, what))
                    network.settle(here)
        except BaseException as error:
            self.failed(error)
            raise

    @contextmanager
    def _breaking(self, harmless: Callable[[BaseException], bool] = lambda error: False) -> Iterator[None]:
        """If the body raises, refuse later calls.

        Args:
            harmless: of an error, whether all ranks have raised, and no message is in flight. A disagreement is.
        """
        try:
            yield
        except BaseException as error:
            if not isinstance(error, DisagreementError) and not harmless(error):
                self.broke(error)
            raise

    def failed(self, error: BaseException) -> None:
        """Tell the other ranks, also of a failure heard from one: not all of them wait for the rank that failed."""
        if self._ranks.board and not isinstance(error, DisagreementError):
            self._ranks.board.publish(error)

    def broke(self, error: BaseException, advice: str = "call fxpass.parallelize again on every rank") -> None:
        """Refuse later calls: this one failed between its first and last exchange, with messages in flight."""
        lines = str(error).strip().splitlines() or [type(error).__name__]  # another rank's error has its traceback
        self._ranks.ended = f"{' … '.join([lines[0], lines[-1]] if len(lines) > 1 else lines)}; {advice}"
        if self._ranks.board:
            self._ranks.board.close()
        for each in (self._ranks.network, self._ranks.first):
            if each:
                each.abort(error)

    def close(self) -> None:
        """Leave the connections. They end when no other executor uses them."""
        if self._closed:
            return
        self._closed = True
        self._ranks.users -= 1
        if not self._ranks.users:
            self._ranks.network = None
            if self._ranks.board:
                self._ranks.board.close()

    def _connected(self, board: Board, device: torch.device) -> Network:
        if self._ranks.network is None:
            nccl = "nccl" in str(dist.get_backend_config(self._group))
            # its groups are not registered with torch, which names groups by how many each process has made
            self._ranks.network = connect(board, device, nccl=nccl, registered=self._group or dist.group.WORLD)
        return self._ranks.network

    def _refuse_ended(self) -> None:
        if self.ended:
            raise RuntimeError(f"the ranks cannot go on after an earlier call: {self.ended}")

    def _join(self, device: torch.device, *, mixed: bool = False) -> Board:
        """The board that all ranks share; initialises the default process group if needed.

        Args:
            mixed: later calls may be on another device, and on other ranks this one may be.
        """
        if self._ranks.board is None:
            if not dist.is_initialized():
                both = mixed and torch.cuda.is_available()
                self._initialize("cpu:gloo,cuda:nccl" if both else "nccl" if device.type == "cuda" else "gloo")
            store = dist.PrefixStore(self._name, dist.distributed_c10d._get_default_store())
            rank = dist.get_rank(self._group)
            self._ranks.board = Board(store, rank, self.world_size, self.timeout)
        return self._ranks.board

    def _initialize(self, backend: str) -> None:
        """Initialise the default process group from torchrun's environment."""
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=self.timeout))
        except dist.DistError as error:
            apart = RankError(
                None,
                f"rank {os.environ['RANK']} did not meet the other processes ({error}); each rank must make its first "
                f"call of a parallel module within {self.timeout:g} s of the others",
            )
            # torch numbers the attempts: a second one here would not meet the first one of another rank
            self.broke(apart, "start all processes again")
            raise apart from error


def _is_of_one_call(error: BaseException) -> bool:
    """Whether an error ends a call on all ranks: a rank has failed, and said so."""
    return isinstance(error, RankError) and error.rank is not None and not error.hangs


class DistributedPlan:
    """A plan loaded on this rank."""

    def __init__(
        self,
        executor: DistributedExecutor,
        steps: RankSteps,
        check: CallCheck,
    ) -> None:
        self.executor = executor
        self.steps = steps
        self.check = check

    def decide(self, inputs: Sequence[Tensor], question: Question) -> Step:
        try:
            with on_device(self.steps.device):
                return self.check.decide(inputs, question)
        except DisagreementError:  # on every rank, before any exchange
            raise
        except BaseException as error:
            self.executor.broke(error)
            raise

    def run(
        self, weights: Sequence[Tensor], inputs: Sequence[Tensor], step: Step, holding: Holding = NOTHING
    ) -> list[Tensor]:
        """The flat outputs, the same on every rank.

        Raises:
            RankError: another rank failed, ended, or did not answer in time.
        """
        try:
            mode, held = self.steps.mode(step), self.executor.held
            return self.steps.run(weights, inputs, step.context, mode, step.pace, held, holding)[0]
        except BaseException as error:
            self.executor.broke(error)
            raise

    @property
    def compiled(self) -> Sequence[Report]:
        return self.steps.runners[0].reports

    def release(self) -> None:
        self.steps.forget_graphs()
        if self.executor.ended:
            return
        try:
            self.check.close()
            self.steps.close()
        except RankError as error:
            self.executor.broke(error)
